"""Evidence in a checkpoint for and against a spec; what it can't know is in ``docs/language.md``, *What can't be caught*."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Checkpoint, HeldShapes, Parameter
from ucp_deepspeed.checkpoint.view import layouts_of, parameter_names
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import Match, Spec, logical_names
from ucp_deepspeed.language.resolve import contradicts_record, describe
from ucp_deepspeed.layout import Layout, Partial, Shape, Shard, ShardGrid
from ucp_deepspeed.layout.layout import Piece
from ucp_deepspeed.layout.pattern import Pattern, split_evenly
from ucp_deepspeed.transfer.evidence.held_values import HeldValues, Progress, SingleRank, of_first_stage, passing

UNRELATED = 0.5
"""`HeldValues.distance` from which two ranks' matrices count as different ones, and not as copies that were updated apart."""

What = Literal["unmatched", "ambiguous", "shapes", "record", "bias", "values", "whole", "remark"]
"""The source of a finding: no rule, or several; shapes of the ranks; the layout recorded when saving; the weight and the bias of
one module; values of the ranks; a checkpoint without tensor parallelism. A ``remark`` contradicts nothing."""

Extent = Literal["no", "shapes", "values"]
"""Use of a checkpoint without tensor parallelism: none, its shapes, or its values too."""


@dataclass(frozen=True, slots=True)
class Finding:
    """A thing that a checkpoint says about a spec, under the logical name of a parameter."""

    name: str
    what: What
    detail: str

    @property
    def wrong(self) -> bool:
        """Return whether the finding contradicts the spec."""
        return self.what != "remark"

    def __str__(self) -> str:
        return f"{self.name}: {self.detail}"


@dataclass(frozen=True)
class Checked:
    """A parameter, by its logical name and the checkpoint's, and the rules that it matches.

    ``layout`` is None if it doesn't match one rule, or shapes contradict it.
    """

    name: str
    own_name: str
    matches: tuple[Match, ...]
    local_shapes: HeldShapes
    layout: Layout | None

    @property
    def fit(self) -> Layout:
        """The layout, where there is one."""
        assert self.layout is not None
        return self.layout

    @property
    def pattern(self) -> Pattern:
        """The pattern of the first rule."""
        return self.matches[0].pattern

    @property
    def words(self) -> str:
        """The pattern and its rule."""
        return f"{describe(self.pattern)} ({self.matches[0]})"

    @property
    def vocabulary(self) -> Shard | None:
        """The pattern, if it is a vocabulary's."""
        return self.pattern if isinstance(self.pattern, Shard) and self.pattern.vocabulary else None

    def found(self, what: What, detail: str) -> Finding:
        """Return a finding on this parameter."""
        return Finding(self.name, what, detail)


@dataclass(frozen=True)
class SpecCheck:
    """The result of comparing a spec with a checkpoint.

    Attributes:
        parameters: without buffers, in the checkpoint's order.
        findings: in the same order.
        unused: globs that match nothing; the globs of one family serve several variants of a model.
        values_compared: number of parameters whose values on several ranks were compared.
        whole_compared: see `Extent`.
    """

    parameters: tuple[Checked, ...]
    findings: tuple[Finding, ...]
    unused: tuple[Match, ...]
    values_compared: int
    whole_compared: Extent

    @property
    def sound(self) -> bool:
        """Return whether nothing contradicts the spec."""
        return not any(finding.wrong for finding in self.findings)


def check_spec(
    spec: Spec,
    checkpoint: Checkpoint,
    *,
    vocabulary_size: int | None = None,
    values: bool = True,
    whole: Checkpoint | None = None,
    progress: Progress = lambda done, total: None,
) -> SpecCheck:
    """Compare a spec with a checkpoint.

    Args:
        values: read tensors; without it, only metadata.
        whole: a checkpoint of the same model without tensor parallelism; if it has the same state, values are compared too.
        progress: see `Progress`; it begins anew for the second checkpoint.

    Raises:
        SpecError: names collide under the spec's naming scheme.
        DamagedCheckpointError: a file is missing or truncated.
    """
    size = vocabulary_size if vocabulary_size is not None else checkpoint.vocabulary_size
    names = logical_names(list(checkpoint.parameters), [spec], checkpoint.logical_names)
    findings: list[Finding] = []
    parameters: list[Checked] = []
    for own_name in parameter_names(checkpoint):
        name, shapes = names[own_name], checkpoint.parameters[own_name].local_shapes
        checked = Checked(name, own_name, spec.matches(name), shapes, None)
        try:
            checked = replace(checked, layout=_layout(checked, checkpoint.topology.tp, size))
        except MismatchError as error:
            findings.append(checked.found("shapes", f"{checked.words}: {error.problems[0].removeprefix(f'{name}: ')}"))
        if len(checked.matches) != 1:
            what: What = "ambiguous" if checked.matches else "unmatched"
            findings.append(checked.found(what, spec.misfit(name, checked.matches)))
        parameters.append(checked)
    fitting = {checked.name: checked for checked in parameters if checked.layout is not None}
    findings += _of_stated_shapes(spec, fitting, size)
    for checked in fitting.values():
        findings += _of_shapes(checked, size)
        recorded = checkpoint.patterns.get(checked.own_name)
        if recorded is not None and contradicts_record(checked.pattern, recorded):
            findings.append(checked.found("record", f"{checked.words}; recorded was {describe(recorded)}"))
        findings += _of_bias(checked, fitting)
    compared = 0
    if values and checkpoint.topology.tp > 1:
        found, compared = _of_values(checkpoint, fitting, progress)
        findings += found
    extent: Extent = "no"
    if whole is not None:
        own = logical_names(list(whole.parameters), [spec], whole.logical_names)
        accused = {finding.name for finding in findings if finding.wrong} if values else None
        extent, found = _of_whole(SingleRank(checkpoint, whole, names, own), fitting, size, accused, progress)
        findings += found
    order = {checked.name: place for place, checked in enumerate(parameters)}
    findings.sort(key=lambda finding: order[finding.name])
    unused = spec.unused(checked.name for checked in parameters)
    return SpecCheck(tuple(parameters), tuple(findings), unused, compared, extent)


