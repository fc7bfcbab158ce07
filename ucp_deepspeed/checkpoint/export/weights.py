"""The weights of a checkpoint under the model's names: which state is written, in which type, and what is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Parameter
from ucp_deepspeed.checkpoint.deepspeed.files import ENGINE_KEYS
from ucp_deepspeed.checkpoint.output import Region, StoredTensor
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, MismatchError, UnsupportedError
from ucp_deepspeed.language.schemes import plain_names

WeightsSource = Literal["master", "weights"]
"""The fp32 master weights, or the weights that the model computes with: these rounded to the run's precision."""

DTYPES: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
"""Types that can be asked for → their names in `ucp_deepspeed.dtypes`."""

_FLOATS = frozenset(("F64", "F32", "F16", "BF16"))


@dataclass(frozen=True)
class Weights:
    """Weights to write.

    Attributes:
        tensors: parameters and buffers, by the model's names.
        tied: further names of tied parameters → the name that each has in ``tensors``.
    """

    tensors: Mapping[str, StoredTensor]
    tied: Mapping[str, str]


def check_range(view: UniversalView, tensors: Mapping[str, StoredTensor], read: Callable[[str], torch.Tensor]) -> None:
    """Check that fp16 could hold the numbers of wider types.

    Args:
        read: returns a tensor as it was written.

    Raises:
        UnsupportedError: it couldn't; lists the tensors.
    """
    problems: list[str] = []
    for name, tensor in tensors.items():
        region = tensor.regions[0]
        narrower = region.dtype == "F16" and view.parameters[region.name].states[region.state] != "F16"
        if narrower and (infinite := int(torch.isinf(read(name)).sum())):
            problems.append(f"{name}: {infinite} of {prod(tensor.shape)} numbers")
    if problems:
        told = f"{view.checkpoint.path} holds numbers above 65504, the largest of fp16, or infinite ones"
        raise UnsupportedError(told, problems, "export in another type: --dtype bf16 or --dtype fp32")


@dataclass(frozen=True)
class Choice:
    """The choice of numbers to write.

    Attributes:
        dtype: key of `DTYPES` for all floating-point numbers; by default the type that each parameter has in the source.
        source: by default the weights, and with a ``dtype`` the masters, which are then rounded once.
    """

    dtype: str | None = None
    source: WeightsSource | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)} (found {self.dtype!r})")
        if self.source not in (None, "master", "weights"):
            raise ConfigError(f"source: expected master or weights (found {self.source!r})")

    def dtype_of(self, parameter: Parameter, precision: str) -> str:
        """Return the type in which a parameter is written.

        Raises:
            ConfigError: weights are asked for in another type than they have.
        """
        held, wanted = parameter.states[state_of(parameter)], None if self.dtype is None else DTYPES[self.dtype]
        if held not in _FLOATS:
            return held
        source = self.source or ("weights" if wanted is None else "master")
        if source == "weights" and parameter.kind == "trainable":
            here = DTYPES[precision]
            if wanted not in (None, here):
                raise ConfigError(
                    f"the weights of this run are {precision}: {self.dtype} is written from the masters; leave the source out"
                )
            return here
        return wanted or held


def state_of(parameter: Parameter) -> str:
    """Return the state that holds a parameter's weight."""
    return MASTER if MASTER in parameter.states else WEIGHT


def model_names(view: UniversalView) -> dict[str, str]:
    """Return the model's own name of each parameter, buffer and further name of a tied one: without the parts of wrappers."""
    return plain_names([*view.parameters, *view.tied])


def weights_of(view: UniversalView, choice: Choice, names: Mapping[str, str]) -> Weights:
    """Return the weights under their names in the output.

    Args:
        names: names in the view → names in the output; others are left out.

    Raises:
        MismatchError: the masters are asked for, and there are none.
        UnsupportedError: the values of some can't be read.
        ConfigError: see `Choice.dtype_of`.
    """
    if choice.source == "master" and view.checkpoint.lacking is not None and view.checkpoint.run.precision != "fp32":
        raise MismatchError(f"{view.checkpoint.lacking.heading}; without the source the weights are exported")
    unread: list[str] = []
    tensors: dict[str, StoredTensor] = {}
    for name, parameter in view.parameters.items():
        if name not in names:
            continue
        state = state_of(parameter)
        if state not in parameter.states:
            unread.append(f"{name}: {parameter.refused.get(state, 'no weight')}")
            continue
        dtype = choice.dtype_of(parameter, view.checkpoint.run.precision)
        tensors[names[name]] = StoredTensor.of(Region.whole(view, name, state, dtype))
    if unread:
        raise UnsupportedError(f"{view.checkpoint.path} holds weights that can't be read", unread)
    tied = {names[alias]: names[owner] for alias, owner in view.tied.items() if alias in names and owner in names}
    return Weights(tensors, tied)


def check_complete(view: UniversalView) -> None:
    """Check that the checkpoint has each parameter of its model.

    Raises:
        MismatchError: it has no value of some.
    """
    checkpoint = view.checkpoint
    if lacking := [f"{name}: {why}" for name, why in {**checkpoint.unrecorded, **checkpoint.excluded}.items()]:
        hint = "save without exclude_frozen_parameters, or export the adapter of a LoRA run alone: --adapter"
        raise MismatchError(f"{checkpoint.path} has no value of some parameters", lacking, hint)


def left_out(view: UniversalView) -> list[str]:
    """Return what a checkpoint holds beside weights, in words: no form of weights alone keeps it."""
    return list(_left_out(view))


def _left_out(view: UniversalView) -> Iterator[str]:
    checkpoint = view.checkpoint
    states = {state for each in view.parameters.values() for state in each.states} - {MASTER, WEIGHT}
    scalars = {name for each in view.parameters.values() for name in each.scalars}
    if states | scalars:
        yield f"optimizer states ({', '.join(sorted(states | scalars))})"
    if view.groups:
        yield "hyper-parameters"
    yield "counters of steps and samples"
    if checkpoint.run.lr_scheduler is not None:
        yield "the scheduler"
    if checkpoint.run.loss_scale is not None:
        yield "the loss scale"
    keys = [str(key) for key in checkpoint.client_state()[1] if key not in ENGINE_KEYS]
    if keys := keys + list(checkpoint.unreadable()):
        yield f"the client state ({', '.join(sorted(keys))})"
    if any(checkpoint.extra_states()):
        yield "extra states of modules"
    yield "states of random numbers"
