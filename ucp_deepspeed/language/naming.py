"""Naming schemes: renamings to logical names, for classes of model that use other names (``docs/language.md``)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property, lru_cache

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language.globs import form_of, is_blind

_PLACEHOLDER = re.compile(r"(\{[^{}]*\}|\*\*)")
_NUMBER = re.compile(r"\{\s*([a-z_]\w*)\s*\}")
MOST_SIDE_BY_SIDE = 2
"""Most numbers that stand side by side in a name. The time to share digits out among more grows fast."""

_DIGITS = r"\d{1,18}"
"""A number in a name. Longer ones count nothing."""

_SUM = re.compile(r"\{\s*([a-z_]\w*)\s*(?:([+-])\s*(\d{1,18})\s*)?\}")


class Renaming(BaseModel):
    """Names of one form, and their logical names."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    from_: str = Field(alias="from")
    to: str

    @model_validator(mode="after")
    def _check(self) -> Renaming:
        for side in (self.from_, self.to):
            if stray := set(_PLACEHOLDER.sub("", side)) & set("*{}"):
                raise ValueError(f"{' and '.join(sorted(stray))} in {side!r} stands for nothing: write '{{n}}' or '**'")
        known = {"**"} if "**" in self.from_ else set()
        for place in _PLACEHOLDER.findall(self.from_):
            number = _NUMBER.fullmatch(place)
            if place != "**" and number is None:
                raise ValueError(f"{place} in {self.from_!r} isn't a number's name in braces")
            name = number[1] if number else "**"
            if (number and name in known) or self.from_.count("**") > 1:
                raise ValueError(f"{place} stands twice in {self.from_!r}")
            known.add(name)
        if re.search(rf"(\{{[^{{}}]*\}}){{{MOST_SIDE_BY_SIDE + 1}}}", self.from_):
            raise ValueError(f"more than {MOST_SIDE_BY_SIDE} placeholders side by side in {self.from_!r}")
        for place in _PLACEHOLDER.findall(self.to):
            total = _SUM.fullmatch(place)
            if place != "**" and total is None:
                raise ValueError(f"{place} in {self.to!r} isn't a number, nor one plus or minus another")
            if (total[1] if total else place) not in known:
                raise ValueError(f"{place} in {self.to!r} doesn't stand in {self.from_!r}")
        return self

    @cached_property
    def _blind(self) -> bool:
        """Return whether matching a form is enough. It isn't with placeholders side by side: each needs a part of a number."""
        texts = _PLACEHOLDER.split(self.from_)[::2]
        return is_blind(texts) and all(texts[1:-1])

    def may_apply(self, form: str) -> bool:
        """Return whether it applies to any names of this form (`form_of`)."""
        return not self._blind or _pattern_of(self.from_).fullmatch(form) is not None

    def logical_name(self, name: str) -> str | None:
        """Return the logical name of a parameter; None if it isn't of this form, or its number would be negative."""
        found = _pattern_of(self.from_).fullmatch(name)
        if found is None:
            return None
        sums = [total for place in _PLACEHOLDER.findall(self.to) if (total := _SUM.fullmatch(place))]
        numbers = [int(found[total[1]]) + _added(total) for total in sums]
        if min(numbers, default=0) < 0:
            return None
        following = map(str, numbers)
        return _PLACEHOLDER.sub(lambda place: found["REST"] if place[0] == "**" else next(following), self.to)

    def name_behind(self, logical: str) -> str | None:
        """Return the name that becomes a logical name, with placeholders for what that doesn't tell; None if there is none."""
        found = _pattern_of(self.to).fullmatch(logical)
        if found is None:
            return None
        known = found.groupdict()
        sums = [total for piece in _PLACEHOLDER.findall(self.to) if (total := _SUM.fullmatch(piece))]
        numbers = {total[1]: int(known[total[1]]) - _added(total) for total in reversed(sums)}

        def told(place: re.Match[str]) -> str:
            number = _NUMBER.fullmatch(place[0])
            return str(numbers.get(number[1], place[0])) if number else known.get("REST", place[0])

        name = _PLACEHOLDER.sub(told, self.from_)
        return name if _PLACEHOLDER.search(name) or self.logical_name(name) == logical else None