def _layout(checked: Checked, degree: int, size: int | None) -> Layout | None:
    """Return the layout by the one rule, without the copies on later pipeline stages: nothing may train their values there."""
    if len(checked.matches) != 1:
        return None
    name = checked.name
    layout = layouts_of({name: checked.pattern}, {name: checked.local_shapes}, degree, size, "the checkpoint")[name]
    return of_first_stage(layout, degree)


def _of_stated_shapes(spec: Spec, fitting: Mapping[str, Checked], size: int | None) -> Iterator[Finding]:
    """Check the global shapes that the rules state. Skip a vocabulary of unknown size, whose padding counts as rows."""
    known = {name: checked for name, checked in fitting.items() if size is not None or checked.vocabulary is None}
    shapes = {name: checked.fit.logical_shape for name, checked in known.items()}
    for name, problem in spec.check_shapes(shapes).problems.items():
        yield known[name].found("shapes", f"logical shape {list(shapes[name])} as {known[name].words}; {problem}")


def _of_shapes(checked: Checked, size: int | None) -> Iterator[Finding]:
    """Remark what the widths of a plain shard, and a vocabulary of unknown size, leave open."""
    pattern = checked.pattern
    if not isinstance(pattern, Shard) or pattern.parts != (1,) or pattern.heads is not None:
        return
    extents = [shape[pattern.dim] for shape in checked.local_shapes if shape is not None]
    total, degree = sum(extents), len(extents)
    if pattern.vocabulary:
        if size is None:
            yield checked.found("remark", f"the vocabulary's size isn't known: all {total} rows are kept")
    elif pattern.widths is None and tuple(extents) != split_evenly(total, degree):
        even = {count: [count * share for share in split_evenly(total // count, degree)] for count in (2, 3)}
        fused = [count for count, shares in even.items() if total % count == 0 and shares == extents]
        hint = f", and {fused[0]} fused parts would be" if fused else ""
        yield checked.found("remark", f"the ranks hold {extents}, which is no even cut{hint}")


def _of_bias(checked: Checked, fitting: Mapping[str, Checked]) -> Iterator[Finding]:
    """Check that a bias is as long as one dimension of its weight: the output's, which is dimension 0 of most modules."""
    weight = fitting.get(f"{checked.name.removesuffix('.bias')}.weight") if checked.name.endswith(".bias") else None
    if weight is None:
        return
    sizes, length = weight.fit.logical_shape, checked.fit.logical_shape
    if len(sizes) == 2 and len(length) == 1 and length[0] not in sizes:
        detail = f"logical shape {list(sizes)} as {weight.words}, but its bias is {list(length)} as {checked.words}"
        yield weight.found("bias", f"{detail}: one of the two rules is wrong")


def _of_values(checkpoint: Checkpoint, fitting: Mapping[str, Checked], progress: Progress) -> tuple[list[Finding], int]:
    """Return what the ranks' values say, and for how many parameters there were values to compare."""
    findings: list[Finding] = []
    compared = 0
    with HeldValues(checkpoint) as ranks:
        held = {name: checkpoint.parameters[checked.own_name] for name, checked in fitting.items()}
        for name in passing(held, progress):
            checked, parameter, layout = fitting[name], held[name], fitting[name].fit
            shared = [copies for box, copies in layout.holders().items() if len(copies) > 1 and box.numel]
            shapes = [local.shape for local in layout.locals if local.pieces]
            if shared and layout.union == "take":
                findings += _differing(checked, parameter, ranks, shared)
            elif shared:
                findings += _unrelated(checked, parameter, ranks)
            elif isinstance(checked.pattern, Shard | ShardGrid) and len(shapes) > 1 and len(set(shapes)) == 1:
                findings += _alike(checked, parameter, ranks)
            else:
                continue
            compared += 1
    return findings, compared


def _differing(
    checked: Checked, parameter: Parameter, ranks: HeldValues, shared: Iterable[Sequence[tuple[int, Piece]]]
) -> Iterator[Finding]:
    """Find copies that differ."""
    for state in parameter.states:
        for first, *others in shared:
            for other in others:
                if (count := ranks.differing(parameter, state, first, other)) > 0:
                    where = f"between model-parallel ranks {first[0]} and {other[0]} in {count} elements"
                    yield checked.found("values", f"{checked.words}, but {state} differs {where}")
                    return


def _unrelated(checked: Checked, parameter: Parameter, ranks: HeldValues) -> Iterator[Finding]:
    """Find a matrix whose copies are as far from each other as from zero: it is no mean of copies, but shards of something.

    Copies that were updated apart differ by the updates, which are much smaller than the values. Shards have nothing in common,
    so the square of their distance is about the sum of their squares. The bound is half of that sum: a cosine of 1/2. Vectors
    are skipped: biases begin at zero, and are nothing but updates.
    """
    if ranks.equal(parameter, checked.fit):
        yield checked.found("remark", "partial, and all ranks hold the same values")
    elif len(checked.fit.logical_shape) > 1:
        state = MASTER if MASTER in parameter.states else WEIGHT
        first, *others = [(rank, local.pieces[0]) for rank, local in enumerate(checked.fit.locals) if local.pieces]
        far = [rank for rank, piece in others if ranks.distance(parameter, state, first, (rank, piece)) >= UNRELATED]
        if far:
            where = f"{state} of model-parallel ranks {first[0]} and {far[0]}"
            yield checked.found("values", f"{checked.words}, but {where} is as far apart as from zero: it looks cut")


def _alike(checked: Checked, parameter: Parameter, ranks: HeldValues) -> Iterator[Finding]:
    """Find shards of one tensor that are equal in every state, and aren't one repeated number: they are copies of it."""
    state = MASTER if MASTER in parameter.states else WEIGHT
    if not ranks.equal(parameter, checked.fit, [state]) or ranks.constant(parameter, state, checked.fit):
        return
    if ranks.equal(parameter, checked.fit):
        yield checked.found("values", f"{checked.words}, but all ranks hold the same values: it looks replicated")


def _of_whole(
    beside: SingleRank,
    fitting: Mapping[str, Checked],
    size: int | None,
    accused: Collection[str] | None,
    progress: Progress,
) -> tuple[Extent, list[Finding]]:
    """Compare with a checkpoint of the same model without tensor parallelism; by values only if it has the same state: some
    parameter has values in both that no two initialisations share. Values of the ``accused`` aren't compared; none if None."""
    findings: list[Finding] = []
    same: dict[str, Pattern] = {}
    padded: dict[str, Pattern] = {}
    for name, checked in fitting.items():
        found, expected = checked.fit.logical_shape, beside.shape(name)
        if expected is None:
            findings.append(checked.found("remark", f"isn't in {beside.whole.path}"))
        elif not _fits(found, expected, checked.vocabulary):
            detail = f"logical shape {list(found)} as {checked.words}"
            findings.append(checked.found("whole", f"{detail}; without tensor parallelism it is {list(expected)}"))
        elif found != expected:
            padded[name] = checked.pattern
        elif not isinstance(checked.pattern, Partial):
            same[name] = checked.pattern
    if accused is None:
        return "shapes", findings
    joined = beside.compared({name: pattern for name, pattern in same.items() if name not in accused}, size, progress)
    for name, pattern in padded.items():
        if name not in accused and (comparable := beside.joins_to(name, pattern, size)) is not None:
            joined[name] = comparable
    if not any(each is not None and each.same and each.told for each in joined.values()):
        return "shapes", findings
    for name, each in joined.items():
        if name in padded and size is None and each is not None and each.padded:
            detail = f"only the first {each.equal} of {each.rows} rows are those without tensor parallelism"
            findings.append(Finding(name, "remark", f"{detail}; say how many aren't padding (--vocabulary-size)"))
        elif each is None or not each.same:
            detail = f"{fitting[name].words}: joined that way it isn't what it is without tensor parallelism"
            findings.append(Finding(name, "whole", detail))
    return "values", findings


def _fits(found: Shape, expected: Shape, vocabulary: Shard | None) -> bool:
    """Return whether a logical shape is the expected one; a vocabulary may be padded differently on either side."""
    if vocabulary is None or len(found) != len(expected):
        return found == expected
    return all(found[dim] == expected[dim] for dim in range(len(found)) if dim != vocabulary.dim)
