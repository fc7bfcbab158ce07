"""Compare two checkpoints through their universal views: element by element, bit by bit, in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import GROUP_STEP, IMPLEMENTATION_SWITCHES, Checkpoint, step_in_group
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.one_save import check_one_save, places_of
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.extra_states import shared_extra_states, under_other_keys
from ucp_deepspeed.checkpoint.torch_files.records import RecordSums
from ucp_deepspeed.checkpoint.torch_files.safe_load import INTEGERS, NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.transfer.copying import FileReader, gather
from ucp_deepspeed.transfer.stage_copies import look, may_differ, settle, with_copies_of

What = (
    Literal["presence", "copies", "kind", "shape", "states", "dtype", "elements", "scalar", "hyperparameter"]
    | Literal["counter", "lr_scheduler", "loss_scale", "extra_state"]
)


@dataclass(frozen=True, slots=True)
class Difference:
    """A respect in which two checkpoints differ.

    Attributes:
        name: the parameter, or the name of a value of the run (``global_steps``).
        what: see `What`.
        detail: both sides, in words.
        state: for ``dtype`` and ``elements``, the state.
        count: for ``elements``, how many differ.
        first_index: for ``elements``, logical index of the first differing element in row-major order.
        max_abs: for ``elements`` of a floating-point type, the largest absolute difference; NaN if one side has a NaN.
    """

    name: str
    what: What
    detail: str
    state: str | None = None
    count: int | None = None
    first_index: Shape | None = None
    max_abs: float | None = None

    def __str__(self) -> str:
        state = f"/{self.state}" if self.state is not None else ""
        return f"{self.name}{state}: {self.detail}"


def compare(
    view_a: UniversalView,
    view_b: UniversalView,
    *,
    chunk_numbytes: int = tunables.COMPARED_NUMBYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Difference]:
    """Return everything in which two checkpoints differ; empty when a run resumed from either would be in the same state.

    It compares which parameters exist and their kinds, global shapes, states and dtypes; every element; scalars such as ``step``,
    on each partition where these differ; the hyper-parameters of each parameter, in the same way and without
    `IMPLEMENTATION_SWITCHES`; the modules' extra states; the run's counters, learning-rate scheduler and, where both sides scale
    the loss, the values that both record of it. It doesn't compare precision, topology and client state.

    Args:
        chunk_numbytes: bytes of each side to hold at a time.
        progress: called with (bytes compared, bytes to compare) of one side after each chunk.

    Raises:
        DamagedCheckpointError: a file is missing, truncated or isn't what was saved, or was changed meanwhile.
        MismatchError: a checkpoint doesn't hold each element of its parameters exactly once, or no state of its optimizer.
    """
    for view in (view_a, view_b):
        if view.checkpoint.lacking is not None:  # equal weights alone would count as equal checkpoints
            raise view.checkpoint.lacking
        if isinstance(view.checkpoint, DeepSpeedCheckpoint):
            check_one_save(view.checkpoint, places_of(view.checkpoint))
    view_a, undecided_a = _of_trained(view_a)
    view_b, undecided_b = _of_trained(view_b)
    found = [Difference(name, "presence", "only in A") for name in view_a.parameters if name not in view_b.parameters]
    found += [Difference(name, "presence", "only in B") for name in view_b.parameters if name not in view_a.parameters]
    found += _copies(view_a, view_b, undecided_a, undecided_b, chunk_numbytes)
    hyper_a, hyper_b = _hyperparameters(view_a), _hyperparameters(view_b)
    sides = _Side(view_a, chunk_numbytes), _Side(view_b, chunk_numbytes)
    common = [name for name in view_a.parameters if name in view_b.parameters]
    total = sum(sum(_common(view_a, view_b, name).values()) for name in common)
    with closing(sides[0].reader), closing(sides[1].reader):
        for name in common:
            found += _parameter(*sides, name, lambda: progress(sides[0].numbytes_read, total))
            found += _mapping(name, "hyperparameter", hyper_a.get(name, {}), hyper_b.get(name, {}))
        for side in sides:
            side.sums.finish()
            side.reader.finish()
    one, other = view_a.checkpoint.extra_states(), view_b.checkpoint.extra_states()
    names_in_a = {logical: name for name, logical in view_a.logical_of.items()}
    pairs = {name: names_in_a[logical] for name, logical in view_b.logical_of.items() if logical in names_in_a}
    other = under_other_keys(other, pairs, {key for held in one for key in held})
    found += _mapping("extra_state", "extra_state", _extra_states(one), _extra_states(other))
    found += _run(view_a.checkpoint, view_b.checkpoint)
    for side in sides:
        side.view.checkpoint.versions.check()
    return found


@dataclass(frozen=True)
class _Undecided:
    """A parameter whose copies differ over pipeline stages, where nothing tells which was trained."""

    name: str
    stages: tuple[int, ...]
    why: str


def _of_trained(view: UniversalView) -> tuple[UniversalView, Mapping[str, _Undecided]]:
    """Return the view with the trained copy of each parameter; and, by logical name, those of which it has the first copy."""
    copies = may_differ(view.checkpoint)
    if not copies:
        return view, {}
    settled = settle(view.checkpoint, copies, look(view.checkpoint, copies), "error")
    problems = (problem.split(": ", 1) for problem in settled.problems)
    undecided = {
        view.logical_of[name]: _Undecided(name, copies[name], why) for name, why in problems if name in view.logical_of
    }
    return view.over(with_copies_of(view.checkpoint, settled.stages)), undecided


def _copies(
    a: UniversalView, b: UniversalView, in_a: Mapping[str, _Undecided], in_b: Mapping[str, _Undecided], numbytes: int
) -> Iterator[Difference]:
    """Yield differences of the later copies where both sides hold several values; one difference where only one does."""
    for name in dict.fromkeys((*in_a, *in_b)):
        one, other = in_a.get(name), in_b.get(name)
        if one is None or other is None or len(one.stages) != len(other.stages):
            told = (f"in {side} {held.why}" for side, held in (("A", one), ("B", other)) if held is not None)
            yield Difference(name, "copies", "; ".join(told))
            continue
        for stages in zip(one.stages[1:], other.stages[1:], strict=True):
            pairs = zip((a, b), (one, other), stages, strict=True)
            views = [v.over(with_copies_of(v.checkpoint, {held.name: stage})) for v, held, stage in pairs]
            side_a, side_b = (_Side(view, numbytes) for view in views)
            with closing(side_a.reader), closing(side_b.reader):
                yield from _parameter(side_a, side_b, name)


class _Side:
    """A side of a comparison: a checkpoint's view, its open files, and the one buffer that its elements pass through."""

    def __init__(self, view: UniversalView, chunk_numbytes: int) -> None:
        self.view = view
        self.sums = RecordSums()
        self.reader = FileReader(view.checkpoint.versions, sums=self.sums)
        self.buffer = torch.empty(max(chunk_numbytes // 8, 1) * 8, dtype=torch.uint8, device="cpu")
        self.numbytes_read = 0
        self._steps = _steps_in_groups(view)

    def numbers(self, name: str) -> dict[str, Any]:
        """Return a parameter's states that are one number, on each partition where they differ; see `step_in_group`."""
        parameter = self.view.parameters[name]
        counted = {GROUP_STEP: self._steps[name]} if name in self._steps else {}
        return {**counted, **parameter.scalars, **parameter.differing}

    def elements(self, name: str, state: str, start: int, numel: int) -> torch.Tensor:
        """Return consecutive elements of a parameter's state; valid until the next call."""
        dtype = self.view.parameters[name].states[state]
        target = self.buffer[: numel * ITEMSIZE[dtype]].view(NAMED_DTYPES[dtype])
        gather(self.view, name, state, start, target, self.reader)
        self.numbytes_read += target.nbytes
        return target


def _common(a: UniversalView, b: UniversalView, name: str) -> dict[str, int]:
    """Return the states of a parameter whose elements can be compared → their size in bytes."""
    if a.logical_shape(name) != b.logical_shape(name):
        return {}
    numel, others = math.prod(a.logical_shape(name)), b.parameters[name].states
    held = a.parameters[name].states
    return {state: numel * ITEMSIZE[dtype] for state, dtype in held.items() if others.get(state) == dtype}


def _parameter(
    side_a: _Side, side_b: _Side, name: str, done: Callable[[], None] = lambda: None
) -> Iterator[Difference]:
    a, b = side_a.view, side_b.view
    one, other = a.parameters[name], b.parameters[name]
    untold = (one.may_be_buffer and other.kind == "buffer") or (other.may_be_buffer and one.kind == "buffer")
    if one.kind != other.kind and not untold:
        yield Difference(name, "kind", f"{one.kind} in A, {other.kind} in B")
    for state in sorted(one.states.keys() ^ other.states.keys()):
        yield Difference(name, "states", f"state {state!r} only in {'A' if state in one.states else 'B'}")
    yield from _mapping(name, "scalar", side_a.numbers(name), side_b.numbers(name))
    if a.logical_shape(name) != b.logical_shape(name):
        yield Difference(name, "shape", f"{list(a.logical_shape(name))} in A, {list(b.logical_shape(name))} in B")
        return
    for state, dtype in one.states.items():
        if other.states.get(state, dtype) != dtype:
            yield Difference(name, "dtype", f"{dtype} in A, {other.states[state]} in B", state)
    for state in _common(a, b, name):
        yield from _elements(side_a, side_b, name, state, done)


def _elements(a: _Side, b: _Side, name: str, state: str, done: Callable[[], None]) -> Iterator[Difference]:
    dtype = a.view.parameters[name].states[state]
    shape = a.view.logical_shape(name)
    numel = math.prod(shape)
    step = a.buffer.numel() // ITEMSIZE[dtype]
    count, first, largest = 0, -1, 0.0
    for start in range(0, numel, step):
        left, right = (side.elements(name, state, start, min(step, numel - start)) for side in (a, b))
        done()
        integer = INTEGERS[ITEMSIZE[dtype]]
        if torch.equal(left.view(integer), right.view(integer)):
            continue
        differing = left.view(integer) != right.view(integer)
        if first < 0:
            first = start + int(differing.to(torch.uint8).argmax())
        count += int(differing.sum())
        if left.is_floating_point():
            gap = float((left[differing].double() - right[differing].double()).abs().max())
            largest = gap if math.isnan(gap) or gap > largest else largest  # a NaN stays: nothing is greater than it
    if count:
        index = (
            tuple(int(position) for position in torch.unravel_index(torch.tensor(first, device="cpu"), shape))
            if shape
            else ()
        )
        max_abs = largest if NAMED_DTYPES[dtype].is_floating_point else None
        detail = f"{count} of {numel} elements differ, first at {list(index)}"
        detail += "" if max_abs is None else f", at most by {max_abs:.6g}"
        yield Difference(name, "elements", detail, state, count, index, max_abs)


def _hyperparameters(view: UniversalView) -> dict[str, dict[str, Any]]:
    """Return the hyper-parameters by parameter: groups may be cut and ordered in another way and mean the same."""
    found: dict[str, dict[str, Any]] = {}
    counted = _steps_in_groups(view)
    for group in view.groups:
        values = {**group.hyperparameters, **group.differing}
        meant = {key: value for key, value in values.items() if key not in IMPLEMENTATION_SWITCHES}
        if meant.get(GROUP_STEP) == 0 or not counted.keys().isdisjoint(group.names):
            del meant[GROUP_STEP]  # no step has been taken, none is counted here, or it is that of the parameters
        found |= dict.fromkeys(group.names, meant)
    return found


def _steps_in_groups(view: UniversalView) -> dict[str, Any]:
    """Return by parameter the step that its group alone counts, or the step of each partition if these differ."""
    return {
        name: group.differing.get(GROUP_STEP, step)
        for group in view.groups
        for name in group.names
        if name in view.parameters and (step := step_in_group(view.parameters[name], group.hyperparameters)) is not None
    }


def _extra_states(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one value for each module, or all ranks' values where they differ."""
    shared, _ = shared_extra_states(found)
    names = dict.fromkeys(name for held in found for name in held)
    return {name: shared.get(name, [held.get(name) for held in found]) for name in names}


def _run(a: Checkpoint, b: Checkpoint) -> Iterator[Difference]:
    for counter in ("global_steps", "global_samples", "skipped_steps"):
        one, other = getattr(a.run, counter), getattr(b.run, counter)
        if one != other:
            yield Difference(counter, "counter", f"{one} in A, {other} in B")
    one, other = a.run.lr_scheduler, b.run.lr_scheduler
    if one is not None and other is not None:
        yield from _mapping("lr_scheduler", "lr_scheduler", one, other)
    elif one is not other:
        yield Difference("lr_scheduler", "lr_scheduler", f"only in {'B' if one is None else 'A'}")
    if a.run.loss_scale is not None and b.run.loss_scale is not None:
        one, other = a.run.loss_scale.values, b.run.loss_scale.values
        common = one.keys() & other.keys()  # each class of scaler keeps other settings besides
        yield from _mapping("loss_scale", "loss_scale", *({key: side[key] for key in common} for side in (one, other)))


def _mapping(name: str, what: What, a: Any, b: Any) -> Iterator[Difference]:
    """Yield differences of two mappings, with keys of any kind, or of the values that a run keeps instead of one."""
    if not isinstance(a, Mapping) or not isinstance(b, Mapping):
        if not same_value(a, b):
            yield Difference(name, what, f"{a!r} in A, {b!r} in B")
        return
    for key in sorted(a.keys() | b.keys(), key=lambda key: (type(key).__name__, str(key))):
        if key not in a or key not in b:
            side, held = ("A", a) if key in a else ("B", b)
            yield Difference(name, what, f"{key} = {held[key]!r} only in {side}")
        elif not same_value(a[key], b[key]):
            yield Difference(name, what, f"{key} is {a[key]!r} in A, {b[key]!r} in B")
