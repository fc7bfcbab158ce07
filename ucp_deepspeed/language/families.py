"""Spec files: those that come with the package (``configs/`` in the source tree), and the user's own by path."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from ucp_deepspeed import tunables
from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language.schemes import logical_names
from ucp_deepspeed.language.spec import Lines, Spec
from ucp_deepspeed.layout.box import Shape
from ucp_deepspeed.layout.pattern import Shard


def spec_folder() -> Path:
    """The folder of the spec files: inside the installed package, or ``configs/`` beside it in a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@lru_cache(maxsize=1)
def _families() -> dict[str, Spec]:
    """Every spec that comes with the package, by its family's name."""
    return {spec.family: spec for spec in map(_read, sorted(spec_folder().glob("*.yaml")))}


def spec_names() -> list[str]:
    """Names of the families that come with the package."""
    return list(_families())


def load_spec(name_or_path: str) -> Spec:
    """Load a family by name, or a spec file by path.

    Raises:
        SpecError: no such family and no such file, not YAML, or not a valid spec.
    """
    if name_or_path in _families():
        return _families()[name_or_path]
    path = Path(name_or_path)
    if not os.path.isfile(path):  # noqa: PTH113 - a name that can't be is no file
        raise SpecError(f"no family or spec file {name_or_path!r:.1000}; families: {', '.join(spec_names())}")
    return _read(path)


def _read(path: Path) -> Spec:
    try:
        with path.open("rb") as file:
            content = file.read(tunables.SPEC_NUMBYTES + 1)
        if len(content) > tunables.SPEC_NUMBYTES:
            raise SpecError(f"spec {path} is too large for a spec: it has more than {tunables.SPEC_NUMBYTES} bytes")
        raw, lines = _parse(content.decode("utf-8"))
    except OSError as error:
        raise SpecError(f"spec {path} can't be read: {error}") from error
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"spec {path}{place} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The YAML reader lets some of Python's own errors through, for example for a date that doesn't exist.
        raise SpecError(f"spec {path} is not YAML: {str(error).splitlines()[0]}") from error
    return Spec.parse(raw, str(path), lines, path.parent)


