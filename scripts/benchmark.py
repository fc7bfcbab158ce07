"""Times resuming, converting and saving beside DeepSpeed's own tools, PyTorch's distributed checkpoint and bare copies.

All ways of one operation alternate in one run on one machine; figures are medians. Writes ``benchmark.json``, ``.md``, ``.png``.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import benchmark_megatron
import benchmark_ranks as on_rank
import click
import matplotlib
from benchmark_ranks import TAG, Measured

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout.pattern import Shard
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 1800.0

PARTS = ("resume", "save", "convert")


@dataclass(frozen=True, slots=True)
class Size:
    """A GPT with a tied embedding, and how many data-parallel ranks save and load it: as many as fit into 24 GiB."""

    model: dict[str, int]
    saving: int
    loading: int


SIZES = {
    "tiny": Size(
        {"layers": 2, "hidden": 128, "heads": 4, "query_groups": 4, "ffn": 512, "vocabulary": 1024},
        saving=4,
        loading=2,
    ),
    "160m": Size(
        {"layers": 17, "hidden": 768, "heads": 12, "query_groups": 12, "ffn": 3072, "vocabulary": 50304},
        saving=4,
        loading=2,
    ),
    "1b": Size(
        {"layers": 18, "hidden": 2048, "heads": 16, "query_groups": 16, "ffn": 8192, "vocabulary": 50304},
        saving=2,
        loading=1,
    ),
}
"""By their number of parameters."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way of doing an operation: ``run`` does it once and says what the slowest rank took; ``source`` is what it reads."""

    name: str
    source: Path
    run: Callable[[], Measured]


@dataclass(frozen=True, slots=True)
class Result:
    """One way's medians. ``ratio``: its warm seconds over those of the first way, which is ours."""

    operation: str
    way: str
    warm: float
    cold: float
    ratio: float
    bytes_read: int
    extra_memory: int
    files: int


