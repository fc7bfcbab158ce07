"""The spec files that come with the package (``configs/`` in the source tree), and the user's own by path."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language.naming import logical_names
from ucp_deepspeed.language.spec import Lines, Spec


def spec_folder() -> Path:
    """Where the spec files are: inside the installed package, or ``configs/`` beside it in a source tree."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


@lru_cache(maxsize=1)
def _families() -> dict[str, Spec]:
    """Every spec that comes with the package, by its family's name."""
    found: dict[str, Spec] = {}
    for path in sorted(spec_folder().glob("*.yaml")):
        spec = _read(path)
        found[spec.family] = spec
    return found


def spec_names() -> list[str]:
    """Names of the families that come with the package."""
    return list(_families())


def load_spec(name_or_path: str) -> Spec:
    """A family by name, or a spec file by path.

    Raises:
        SpecError: no such family and no such file, not YAML, or not a valid spec.
    """
    if name_or_path in _families():
        return _families()[name_or_path]
    path = Path(name_or_path)
    if not path.is_file():
        raise SpecError(f"no family or spec file {name_or_path!r}; families: {', '.join(spec_names())}")
    return _read(path)


def _read(path: Path) -> Spec:
    try:
        raw, lines = _parse(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        place = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        raise SpecError(f"spec {path}{place} is not YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        # The reader of YAML lets some of Python's own errors through, as of a date that there isn't.
        raise SpecError(f"spec {path} is not YAML: {str(error).splitlines()[0]}") from error
    return Spec.parse(raw, str(path), lines, path.parent)


def _parse(text: str) -> tuple[Any, Lines]:
    """A document's content, and where its globs stand."""
    loader = _UniqueKeys(text)
    try:
        node = loader.get_single_node()
        lines = dict(_lines(node))  # before the content is made, which moves keys that ``<<`` takes over
        return (None if node is None else loader.construct_document(node)), lines
    finally:
        loader.dispose()


def _lines(node: Any) -> Iterator[tuple[tuple[int, int], int]]:
    """Line of each glob; of one that ``<<`` takes over there is none. What isn't a spec has no lines."""
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
    """Refuses a key that stands twice in a mapping, where YAML's usual reader would take the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """As the base class's, but for keys that stand twice. Here ``<<`` hasn't added a mapping's keys to another's yet."""
        node = super().compose_mapping_node(anchor)
        keys = [key.value for key, _ in node.value]
        for index, (key, _) in enumerate(node.value):
            if key.value in keys[:index]:
                raise yaml.composer.ComposerError(None, None, f"key {key.value!r} stands twice", key.start_mark)
        return node


def find_family(names: Sequence[str]) -> Spec | None:
    """The family of which each of these parameters matches exactly one rule.

    Args:
        names: logical names.

    Returns:
        None when no family fits.

    Raises:
        SpecError: more than one family fits and they disagree on a pattern: which one is right can't be told by names.
    """
    fitting = _fitting(names)
    for other in fitting[1:]:
        first, second = fitting[0].patterns(names), other.patterns(names)
        differing = [name for name in names if first[name] != second[name]]
        if differing:
            raise SpecError(
                f"families {fitting[0].family!r} and {other.family!r} both fit and disagree on {differing[0]}; name one in the "
                f"config or with --spec. Parameters on which they disagree",
                differing,
            )
    return fitting[0] if fitting else None


def naming_specs(spec: Spec | None, *sides: Sequence[str]) -> list[Spec]:
    """The specs by which names are made logical: the one that the user named, else all that fit the parameters of one side.

    Args:
        sides: names of the source's and of the target's parameters; the first side that some family fits decides.
    """
    if spec is not None:
        return [spec]
    return next((fitting for names in sides if (fitting := _fitting(names))), [])


def _fitting(names: Sequence[str]) -> list[Spec]:
    """Families of which each of these parameters, under its logical name, matches exactly one rule."""
    return [spec for spec in _families().values() if spec.coverage(logical_names(names, [spec]).values()) == 1.0]
