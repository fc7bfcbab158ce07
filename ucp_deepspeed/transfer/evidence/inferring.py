"""Make a first spec for a checkpoint: from its records, else by comparison with one of a single rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.view import held_shapes, layouts_of, parameter_names
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language.inference import (
    Guess,
    fused_candidates,
    fused_comment,
    guess_from_shapes,
    padded_candidates,
)
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.layout import Partial, Replicate, Scale, Shape, Shard
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.transfer.evidence.held_values import (
    HeldValues,
    Joined,
    Progress,
    SingleRank,
    of_first_stage,
    passing,
)

SCALE_COMMENT = "each rank holds the value divided by their number; give powers for the optimizer's states, too"
PARTIAL_COMMENT = "all ranks hold the whole shape with different values: partial, if each rank updates its own"


def infer_from_record(checkpoint: Checkpoint) -> dict[str, Guess]:
    """Return what the manifest or the index says, by logical name; raise a SpecError if it lacks some parameter."""
    names = parameter_names(checkpoint)
    missing = [name for name in names if name not in checkpoint.patterns]
    if missing:
        raise SpecError(
            f"{checkpoint.path} doesn't record how {len(missing)} parameters are cut; compare it with a checkpoint of the same "
            f"model without tensor parallelism (--single-rank), or read the attributes of the model (--model). Not recorded are",
            missing,
        )
    return {checkpoint.logical_names.get(name, name): Guess(checkpoint.patterns[name]) for name in names}


def infer_by_comparison(
    checkpoint: Checkpoint, whole: Checkpoint, progress: Progress = lambda done, total: None
) -> dict[str, Guess]:
    """Return what local and global shapes tell; and values, where both checkpoints have the same state.

    Raises:
        MismatchError: the second checkpoint has several tensor-parallel ranks, or lacks a parameter.
    """
    if checkpoint.topology.tp == 1:
        raise MismatchError(f"{checkpoint.path} is of one tensor-parallel rank: nothing is cut there")
    beside = SingleRank(checkpoint, whole)
    names = parameter_names(checkpoint)
    missing = [name for name in names if name not in whole.parameters]
    if missing:
        raise MismatchError(f"{whole.path} isn't of the same model: these parameters are missing there", missing)
    held = {name: checkpoint.parameters[name] for name in names}
    found = {name: _of_parameter(beside, name) for name in passing(held, progress)}
    same_state = any(
        each is not None and each.same and each.told for _, by_pattern in found.values() for each in by_pattern.values()
    )
    return {
        checkpoint.logical_names.get(name, name): _decided(checkpoint, name, guess, by_pattern, same_state)
        for name, (guess, by_pattern) in found.items()
    }


ByPattern = Mapping[Pattern, Joined | None]
"""Patterns that the shapes allow, each with the comparison when joined by it; the guess from shapes is first."""


def _of_parameter(beside: SingleRank, name: str) -> tuple[Guess, ByPattern]:
    """Return the guess from shapes, and the candidates."""
    local_shapes, logical_shape = held_shapes(beside.checkpoint, {name: LogicalName(name)})[name], beside.shape(name)
    assert logical_shape is not None
    guess = guess_from_shapes(local_shapes, logical_shape)
    sizes = beside.checkpoint.vocabulary_size, beside.whole.vocabulary_size
    size = next((each for each in sizes if each is not None), None)
    candidates = _candidates(guess.pattern, local_shapes, logical_shape)
    return guess, {pattern: beside.joins_to(name, pattern, size) for pattern in candidates}


def _candidates(guess: Pattern | None, local_shapes: Sequence[Shape], logical_shape: Shape) -> tuple[Pattern, ...]:
    """Return the patterns that the shapes allow, the guess first."""
    if isinstance(guess, Replicate):
        return (Replicate(), Replicate(scale=Scale()))
    if guess is None or (isinstance(guess, Shard) and guess.vocabulary):
        return padded_candidates(local_shapes, logical_shape)
    if isinstance(guess, Shard):
        return (guess, *fused_candidates(guess, local_shapes, logical_shape))
    return (guess,)


def _decided(checkpoint: Checkpoint, name: str, guess: Guess, by_pattern: ByPattern, same_state: bool) -> Guess:
    """Return the guess from shapes, corrected by values."""
    agreeing = [pattern for pattern, joined in by_pattern.items() if joined is not None and joined.same]
    if isinstance(guess.pattern, Replicate):
        parameter, degree = checkpoint.parameters[name], checkpoint.topology.tp
        layout = layouts_of({name: Replicate()}, {name: parameter.local_shapes}, degree, None, "the checkpoint")[name]
        with HeldValues(checkpoint) as ranks:
            if not ranks.equal(parameter, of_first_stage(layout, degree)):
                return Guess(Partial(), (PARTIAL_COMMENT,))
        if same_state and agreeing[:1] == [Replicate(scale=Scale())]:
            return Guess(agreeing[0], (SCALE_COMMENT,))
        return guess
    told = [joined for joined in by_pattern.values() if joined is not None and joined.told]
    if same_state and told:  # one repeated number comes out the same by several patterns
        if len(agreeing) == 1:
            return guess if guess.pattern == agreeing[0] else Guess(agreeing[0])
        if not agreeing:
            return Guess(None, (_disagreement(by_pattern),))
    if guess.pattern is None or len(by_pattern) < 2:
        return guess
    shards = [pattern for pattern in by_pattern if isinstance(pattern, Shard) and pattern != guess.pattern]
    return Guess(guess.pattern, (fused_comment(shards),))


def _disagreement(by_pattern: ByPattern) -> str:
    """Return the comment for a parameter where no pattern gives the values of the single rank."""
    for pattern, joined in by_pattern.items():
        if isinstance(pattern, Shard) and pattern.vocabulary and joined is not None and joined.padded:
            rows = f"only the first {joined.equal} of {joined.rows} rows are those of the single rank"
            return f"as a vocabulary, {rows}: it is one if the rest is padding"
    return "no known way to join the ranks' values gives those of the single rank"
