"""Names that differ only in their beginnings: the lines of a spec that would make them the same.

A library that renames its modules (``visual.blocks.0.weight``, then ``model.visual.blocks.0.weight``) doesn't change the ends of
the names and the shapes. Renamings that are found are checked against all names of both sides before they are told.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language.naming import Renaming, translate
from ucp_deepspeed.layout.box import Shape

MOST_LINES = 12
"""Most lines of a suggestion. More lines are no rule, but chance."""

PLACEHOLDERS = "nmkl"
"""Names for the numbers in one beginning."""


Shapes = Mapping[str, Shape | None]
"""Shapes by name."""


def suggest_renamings(source: Shapes, target: Shapes, common: Collection[str]) -> list[Renaming]:
    """Return renamings under which names that only one side has become the same; none if no rule does it.

    Args:
        source, target: names that only this side has → their shapes.
        common: names that both sides have.
    """
    if not source or not target or max(len(source), len(target)) > tunables.MOST_RENAMED:
        return []
    found = [_rules(one, other, longer) for longer in range(3) for one, other in ((source, target), (target, source))]
    sound = [rules for rules in found if rules and _holds(rules, source, target, common)]
    best = min(sound, key=len, default=[])
    return best if len(best) <= MOST_LINES else []


def as_lines(renamings: Sequence[Renaming], title: str = "renamed") -> str:
    """Write the key ``names`` of a spec file."""
    lines = [f'    - {{from: "{each.from_}", to: "{each.to}"}}' for each in renamings]
    return "\n".join(["names:", f"  {title}:", *lines])


Rule = tuple[str, str]
"""Both sides of a renaming: from, and to."""


def _rules(source: Shapes, target: Shapes, longer: int) -> list[Renaming]:
    """Find beginnings to exchange, the one that maps most names first, until no more names become one of the target's.

    Beginnings are ``longer`` by so many parts than the difference, to tell more names apart.
    """
    by_end: dict[str, list[str]] = {}
    for name in target:
        by_end.setdefault(name.rpartition(".")[2], []).append(name)
    left: dict[str, dict[Rule, str]] = {}
    for name, shape in source.items():
        others = [other for other in by_end.get(name.rpartition(".")[2], ()) if target[other] == shape]
        rules = {_exchange(name.split("."), other.split("."), longer): other for other in others}
        left[name] = {rule: other for rule, other in rules.items() if rule is not None}
    found: list[Rule] = []
    free = set(target)
    while counts := Counter(rule for rules in left.values() for rule, other in rules.items() if other in free):
        best = max(counts, key=lambda rule: (counts[rule], -len(rule[0]), rule))
        found.append(best)
        free -= {rules[best] for rules in left.values() if best in rules}
        left = {name: rules for name, rules in left.items() if best not in rules}
    return [Renaming.model_validate({"from": start, "to": end}) for start, end in found]


def _exchange(name: list[str], other: list[str], longer: int) -> Rule | None:
    """Return the rule from one name to the other: their beginnings up to the longest common end, numbers as placeholders."""
    same = 0
    while same < min(len(name), len(other)) and name[-1 - same] == other[-1 - same]:
        same += 1
    if len(name) == 1:
        return name[0], ".".join(other)
    same = max(min(same, len(name) - 1) - longer, 1)  # a beginning must remain
    beginnings = _numbered(name[: len(name) - same], other[: len(other) - same])
    return beginnings and (".".join([*beginnings[0], "**"]), ".".join([*beginnings[1], "**"]))


def _numbered(start: list[str], end: list[str]) -> tuple[list[str], list[str]] | None:
    """Replace numbers by placeholders, the same on both sides; None if the two sides have different numbers."""
    numbers = [part for part in start if part.isdecimal()]
    if numbers != [part for part in end if part.isdecimal()] or len(numbers) > len(PLACEHOLDERS):
        return None

    def with_placeholders(parts: list[str]) -> list[str]:
        names = iter(PLACEHOLDERS)
        return [f"{{{next(names)}}}" if part.isdecimal() else part for part in parts]

    return with_placeholders(start), with_placeholders(end)


def _holds(found: Sequence[Renaming], source: Shapes, target: Shapes, common: Collection[str]) -> bool:
    """Return whether the renamings make names of both sides the same, of the same shapes, and keep names that already agree."""
    scheme = tuple(found)
    try:
        left = translate([*common, *source], scheme)
        right = translate([*common, *target], scheme)
    except SpecError:
        return False
    if any(left[name] != name or right[name] != name for name in common):
        return False
    shapes = {right[name]: shape for name, shape in target.items()}
    paired = [name for name in source if left[name] in shapes]
    return bool(paired) and all(shapes[left[name]] == source[name] for name in paired)
