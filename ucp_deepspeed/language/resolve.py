"""The pattern of each parameter, if several sources know something about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import gcd
from typing import TYPE_CHECKING

from ucp_deepspeed.errors import MismatchError, SpecError, UnsupportedError
from ucp_deepspeed.language.families import find_family
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.language.naming import OPTIMIZER_ONLY
from ucp_deepspeed.layout.box import Shape
from ucp_deepspeed.layout.pattern import AnyPattern, Partial, Pattern, PerRank, Replicate, Shard, ShardGrid, Unique

if TYPE_CHECKING:
    from ucp_deepspeed.language.spec import Spec


CHECK_HINT = (
    'correct the spec, which "ucp spec check PATH --against CKPT" holds against all that a checkpoint tells; with "spec": "auto" '
    "the checkpoint and the model tell what they know"
)


def resolve_patterns(
    names: Sequence[LogicalName],
    *,
    degree: int,
    spec: Spec | None = None,
    recorded: Mapping[str, Pattern] | None = None,
    inferred: Mapping[str, Pattern] | None = None,
    exact: bool = False,
    refused: Mapping[str, str] | None = None,
    local_shapes: Mapping[str, Sequence[Shape]] | None = None,
    same_degree: bool = False,
) -> dict[str, AnyPattern]:
    """Choose one pattern per parameter. The best source wins: spec, then checkpoint, then live model, then family by names.

    Args:
        names: names of the parameters, without buffers.
        degree: the larger tensor-parallel size of source and target; at 1 every unknown parameter is *unique*.
        spec: the spec that the user named.
        recorded: patterns in the checkpoint's manifest.
        inferred: patterns from the attributes of the live target's parameters.
        exact: whether the attributes tell the whole cut (AutoTP): then a plain shard has no fused parts, and a family, which is a
            guess, yields to them.
        refused: parameters whose cut can't be told, according to source or target, with the reason. Only a named spec tells it.
        local_shapes: shapes on the source's tensor-parallel ranks, to tell families apart.
        same_degree: source and target both have that size. If nothing tells the pattern, each rank's share then goes to the same
            rank, provided that all shares have the same shape.

    Raises:
        UnsupportedError: the degree changes, and there is only a guess for a parameter of ``refused``.
        SpecError: the degree changes and no source knows the parameters, or several families fit; or some parameters don't match
            exactly one rule of the spec.
        MismatchError: the winner contradicts the live parameters, or shapes contradict those that the spec states; lists them.
    """
    recorded, inferred, shapes = recorded or {}, inferred or {}, local_shapes or {}
    known: dict[str, AnyPattern] = {**inferred, **recorded}
    apart = [name for name in names if name.startswith(OPTIMIZER_ONLY)]  # no spec knows them, and nothing cuts them
    names = [name for name in names if name not in apart] if apart else names
    unknown = [name for name in names if name not in known]
    chosen: dict[str, AnyPattern]
    origin = "the checkpoint"
    if spec is not None:
        chosen, origin = {**_of_spec(names, spec, recorded, shapes)}, f"spec {spec.family!r}"
    elif degree == 1 or not unknown:
        chosen = {name: known.get(name, Unique()) for name in names}
    elif (family := _family(names, unknown, shapes, refused or {}, same_degree)) is None:
        chosen = {name: known.get(name, PerRank()) for name in names}
    else:
        chosen, origin = {**family.patterns(names)}, f"family {family.family!r}"
        chosen |= {name: live for name, live in _contradicted(chosen, inferred, exact).items() if exact}
    problems = [
        f"{name}: {origin} says {describe(chosen[name])}, the live parameter is {describe(live)}"
        for name, live in _contradicted(chosen, inferred, exact).items()
    ]
    if problems and (degree > 1 or spec is not None):
        raise MismatchError("layouts contradict the live model's parameters", problems, CHECK_HINT)
    return chosen | {name: known.get(name, Unique() if degree == 1 else Replicate()) for name in apart}


def _contradicted(chosen: Mapping[str, AnyPattern], inferred: Mapping[str, Pattern], exact: bool) -> dict[str, Pattern]:
    """Return the live parameters that contradict the chosen patterns."""
    live = {name: inferred[name] for name in chosen if name in inferred}
    return {name: each for name, each in live.items() if contradicts(chosen[name], each, exact)}


def per_rank(patterns: Mapping[str, AnyPattern]) -> list[str]:
    """Return the parameters of which each rank keeps the same rank's share, since nothing tells more."""
    return [name for name, pattern in patterns.items() if isinstance(pattern, PerRank)]