@lru_cache(maxsize=4096)
def _pattern_of(side: str) -> re.Pattern[str]:
    """Compile one side of a renaming; what stands twice in it must be told the same only where it is ``**``."""
    pieces, seen = [], set()
    for piece in _PLACEHOLDER.split(side):
        total = _SUM.fullmatch(piece)
        group = "REST" if piece == "**" else total[1] if total else None
        if group is None:
            pieces.append(re.escape(piece))
        elif group in seen:
            pieces.append(_DIGITS if total else "(?P=REST)")
        else:
            pieces.append(rf"(?P<{group}>{_DIGITS})" if total else "(?P<REST>.+)")
            seen.add(group)
    return re.compile("".join(pieces))


def _added(total: re.Match[str]) -> int:
    return int(f"{total[2] or '+'}{total[3] or 0}")


Scheme = tuple[Renaming, ...]
"""The renamings for one class of model."""


OPTIMIZER_ONLY = "optimizer_only."
"""Prefix of the names of parameters that the optimizer has and no module."""


def optimizer_only_name(group: int, index: int) -> str:
    """Name the ``index``-th parameter of a parameter group that the optimizer has and no module."""
    return f"{OPTIMIZER_ONLY}{group}.{index}"


def translate(names: Sequence[str], scheme: Scheme) -> dict[str, str]:
    """Return the logical name of each; a name without a renaming stays as it is.

    Raises:
        SpecError: two renamings apply to a name, or two names become the same.
    """
    found: dict[str, str] = {}
    applying = {form: [each for each in scheme if each.may_apply(form)] for form in set(map(form_of, names))}
    for name in names:
        renamed = (each.logical_name(name) for each in applying[form_of(name)])
        logical = {other for other in renamed if other is not None}
        if len(logical) > 1:
            raise SpecError(f"{name} has {len(logical)} logical names: {', '.join(sorted(logical))}")
        found[name] = logical.pop() if logical else name
    return without_collisions(found)


def translate_back(names: Sequence[str], scheme: Scheme, among: Sequence[str] = ()) -> dict[str, str]:
    """Return for each logical name the name that a class of model has for it: the inverse of `translate`.

    Args:
        among: names of a model of that class, all or some. They tell what the renamings leave open.

    Raises:
        SpecError: several names become a logical name, or none does, or one becomes two; lists all such names.
    """
    found = {logical: name for name, logical in translate(among, scheme).items()}
    problems: list[str] = []
    for logical in names:
        if logical not in found:
            behind = dict.fromkeys(name for each in scheme if (name := each.name_behind(logical)) is not None)
            found[logical] = next(iter(behind), logical)
            if len(behind) > 1 or _PLACEHOLDER.search(found[logical]):
                problems.append(f"{logical}: {' or '.join(behind)}")
    if problems:
        raise SpecError("several names become these logical names; give the names of the model as 'among'", problems)
    found = without_collisions({logical: found[logical] for logical in names}, "name under the naming scheme")
    again = translate(list(found.values()), scheme)
    lost = [f"{logical}: {name} becomes {again[name]}" for logical, name in found.items() if again[name] != logical]
    if lost:
        raise SpecError("no name becomes these logical names; add a renaming to the scheme", lost)
    return found


def without_collisions(found: dict[str, str], what: str = "logical name") -> dict[str, str]:
    """Return names with their other names, as given; ``what`` is the word for these in the message.

    Raises:
        SpecError: two have the same.
    """
    owners: dict[str, str] = {}
    for name, other in found.items():
        if owners.setdefault(other, name) != name:
            raise SpecError(f"{owners[other]} and {name} have the same {what}, {other}")
    return found
