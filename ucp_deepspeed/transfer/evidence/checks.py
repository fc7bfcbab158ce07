"""Evidence in a checkpoint for and against a spec: names, shapes, values, recorded layouts, and a whole copy beside it.

A wrong rule can keep every byte and ruin the model. So a spec is compared with everything that the checkpoint knows. What it
doesn't know is listed in ``docs/language.md``, *What can't be caught*.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Checkpoint, HeldShapes, Parameter
from ucp_deepspeed.checkpoint.torch_files.reading import INTEGERS, NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of, parameter_names
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import Match, Spec, logical_names
from ucp_deepspeed.language.resolve import contradicts_record, describe
from ucp_deepspeed.layout import Layout, Partial, Replicate, Shape, Shard, ShardGrid
from ucp_deepspeed.layout.layout import NOTHING
from ucp_deepspeed.layout.pattern import Pattern, split_evenly
from ucp_deepspeed.transfer.copying import FileReader, gather
from ucp_deepspeed.transfer.evidence.held_values import HeldValues, Progress, no_progress, passing

UNRELATED = 0.5
"""`HeldValues.distance` from which two ranks' matrices count as different ones, and not as copies that were updated apart."""

What = Literal["unmatched", "ambiguous", "shapes", "record", "bias", "values", "whole", "remark"]
"""The source of a finding: no rule, or several; shapes of the ranks; the layout recorded when saving; the weight and the bias of
one module; values of the ranks; a checkpoint without tensor parallelism. A ``remark`` contradicts nothing."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a checkpoint says about a spec.

    Attributes:
        name: logical name of the parameter.
        what: see `What`.
        detail: in words.
    """

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
    """One parameter that a spec is checked against.

    Attributes:
        name: logical name.
        own_name: name in the checkpoint.
        matches: the rules that it matches.
        local_shapes: see `HeldShapes`.
        layout: None when it doesn't match one rule, or shapes contradict it.
    """

    name: str
    own_name: str
    matches: tuple[Match, ...]
    local_shapes: HeldShapes
    layout: Layout | None

    @property
    def pattern(self) -> Pattern | None:
        """The pattern of its one rule; None unless exactly one rule matches."""
        return self.matches[0].pattern if len(self.matches) == 1 else None


@dataclass(frozen=True)
class SpecCheck:
    """The result of comparing a spec with a checkpoint.

    Attributes:
        parameters: without buffers, in the checkpoint's order.
        findings: in the same order.
        unused: globs that match nothing; the globs of one family serve several variants of a model.
        values_compared: number of parameters whose values on several ranks were compared.
        whole_compared: how the checkpoint without tensor parallelism was used: not at all, by shapes, or by values too.
    """

    parameters: tuple[Checked, ...]
    findings: tuple[Finding, ...]
    unused: tuple[Match, ...]
    values_compared: int
    whole_compared: Literal["no", "shapes", "values"]

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
    progress: Progress = no_progress,
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
        matches = spec.matches(names[own_name])
        shapes = checkpoint.parameters[own_name].local_shapes
        layout, against = _layout(names[own_name], matches, shapes, checkpoint.topology.tp, size, spec)
        findings += against
        parameters.append(Checked(names[own_name], own_name, matches, shapes, layout))
    fitting = {checked.name: checked for checked in parameters if checked.layout is not None}
    findings += _of_stated_shapes(spec, fitting, size)
    for checked in fitting.values():
        findings += _of_shapes(checked, size)
        findings += _of_record(checked, checkpoint)
        findings += _of_bias(checked, fitting)
    compared = 0
    if values and checkpoint.topology.tp > 1:
        found, compared = _of_values(checkpoint, fitting, progress)
        findings += found
    extent: Literal["no", "shapes", "values"] = "no"
    if whole is not None:
        accused = {finding.name for finding in findings if finding.wrong}
        extent, found = _of_whole(checkpoint, whole, fitting, names, spec, size, accused if values else None, progress)
        findings += found
    order = {checked.name: place for place, checked in enumerate(parameters)}
    findings.sort(key=lambda finding: order[finding.name])
    unused = spec.unused(checked.name for checked in parameters)
    return SpecCheck(tuple(parameters), tuple(findings), unused, compared, extent)


