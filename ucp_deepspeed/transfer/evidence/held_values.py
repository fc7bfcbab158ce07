"""Compare what the ranks of a checkpoint, tied parameters or two checkpoints hold, a few rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass, replace
from math import prod

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.torch_files.safe_load import INTEGERS, NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Layout, Shape, Shard
from ucp_deepspeed.layout.layout import NOTHING, Piece
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import StridedView
from ucp_deepspeed.transfer.copying import FileReader, gather

UNTIE_HINT = (
    "one tensor can't hold both: let the model keep them apart, as \"tie_word_embeddings\": false in a Hugging Face model's "
    "configuration does"
)

Progress = Callable[[int, int], None]
"""Called with the number of bytes that have been compared, or needn't be, and the number of all bytes."""


def passing(parameters: Mapping[str, Parameter], progress: Progress) -> Iterator[str]:
    """Yield names of parameters, one after the other, and report how much of the ranks' part of them has been passed."""
    sizes = {
        name: sum(prod(shape) for shape in parameter.local_shapes if shape is not None)
        * sum(ITEMSIZE[dtype] for dtype in parameter.states.values())
        for name, parameter in parameters.items()
    }
    total, done = sum(sizes.values()), 0
    for name, numbytes in sizes.items():
        yield name
        done += numbytes
        progress(done, total)