class Bench:
    """The sources, made once, and the operations on them."""

    def __init__(self, size: Size, repeats: int, folder: Path) -> None:
        self.size, self.repeats, self.folder = size, repeats, folder
        self.run = Run("gpt", size=size.model, precision="bf16")
        self.parameters = 0
        self._pool: RankPool | None = None
        self.results: list[Result] = []

    def pool(self, ranks: int) -> RankPool:
        """Ranks that keep their engine; those of another number are ended, since all engines wouldn't fit into memory."""
        if self._pool is None or self._pool.world_size != ranks:
            self.close()
            self._pool = RankPool(ranks, most_runs=sys.maxsize)
        return self._pool

    def close(self) -> None:
        """End the ranks."""
        if self._pool is not None:
            self._pool.close()

    def compare(self, operation: str, ways: Sequence[Way]) -> None:
        """Alternate the ways, each time with cold and then with warm files.

        The first run of each tells the memory, and not the time: who looks for it often holds up whoever runs in Python.
        """
        found: dict[str, tuple[list[Measured], list[Measured]]] = {way.name: ([], []) for way in ways}
        memory: dict[str, int] = {}
        for repeat in range(self.repeats + 1):
            if self._pool is not None:
                _call(self._pool, on_rank.watch_memory, repeat == 0)
            for way in ways:
                _forget_pages(way.source)
                cold, warm = way.run(), way.run()
                if not repeat:
                    memory[way.name] = warm.extra_memory
                else:
                    found[way.name][0].append(cold)
                    found[way.name][1].append(warm)
        ours = _seconds(found[ways[0].name][1])
        for name, (cold_runs, warm_runs) in found.items():
            self.results.append(
                Result(
                    operation,
                    name,
                    _seconds(warm_runs),
                    _seconds(cold_runs),
                    _seconds(warm_runs) / ours,
                    warm_runs[-1].bytes_read,
                    memory[name],
                    warm_runs[-1].files,
                )
            )
            click.echo(f"{operation}: {name}: {self.results[-1].warm:.2f} s", err=True)

    def source(self, name: str, ranks: int, **changes: object) -> Path:
        """A native checkpoint of a run with one step, in a folder of this name."""
        folder = self.folder / name
        self.parameters = _call(self.pool(ranks), on_rank.build, replace(self.run, **changes))[0]  # type: ignore[arg-type]
        _call(self.pool(ranks), on_rank.save, str(folder), True)
        _call(self.pool(ranks), on_rank.release)
        return folder

    @property
    def large(self) -> bool:
        """Whether the engine leaves no room for as much memory again, which the peers' loads need."""
        return self.parameters >= on_rank.LARGE

    def resume(self, operation: str, source: Path, peers: bool, **changes: object) -> None:
        """Loads: ours, the limit, and those of the others that can."""
        others = self._peers(source) if peers and not self.large else []
        pool = self.pool(self.size.loading)
        files = [str(path) for path in sorted((source / TAG).glob("*optim_states.pt"))]
        _call(pool, on_rank.build, replace(self.run, **changes))  # type: ignore[arg-type]
        ours = Way("ours: direct load", source, lambda: _slowest(pool, on_rank.load_directly, str(source)))
        limit = Way("bare mapped copy (the limit)", source, lambda: _slowest(pool, on_rank.copy_mapped, files))
        self.compare(operation, [ours, limit, *others])
        _call(pool, on_rank.release)
        for way in others:
            shutil.rmtree(way.source)

    def _peers(self, source: Path) -> list[Way]:
        converted = self._converted_by_deepspeed(source)
        natively = lambda: _slowest(self.pool(self.size.loading), on_rank.load_natively, str(converted), True)  # noqa: E731
        return [
            Way("DeepSpeed: universal load, after converting", converted, natively),
            *self._distributed(source),
        ]

    def same_topology(self) -> None:
        """Ours against DeepSpeed's own load."""
        ranks = self.size.loading
        source = self.source("same", ranks)
        pool = self.pool(ranks)
        _call(pool, on_rank.build, self.run)
        ways = [Way('ours: "load": "always"', source, lambda: _slowest(pool, on_rank.load_directly, str(source)))]
        if not self.large:
            natively = lambda: _slowest(pool, on_rank.load_natively, str(source))  # noqa: E731
            ways.append(Way("DeepSpeed's own load", source, natively))
        self.compare("resume, same topology", ways)
        saved = self.folder / "saved"
        self.compare(
            "save",
            [
                Way("ours: hook on", source, lambda: _slowest(pool, on_rank.save, str(saved), True)),
                Way("DeepSpeed alone", source, lambda: _slowest(pool, on_rank.save, str(saved), False)),
            ],
        )
        if not self.large:  # the state is copied once by ours, and once by the limit
            self.stall(saved)
        _call(pool, on_rank.release)
        shutil.rmtree(source)
        shutil.rmtree(saved)

    def stall(self, saved: Path) -> None:
        """For how long saving stops the training of the engine that is there."""
        pool = self.pool(self.size.loading)
        self.compare(
            "save stall",
            [
                Way("ours: asynchronous", saved, lambda: _slowest(pool, on_rank.save, str(saved), True, True)),
                Way("DeepSpeed's native save", saved, lambda: _slowest(pool, on_rank.save, str(saved), False)),
                Way("bare memory copy (the limit)", saved, lambda: _slowest(pool, on_rank.copy_state)),
            ],
        )

    def convert(self, source: Path) -> None:
        """To the universal form: whole commands, from start to end."""
        target = self.folder / "converted"

        def ours(workers: int) -> Callable[[], Measured]:
            return lambda: _command([_program("ucp"), "convert", source, target, "--workers", workers], target)

        def theirs(workers: int) -> Callable[[], Measured]:
            return lambda: _command(_deepspeed_converter(source, target, workers), target)

        ways = [Way(f"ours: ucp convert, {n} worker{'s' * (n > 1)}", source, ours(n)) for n in (2, 1)]
        ways.append(Way("DeepSpeed: ds_to_universal, 2 workers", source, theirs(2)))
        if not self.large:  # it would take minutes each time
            ways.append(Way("DeepSpeed: ds_to_universal, 1 worker", source, theirs(1)))
        ways.append(Way("cp -r (the limit)", source, lambda: _command(["cp", "-r", source / TAG, target], target)))
        durable = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source / TAG, target]
        ways.append(Way("cp -r, until it is on disk, as ucp convert is", source, lambda: _command(durable, target)))
        self.compare("convert", ways)

    def _converted_by_deepspeed(self, source: Path) -> Path:
        target = self.folder / f"{source.name}-deepspeed"
        _command(_deepspeed_converter(source, target / TAG, 2), target, keep=True)
        return target

    def _distributed(self, source: Path) -> list[Way]:
        """Other distributed checkpoints of the same whole state: cut as the source is, loaded cut over the ranks."""
        view = UniversalView.of(open_checkpoint(source))
        shapes = {
            name: view.logical_shape(name) for name, entry in view.parameters.items() if entry.kind == "trainable"
        }
        patterns, tp = view.patterns, view.checkpoint.topology.tp
        cut = {name: pattern.dim if isinstance(pattern := patterns[name], Shard) else None for name in shapes}
        rows: dict[str, int | None] = dict.fromkeys(shapes, 0)
        dims, ranks = (cut, tp) if tp > 1 else (rows, self.size.saving)
        torch_folder = self.folder / f"{source.name}-distributed"
        savers = RankPool(ranks)
        _call(savers, on_rank.distribute, shapes, dims, str(torch_folder), False)
        savers.close()
        megatron_folder = self.folder / f"{source.name}-megatron"
        described = self.folder / f"{source.name}-megatron.json"
        described.write_text(json.dumps({"shapes": shapes, "dims": dims}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        _command(
            [*torchrun, ROOT / "scripts" / "benchmark_megatron.py", megatron_folder, described],
            megatron_folder,
            keep=True,
        )
        load = (shapes, rows, str(torch_folder), True)
        loading = self.size.loading
        return [
            Way(
                "PyTorch: dcp.load of the same state",
                torch_folder,
                lambda: _slowest(self.pool(loading), on_rank.distribute, *load),
            ),
            Way(
                "Megatron-Core: dist_checkpointing.load of the same state",
                megatron_folder,
                lambda: _slowest(self.pool(loading), benchmark_megatron.load, shapes, str(megatron_folder)),
            ),
        ]


def _call(pool: RankPool, function: Callable[..., object], *arguments: object) -> list:
    return pool.run(function, *arguments, timeout=TIMEOUT)


def _slowest(pool: RankPool, function: Callable[..., Measured], *arguments: object) -> Measured:
    """Seconds and memory of the rank that has most, bytes and files of all."""
    found: list[Measured] = _call(pool, function, *arguments)
    return Measured(
        max(each.seconds for each in found),
        sum(each.bytes_read for each in found),
        max(each.extra_memory for each in found),
        max(each.files for each in found),
    )


def _seconds(runs: Sequence[Measured]) -> float:
    return statistics.median(run.seconds for run in runs)


def _program(name: str) -> Path:
    return Path(sys.executable).parent / name


def _deepspeed_converter(source: Path, target: Path, workers: int) -> list[object]:
    module = "deepspeed.checkpoint.ds_to_universal"
    options = ["--num_extract_workers", workers, "--num_merge_workers", workers, "--inject_missing_state"]
    return [sys.executable, "-m", module, "--input_folder", source / TAG, "--output_folder", target, *options]


def _command(command: Sequence[object], target: Path, keep: bool = False) -> Measured:
    """Run a command that makes a folder. Its extra memory is that of its disk: bytes there for a time and not at the end."""
    shutil.rmtree(target, ignore_errors=True)
    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], _size(target))

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    finished = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=TIMEOUT, check=False
    )
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if finished.returncode:
        raise SystemExit(f"{' '.join(map(str, command))} failed:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
    size = _size(target)
    if not keep:
        shutil.rmtree(target)
    return Measured(seconds, 0, max(peak[0] - size, 0))


def _size(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):  # a temporary file that is gone by now
                total += (Path(parent) / name).stat().st_size
    return total


def _forget_pages(folder: Path) -> None:
    """Have the kernel drop what it keeps of these files."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)


def _table(results: Sequence[Result]) -> str:
    rows = [
        "| operation | way | warm s | cold s | × ours | MB read | extra MB |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in results:
        read = f"{result.bytes_read / 1e6:.0f}" if result.bytes_read else ""
        rows.append(
            f"| {result.operation} | {result.way} | {result.warm:.2f} | {result.cold:.2f} | {result.ratio:.2f} | {read} | "
            f"{result.extra_memory / 1e6:.0f} |"
        )
    return "\n".join(rows) + "\n"


def _draw(results: Sequence[Result], path: Path) -> None:
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


@click.command(help=__doc__)
@click.option(
    "--params", "size", type=click.Choice(list(SIZES)), default="160m", show_default=True, help="Size of the model."
)
@click.option("--repeats", default=5, show_default=True, help="Runs of each way, after one that doesn't count.")
@click.option(
    "--only",
    type=click.Choice(PARTS),
    multiple=True,
    default=PARTS,
    help="Leave out the others; save is all on one topology. Can be given several times.",
)
@click.option("--output", type=click.Path(path_type=Path), default=ROOT / "build" / "benchmark", show_default=True)
def main(size: str, repeats: int, only: Sequence[str], output: Path) -> None:
    """Run everything, or a part of it."""
    work = output / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    bench = Bench(SIZES[size], repeats, work)
    saving, loading = SIZES[size].saving, SIZES[size].loading
    data = bench.source("data", saving)
    if "resume" in only:
        tensor = bench.source("tensor", 2, tp=2)
        bench.resume(f"resume, DP{saving} → DP{loading}, ZeRO-1", data, peers=True)
        bench.resume(f"resume, TP2·DP1 → TP1·DP{loading}, ZeRO-1", tensor, peers=True)
        shutil.rmtree(tensor)
        if not bench.large:  # building the engine takes as much again
            bench.resume(f"resume, DP{saving} ZeRO-1 → DP{loading} ZeRO-3", data, peers=False, zero={"stage": 3})
    if "save" in only:
        bench.same_topology()
    bench.close()
    if "convert" in only:
        bench.convert(data)
    table = _table(bench.results)
    machine = {
        "parameters": bench.parameters,
        "ranks that save and load": [saving, loading],
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "repeats": repeats,
    }
    (output / "benchmark.json").write_text(
        json.dumps({"machine": machine, "results": [asdict(r) for r in bench.results]}, indent=1)
    )
    (output / "benchmark.md").write_text(table)
    _draw(bench.results, output / "benchmark.png")
    click.echo(table)
    shutil.rmtree(work)


if __name__ == "__main__":
    main()