def _parse(text: str) -> tuple[Any, Lines]:
    """Return a document's content, and the lines of its globs."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        _check_repeated(node)
        lines = dict(_lines(node))  # first: making the content moves keys that ``<<`` takes over
        return (None if node is None else loader.construct_document(node)), lines
    finally:
        loader.dispose()


def _check_repeated(node: Any) -> None:
    """Refuse aliases of aliases: each level of them makes the document many times larger."""
    sizes: dict[int, int] = {}

    def size_of(found: Any) -> int:
        if id(found) not in sizes:
            sizes[id(found)] = 0  # a node in itself
            parts = (
                [part for pair in found.value for part in pair] if isinstance(found, yaml.MappingNode) else found.value
            )
            inner = 0 if isinstance(found, yaml.ScalarNode) else sum(map(size_of, parts))
            sizes[id(found)] = 1 + inner
        return sizes[id(found)]

    if node is not None and (total := size_of(node)) > MOST_REPEATED * len(sizes):
        raise yaml.YAMLError(f"aliases make {total} values of {len(sizes)}")


MOST_REPEATED = 50
"""Values that aliases may make of each one that is written, on average."""


def _lines(node: Any) -> Iterator[tuple[tuple[int, int], int]]:
    """Yield the line of each glob. A glob that ``<<`` takes over has none. Other documents than specs yield no lines."""
    rules = _value_of(node, "rules")
    for number, rule in enumerate(rules.value if isinstance(rules, yaml.SequenceNode) else ()):
        match = _value_of(rule, "match")
        globs = match.value if isinstance(match, yaml.SequenceNode) else [match] if match is not None else []
        for place, glob in enumerate(globs):
            yield (number, place), glob.start_mark.line + 1


def _value_of(node: Any, key: str) -> Any:
    pairs = node.value if isinstance(node, yaml.MappingNode) else ()
    return next((value for name, value in pairs if name.value == key), None)


class _UniqueKeys(yaml.SafeLoader):
    """A YAML loader that refuses a key that stands twice in a mapping. YAML's usual reader would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Compose as the base class does, but refuse keys that stand twice. ``<<`` hasn't yet added keys to a mapping here."""
        node = super().compose_mapping_node(anchor)
        keys: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.composer.ComposerError(None, None, "a key isn't a name", key.start_mark)
            if key.value in keys:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
            keys.add(key.value)
        return node


@dataclass(frozen=True)
class Candidate:
    """A family, and how well it fits a model.

    Attributes:
        spec: the family.
        coverage: share of the parameters that match exactly one rule, 0 to 1.
        unmatched: parameters that don't match exactly one rule.
        problems: parameters that match, but whose shapes contradict the rule; each with the reason.
        confirmed: number of parameters with a whole shape that the rules state and nothing contradicts.
    """

    spec: Spec
    coverage: float
    unmatched: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    confirmed: int = 0

    @property
    def fits(self) -> bool:
        """Return whether all names fit, and no shape contradicts."""
        return self.coverage == 1.0 and not self.problems

    def __str__(self) -> str:
        family = self.spec.family
        if self.coverage < 1.0:
            return f"{family}: {self.coverage:.0%} of the names match one rule; {self.unmatched[0]} doesn't"
        if self.problems:
            return f"{family}: all names match, {len(self.problems)} shapes don't; {self.problems[0]}"
        shapes = f"{self.confirmed} stated shapes agree" if self.confirmed else "no shape was compared"
        return f"{family}: all names match, {shapes}"


@dataclass(frozen=True)
class Detection:
    """The family that a model belongs to, with the evidence.

    Attributes:
        confidence: ``shapes``: one family fits, and shapes that its rules state confirm it; ``names``: one family fits, by names
            alone; ``ambiguous``: several fit and say different things; ``none``: no family fits.
        candidates: every family, best first.
        disagreement: when ambiguous, the parameters for which the families that fit give different patterns.
        unconfirmed: cut parameters whose shapes don't tell whether they are fused: only their names say that they are laid out
            as the family says.
    """

    confidence: Literal["shapes", "names", "ambiguous", "none"]
    candidates: tuple[Candidate, ...]
    disagreement: tuple[str, ...] = ()
    unconfirmed: tuple[str, ...] = ()

    @property
    def spec(self) -> Spec | None:
        """The family; None if none fits.

        Raises:
            SpecError: several fit and disagree.
        """
        if self.confidence == "ambiguous":
            one, other = (candidate.spec.family for candidate in self.candidates[:2])
            raise SpecError(
                f"families {one!r} and {other!r} both fit and disagree on {self.disagreement[0]}; name one in the config or "
                f"with --spec. Parameters on which they disagree",
                self.disagreement,
            )
        return None if self.confidence == "none" else self.candidates[0].spec

    def __str__(self) -> str:
        return f"{self.confidence}: " + "; ".join(map(str, self.candidates))


def find_family(names: Sequence[str], local_shapes: Mapping[str, Sequence[Shape]] | None = None) -> Detection:
    """Find the family: each parameter matches exactly one of its rules, and no shape contradicts a stated one.

    Args:
        names: logical names.
        local_shapes: by name, the shapes on the tensor-parallel ranks of one stage; if None, only names decide.
    """
    ordered = sorted(
        (_candidate(spec, names, local_shapes or {}) for spec in _families().values()),
        key=lambda candidate: (not candidate.fits, -candidate.coverage, len(candidate.problems)),
    )
    fitting = [candidate for candidate in ordered if candidate.fits]
    if not fitting:
        return Detection("none", tuple(ordered))
    patterns = [candidate.spec.patterns(names) for candidate in fitting]
    others = [place for place, found in enumerate(patterns) if found != patterns[0]]
    if others:
        ordered.insert(1, ordered.pop(others[0]))  # the first two candidates disagree
        differing = tuple(name for name in names if patterns[others[0]][name] != patterns[0][name])
        return Detection("ambiguous", tuple(ordered), differing)
    stated = {name for name in names if fitting[0].spec.matches(name)[0].shape is not None}
    cut = (name for name, pattern in patterns[0].items() if isinstance(pattern, Shard) and not pattern.vocabulary)
    unconfirmed = tuple(name for name in cut if name not in stated or not local_shapes or name not in local_shapes)
    return Detection("shapes" if fitting[0].confirmed else "names", tuple(ordered), (), unconfirmed)


def _candidate(spec: Spec, names: Sequence[str], local_shapes: Mapping[str, Sequence[Shape]]) -> Candidate:
    unmatched = spec.unmatched(names)
    coverage = spec.coverage(names)
    if unmatched or not names:
        return Candidate(spec, coverage, unmatched)
    wanted = set(names)
    known = {name: shapes for name, shapes in local_shapes.items() if name in wanted}
    impossible, check = spec.check_local_shapes(known)
    problems = (*impossible, *(f"{name}: {why}" for name, why in check.problems.items()))
    return Candidate(spec, coverage, (), problems, len(check.confirmed))


def naming_specs(spec: Spec | None, *sides: Sequence[str]) -> list[Spec]:
    """Return the specs that make names logical: the user's, else all families that fit the first side that some family fits."""
    if spec is not None:
        return [spec]
    return next((list(fitting) for names in sides if (fitting := _fitting(tuple(names)))), [])


@lru_cache(maxsize=8)  # each save asks for the same names, while training waits
def _fitting(names: tuple[str, ...]) -> tuple[Spec, ...]:
    """Return the families in which each parameter, under its logical name, matches exactly one rule."""
    return tuple(spec for spec in _families().values() if spec.coverage(logical_names(names, [spec]).values()) == 1.0)
