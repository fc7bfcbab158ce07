"""A checkpoint beside one of the same model without tensor parallelism: are joined shards the whole parameters?"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from math import prod

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import MASTER, Checkpoint
from ucp_deepspeed.checkpoint.torch_files.reading import INTEGERS, NAMED_DTYPES
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.layout import Shape, Shard
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.transfer.copying import FileReader, gather
from ucp_deepspeed.transfer.evidence.held_values import Progress, passing


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
    """A checkpoint, and one of the same model without tensor parallelism.

    Args:
        names, whole_names: names in both checkpoints → logical ones; by default the checkpoints' own names.

    Raises:
        MismatchError: the second checkpoint has several tensor-parallel ranks.
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

        Args:
            size: rows of the vocabulary that aren't padding, if that is known.

        Returns:
            None where they can't be compared: their shapes differ, or one of them isn't trained or holds another dtype.
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
        sides = [torch.empty(min(step, numel - start), dtype=NAMED_DTYPES[dtype]) for _ in range(2)]
        for view, side in zip((one, other), sides, strict=True):
            gather(view, name, MASTER, start, side, reader)
        left, right = (side.view(integer) for side in sides)
        if not torch.equal(left, right):
            first = start + int((left != right).int().argmax())
            return Joined(first * rows // numel, rows, True)
        seen |= {int(left.min()), int(left.max())}
    return Joined(rows, rows, len(seen) > 1)