def _of_spec(
    names: Sequence[str], spec: Spec, recorded: Mapping[str, Pattern], local_shapes: Mapping[str, Sequence[Shape]]
) -> dict[str, Pattern]:
    patterns = spec.patterns(names)
    # If a parameter can't be joined at all, making layouts of the patterns finds it, with its local shapes.
    _, check = spec.check_local_shapes({name: shapes for name, shapes in local_shapes.items() if name in patterns})
    # The record is better than shapes; it is compared with the spec when the files are read.
    denied = {name: why for name, why in check.problems.items() if name not in recorded}
    if denied:
        problems = [f"{name}: {describe(patterns[name])}; {why}" for name, why in denied.items()]
        raise MismatchError(f"shapes contradict what spec {spec.family!r} states", problems, CHECK_HINT)
    return patterns


def _family(
    names: Sequence[str],
    unknown: Sequence[str],
    local_shapes: Mapping[str, Sequence[Shape]],
    refused: Mapping[str, str],
    same_degree: bool,
) -> Spec | None:
    """Find the family, which is a guess. None if it isn't good enough and shares may stay on their ranks."""
    denied = [f"{name}: {refused[name]}" for name in unknown if name in refused]
    may_stay = same_degree and all(len(set(local_shapes.get(name, ()))) <= 1 for name in unknown)
    if denied and not may_stay:
        raise UnsupportedError(
            "tensor parallelism has cut parameters in a way that this release can't tell; name a spec that says how they are "
            'laid out: "universal_checkpoint": {"spec": "path.yaml"}, or --spec on the command line',
            denied,
        )
    detection = find_family(names, local_shapes)
    if may_stay and (denied or detection.confidence in ("ambiguous", "none")):
        return None
    if detection.spec is None:
        nearest = f" (nearest is {detection.candidates[0]})" if detection.candidates[0].coverage > 0 else ""
        raise SpecError(
            f"no layout is known for {len(unknown)} parameters and no family fits{nearest}; name a spec: "
            f'"universal_checkpoint": {{"spec": "path.yaml"}}, or --spec on the command line. Without a layout are',
            unknown,
        )
    return detection.spec


def contradicts(pattern: AnyPattern, live: Pattern, exact: bool = False) -> bool:
    """Return whether a pattern contradicts a live parameter's. It may add widths to it and, if that isn't ``exact``, parts."""
    if pattern == live:
        return False
    if isinstance(pattern, Shard) and isinstance(live, Shard):
        unknown_parts = live.parts == (1,) and not exact
        return pattern.dim != live.dim or not (unknown_parts or _reduced(live.parts) == _reduced(pattern.parts))
    whole = (Replicate, Partial, Unique)
    return not (isinstance(pattern, whole) and isinstance(live, whole))


def _reduced(parts: Sequence[int]) -> tuple[int, ...]:
    return tuple(part // gcd(*parts) for part in parts)


def contradicts_record(pattern: AnyPattern, recorded: Pattern) -> bool:
    """Return whether a pattern differs from the one that was recorded when saving.

    It may add what a vocabulary is, and which heads a plain shard has: the result must still have the recorded whole shape.
    """
    if not (isinstance(pattern, Shard) and isinstance(recorded, Shard)):
        return pattern != recorded
    cuts = {(each.dim, _reduced(each.parts), each.widths) for each in (pattern, recorded)}
    if len(cuts) > 1:
        return True
    adds_heads = recorded.heads is None and recorded.parts == (1,)
    return (recorded.vocabulary and not pattern.vocabulary) or (pattern.heads != recorded.heads and not adds_heads)


def describe(pattern: AnyPattern) -> str:
    """Describe a pattern in a few words: ``shard on dimension 0 in parts 1:1``."""
    if isinstance(pattern, Replicate) and pattern.scale is not None:
        powers = ", ".join(f"{state} {power}" for state, power in sorted(pattern.scale.powers.items()))
        return f"replicate (scaled, powers {powers})"
    if isinstance(pattern, ShardGrid):
        grids = ", ".join("×".join(map(str, grid)) for grid in pattern.grids)
        return f"shard on dimensions {', '.join(map(str, pattern.dims))} in grids {grids or 'of one rank'}"
    if not isinstance(pattern, Shard):
        return pattern.pattern
    parts = f" in parts {':'.join(map(str, pattern.parts))}" if len(pattern.parts) > 1 else ""
    heads = f" with heads {':'.join(map(str, pattern.heads))}" if pattern.heads is not None else ""
    widths = f" in widths {', '.join(map(str, pattern.widths))}" if pattern.widths is not None else ""
    return f"shard on dimension {pattern.dim}{parts}{heads}{widths}" + (" (vocabulary)" if pattern.vocabulary else "")
