"""Checks of what is read against the checksums of pieces, while it is in the processor's cache or soon after."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from xxhash import xxh3_64

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checksums import FileSums, damaged, sum_of


class PieceChecks:
    """Checks of one file. Thread-safe.

    A piece that one read holds whole is summed in its place, and so is one that several reads hold in the order of the file. What
    lies between two of them is read for the sum alone if it is little, such as a bias that is taken from another file. Of other
    pieces it is counted how much has been read; when that is all, what hasn't been summed is read again, which the system has in
    memory. Bytes that are read twice count twice: a piece is then checked too early, which does no harm.

    Args:
        path: of the file, for messages.
        again: reads the file from one place to another.
    """

    def __init__(self, path: str, sums: FileSums, again: Callable[[int, int], memoryview]) -> None:
        self._path, self._sums, self._again = path, sums, again
        numbytes = [min(sums.piece, length - low) for _, length in sums.ranges for low in range(0, length, sums.piece)]
        self._numbytes = np.array(numbytes, dtype=np.int64)
        self._read = np.zeros_like(self._numbytes)
        self._checked = np.zeros(len(numbytes), dtype=bool)
        self._begun: dict[int, tuple[int, xxh3_64]] = {}
        """Pieces of which the beginning has been summed: up to where, and its sum."""
        self._lock = threading.Lock()

    @property
    def bytes_checked(self) -> int:
        """Bytes that were read and lie in pieces that agree with their sums."""
        return int(np.minimum(self._read, self._numbytes)[self._checked].sum())

    @property
    def bytes_read(self) -> int:
        """Bytes that were read."""
        return int(self._read.sum())

    def read(
        self, start: int, data: memoryview, fill: Callable[[int, memoryview], None] = lambda place, part: None
    ) -> None:
        """Check the pieces in bytes from a place on.

        Args:
            fill: reads bytes from a place of the file on: a piece is summed as soon as it is there. By default all are there.

        Raises:
            DamagedCheckpointError: a piece isn't what was saved, or the bytes aren't those of one storage.
        """
        stop, behind = start + len(data), 0
        sums: list[int] = []
        for number, low, high in self._sums.spans(self._numbers(start, stop)):
            first = max(low, start)
            part = data[first - start : high - start]
            fill(first, part)
            if len(part) == high - low:
                sums.append(sum_of(part))
                behind = number + 1
            else:
                self._add_part(number, low, high, first, part)
        if sums:
            whole = slice(behind - len(sums), behind)
            with self._lock:
                self._read[whole] = self._numbytes[whole]
            self._compare(whole.start, sums)

    def _add_part(self, number: int, low: int, high: int, first: int, part: memoryview) -> None:
        """Count and sum a part of a piece, and check the piece once all of it has been summed or read."""
        behind = first + len(part)
        with self._lock:
            read = self._read.item(number) + len(part)
            self._read[number] = read
            if self._checked.item(number):
                return
            upto, state = self._begun.pop(number, (low, xxh3_64()))
        if upto < first <= upto + len(part) * tunables.MOST_BETWEEN:
            state.update(self._again(upto, first))
            upto = first
        if first <= upto < behind:
            state.update(part[upto - first :])
            upto = behind
        with self._lock:
            self._begun[number] = upto, state
        if upto == high or read >= high - low:
            self.check(number)

    def touched(self, start: int, stop: int, numbytes: int) -> None:
        """Count bytes that were read evenly between two places, and check pieces of which all has been read. Errors are those of
        `read`."""
        numbers = self._numbers(start, stop)
        if not numbers:
            return
        first, last = numbers[0], numbers[-1]
        share = self._numbytes[first : last + 1].copy()
        share[0] -= start - self._sums.span(first)[0]
        share[-1] -= self._sums.span(last)[1] - stop
        with self._lock:
            read = self._read[first : last + 1]
            read += -(-share * numbytes // (stop - start))
            done = (read >= self._numbytes[first : last + 1]) & ~self._checked[first : last + 1]
        for each in np.flatnonzero(done).tolist():
            self.check(first + each)

    def check(self, number: int) -> None:
        """Check a piece that was read in part. Bytes that are read for that alone don't count. Errors are those of `read`."""
        low, high = self._sums.span(number)
        with self._lock:
            upto, state = self._begun.pop(number, (low, xxh3_64()))
        if upto < high:
            state.update(self._again(upto, high))
        self._compare(number, [state.intdigest()])

    def _numbers(self, start: int, stop: int) -> range:
        if start == stop:
            return range(0)
        if (numbers := self._sums.pieces_of(start, stop)) is None:
            raise damaged(self._path, f"the places of its tensors, such as bytes {start} to {stop - 1},")
        return numbers

    def _compare(self, first: int, found: list[int]) -> None:
        """Compare the sums of pieces that follow one another.

        Raises:
            DamagedCheckpointError: one isn't what was saved.
        """
        behind = first + len(found)
        saved = self._sums.of_pieces[first:behind].tolist()
        if saved != found:
            wrong = next(number for number, (a, b) in enumerate(zip(saved, found, strict=True), first) if a != b)
            low, high = self._sums.span(wrong)
            raise damaged(self._path, f"bytes {low} to {high - 1}")
        with self._lock:
            for number in self._begun.keys() & range(first, behind):
                del self._begun[number]
            self._checked[first:behind] = True

    def partly_read(self) -> list[tuple[float, int, int]]:
        """Return pieces that were read in part and not checked: the share that was read, their numbers, and their bytes."""
        numbers = np.flatnonzero((self._read > 0) & ~self._checked)
        shares = self._read[numbers] / self._numbytes[numbers]
        return list(zip(shares.tolist(), numbers.tolist(), self._numbytes[numbers].tolist(), strict=True))
