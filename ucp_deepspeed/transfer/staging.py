"""Ways to an accelerator: pinned buffers of the host, and streams on which copies go on while the next bytes are read."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

import torch

logger = logging.getLogger("ucp_deepspeed")


def pinned(numbytes: int) -> torch.Tensor:
    """Return bytes of host memory that an accelerator copies to and from by itself; plain memory, with a warning, if it can pin
    no more.

    torch pins blocks whose sizes are powers of two: other sizes waste memory.
    """
    with torch.inference_mode(False):  # later users may write to it outside of that mode
        try:
            return torch.empty(numbytes, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            logger.warning("%d bytes of host memory can't be pinned, so that copies are slower: %s", numbytes, error)
            return torch.empty(numbytes, dtype=torch.uint8, device="cpu")


class Lane:
    """One thread's way to an accelerator: a stream, and two pinned buffers that are used in turn.

    Args:
        numbytes: size of a buffer.
    """

    def __init__(self, device: torch.device, numbytes: int) -> None:
        self.device, self.stream = device, torch.Stream(device=device)
        self._both = pinned(2 * numbytes)
        self._buffers = self._both.split(numbytes)
        self._copied: list[torch.Event | None] = [None, None]
        self._turn = 0
        self._after: torch.Event | None = None

    def follow(self, event: torch.Event) -> None:
        """Begin what comes next on the device when the event has come there."""
        if event is not self._after:
            self.stream.wait_event(event)
            self._after = event

    def fill(self, target: torch.Tensor, dtype: torch.dtype, read: Callable[[torch.Tensor], object]) -> None:
        """Fill a tensor of the device, with any strides, and values that the device converts to its dtype.

        Args:
            dtype: type of the values that are read; they fit in a buffer.
            read: puts the values into contiguous memory of the target's shape.
        """
        self._turn = 1 - self._turn
        if (copied := self._copied[self._turn]) is not None:
            copied.synchronize()
        staged = self._buffers[self._turn][: target.numel() * dtype.itemsize].view(dtype).view(target.shape)
        read(staged)
        with self.stream:
            if target.is_contiguous() and target.dtype == dtype:
                target.copy_(staged, non_blocking=True)
            else:  # otherwise torch would convert on the host
                target.copy_(staged.to(self.device, non_blocking=True))
            self._copied[self._turn] = self.stream.record_event()

    def join(self) -> None:
        """Let what is queued later on the caller's current stream wait for what was filled."""
        torch.accelerator.current_stream(self.device).wait_stream(self.stream)


class Lanes:
    """A lane for each thread and device. What they fill counts as filled on the stream that is current for the caller of `follow`
    and `join`.

    Args:
        numbytes: size of a buffer; each lane has two.
    """

    def __init__(self, numbytes: int) -> None:
        self.numbytes = numbytes
        self._of_thread = threading.local()
        self._all: list[Lane] = []
        self._after: dict[torch.device, torch.Event] = {}

    def follow(self, device: torch.device) -> None:
        """Let lanes begin after what is queued on the device's current stream; once until `join`."""
        if device not in self._after:
            self._after[device] = torch.accelerator.current_stream(device).record_event()

    def fill(self, target: torch.Tensor, dtype: torch.dtype, read: Callable[[torch.Tensor], object]) -> None:
        """Fill a tensor by the calling thread's lane; see `Lane.fill`."""
        mine = vars(self._of_thread)
        if (lane := mine.get(str(target.device))) is None:
            lane = mine[str(target.device)] = Lane(target.device, self.numbytes)
            self._all.append(lane)
        lane.follow(self._after[target.device])
        lane.fill(target, dtype, read)

    def join(self) -> None:
        """Let what is queued later on current streams wait for what was filled."""
        for lane in self._all:
            lane.join()
        self._after = {}

    def close(self) -> None:
        """Wait for what was filled; no other thread may use the lanes any more."""
        for lane in self._all:
            lane.stream.synchronize()
