"""Which parameter of the checkpoint belongs to which of the model, and what happens to those that differ.

Everything that isn't a plain restore is an error, unless the config or an argument of the load allows it by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from ucp_deepspeed.checkpoint import Checkpoint, Parameter
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes
from ucp_deepspeed.checkpoint.view import parameter_names
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.model import EngineModel, EngineTensor
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import logical_names, naming_specs
from ucp_deepspeed.layout import Shape


@dataclass(frozen=True)
class Names:
    """Logical names of the checkpoint's and the model's parameters and buffers, by the names that each side has for them."""

    source: Mapping[str, str]
    target: Mapping[str, str]


@dataclass(frozen=True)
class Policies:
    """What a load may do beside restoring. Made of the config and of the arguments of ``engine.load_checkpoint``.

    Attributes:
        initialise: a trained parameter, or a part of one, that the checkpoint lacks keeps the model's value, with zero state.
        drop: a trained parameter or an optimizer state that the model has no place for is left out.
        optimizer_states: ``restore`` them; ``keep`` the live ones; ``reset`` them to zero, as before a first step.
        strict: frozen parameters and buffers must be the same on both sides too.
        reshape: parameters of another shape keep the model's value.
        rounded: masters begin as the source's low-precision weights (``zero_optimization.load_from_fp32_weights: false``).
    """

    initialise: bool = False
    drop: bool = False
    optimizer_states: Literal["restore", "keep", "reset"] = "restore"
    strict: bool = True
    reshape: bool = False
    rounded: bool = False

    @classmethod
    def of(cls, config: UniversalCheckpointConfig, restore: bool, strict: bool) -> Policies:
        """Args: restore: whether the call asks for optimizer states at all."""
        states: Literal["restore", "keep", "reset"] = config.optimizer_states if restore else "keep"
        return cls(config.on_missing == "init", config.on_extra == "drop", states, strict)


@dataclass(frozen=True)
class Matching:
    """The outcome, by logical name.

    Attributes:
        names: of both sides.
        restored: parameters and buffers on both sides.
        initialised: those that only the model has; they keep its values.
        dropped: those that only the checkpoint has.
        unfrozen: trained in the model and not in the checkpoint: the weight is restored, the optimizer state starts at zero.
        frozen: trained in the checkpoint and not in the model: the master weight is restored, the optimizer state is dropped.
    """

    names: Names
    restored: frozenset[str]
    initialised: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    unfrozen: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()


def match_names(checkpoint: Checkpoint, model: EngineModel) -> Names:
    """Translate the names of both sides by the same specs.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one.
    """
    specs = naming_specs(model.spec, parameter_names(checkpoint), model.named("trainable", "frozen"))
    recorded = checkpoint.logical_names
    return Names(
        logical_names(list(checkpoint.parameters), specs, recorded), logical_names(list(model.tensors), specs, recorded)
    )


def match(checkpoint: Checkpoint, model: EngineModel, policies: Policies) -> Matching:
    """Pair both sides' parameters and buffers.

    Raises:
        MismatchError: lists every parameter that is missing, extra or of another kind, where no policy allows it.
        SpecError: see `match_names`.
    """
    names = match_names(checkpoint, model)
    source = {names.source[name]: parameter for name, parameter in checkpoint.parameters.items()}
    target = {names.target[name]: tensor for name, tensor in model.tensors.items()}
    problems = [
        problem
        for name in sorted(source.keys() | target.keys())
        for problem in _problems(name, source, target, policies)
    ]
    if problems:
        raise MismatchError(f"{checkpoint.path} and the model have different parameters", problems)
    both = [name for name in target if name in source]
    return Matching(
        names,
        frozenset(both),
        tuple(name for name in target if name not in source),
        tuple(name for name in source if name not in target),
        tuple(name for name in both if target[name].kind == "trainable" != source[name].kind),
        tuple(name for name in both if source[name].kind == "trainable" != target[name].kind),
    )


def _problems(
    name: str, source: Mapping[str, Parameter], target: Mapping[str, EngineTensor], policies: Policies
) -> Iterator[str]:
    """What is wrong with one name; nothing when it is on both sides, or a policy allows that it isn't."""
    if name not in source:
        live = target[name]
        if not (policies.initialise or (live.kind != "trainable" and not policies.strict)):
            yield f"{name}: missing in the checkpoint; the model expects {some_shape(live.local_shapes)}"
    elif name not in target:
        saved = source[name]
        if not (policies.drop or (saved.kind != "trainable" and not policies.strict)):
            yield f"{name}: extra in the checkpoint ({saved.kind}, {some_shape(saved.local_shapes)})"
    else:
        kinds = source[name].kind, target[name].kind
        unfrozen, frozen = kinds == ("frozen", "trainable"), kinds == ("trainable", "frozen")
        if kinds[0] != kinds[1] and not (unfrozen and policies.initialise) and not (frozen and policies.drop):
            yield f"{name}: {kinds[0]} in the checkpoint, {kinds[1]} in the model{_hint(unfrozen, frozen)}"


def _hint(unfrozen: bool, frozen: bool) -> str:
    if unfrozen:
        return '; "on_missing": "init" starts its optimizer state at zero'
    return '; "on_extra": "drop" leaves its optimizer state out' if frozen else ""


def some_shape(shapes: HeldShapes) -> Shape | None:
    """Local shape on the first rank that holds the parameter."""
    return next((shape for shape in shapes if shape is not None), None)
