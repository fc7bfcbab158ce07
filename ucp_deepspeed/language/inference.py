"""A first spec from facts about a model: patterns by parameter, folded into rules; and patterns from shapes.

Comments in the written file say what shapes leave open. If nothing is certain about a parameter, it gets no rule: its globs are
written as a comment, so that the spec is refused until somebody has decided.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import prod

from ucp_deepspeed.language.spec import PATTERN
from ucp_deepspeed.layout.box import Shape
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard, ShardGrid

FUSED_PARTS = ((1, 1), (1, 1, 1), *((share, 1, 1) for share in range(2, 17)))
"""Parts that fused tensors can have: gate and up; q, k and v; up to 16 q heads for each k head."""

MOST_HEADS_FOR_ONE, MOST_HEADS_IN_ALL = 32, 128
"""Limits of q heads for each kv head, and for a single kv head. Up to these, further rows may be copies of k and v."""

_PLAIN = re.compile(r"[A-Za-z_][\w.*-]*")
"""Strings that YAML reads unchanged without quotes, considering the characters in parameter names."""


@dataclass(frozen=True, slots=True)
class Guess:
    """The pattern of one parameter, as far as it is known.

    Attributes:
        pattern: the pattern; None if nothing is certain.
        comments: open questions, in words; one line each.
    """

    pattern: Pattern | None
    comments: tuple[str, ...] = ()


def guess_from_shapes(local_shapes: Sequence[Shape], whole: Shape) -> Guess:
    """Find the pattern that leads from a whole tensor's shape to those of the tensor-parallel ranks, as far as shapes tell."""
    first, degree = local_shapes[0], len(local_shapes)
    if all(shape == whole for shape in local_shapes):
        return Guess(Replicate())
    unknown = Guess(None, (f"{list(whole)} on one rank, {_listed(local_shapes)} on {degree}: no pattern is known",))
    if any(len(shape) != len(whole) for shape in local_shapes):
        return unknown
    cut = [dim for dim in range(len(whole)) if any(shape[dim] != whole[dim] for shape in local_shapes)]
    if len(cut) > 1:
        return _guess_grid(local_shapes, whole, cut) or unknown
    dim = cut[0]
    total = sum(shape[dim] for shape in local_shapes)
    if total == whole[dim]:
        return Guess(Shard(dim))
    even = all(shape == first for shape in local_shapes)
    copies, rest = divmod(total, max(whole[dim], 1))
    if even and copies > 1 and rest == 0 and degree % copies == 0 and whole[dim] % (degree // copies) == 0:
        heads = degree // copies
        comment = (
            f"each of {heads} equal shares is held by {copies} ranks: taken for {heads} kv heads, on neighbouring ranks"
        )
        return Guess(Shard(dim, heads=(heads,)), (comment,))
    return _guess_more_rows(padded_candidates(local_shapes, whole), local_shapes, whole) or unknown


def _guess_more_rows(candidates: Sequence[Shard], local_shapes: Sequence[Shape], whole: Shape) -> Guess | None:
    """Guess if the ranks hold more rows than a single rank would. Certain only if one kind of tensor explains it."""
    if not candidates:
        return None
    held = f"{sum(shape[0] for shape in local_shapes)} rows over {len(local_shapes)} ranks, {whole[0]} on one"
    if len(whole) == 2 and all(candidate.vocabulary for candidate in candidates):
        return Guess(candidates[0], (f"{held}: taken for a vocabulary that is padded otherwise",))
    options = [
        f"q, k and v of {candidate.heads[1]} kv heads (parts {list(candidate.parts)}, heads {list(candidate.heads)})"
        if candidate.heads is not None
        else "a vocabulary that is padded otherwise"
        for candidate in candidates
    ]
    return Guess(None, (f"{held}: {', or '.join(options)}",))


def padded_candidates(local_shapes: Sequence[Shape], whole: Shape) -> tuple[Shard, ...]:
    """Return patterns with more rows than one rank has: a padded vocabulary; fused q, k, v with fewer kv heads than ranks."""
    first, degree = local_shapes[0], len(local_shapes)
    if not whole or any(shape != first for shape in local_shapes) or first[1:] != whole[1:]:
        return ()
    excess = first[0] * degree - whole[0]
    if excess <= 0:
        return ()
    found = [Shard(0, vocabulary=True)] if excess < whole[0] else []
    for copies in (each for each in range(2, degree + 1) if degree % each == 0):
        kv_rows, odd = divmod(excess, 2 * (copies - 1))  # rows of all kv heads, counted once
        q_heads_each, rest = divmod(whole[0], kv_rows) if kv_rows else (0, 1)
        q_heads_each -= 2
        kv_heads = degree // copies
        most = MOST_HEADS_IN_ALL if kv_heads == 1 else MOST_HEADS_FOR_ONE
        if odd or rest or not 1 <= q_heads_each <= most or q_heads_each * kv_heads % degree:
            continue
        fused = Shard(0, parts=(q_heads_each, 1, 1), heads=(q_heads_each * kv_heads, kv_heads, kv_heads))
        if kv_rows % kv_heads == 0 and fused.local_shapes(whole, degree) == tuple(local_shapes):
            found.append(fused)
    return tuple(found)


def _guess_grid(local_shapes: Sequence[Shape], whole: Shape, cut: Sequence[int]) -> Guess | None:
    """Guess a cut along several dimensions, if the ranks form a grid."""
    grid = tuple(-(-whole[dim] // max(local_shapes[0][dim], 1)) for dim in cut)
    if prod(grid) != len(local_shapes):
        return None
    pattern = ShardGrid(tuple(cut), (grid,))
    comment = "taken for a grid of which the last axis runs fastest over the ranks"
    return Guess(pattern, (comment,)) if _explains(pattern, local_shapes, whole) else None


def fused_candidates(pattern: Shard, local_shapes: Sequence[Shape], logical_shape: Shape) -> tuple[Shard, ...]:
    """Return shards with parts that have the same local shapes as a plain shard. Shapes can't tell them apart."""
    if pattern.parts != (1,) or pattern.heads is not None or pattern.vocabulary or len(local_shapes) < 2:
        return ()
    candidates = (Shard(pattern.dim, parts=parts) for parts in FUSED_PARTS)
    return tuple(candidate for candidate in candidates if _explains(candidate, local_shapes, logical_shape))


def _explains(pattern: Pattern, local_shapes: Sequence[Shape], whole: Shape) -> bool:
    with suppress(ValueError):
        pattern.layout(whole, local_shapes)
        return True
    return False


def fused_comment(candidates: Sequence[Shard]) -> str:
    """A comment for a plain shard that might be fused."""
    listed = [list(candidate.parts) for candidate in candidates]
    several = ", ".join(map(str, listed[:3])) + (", …" if len(listed) > 3 else "")
    return f"shapes can't tell whether this is fused (gate and up; q, k and v); if it is, add parts, one of {several}"


def generalised(name: str) -> str:
    """Return a parameter's name with ``*`` in the place of numbers: ``layers.*.weight`` for ``layers.3.weight``."""
    return ".".join("*" if part.isdecimal() else part for part in name.split("."))


def spec_text(family: str, description: str, guesses: Mapping[str, Guess], heading: Sequence[str] = ()) -> str:
    """Write a spec file in which each parameter with a known pattern matches one rule; ``heading`` is a comment on top."""
    known: dict[Guess, list[str]] = {}
    for glob, guess in _globs(guesses).items():
        known.setdefault(guess, []).append(glob)
    lines = [f"# {line}" for line in heading]
    lines += [f"family: {_scalar(family)}", f"description: {_scalar(description)}", "rules:"]
    for guess, globs in sorted(known.items(), key=lambda entry: entry[0].pattern is None):
        lines += [f"  # {comment}" for comment in guess.comments]
        if guess.pattern is not None:
            lines += _rule(globs, guess.pattern)
        else:  # somebody must still decide
            lines += ["  # - match:", *(f"  #     - {_scalar(glob)}" for glob in globs), "  #   pattern: ?"]
    return "\n".join(lines) + "\n"


def _globs(guesses: Mapping[str, Guess]) -> dict[str, Guess]:
    """Return globs for all names: numbers are left out if that makes no difference."""
    members: dict[str, list[str]] = {}
    for name in guesses:
        members.setdefault(generalised(name), []).append(name)
    found: dict[str, Guess] = {}
    for glob, names in members.items():
        alike = len({guesses[name] for name in names}) == 1
        found |= {glob: guesses[names[0]]} if alike else {name: guesses[name] for name in names}
    return found


def _rule(globs: Sequence[str], pattern: Pattern) -> list[str]:
    fields = PATTERN.dump_python(pattern, mode="json", exclude_defaults=True)
    listed = ["  - match:", *(f"      - {_scalar(glob)}" for glob in globs)]
    lines = listed if len(globs) > 1 else [f"  - match: {_scalar(globs[0])}"]
    lines.append(f"    pattern: {pattern.pattern}")
    if isinstance(pattern, Shard):
        fields = {"dim": pattern.dim} | fields
    return lines + [f"    {key}: {json.dumps(value)}" for key, value in fields.items() if key != "pattern"]


def _scalar(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else json.dumps(text, ensure_ascii=False)


def _listed(shapes: Sequence[Shape]) -> str:
    if len(set(shapes)) == 1:
        return f"{len(shapes)} × {list(shapes[0])}"
    return ", ".join(str(list(shape)) for shape in shapes)
