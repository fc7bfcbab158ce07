"""The results of ``benchmark.py``: tables, a chart, and the machine that it holds for."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import matplotlib
from benchmark_profile import Phases
from benchmark_ranks import Measured

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True, slots=True)
class Pair:
    """One way's two runs right after one another: with files that the kernel no longer keeps, and with those that it does."""

    cold: Measured
    warm: Measured


@dataclass(frozen=True, slots=True)
class Runs:
    """All of one way: ``watched`` tells what it takes, and ``timed`` how long."""

    watched: Pair
    timed: list[Pair] = field(default_factory=list)

    def after(self, first: Pair) -> Runs:
        """Each with something else before it that was measured once."""
        pairs = [Pair(pair.cold.after(first.cold), pair.warm.after(first.warm)) for pair in (self.watched, *self.timed)]
        return Runs(pairs[0], pairs[1:])

    def seconds(self, kind: str) -> list[float]:
        """Seconds of each run; those of the watched run if there is no other."""
        return [getattr(pair, kind).seconds for pair in self.timed or [self.watched]]

    @property
    def extra_memory(self) -> int | None:
        """Peak memory, with what the first run kept for later ones, such as buffers for saving in the background."""
        held = [pair.extra_memory for pair in (self.watched.cold, self.watched.warm)]
        return max((each for each in held if each is not None), default=None)


@dataclass(frozen=True, slots=True)
class Result:
    """One way's figures: ``warm`` and ``cold`` are medians of the runs' seconds, ``ratio`` is the first over that of the first
    way, which is ours; for the others see `Measured`.
    """

    operation: str
    way: str
    warm: float
    cold: float
    ratio: float
    bytes_read: int | None
    bytes_written: int | None
    files: int | None
    extra_memory: int | None
    temporary: int | None
    bytes_counted: int | None
    warm_runs: list[float]
    cold_runs: list[float]


def result_of(operation: str, way: str, runs: Runs, ours: float) -> Result:
    """Return the figures of one way.

    Args:
        ours: median of our warm seconds.
    """
    warm, cold, taken = runs.seconds("warm"), runs.seconds("cold"), runs.watched.warm
    return Result(
        operation,
        way,
        statistics.median(warm),
        statistics.median(cold),
        statistics.median(warm) / ours,
        taken.bytes_read,
        taken.bytes_written,
        taken.files,
        runs.extra_memory,
        taken.temporary,
        taken.bytes_counted,
        warm,
        cold,
    )


def table_of(results: Sequence[Result]) -> str:
    """One row a way; empty where a figure is unknown."""
    rows = [
        "| operation | way | warm s | cold s | × ours | MB read | MB written | files | extra MB | temporary MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        seconds = f"{result.warm:.2f} | {result.cold:.2f} | {result.ratio:.2f}"
        numbers = [result.bytes_read, result.bytes_written, result.files, result.extra_memory, result.temporary]
        scales = (1e6, 1e6, 1, 1e6, 1e6)
        cells = ["" if each is None else f"{each / scale:.0f}" for each, scale in zip(numbers, scales, strict=True)]
        rows.append(f"| {result.operation} | {result.way} | {seconds} | {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


@dataclass(frozen=True, slots=True)
class Profile:
    """Time of an operation by phase: medians of seconds, with the files in the page cache, and without."""

    warm: Phases
    cold: Phases


def profile_table(profiles: Mapping[str, Profile]) -> str:
    """The phases of each operation, the longest first, by its warm runs."""
    rows = ["| ours | phase | warm s | % | cold s |", "| --- | --- | ---: | ---: | ---: |"]
    for operation, profile in profiles.items():
        total = sum(profile.warm.values())
        for name, seconds in sorted(profile.warm.items(), key=lambda item: -item[1]):
            share, cold = 100 * seconds / total, profile.cold.get(name, 0.0)
            rows.append(f"| {operation} | {name} | {seconds:.2f} | {share:.0f} | {cold:.2f} |")
    return "\n".join(rows) + "\n"


def machine() -> dict[str, object]:
    """The things on which the figures depend beside the settings."""
    described = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line)
    models = (value.strip() for key, value in described if key.strip() == "model name")
    return {
        "cpu": next(models, platform.machine()),
        "cores": os.cpu_count(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "deepspeed", "megatron-core")},
    }


def draw(results: Sequence[Result], path: Path) -> None:
    """The warm seconds as bars."""
    operations = list(dict.fromkeys(result.operation for result in results))
    figure, axes = plt.subplots(len(operations), 1, figsize=(9, 1.9 * len(operations)), squeeze=False)
    for axis, operation in zip(axes[:, 0], operations, strict=True):
        held = [result for result in results if result.operation == operation][::-1]
        colours = ["tab:blue" if result.way.startswith("ours") else "tab:gray" for result in held]
        bars = axis.barh([result.way for result in held], [result.warm for result in held], color=colours)
        axis.bar_label(bars, [f"{result.warm:.2f} s" for result in held], padding=3, fontsize=8)
        axis.set_title(operation, loc="left", fontsize=9)
        axis.tick_params(labelsize=8)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
