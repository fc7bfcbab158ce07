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


FEW_STARS = 2
"""Stars with which a regular expression is fast. With many it may try each star at each place, and those of the next at each."""


class Glob:
    """A glob for whole names: ``*`` stands for a part of a dotted name or a piece of one, ``**`` for any parts.

    The time that `fullmatch` takes is the product of the two lengths at most.
    """

    def __init__(self, glob: str) -> None:
        self._pieces = re.findall(r"\*\*|.", re.sub(r"\*{3,}", "**", glob), re.DOTALL)
        wild = {"**": r".*", "*": r"[^.]*"}
        self._pattern: re.Pattern[str] | None = None
        if sum(piece in wild for piece in self._pieces) <= FEW_STARS:
            self._pattern = re.compile("".join(wild.get(each) or re.escape(each) for each in self._pieces), re.DOTALL)
            return
        # A number for each kind of piece, with a bit for each place where one of that kind stands.
        self._any, self._part = (self._places(star) for star in ("**", "*"))
        self._texts = {piece: self._places(piece) for piece in self._pieces if piece not in wild}

    def _places(self, wanted: str) -> int:
        return sum(1 << place for place, piece in enumerate(self._pieces) if piece == wanted)

    def fullmatch(self, name: str) -> bool:
        """Return whether it fits a name."""
        if self._pattern is not None:
            return self._pattern.fullmatch(name) is not None
        # The bits are the pieces that may come next. All are moved on together, one character after the other.
        stars = self._any | self._part
        state = self._past_stars(1, stars)
        for character in name:
            stays = self._any if character == "." else stars
            state = self._past_stars((state & stays) | (state & self._texts.get(character, 0)) << 1, stars)
            if not state:
                return False
        return bool(state >> len(self._pieces))

    @staticmethod
    def _past_stars(state: int, stars: int) -> int:
        """Add the pieces behind stars: a star may stand for nothing. No two stand side by side."""
        return state | (state & stars) << 1


@lru_cache(maxsize=4096)
def compiled(glob: str) -> Glob:
    """Return a glob, ready to be matched."""
    return Glob(glob)


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