def of_first_stage(layout: Layout, degree: int) -> Layout:
    """Return the layout on the first pipeline stage that holds something: nothing may train the copies on later ones."""
    first = next((rank for rank, local in enumerate(layout.locals) if local != NOTHING), 0) // degree
    locals_ = (local if rank // degree == first else NOTHING for rank, local in enumerate(layout.locals))
    return replace(layout, locals=tuple(locals_))


class HeldValues(AbstractContextManager["HeldValues"]):
    """The local tensors of a checkpoint's ranks, read a few rows at a time. A context manager, which closes the files."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.reader = checkpoint, FileReader(checkpoint.versions)

    def __exit__(self, *_: object) -> None:
        self.reader.close()

    def differing(self, parameter: Parameter, state: str, one: tuple[int, Piece], other: tuple[int, Piece]) -> int:
        """Return in how many elements, bit by bit, two ranks' copies of a logical box differ."""
        return sum(int((left != right).sum()) for left, right in self._pairs(parameter, state, one, other))

    def distance(self, parameter: Parameter, state: str, one: tuple[int, Piece], other: tuple[int, Piece]) -> float:
        """Return the squared distance of two copies of a logical box over the sum of their squares: 0 equal, 1 unrelated."""
        dtype = NAMED_DTYPES[parameter.states[state]]
        apart = total = 0.0
        for rows in self._pairs(parameter, state, one, other):
            left, right = (side.contiguous().view(dtype).double() for side in rows)
            apart += float((left - right).square().sum())
            total += float(left.square().sum() + right.square().sum())
        return apart / total if total else 0.0

    def equal(self, parameter: Parameter, layout: Layout, states: Iterable[str] | None = None) -> bool:
        """Return whether the local tensors of all ranks that hold one are equal, bit by bit, in some states or in all."""
        (first, mine), *others = [(rank, local.pieces) for rank, local in enumerate(layout.locals) if local.pieces]
        return all(
            torch.equal(left, right)
            for state in states or parameter.states
            for rank, pieces in others
            for own, piece in zip(mine, pieces, strict=True)
            for left, right in self._pairs(parameter, state, (first, own), (rank, piece))
        )

    def constant(self, parameter: Parameter, state: str, layout: Layout) -> bool:
        """Return whether the first rank that holds something holds one repeated number."""
        rank, local = next((rank, local) for rank, local in enumerate(layout.locals) if local.pieces)
        seen = {
            bits
            for piece in local.pieces
            for rows in self._rows(parameter, state, rank, piece)
            for bits in (int(rows.min()), int(rows.max()))
        }
        return len(seen) == 1

    def _pairs(
        self, parameter: Parameter, state: str, one: tuple[int, Piece], other: tuple[int, Piece]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return zip(self._rows(parameter, state, *one), self._rows(parameter, state, *other), strict=True)

    def _rows(self, parameter: Parameter, state: str, rank: int, piece: Piece) -> Iterator[torch.Tensor]:
        """Yield the bits of a piece of a rank's local tensor, as integers."""
        shape, box = parameter.local_shapes[rank], piece.local_box
        assert shape is not None
        if not shape:
            yield self.flat(parameter, state, rank, 0, 1)
            return
        row = prod(shape[1:])
        step = max(tunables.COMPARED_NUMBYTES // max(row * ITEMSIZE[parameter.states[state]], 1), 1)
        inner = (slice(None), *(slice(low, high) for low, high in zip(box.start[1:], box.stop[1:], strict=True)))
        for start in range(box.start[0], box.stop[0], step):
            stop = min(start + step, box.stop[0])
            flat = self.flat(parameter, state, rank, start * row, stop * row)
            yield flat.view(stop - start, *shape[1:])[inner]

    def flat(self, parameter: Parameter, state: str, rank: int, start: int, stop: int) -> torch.Tensor:
        """Return the bits of a flat interval of a rank's local tensor, as integers."""
        dtype = parameter.states[state]
        flat = torch.empty(stop - start, dtype=NAMED_DTYPES[dtype], device="cpu")
        for fragment in self.checkpoint.local_fragments(parameter.name, state, rank, start, stop):
            low, high = max(fragment.local_start, start), min(fragment.local_start + fragment.numel, stop)
            if low < high:
                at = fragment.buffer_start + low - fragment.local_start
                view: StridedView[FileExtent] = StridedView(fragment.buffer, at, (1,))
                self.reader.read_into(view, flat[low - start : high - start])
        return flat.view(INTEGERS[ITEMSIZE[dtype]])

    def parts(
        self, parameter: Parameter, state: str, rank: int, share: tuple[int, int] = (0, 1), numel: int | None = None
    ) -> Iterator[torch.Tensor]:
        """Yield the bits of a rank's local tensor, as integers, a few elements at a time.

        Args:
            share: the part of the elements to read, and the number of parts: ranks divide them.
            numel: how many elements to read, from the first on; by default all.
        """
        numel = prod(parameter.local_shapes[rank] or ()) if numel is None else numel
        first, last = (numel * part // share[1] for part in (share[0], share[0] + 1))
        step = tunables.COMPARED_NUMBYTES // max(ITEMSIZE.values())
        for start in range(first, last, step):
            yield self.flat(parameter, state, rank, start, min(start + step, last))


def differing_ties(
    checkpoint: Checkpoint, ties: Mapping[str, str], share: tuple[int, int] | None = (0, 1)
) -> list[str]:
    """Return a line for each parameter that differs, bit by bit, from the one that the model ties it to.

    Args:
        ties: name of a parameter → name of the parameter that the model has in its place.
        share: the part of the elements to look at, and the number of parts: ranks divide them. None to read no tensors.
    """
    with HeldValues(checkpoint) as held:
        found = {name: _difference(held, name, owner, share) for name, owner in ties.items()}
    return [
        f"{name}: tied to {ties[name]} in the model, and not in the checkpoint: {difference}; {UNTIE_HINT}"
        for name, difference in found.items()
        if difference is not None
    ]


def _difference(held: HeldValues, name: str, owner: str, share: tuple[int, int] | None) -> str | None:
    one, other = held.checkpoint.parameters[name], held.checkpoint.parameters[owner]
    # Where nothing tells what a weight is, it may be a second copy of the master that the optimizer has under the other name.
    copied = one.may_be_buffer and not other.may_be_buffer and one.states.keys() == {WEIGHT} and MASTER in other.states
    pairs = {WEIGHT: MASTER} if copied else {state: state for state in one.states}
    for what in ("local_shapes",) if copied else ("kind", "local_shapes", "scalars", "states"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if (mine, theirs) != (theirs, mine):
            return f"their {what.replace('_', ' ')} are {mine} and {theirs}"
    if copied and one.states[WEIGHT] != other.states[MASTER]:
        return f"their types are {one.states[WEIGHT]} and {other.states[MASTER]}"
    if share is None:
        return None
    for pair in pairs.items():
        for rank in (rank for rank, shape in enumerate(one.local_shapes) if shape is not None):
            both = zip((one, other), pair, strict=True)
            bits = (held.parts(each, state, rank, share) for each, state in both)
            if not all(torch.equal(*found) for found in zip(*bits, strict=True)):
                return f"their values of {pair[0]!r} differ"
    return None


@dataclass(frozen=True, slots=True)
class Joined:
    """A parameter, joined by a pattern, compared with the one without tensor parallelism.

    Attributes:
        equal: number of rows (places of dimension 0) at the beginning that have the same values, bit by bit.
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


class SingleRank:
    """A checkpoint, and one of the same model without tensor parallelism: with it, that is a MismatchError.

    Args:
        names, whole_names: names in both checkpoints → logical ones; by default the checkpoints' own names.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        whole: Checkpoint,
        names: Mapping[str, str] | None = None,
        whole_names: Mapping[str, str] | None = None,
    ) -> None:
        if whole.topology.tp > 1:
            degree = whole.topology.tp
            raise MismatchError(f"{whole.path} is of {degree} tensor-parallel ranks; one of a single rank is needed")
        self.checkpoint, self.whole = checkpoint, whole
        self._names = names or {name: name for name in checkpoint.parameters}
        self._whole_names = whole_names or {name: name for name in whole.parameters}
        self._wholes = {logical: whole.parameters[name] for name, logical in self._whole_names.items()}

    def shape(self, name: str) -> Shape | None:
        """Return the shape that a parameter has without tensor parallelism; None if the other checkpoint lacks it."""
        shapes = self._wholes[name].local_shapes if name in self._wholes else ()
        return next((shape for shape in shapes if shape is not None), None)

    def compared(
        self, patterns: Mapping[str, Pattern], size: int | None, progress: Progress
    ) -> dict[str, Joined | None]:
        """Compare trained parameters of the same shape, joined by patterns; None for two dtypes."""
        one = UniversalView(self.checkpoint, self._names, patterns, size, patterns)
        other = UniversalView.of_single_rank(self.whole, self._whole_names, patterns)
        trained = {name: each for name, each in one.parameters.items() if each.kind == "trainable"}
        with closing(FileReader()) as reader:
            return {name: _joined(one, other, name, reader) for name in passing(trained, progress)}

    def joins_to(self, name: str, pattern: Pattern, size: int | None = None) -> Joined | None:
        """Compare a trained parameter, joined by a pattern, with the one without tensor parallelism.

        None if they can't be compared: their shapes differ, or one of them isn't trained or holds another dtype. ``size``: rows
        of the vocabulary that aren't padding, if that is known.
        """
        patterns = {name: pattern}
        try:
            one = UniversalView(self.checkpoint, self._names, patterns, None, {name}, check_record=False)
            other = UniversalView.of_single_rank(self.whole, self._whole_names, {name})
            if isinstance(pattern, Shard) and pattern.vocabulary:
                held = [view.logical_shape(name)[pattern.dim] for view in (one, other)]
                rows = min(*held, held[0] if size is None else size)
                one = UniversalView(self.checkpoint, self._names, patterns, rows, {name}, check_record=False)
                other = UniversalView(self.whole, self._whole_names, patterns, rows, {name}, check_record=False)
            trained = one.parameters[name].kind == other.parameters[name].kind == "trainable"
            if not trained or one.logical_shape(name) != other.logical_shape(name):
                return None
            with closing(FileReader()) as reader:
                return _joined(one, other, name, reader)
        except MismatchError:
            return None


def _joined(one: UniversalView, other: UniversalView, name: str, reader: FileReader) -> Joined | None:
    """Compare a parameter of two views; None for two dtypes."""
    dtype = one.parameters[name].states[MASTER]
    if other.parameters[name].states.get(MASTER) != dtype:
        return None
    integer, shape = INTEGERS[ITEMSIZE[dtype]], one.logical_shape(name)
    numel, step = prod(shape), tunables.COMPARED_NUMBYTES // ITEMSIZE[dtype]
    rows = shape[0] if shape else 1
    seen: set[int] = set()
    for start in range(0, numel, step):
        sides = [torch.empty(min(step, numel - start), dtype=NAMED_DTYPES[dtype], device="cpu") for _ in range(2)]
        for view, side in zip((one, other), sides, strict=True):
            gather(view, name, MASTER, start, side, reader)
        left, right = (side.view(integer) for side in sides)
        if not torch.equal(left, right):
            first = start + int((left != right).int().argmax())
            return Joined(first * rows // numel, rows, True)
        seen |= {int(left.min()), int(left.max())}
    return Joined(rows, rows, len(seen) > 1)
