"""Faults of the environment for ``scripts/torture_disks.py``, which a process switches on for itself and off again.

System calls fail by a library that is loaded before all others (``torture_disks.c``); limits are the system's own; modes of files
apply to root once it has given up the capability to override them.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CALLS: Mapping[str, int] = {
    "open": 1,
    "read": 2,
    "write": 4,
    "sync": 8,
    "rename": 16,
    "close": 32,
    "map": 64,
    "stat": 128,
    "list": 256,
    "make": 512,
    "remove": 1024,
    "truncate": 2048,
    "lock": 4096,
}
"""Kinds of calls → their bits in ``torture_disks.c``."""

COUNT, FAIL, SHORT, FULL, CUTS = range(5)
"""Effects on a call: it is only counted; it fails; it does half of what it should; it fails when a disk would be full; a
file becomes shorter before it."""

ALWAYS = 1 << 40
"""Number of a last call that no process reaches."""

CAPABILITIES = 1 << 1 | 1 << 2
"""``CAP_DAC_OVERRIDE`` and ``CAP_DAC_READ_SEARCH``."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        calls: kinds of calls that fail, of `CALLS`; empty for none.
        first, last: numbers of the calls that fail, from 1 on.
        number: errno.
        how: one of `COUNT`, `FAIL`, `SHORT`, `FULL`, `CUTS`.
        room: bytes that can be written, for `FULL`.
        cut: file that becomes shorter, for `CUTS`.
        limits: limit of ``resource`` → its soft value. That of memory counts from what the process has.
        kills: whether the signal of the size limit has its usual effect.
        modes: whether the modes of files apply.
        umask: the process's umask.
        clock: seconds by which the clock is wrong.
        ranks: ranks that have the fault.
    """

    calls: tuple[str, ...] = ()
    first: int = 1
    last: int = 1
    number: int = errno.EIO
    how: int = FAIL
    room: int = 0
    cut: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)
    kills: bool = False
    modes: bool = False
    umask: int | None = None
    clock: int = 0
    ranks: tuple[int, ...] = (0, 1)


def preload(folder: Path) -> None:
    """Compile the library, and have processes that start from now on load it."""
    library = folder / "torture_disks.so"
    source = Path(__file__).with_name("torture_disks.c")
    subprocess.run(["gcc", "-O1", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    os.environ["LD_PRELOAD"] = str(library)


@dataclass
class Met:
    """The calls that a process has made below the folder, by kind, and how many of them failed."""

    calls: dict[str, int] = field(default_factory=dict)
    failed: int = 0


@contextmanager
def placed(fault: Fault, folder: str, for_ever: bool = False) -> Iterator[Met]:
    """Have a fault in the block, for files below a folder.

    Args:
        for_ever: the process can't raise its limits again.
    """
    library, met = ctypes.CDLL(None), Met()
    limits = {getattr(resource, name): value for name, value in fault.limits.items()}
    before = {limit: resource.getrlimit(limit) for limit in limits}
    if resource.RLIMIT_AS in limits:
        limits[resource.RLIMIT_AS] += _numbytes_of_process()
    if resource.RLIMIT_NOFILE in limits:
        limits[resource.RLIMIT_NOFILE] += len(os.listdir("/dev/fd"))  # noqa: PTH208
    umask = None if fault.umask is None else os.umask(fault.umask)
    library.fault_clock(ctypes.c_long(fault.clock))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_DFL) if fault.kills else None
    kept = _take_capabilities() if fault.modes else None
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value if for_ever else before[limit][1]))
    if fault.calls or fault.how == COUNT:
        bits = sum(CALLS[call] for call in fault.calls)
        first, last, room = map(ctypes.c_long, (fault.first, fault.last, fault.room))
        library.fault_arm(os.fsencode(folder), bits, first, last, fault.number, fault.how, room, os.fsencode(fault.cut))
    try:
        yield met
    finally:
        if fault.calls or fault.how == COUNT:
            counts = (ctypes.c_long * 16)()
            met.failed = library.fault_disarm(counts)
            met.calls = dict(zip(CALLS, counts, strict=False))
        for limit, values in before.items() if not for_ever else ():
            resource.setrlimit(limit, values)
        if kept is not None:
            _set_capabilities(kept)
        if handler is not None:
            signal.signal(signal.SIGXFSZ, handler)
        library.fault_clock(ctypes.c_long(0))
        if umask is not None:
            os.umask(umask)


def _numbytes_of_process() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


_Header, _Sets = ctypes.c_uint32 * 2, ctypes.c_uint32 * 6
_VERSION = 0x20080522
_CAPGET, _CAPSET = (125, 126) if os.uname().machine == "x86_64" else (90, 91)


def _take_capabilities() -> list[int]:
    """Give up, in this thread and those that it starts, what lets root pass over the modes of files; return what there was."""
    sets = _Sets()
    ctypes.CDLL(None).syscall(_CAPGET, _Header(_VERSION, 0), sets)
    before = list(sets)
    _set_capabilities([before[0] & ~CAPABILITIES, *before[1:]])
    return before


def _set_capabilities(sets: list[int]) -> None:
    if ctypes.CDLL(None).syscall(_CAPSET, _Header(_VERSION, 0), _Sets(*sets)):
        raise OSError("capset failed")
