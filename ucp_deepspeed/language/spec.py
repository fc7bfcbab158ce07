"""Spec files: grammar, validation and matching (``docs/language.md``)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PrivateAttr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from ucp_deepspeed.errors import SpecError, each_or_problem, worded
from ucp_deepspeed.language.dimensions import (
    Dimension,
    ShapeCheck,
    StatedShape,
    check_shapes,
    dimension_values,
    is_expression,
    read_config,
    with_numbers,
)
from ucp_deepspeed.language.globs import Matcher, check_glob
from ucp_deepspeed.language.huggingface import HuggingFaceNames
from ucp_deepspeed.language.naming import Renaming
from ucp_deepspeed.layout.box import Shape
from ucp_deepspeed.layout.pattern import Pattern, Shard


def _checked_extent(value: Any) -> Any:
    """Refuse values that could be mistaken: a boolean for a number, or a number in quotes for an expression."""
    if value is None or (type(value) is int and value >= 0) or (isinstance(value, str) and is_expression(value)):
        return value
    raise ValueError(f"an extent is a number from 0 or an expression, not {value!r}")


PATTERN: TypeAdapter[Pattern] = TypeAdapter(
    Annotated[Pattern, Discriminator("pattern")], config=ConfigDict(extra="forbid")
)
"""Validates and writes patterns: in spec files, in manifests and in universal checkpoints."""


Extent = Annotated[int | str | None, BeforeValidator(_checked_extent)]
"""An extent of a stated shape: a number, an expression over dimensions without a value, or None for an open extent."""

RULES_HINT = (
    'correct the rules; "ucp spec check PATH --against CKPT" lists what they leave, and "ucp spec infer CKPT" writes a first '
    "spec"
)

Lines = Mapping[tuple[int, int], int]
"""Line of each glob in its file, by the positions of the rule and of the glob in it."""


@dataclass(frozen=True, slots=True)
class Match:
    """A rule that a parameter matches.

    Attributes:
        rule: its position in the spec, from 0.
        glob: the first of its globs that fits.
        line: line of the glob in the file; None if the spec didn't come from one.
        pattern: the rule's pattern.
        shape: shape of the whole parameter, if the rule states it.
    """

    rule: int
    glob: str
    line: int | None
    pattern: Pattern
    shape: StatedShape | None = None

    def __str__(self) -> str:
        return self.glob if self.line is None else f"{self.glob} (line {self.line})"


class Rule(BaseModel):
    """Parameters, by glob, and the pattern that they follow.

    In YAML the pattern's fields stand beside ``match``: ``{match: "*.weight", pattern: shard, dim: 0}``. ``shape`` is optional
    and gives the whole parameter's shape, which ``ucp spec check`` compares.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    match: Annotated[tuple[str, ...], Field(min_length=1)]
    pattern: Annotated[Pattern, Discriminator("pattern")]
    shape: tuple[Extent, ...] | None = None

    @model_validator(mode="before")
    @classmethod
    def _fold(cls, raw: Any) -> Any:
        """Gather the pattern's fields, and accept one glob without a list."""
        if not isinstance(raw, Mapping) or not isinstance(raw.get("pattern"), str):
            return raw
        fields = {key: value for key, value in raw.items() if key not in ("match", "shape")}
        # JSON lets a list stand for a tuple, but doesn't take "0" or true for a number.
        folded: dict[str, Any] = {"pattern": PATTERN.validate_json(json.dumps(fields, default=repr), strict=True)}
        if "match" in raw:
            folded["match"] = [raw["match"]] if isinstance(raw["match"], str) else raw["match"]
        if "shape" in raw:
            folded["shape"] = raw["shape"]
        return folded

    @field_validator("match")
    @classmethod
    def _check_globs(cls, globs: tuple[str, ...]) -> tuple[str, ...]:
        for glob in globs:
            check_glob(glob)
        return globs


