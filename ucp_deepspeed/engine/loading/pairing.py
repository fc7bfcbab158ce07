"""Match the checkpoint's parameters with the live model's; see `ucp_deepspeed.transfer.planning.policies`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.retied import RetiedCheckpoint, copies_wanted
from ucp_deepspeed.checkpoint.view import names_of, parameter_names
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import logical_names, naming_specs
from ucp_deepspeed.language.wrappers import seen_through
from ucp_deepspeed.transfer.planning.policies import (
    Matching,
    Policies,
    check_any,
    check_matching,
    check_recorded,
    match,
    renaming_hint,
)
from ucp_deepspeed.transfer.ties import differing_ties

logger = logging.getLogger("ucp_deepspeed")


@dataclass(frozen=True)
class Names:
    """Logical names of the checkpoint's and the model's parameters and buffers, by the names that each side has for them."""

    source: Mapping[str, str]
    target: Mapping[str, str]


def policies_of(config: UniversalCheckpointConfig, restore: bool, strict: bool) -> Policies:
    """Return the policies that the config and a call of ``engine.load_checkpoint`` make together.

    A call without states that isn't strict begins a run from another model's weights: it takes what matches.

    Args:
        restore: whether the call asks for optimizer states at all, and the engine keeps any.
        strict: its ``load_module_strict``.
    """
    states = config.optimizer_states if restore else "keep"
    warm = not restore and not strict
    initialise, drop = warm or config.on_missing == "init", warm or config.on_extra == "drop"
    return Policies(initialise, drop, states, strict, differing=config.on_differing)


def match_names(checkpoint: Checkpoint, model: EngineModel) -> Names:
    """Translate the names of both sides by the same specs.

    The checkpoint's recorded names are used for the model only where no spec names anything: a layer may have another number
    there. Names that differ by wrappers alone are the same.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one.
    """
    source, target = _translated(checkpoint, model)
    return Names(source | _tied_otherwise(checkpoint, model, source, target), target)


def _translated(checkpoint: Checkpoint, model: EngineModel) -> tuple[dict[str, str], dict[str, str]]:
    """Return logical names of both sides; they include further names of tied parameters where these have other logical names."""
    specs = naming_specs(model.spec, parameter_names(checkpoint), model.named("trainable", "frozen"))
    recorded, held = checkpoint.logical_names, list(model.tensors)
    target = logical_names(held, specs)
    if all(name == logical for name, logical in target.items()):
        target = logical_names(held, specs, recorded)
    source = names_of(checkpoint, specs)
    wrapped = seen_through(source.values(), [*target.values(), *(name for name in model.tied if name not in target)])
    return {name: wrapped.get(logical, logical) for name, logical in source.items()}, target


def _tied_otherwise(
    checkpoint: Checkpoint, model: EngineModel, source: Mapping[str, str], target: Mapping[str, str]
) -> dict[str, str]:
    """Return, for tied parameters that the model has under another of their names, that name: its modules stand in another
    order."""
    wanted, held = frozenset(target.values()), {source[name]: name for name in checkpoint.parameters}
    renamed = {
        owner: source[alias]
        for alias, owner in checkpoint.tied.items()
        if source.get(alias) in wanted and owner in source and source[owner] not in wanted
    }
    of_model = {
        held[alias]: target[owner]
        for alias, owner in model.tied.items()
        if alias in held and alias not in wanted and target[owner] not in held
    }
    return of_model | renamed


def in_ties_of(checkpoint: Checkpoint, model: EngineModel, share: tuple[int, int]) -> Checkpoint:
    """Return the checkpoint with copies of tied parameters that the model keeps apart, and one of each that the model ties.

    Args:
        share: see `differing_ties`.

    Raises:
        SpecError: see `match_names`.
        MismatchError: lists parameters that the model ties and that have different values in the checkpoint.
    """
    if not checkpoint.tied and not model.tied:
        return checkpoint
    source, target = _translated(checkpoint, model)
    wanted = set(target.values())
    copies = copies_wanted(checkpoint, {name for name, logical in source.items() if logical in wanted})
    held = {source[name]: name for name in checkpoint.parameters}
    joined = {
        held[alias]: held[target[owner]]
        for alias, owner in model.tied.items()
        if alias in held and alias not in wanted and target[owner] in held
    }
    if problems := differing_ties(checkpoint, joined, share):
        raise MismatchError(f"{checkpoint.path} and the model tie different parameters", problems)
    return RetiedCheckpoint(checkpoint, copies, joined) if copies or joined else checkpoint


def match_model(checkpoint: Checkpoint, model: EngineModel, names: Names, policies: Policies) -> Matching:
    """Pair both sides' parameters and buffers.

    Raises:
        MismatchError: lists every parameter that is missing, extra or of another kind, where no policy allows it.
    """
    source = {names.source[name]: parameter for name, parameter in checkpoint.parameters.items()}
    target = {names.target[name]: tensor for name, tensor in model.tensors.items()}
    unrecorded = {name: why for name, why in checkpoint.unrecorded.items() if name in model.tensors}
    check_recorded(unrecorded, policies, f"{checkpoint.path}")
    check_matching(source, target, policies, f"{checkpoint.path} and the model have different parameters")
    matching = match(source, target)
    if matching.initialised and matching.dropped and (hint := renaming_hint(source, target)) and dist.get_rank() == 0:
        logger.warning("of what is left out, and what keeps the model's values: %s", hint)
    if not policies.reshape:  # this policy is for a function of the user's own that fills what doesn't match
        check_any(source, target, matching, policies, f"{checkpoint.path}")
    return matching
