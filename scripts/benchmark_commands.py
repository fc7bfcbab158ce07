"""Whole commands that ``benchmark.py`` measures: conversions and copies, from start to end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from benchmark_ranks import TAG, Measured, io_of_self, memory_in

TIMEOUT = 1800.0

WATCH_SECONDS = 0.05
"""Between two looks at a command's memory and disk."""


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Turn SIGTERM, Ctrl-C and SIGHUP into SystemExit inside the block, once: another one doesn't disturb the cleaning up.

    Ignored signals, as SIGHUP is under nohup, stay ignored.
    """
    numbers = [
        number
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        if signal.getsignal(number) != signal.SIG_IGN
    ]

    def end(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(128 + signum)

    previous = {number: signal.signal(number, end) for number in numbers}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def converter(source: Path, target: Path, workers: int) -> list[object]:
    """The package's own command."""
    return [Path(sys.executable).parent / "ucp", "convert", source, target, "--workers", workers]


def deepspeed_converter(source: Path, target: Path, workers: int) -> list[object]:
    """DeepSpeed's."""
    module = "deepspeed.checkpoint.ds_to_universal"
    options = ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    return [sys.executable, "-m", module, "--input_folder", source / TAG, "--output_folder", target, *options]


def exporter(source: Path, target: Path, workers: int) -> list[object]:
    """The package's own command for fp32 weights."""
    options = ["--to", "torch", "--source", "master", "--workers", workers]
    return [Path(sys.executable).parent / "ucp", "export", source, target, *options]


def deepspeed_exporter(source: Path, target: Path) -> list[object]:
    """DeepSpeed's, which makes one file of models up to this size."""
    return [sys.executable, "-m", "deepspeed.utils.zero_to_fp32", source, target, "--max_shard_size", "1000GB"]


def forget_pages(folder: Path) -> None:
    """Have the kernel drop what it keeps of these files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def run_command(command: Sequence[object], target: Path, keep: bool = False) -> Measured:
    """Run a command that makes a folder; its memory is that of all of its processes together."""
    shutil.rmtree(target, ignore_errors=True)
    read, written = io_of_self()
    started = time.perf_counter()
    process = subprocess.Popen(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # with all that it starts, which goes on otherwise when it is killed
    )
    watcher = _Watcher(process.pid, target)
    watcher.start()
    try:
        output, _ = process.communicate(timeout=TIMEOUT)
        seconds = time.perf_counter() - started
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()  # until all of them have ended, and write nothing any more
        raise
    finally:
        watcher.end()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{output[-4000:]}")
    io = io_of_self()
    numbytes, files = size(target)
    if not keep:
        shutil.rmtree(target)
    return Measured(
        seconds,
        io[0] - read - watcher.own_reads,
        io[1] - written,
        files,
        watcher.memory,
        max(watcher.disk - numbytes, 0),
    )


class _Watcher(threading.Thread):
    """Looks at what a process and its children hold in memory, and at what there is in a folder."""

    def __init__(self, pid: int, folder: Path) -> None:
        super().__init__()
        self._pid, self._folder, self._done = pid, folder, threading.Event()
        self.memory, self.disk, self.own_reads = 0, 0, 0

    def run(self) -> None:
        while not self._done.wait(WATCH_SECONDS):
            held = [self._read(f"{process}/status") for process in self._tree(str(self._pid))]
            self.memory = max(self.memory, sum(map(memory_in, held)))
            self.disk = max(self.disk, size(self._folder)[0])

    def end(self) -> None:
        """When the process has ended."""
        self._done.set()
        self.join()

    def _tree(self, pid: str) -> Iterator[str]:
        yield pid
        for child in self._read(f"{pid}/task/{pid}/children").split():
            yield from self._tree(child)

    def _read(self, name: str) -> str:
        with suppress(OSError):  # it has ended meanwhile
            found = (Path("/proc") / name).read_text()
            self.own_reads += len(found)
            return found
        return ""


def size(folder: Path) -> tuple[int, int]:
    """Bytes and number of the files in a folder."""
    numbytes, files = 0, 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a temporary file that is gone by now
                numbytes += (Path(parent) / name).stat().st_size
                files += 1
    return numbytes, files