class Spec(BaseModel):
    """A model family.

    Attributes:
        family: its name.
        description: the models, and the software that wrote them.
        rules: see `Rule`; they apply to logical names.
        config: path of the model's own configuration, a JSON file, relative to the spec's folder.
        dimensions: numbers with names, for expressions in rules (`ucp_deepspeed.language.dimensions`).
        names: renamings to logical names, for classes of model that use other names (`ucp_deepspeed.language.naming`).
        huggingface: what parameters become in Hugging Face models (`ucp_deepspeed.language.huggingface`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    family: str
    description: str = ""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    config: str | None = None
    dimensions: Mapping[Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")], Dimension] = {}
    names: Mapping[str, tuple[Renaming, ...]] = {}
    huggingface: tuple[HuggingFaceNames, ...] = ()
    _lines: Lines = PrivateAttr(default_factory=dict)
    _values: Mapping[str, int] = PrivateAttr(default_factory=dict)

    @classmethod
    def parse(cls, raw: Any, origin: str, lines: Lines | None = None, folder: Path | None = None) -> Spec:
        """Validate a spec that was read from ``origin``, and replace the expressions in it by numbers.

        Args:
            lines: lines of its globs.
            folder: folder that the path of the model's configuration is relative to; by default the current one.

        Raises:
            SpecError: lists every wrong key or value with its place.
        """
        numbered, values, wrong = _with_numbers(raw, folder or Path())
        if wrong:
            raise SpecError(f"spec {origin} is not valid", wrong)
        try:
            spec = cls.model_validate(numbered)
            spec._lines, spec._values = dict(lines or {}), values
            return spec
        except ValidationError as error:
            items = error.errors()
            # A wrong rule is also reported as one rule too few.
            inside = [item for item in items if item["loc"][:1] == ("rules",) and len(item["loc"]) > 1]
            shown = [item for item in items if not (inside and item["loc"] == ("rules",))]
            problems = [f"{_place(item['loc'])}: {worded(item)}" for item in shown]
            raise SpecError(f"spec {origin} is not valid", problems) from error

    @cached_property
    def _matcher(self) -> Matcher:
        return Matcher([rule.match for rule in self.rules])

    @cached_property
    def _of_globs(self) -> dict[tuple[int, int], Match]:
        """Matches by the positions of the rule and of the glob in it."""
        return {
            (number, place): Match(number, glob, self._lines.get((number, place)), rule.pattern, rule.shape)
            for number, rule in enumerate(self.rules)
            for place, glob in enumerate(rule.match)
        }

    def patterns(self, names: Iterable[str]) -> dict[str, Pattern]:
        """Return the pattern of each parameter.

        Raises:
            SpecError: lists all parameters that match no rule, with the nearest globs, and all that match several.
        """
        matches = {name: self.matches(name) for name in names}
        problems = [f"{name}: {self.misfit(name, found)}" for name, found in matches.items() if len(found) != 1]
        if problems:
            raise SpecError(
                f"spec {self.family!r} doesn't give exactly one rule for each parameter", problems, RULES_HINT
            )
        return {name: found[0].pattern for name, found in matches.items()}

    def matches(self, name: str) -> tuple[Match, ...]:
        """Return every rule that a parameter matches, in the spec's order; there should be exactly one."""
        return tuple(self._of_globs[fit] for fit in self._matcher.fits(name))

    def unused(self, names: Iterable[str]) -> tuple[Match, ...]:
        """Return the globs that fit none of these names, in the spec's order."""
        return tuple(self._of_globs[place] for place in self._matcher.unused(names))

    def unmatched(self, names: Iterable[str]) -> tuple[str, ...]:
        """Return the names that don't match exactly one rule."""
        return tuple(name for name in names if len(self._matcher.fits(name)) != 1)

    def check_shapes(self, logical_shapes: Mapping[str, Shape]) -> ShapeCheck:
        """Compare the whole shapes that the rules state with those of parameters that match one rule each."""
        stated = {name: matches[0].shape for name in logical_shapes if len(matches := self.matches(name)) == 1}
        known = {name: shape for name, shape in stated.items() if shape is not None}
        free_dims = [name for name, value in self.dimensions.items() if value is None]
        return check_shapes(known, logical_shapes, self._values, free_dims)

    def check_local_shapes(self, local_shapes: Mapping[str, Sequence[Shape]]) -> tuple[list[str], ShapeCheck]:
        """Join local shapes of the tensor-parallel ranks by the rules' patterns, and compare them with the stated shapes.

        Returns:
            Parameters that can't be joined, each with the reason, and the comparison of the others. Vocabularies are left out,
            since their size without padding isn't known here.
        """
        rules = {name: found[0].pattern for name in local_shapes if len(found := self.matches(name)) == 1}
        joined = [name for name, rule in rules.items() if not (isinstance(rule, Shard) and rule.vocabulary)]
        logical_shapes, impossible = each_or_problem(joined, lambda name: rules[name].logical_shape(local_shapes[name]))
        check = self.check_shapes(logical_shapes)
        worded = {name: f"logical shape {list(logical_shapes[name])}; {why}" for name, why in check.problems.items()}
        return impossible, replace(check, problems=worded)

    def coverage(self, names: Iterable[str]) -> float:
        """Return the share of the names that match exactly one rule, 0 to 1."""
        known = list(names)
        return self._matcher.count_unique(known) / len(known) if known else 0.0

    def misfit(self, name: str, matches: Sequence[Match]) -> str:
        """Say that a parameter matches several rules, or none; then with the two globs that look most like its name."""
        if matches:
            return f"matches {len(matches)} rules ({', '.join(map(str, matches))})"
        globs = [glob for rule in self.rules for glob in rule.match]
        nearest = sorted(globs, key=lambda glob: -SequenceMatcher(None, glob, name).ratio())[:2]
        return f"matches no rule; nearest: {', '.join(nearest)}"


class _Dimensions(BaseModel):
    """The part of a spec that is needed before its expressions can be read."""

    config: str | None = None
    dimensions: Mapping[str, Dimension] = {}


def _with_numbers(raw: Any, folder: Path) -> tuple[Any, dict[str, int], list[str]]:
    """Return a spec without expressions, its dimensions, and what is wrong with them. Validation refuses what is no spec."""
    if not isinstance(raw, Mapping) or not isinstance(raw.get("rules"), list):
        return raw, {}, []
    try:
        given = _Dimensions.model_validate({key: raw[key] for key in ("config", "dimensions") if key in raw})
    except ValidationError:
        return raw, {}, []
    try:
        config = read_config(folder, given.config) if given.config is not None else None
        values = dimension_values(given.dimensions, config)
    except ValueError as error:
        return raw, {}, [str(error) if str(error).startswith("config: ") else f"dimensions.{error}"]
    free_dims = [name for name, value in given.dimensions.items() if value is None]
    rules: list[Any] = []
    problems: list[str] = []
    for number, rule in enumerate(raw["rules"]):
        numbered, wrong = with_numbers(rule, values, free_dims) if isinstance(rule, Mapping) else (rule, [])
        rules.append(numbered)
        problems += [f"rules[{number}].{problem}" for problem in wrong]
    return {**raw, "rules": rules}, values, problems


def _place(location: tuple[int | str, ...]) -> str:
    """``rules[3].dim`` for ``("rules", 3, "dim")``."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".") or "top level"
