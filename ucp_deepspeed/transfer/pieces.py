"""Checks of what is read against the checksums of pieces, while it is in the processor's cache or soon after."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from xxhash import xxh3_64

from ucp_deepspeed.checkpoint.checksums import FileSums, damaged, sum_of


class PieceChecks:
    """Checks of one file. Thread-safe.

    A piece that one read holds whole is summed in its place, and so is one that several reads hold in the order of the file. Of
    others it is counted how much has been read; when that is all, `read` and `touched` return it, to be checked from the file,
    which the system has in memory. Bytes that are read twice count twice: a piece is then checked too early, which does no harm.

    Args:
        path: of the file, for messages.
    """

    def __init__(self, path: str, sums: FileSums) -> None:
        self._path, self._sums = path, sums
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
    ) -> list[int]:
        """Check the pieces in bytes from a place on. Return the numbers of pieces that others have completed.

        Args:
            fill: reads bytes from a place of the file on: a piece is summed as soon as it is there. By default all are there.

        Raises:
            DamagedCheckpointError: a piece isn't what was saved, or the bytes aren't those of one storage.
        """
        complete, stop = [], start + len(data)
        whole = 0
        sums: list[int] = []
        for number, low, high in self._sums.spans(self._numbers(start, stop)):
            if start <= low and high <= stop:
                part = data[low - start : high - start]
                fill(low, part)
                sums.append(sum_of(part))
                whole = number + 1 - len(sums)
            else:
                first = max(low, start)
                part = data[first - start : high - start]
                fill(first, part)
                if self._add_part(number, low, first, part, high):
                    complete.append(number)
        if sums:
            self._compare(whole, sums)
        return complete

    def _add_part(self, number: int, low: int, first: int, part: memoryview, high: int) -> bool:
        """Count and sum a part of a piece; return whether all of the piece has been read and must be read again to be checked."""
        with self._lock:
            upto, state = self._begun.pop(number) if number in self._begun else (low, xxh3_64())
            read = self._read.item(number) + len(part)
            self._read[number] = read
            done = read >= high - low and not self._checked.item(number)
        in_order = upto == first
        if in_order:
            state.update(part)
        if not done:
            if in_order:
                with self._lock:
                    self._begun[number] = first + len(part), state
            return False
        if not in_order or first + len(part) != high:
            return True
        self._compare(number, [state.intdigest()])
        return False

    def touched(self, start: int, stop: int, numbytes: int) -> list[int]:
        """Count bytes that were read evenly between two places. Return the numbers of pieces of which all has been read.

        Raises:
            DamagedCheckpointError: the bytes aren't those of one storage.
        """
        numbers = self._numbers(start, stop)
        if not numbers:
            return []
        first, last = numbers[0], numbers[-1]
        share = self._numbytes[first : last + 1].copy()
        share[0] -= start - self._sums.span(first)[0]
        share[-1] -= self._sums.span(last)[1] - stop
        return [first + each for each in self._add(first, last + 1, -(-share * numbytes // (stop - start)))]

    def _numbers(self, start: int, stop: int) -> range:
        if start == stop:
            return range(0)
        if (numbers := self._sums.pieces_of(start, stop)) is None:
            raise damaged(self._path, f"the places of its tensors, such as bytes {start} to {stop - 1},")
        return numbers

    def _add(self, first: int, behind: int, numbytes: int | np.ndarray) -> list[int]:
        """Count bytes of pieces; return the places among these of those that are now complete."""
        with self._lock:
            read = self._read[first:behind]
            read += numbytes
            done = (read >= self._numbytes[first:behind]) & ~self._checked[first:behind]
        return np.flatnonzero(done).tolist()

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
            self._read[first:behind] = np.maximum(self._read[first:behind], self._numbytes[first:behind])

    def compare_from(self, number: int, read: Callable[[int, int], memoryview]) -> int:
        """Compare a piece by a function that reads from one place to another; return its bytes. Errors are those of `read`."""
        low, high = self._sums.span(number)
        counted = int(self._read[number])
        self._compare(number, [sum_of(read(low, high))])
        with self._lock:
            self._read[number] = min(counted, high - low)  # the rest was read for the check alone
        return high - low

    def partly_read(self) -> list[tuple[float, int, int]]:
        """Return pieces that were read in part and not checked: the share that was read, their numbers, and their bytes."""
        numbers = np.flatnonzero((self._read > 0) & ~self._checked)
        shares = self._read[numbers] / self._numbytes[numbers]
        return list(zip(shares.tolist(), numbers.tolist(), self._numbytes[numbers].tolist(), strict=True))