def _layout(
    name: str, matches: Sequence[Match], shapes: HeldShapes, degree: int, size: int | None, spec: Spec
) -> tuple[Layout | None, list[Finding]]:
    if not matches:
        return None, [Finding(name, "unmatched", f"matches no rule; nearest: {', '.join(spec.nearest(name))}")]
    if len(matches) > 1:
        return None, [Finding(name, "ambiguous", f"matches {len(matches)} rules ({', '.join(map(str, matches))})")]
    try:
        layout = layouts_of({name: matches[0].pattern}, {name: shapes}, degree, size, "the checkpoint")[name]
        return _of_first_stage(layout, degree), []
    except MismatchError as error:
        detail = error.problems[0].removeprefix(f"{name}: ")
        return None, [Finding(name, "shapes", f"{describe(matches[0].pattern)} ({matches[0]}): {detail}")]


def _of_first_stage(layout: Layout, degree: int) -> Layout:
    """Return the layout without the copies on later pipeline stages, which may hold values that nothing trains there."""
    first = next((rank for rank, local in enumerate(layout.locals) if local != NOTHING), 0) // degree
    locals_ = (local if rank // degree == first else NOTHING for rank, local in enumerate(layout.locals))
    return replace(layout, locals=tuple(locals_))


def _of_stated_shapes(spec: Spec, fitting: Mapping[str, Checked], size: int | None) -> Iterator[Finding]:
    """Check the global shapes that the rules state. Skip a vocabulary of unknown size, whose padding counts as rows."""
    shapes = {
        name: checked.layout.logical_shape
        for name, checked in fitting.items()
        if checked.layout is not None
        and (size is not None or not (isinstance(checked.pattern, Shard) and checked.pattern.vocabulary))
    }
    for name, problem in spec.check_shapes(shapes).problems.items():
        yield Finding(name, "shapes", f"logical shape {list(shapes[name])} as {_words(fitting[name])}; {problem}")


def _of_shapes(checked: Checked, size: int | None) -> Iterator[Finding]:
    """Remark what the widths of a plain shard, and a vocabulary of unknown size, leave open."""
    pattern = checked.pattern
    if not isinstance(pattern, Shard) or pattern.parts != (1,) or pattern.heads is not None:
        return
    extents = [shape[pattern.dim] for shape in checked.local_shapes if shape is not None]
    if pattern.vocabulary:
        if size is None:
            yield Finding(
                checked.name, "remark", f"the vocabulary's size isn't known: all {sum(extents)} rows are kept"
            )
    elif pattern.widths is None and tuple(extents) != split_evenly(sum(extents), len(extents)):
        fused = [count for count in (2, 3) if _fused_extents(sum(extents), count, len(extents)) == extents]
        hint = f", and {fused[0]} fused parts would be" if fused else ""
        yield Finding(checked.name, "remark", f"the ranks hold {extents}, which is no even cut{hint}")


def _fused_extents(total: int, count: int, degree: int) -> list[int] | None:
    """Return the extents that ranks hold of equal fused parts; None where the parts wouldn't be equal."""
    if total % count:
        return None
    return [count * share for share in split_evenly(total // count, degree)]


def _of_record(checked: Checked, checkpoint: Checkpoint) -> Iterator[Finding]:
    recorded, pattern = checkpoint.patterns.get(checked.own_name), checked.pattern
    if recorded is not None and pattern is not None and contradicts_record(pattern, recorded):
        yield Finding(
            checked.name, "record", f"{describe(pattern)} ({checked.matches[0]}); recorded was {describe(recorded)}"
        )


def _of_bias(checked: Checked, fitting: Mapping[str, Checked]) -> Iterator[Finding]:
    """Check that a bias is as long as one dimension of its weight: the output's, which is dimension 0 of most modules."""
    weight = fitting.get(f"{checked.name.removesuffix('.bias')}.weight") if checked.name.endswith(".bias") else None
    if weight is None or weight.layout is None or checked.layout is None:
        return
    sizes, length = weight.layout.logical_shape, checked.layout.logical_shape
    if len(sizes) == 2 and len(length) == 1 and length[0] not in sizes:
        yield Finding(
            weight.name,
            "bias",
            f"logical shape {list(sizes)} as {_words(weight)}, but its bias is {list(length)} as {_words(checked)}: "
            f"one of the two rules is wrong",
        )


def _words(checked: Checked) -> str:
    return f"{describe(checked.matches[0].pattern)} ({checked.matches[0]})"


def _of_values(checkpoint: Checkpoint, fitting: Mapping[str, Checked], progress: Progress) -> tuple[list[Finding], int]:
    ranks = HeldValues(checkpoint)
    findings: list[Finding] = []
    compared = 0
    try:
        held = {name: checkpoint.parameters[checked.own_name] for name, checked in fitting.items()}
        for name in passing(held, progress):
            found, looked = _values_of(fitting[name], ranks)
            findings += found
            compared += looked
    finally:
        ranks.reader.close()
    return findings, compared


def _values_of(checked: Checked, ranks: HeldValues) -> tuple[list[Finding], bool]:
    """Return the findings of the ranks' values for one parameter, and whether there were values to compare."""
    assert checked.layout is not None
    parameter = ranks.checkpoint.parameters[checked.own_name]
    shared = [(box, held) for box, held in checked.layout.holders().items() if len(held) > 1 and box.numel]
    if shared and checked.layout.union == "take":
        for state in parameter.states:
            for _, ((first, piece), *others) in shared:
                for rank, other in others:
                    if (count := ranks.differing(parameter, state, (first, piece), (rank, other))) > 0:
                        detail = (
                            f"{_words(checked)}, but {state} differs between model-parallel ranks {first} and {rank}"
                        )
                        return [Finding(checked.name, "values", f"{detail} in {count} elements")], True
        return [], True
    if shared:
        if all(ranks.equal(parameter, state, checked.layout) for state in parameter.states):
            return [Finding(checked.name, "remark", "partial, and all ranks hold the same values")], True
        return list(_of_partial(checked, parameter, ranks)), True
    if isinstance(checked.pattern, Shard | ShardGrid) and checked.layout.degree > 1:
        return _alike(checked, parameter, ranks)
    return [], False


def _of_partial(checked: Checked, parameter: Parameter, ranks: HeldValues) -> Iterator[Finding]:
    """Find a matrix whose copies are as far from each other as from zero: it is no mean of copies, but shards of something.

    Copies that started alike and were updated apart differ by the updates, which are much smaller than the values. Shards of a
    matrix have nothing in common, so the square of their distance is about the sum of their squares. The bound is half of that
    sum: a cosine of 1/2, or for equal norms a distance as long as they are. Vectors are skipped: biases begin at zero, and are
    nothing but updates.
    """
    assert checked.layout is not None
    if len(checked.layout.logical_shape) < 2:
        return
    state = MASTER if MASTER in parameter.states else WEIGHT
    (first, mine), *others = [
        (rank, local.pieces[0]) for rank, local in enumerate(checked.layout.locals) if local.pieces
    ]
    for rank, piece in others:
        share = ranks.distance(parameter, state, (first, mine), (rank, piece))
        if share >= UNRELATED:
            detail = (
                f"but {state} of model-parallel ranks {first} and {rank} is as far apart as from zero: it looks cut"
            )
            yield Finding(checked.name, "values", f"{_words(checked)}, {detail}")
            return


def _alike(checked: Checked, parameter: Parameter, ranks: HeldValues) -> tuple[list[Finding], bool]:
    """Find shards of one tensor that are equal in every state, and aren't one repeated number: they are copies of it."""
    assert checked.layout is not None
    locals_ = [local for local in checked.layout.locals if local.pieces]
    if len(locals_) < 2 or len({local.shape for local in locals_}) > 1:
        return [], False
    state = MASTER if MASTER in parameter.states else WEIGHT
    if not ranks.equal(parameter, state, checked.layout) or ranks.constant(parameter, state, checked.layout):
        return [], True
    if all(ranks.equal(parameter, other, checked.layout) for other in parameter.states):
        detail = f"{_words(checked)}, but all ranks hold the same values: it looks replicated"
        return [Finding(checked.name, "values", detail)], True
    return [], True


def _of_whole(
    checkpoint: Checkpoint,
    whole: Checkpoint,
    fitting: Mapping[str, Checked],
    names: Mapping[str, str],
    spec: Spec,
    size: int | None,
    accused: set[str] | None,
    progress: Progress,
) -> tuple[Literal["shapes", "values"], list[Finding]]:
    """Compare with a checkpoint of the same model without tensor parallelism.

    Args:
        accused: parameters whose values needn't be compared; None to compare no values at all.
    """
    check_single_rank(whole)
    own = logical_names(list(whole.parameters), [spec], whole.logical_names)
    wholes = {logical: whole.parameters[name] for name, logical in own.items()}
    findings: list[Finding] = []
    same: dict[str, Pattern] = {}
    padded: dict[str, Pattern] = {}
    for name, checked in fitting.items():
        assert checked.layout is not None and checked.pattern is not None
        if name not in wholes:
            findings.append(Finding(name, "remark", f"isn't in {whole.path}"))
            continue
        expected = whole_shape(wholes[name])
        if not _fits(checked.layout.logical_shape, expected, checked.pattern):
            found = f"logical shape {list(checked.layout.logical_shape)} as {_words(checked)}"
            findings.append(Finding(name, "whole", f"{found}; without tensor parallelism it is {list(expected)}"))
        elif checked.layout.logical_shape != expected:
            padded[name] = checked.pattern
        elif not isinstance(checked.pattern, Partial):
            same[name] = checked.pattern
    if accused is None:
        return "shapes", findings
    wanted = {name: pattern for name, pattern in same.items() if name not in accused}
    one = UniversalView(checkpoint, names, wanted, size, wanted)
    flat = UniversalView.of_single_rank(whole, own, wanted)
    differing, same_state = _differing_wholes(one, flat, progress)
    in_part: dict[str, Joined] = {}
    for name, pattern in padded.items():
        joined = None if name in accused else joins_to(checkpoint, whole, name, pattern, size, (names, own))
        if joined is None:
            continue
        same_state |= joined.same and joined.told
        if joined.padded and size is None:
            in_part[name] = joined
        elif not joined.same:
            differing.append(name)
    if not same_state:
        return "shapes", findings
    for name in differing:
        detail = f"{_words(fitting[name])}: joined that way it isn't what it is without tensor parallelism"
        findings.append(Finding(name, "whole", detail))
    for name, joined in in_part.items():
        detail = f"only the first {joined.equal} of {joined.rows} rows are those without tensor parallelism"
        findings.append(Finding(name, "remark", f"{detail}; say how many aren't padding (--vocabulary-size)"))
    return "values", findings


def check_single_rank(whole: Checkpoint) -> None:
    """Refuse a checkpoint with tensor parallelism.

    Raises:
        MismatchError: it has several tensor-parallel ranks.
    """
    if whole.topology.tp > 1:
        raise MismatchError(
            f"{whole.path} is of {whole.topology.tp} tensor-parallel ranks; one of a single rank is needed"
        )


def copies_agree(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether all tensor-parallel ranks hold the same values of a parameter in every state."""
    parameter, degree = checkpoint.parameters[name], checkpoint.topology.tp
    layout = layouts_of({name: Replicate()}, {name: parameter.local_shapes}, degree, None, "the checkpoint")[name]
    ranks = HeldValues(checkpoint)
    try:
        return all(ranks.equal(parameter, state, _of_first_stage(layout, degree)) for state in parameter.states)
    finally:
        ranks.reader.close()


@dataclass(frozen=True, slots=True)
class Joined:
    """A parameter, joined by a pattern, compared with the one without tensor parallelism.

    Attributes:
        equal: number of rows at the beginning that have the same values, bit by bit; a row is all that lies at one place of
            dimension 0.
        rows: number of rows that were compared: all or, in a vocabulary, the rows that both have, or that aren't padding.
        told: whether the values can tell one state from another: a parameter that repeats one number can't.
    """

    equal: int
    rows: int
    told: bool

    @property
    def same(self) -> bool:
        """Return whether it is the same parameter."""
        return self.equal == self.rows

    @property
    def padded(self) -> bool:
        """Return whether the rows that differ may be padding: rows of two vocabularies behind the last word."""
        return self.rows > self.equal >= self.rows / 2


def joins_to(
    checkpoint: Checkpoint,
    whole: Checkpoint,
    name: str,
    pattern: Pattern,
    size: int | None = None,
    logical_of: tuple[Mapping[str, str], Mapping[str, str]] | None = None,
) -> Joined | None:
    """Compare a trained parameter, joined by a pattern, with the one without tensor parallelism.

    Args:
        name: logical name.
        size: rows of the vocabulary that aren't padding, if that is known.
        logical_of: names in both checkpoints → logical ones; by default the checkpoints' own names.

    Returns:
        None where they can't be compared: their shapes differ, or one of them isn't trained or holds another dtype.
    """
    own = {key: key for key in (*checkpoint.parameters, *whole.parameters)}
    names, whole_names = logical_of or (own, own)
    vocabulary = isinstance(pattern, Shard) and pattern.vocabulary
    reader = FileReader()
    try:
        one = UniversalView(checkpoint, names, {name: pattern}, None, {name}, check_record=False)
        other = UniversalView.of_single_rank(whole, whole_names, {name})
        if vocabulary and isinstance(pattern, Shard):
            held = [view.logical_shape(name)[pattern.dim] for view in (one, other)]
            rows = min(*held, held[0] if size is None else size)
            one = UniversalView(checkpoint, names, {name: pattern}, rows, {name}, check_record=False)
            other = UniversalView(whole, whole_names, {name: pattern}, rows, {name}, check_record=False)
        trained = one.parameters[name].kind == other.parameters[name].kind == "trainable"
        if not trained or one.logical_shape(name) != other.logical_shape(name):
            return None
        return _joined(one, other, name, reader)
    except MismatchError:
        return None
    finally:
        reader.close()


def whole_shape(parameter: Parameter) -> Shape:
    """Return the shape of a parameter without tensor parallelism, on the first pipeline stage that holds it."""
    return next(shape for shape in parameter.local_shapes if shape is not None)


def _fits(found: Shape, expected: Shape, pattern: Pattern) -> bool:
    """Return whether a logical shape is the expected one; a vocabulary may be padded differently on either side."""
    if isinstance(pattern, Shard) and pattern.vocabulary and len(found) == len(expected):
        return all(
            one == other for dim, (one, other) in enumerate(zip(found, expected, strict=True)) if dim != pattern.dim
        )
    return found == expected


def _differing_wholes(one: UniversalView, other: UniversalView, progress: Progress) -> tuple[list[str], bool]:
    """Return trained parameters whose values differ, and whether the two checkpoints have the same state.

    They have, if some parameter has the same values in both that no two initialisations share.
    """
    differing: list[str] = []
    same_state = False
    reader = FileReader()
    try:
        trained = {name: each for name, each in one.parameters.items() if each.kind == "trainable"}
        for name in passing(trained, progress):
            joined = _joined(one, other, name, reader)
            same_state |= joined is not None and joined.same and joined.told
            if joined is None or not joined.same:
                differing.append(name)
    finally:
        reader.close()
    return differing, same_state


def _joined(one: UniversalView, other: UniversalView, name: str, reader: FileReader) -> Joined | None:
    """Return the comparison as `Joined`; None for two dtypes."""
    dtype = one.parameters[name].states[MASTER]
    if other.parameters[name].states.get(MASTER) != dtype:
        return None
    integer, shape = INTEGERS[ITEMSIZE[dtype]], one.logical_shape(name)
    numel, step = prod(shape), tunables.COMPARED_NUMBYTES // ITEMSIZE[dtype]
    rows = shape[0] if shape else 1
    seen: set[int] = set()
    for start in range(0, numel, step):
        sides = [torch.empty(min(step, numel - start), dtype=NAMED_DTYPES[dtype]) for _ in range(2)]
        for view, side in zip((one, other), sides, strict=True):
            gather(view, name, MASTER, start, side, reader)
        left, right = (side.view(integer) for side in sides)
        if not torch.equal(left, right):
            first = start + int((left != right).int().argmax())
            return Joined(first * rows // numel, rows, True)
        seen |= {int(left.min()), int(left.max())}
    return Joined(rows, rows, len(seen) > 1)
