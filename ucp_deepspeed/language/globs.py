"""Matching of names and rules, fast for models with a hundred thousand names.

``layers.0.mlp.weight`` and ``layers.31.mlp.weight`` have one *form*, ``layers.0.mlp.weight``: they differ in numbers that stand
alone between dots. A glob is *blind* if its own texts hold no such number: it fits a name if and only if it fits the name's form,
so that each form is matched once. All other globs are tried on the names themselves.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache

_NUMBER = re.compile(r"(?<![^.])[0-9]+(?![^.])")

_MOST_NAMES, _MOST_FORMS = 2**17, 2**14
"""Numbers of remembered entries, some 100 bytes each; forgotten ones are computed again."""


@lru_cache(maxsize=_MOST_NAMES)
def form_of(name: str) -> str:
    """Return the name with 0 in the place of each part that is a number."""
    return sys.intern(_NUMBER.sub("0", name))


def is_blind(texts: Iterable[str]) -> bool:
    """Return whether a pattern of these texts, with anything between them, treats all names of a form in the same way.

    Digits beside another character can only be in a part of a name that isn't a number: ``fc1`` is none, ``*.0`` may be one.
    """
    return not any(_NUMBER.search(text) for text in texts)


@lru_cache(maxsize=4096)
def compiled(glob: str) -> re.Pattern[str]:
    """Compile a glob for whole names: ``*`` stands for a part of a dotted name or a piece of one, ``**`` for any parts."""
    pieces = re.split(r"(\*\*|\*)", glob)
    wild = {"**": r".*", "*": r"[^.]*"}
    return re.compile("".join(wild.get(piece, re.escape(piece)) for piece in pieces))


def check_glob(glob: str) -> None:
    """Refuse a question mark, which elsewhere stands for a character, by a ValueError that tells what to write."""
    if "?" in glob:
        raise ValueError(f"? in {glob!r} is no wildcard: write * for a part of a name between dots, or a piece of one")


Fit = tuple[int, int]
"""A rule, and the first of its globs that fits, by their positions."""


class Matcher:
    """Rules, each with globs, ready to be matched."""

    def __init__(self, rules: Sequence[Sequence[str]]) -> None:
        self._globs = [
            (number, place, compiled(glob), is_blind(glob.split("*")))
            for number, globs in enumerate(rules)
            for place, glob in enumerate(globs)
        ]
        self._numbered = [(number, place, glob) for number, place, glob, blind in self._globs if not blind]
        self._fits_of_form = lru_cache(maxsize=_MOST_FORMS)(self._match_form)

    def fits(self, name: str) -> tuple[Fit, ...]:
        """Return every rule that fits, in order."""
        found = self._fits_of_form(form_of(name))
        if not self._numbered:
            return found
        first = dict(found)
        for number, place, glob in self._numbered:
            if first.get(number, place) >= place and glob.fullmatch(name):
                first[number] = place
        return tuple(sorted(first.items()))

    def count_unique(self, names: Iterable[str]) -> int:
        """Count the names that exactly one rule fits; a name that stands twice counts twice."""
        if self._numbered:
            return sum(len(self.fits(name)) == 1 for name in names)
        forms = Counter(map(form_of, names))
        return sum(count for form, count in forms.items() if len(self._fits_of_form(form)) == 1)

    def unused(self, names: Iterable[str]) -> list[Fit]:
        """Return rules and globs that fit none of the names, in order."""
        known = set(names)
        forms = set(map(form_of, known))
        return [
            (number, place)
            for number, place, glob, blind in self._globs
            if not any(glob.fullmatch(text) for text in (forms if blind else known))
        ]

    def _match_form(self, form: str) -> tuple[Fit, ...]:
        first: dict[int, int] = {}
        for number, place, glob, blind in self._globs:
            if blind and number not in first and glob.fullmatch(form):
                first[number] = place
        return tuple(first.items())
