"""Times resuming, converting and saving beside DeepSpeed's own tools, PyTorch's distributed checkpoint and bare copies.

All ways of one operation alternate in one run on one machine; seconds are medians. Writes ``benchmark.json``, ``.md``, ``.png``.
`Measured` says what the columns count.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import benchmark_gpu
import benchmark_megatron
import benchmark_profile
import benchmark_ranks as on_rank
import click
from benchmark_commands import (
    TIMEOUT,
    converter,
    deepspeed_converter,
    deepspeed_exporter,
    ended_by_signals,
    exporter,
    forget_pages,
    run_command,
)
from benchmark_profile import Phases, by_phase
from benchmark_ranks import TAG, Measured
from benchmark_report import Pair, Profile, Result, Runs, draw, machine, profile_table, result_of, table_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.pattern import Shard
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("resume", "save", "convert", "export")

LOAD_CONVERTED = "DeepSpeed: universal load, after converting"
CONVERT_AND_LOAD = "DeepSpeed: ds_to_universal + universal load"


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


class Bench:
    """The sources, made once, and the operations on them."""

    def __init__(self, size: Size, repeats: int, folder: Path, profiling: bool = False) -> None:
        self.size, self.repeats, self.folder, self.profiling = size, repeats, folder, profiling
        self.run = Run("gpt", size=size.model, precision="bf16")
        self.parameters = 0
        self._pool: RankPool | None = None
        self.results: list[Result] = []
        self.profiles: dict[str, Profile] = {}

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
            self._pool = None

    def compare(self, operation: str, ways: Sequence[Way], converted: Pair | None = None) -> None:
        """Alternate the ways, each time with cold and then with warm files.

        The first pair of each tells what it takes, and not the time: who looks for it often holds up whoever runs in Python.
        Every second round goes in the other order, and what one has written is on disk before the next begins.

        Args:
            converted: what DeepSpeed's conversion took, before the load of its result.
        """
        found = self._alternate(ways)
        if converted is not None:
            rows = list(found)
            found[CONVERT_AND_LOAD] = found[LOAD_CONVERTED].after(converted)
            rows.insert(rows.index(LOAD_CONVERTED) + 1, CONVERT_AND_LOAD)
            found = {name: found[name] for name in rows}
        ours = statistics.median(found[ways[0].name].seconds("warm"))
        for name, runs in found.items():
            self.results.append(result_of(operation, name, runs, ours))
            click.echo(f"{operation}: {name}: {self.results[-1].warm:.2f} s", err=True)

    def _alternate(self, ways: Sequence[Way]) -> dict[str, Runs]:
        found: dict[str, Runs] = {}
        for repeat in range(self.repeats + 1):
            if self._pool is not None:
                _call(self._pool, on_rank.watch, repeat == 0)
            for way in ways if repeat % 2 == 0 else reversed(ways):
                forget_pages(way.source)
                pair = Pair(_settled(way.run), _settled(way.run))
                if not repeat:
                    found[way.name] = Runs(pair)
                else:
                    found[way.name].timed.append(pair)
        return found

    def source(self, name: str, ranks: int, **changes: object) -> Path:
        """A native checkpoint of a run with one step, in a folder of this name."""
        folder = self.folder / name
        self.parameters = _call(self.pool(ranks), on_rank.build, replace(self.run, **changes))[0]  # type: ignore[arg-type]
        _call(self.pool(ranks), on_rank.save, str(folder), True)
        _call(self.pool(ranks), on_rank.release)
        return folder

    @property
    def large(self) -> bool:
        """Tell whether the engine leaves no room for as much memory again, which the peers' loads need."""
        return self.parameters >= on_rank.LARGE

    def resume(self, operation: str, source: Path, peers: bool, **changes: object) -> None:
        """Loads: ours, the limits, and those of the others that can."""
        converted, others = self._peers(source) if peers and not self.large else (None, [])
        pool = self.pool(self.size.loading)
        _call(pool, on_rank.build, replace(self.run, **changes))  # type: ignore[arg-type]
        ours = Way("ours: direct load", source, lambda: _slowest(pool, on_rank.load_directly, str(source)))
        unchecked = Way("ours: direct load, unchecked", source, self._unchecked(pool, source))
        self.compare(operation, [ours, unchecked, *self._limits(source), *others], converted)
        self._profile_load(operation, source)
        _call(pool, on_rank.release)
        for way in others:
            shutil.rmtree(way.source)

    @staticmethod
    def _unchecked(pool: RankPool, source: Path) -> Callable[[], Measured]:
        return lambda: _slowest(pool, on_rank.load_directly, str(source), "off")

    def _limits(self, source: Path) -> list[Way]:
        """The files with the masters and moments, from which weights can be made: copied from maps, and read."""
        pool = self.pool(self.size.loading)
        files = [str(path) for path in sorted((source / TAG).glob("*optim_states.pt"))]
        copied = lambda: _slowest(pool, on_rank.copy_mapped, files)  # noqa: E731
        read = lambda: _slowest(pool, on_rank.read_sequentially, files)  # noqa: E731
        return [
            Way("bare mapped copy (the limit)", source, copied),
            Way("sequential read of the same bytes (the limit, cold)", source, read),
        ]

    def _profile_load(self, operation: str, source: Path) -> None:
        """Loads; of each phase the mean over the ranks."""
        if not self.profiling:
            return
        pool = self.pool(self.size.loading)
        _call(pool, on_rank.watch, False)
        self._profile(
            operation,
            source,
            lambda: by_phase(_call(pool, benchmark_profile.profile_load, str(source)), statistics.fmean),
        )

    def _profile_convert(self, source: Path, target: Path) -> None:
        """Whole commands, as they are compared."""
        if not self.profiling:
            return

        def run() -> Phases:
            command = [sys.executable, benchmark_profile.__file__, repr(time.perf_counter()), source, target]
            done = subprocess.run([str(part) for part in command], capture_output=True, timeout=TIMEOUT, check=True)
            shutil.rmtree(target)
            phases: Phases = json.loads(done.stdout)
            return phases

        self._profile("convert, 1 worker", source, run)

    def _profile(self, operation: str, source: Path, run: Callable[[], Phases]) -> None:
        """Each time with cold and then with warm files, as in `compare`."""
        cold, warm = [], []
        for _ in range(max(self.repeats, 1)):
            forget_pages(source)
            cold.append(run())
            warm.append(run())
        self.profiles[operation] = Profile(by_phase(warm, statistics.median), by_phase(cold, statistics.median))

    def _peers(self, source: Path) -> tuple[Pair, list[Way]]:
        """The cost of DeepSpeed's conversion, and of the loads."""
        converted = self.folder / f"{source.name}-deepspeed"
        command = deepspeed_converter(source, converted / TAG, 2)
        forget_pages(source)
        conversion = Pair(run_command(command, converted), run_command(command, converted, keep=True))
        natively = lambda: _slowest(self.pool(self.size.loading), on_rank.load_natively, str(converted), True)  # noqa: E731
        return conversion, [Way(LOAD_CONVERTED, converted, natively), *self._distributed(source)]

    def same_topology(self) -> None:
        """Ours against DeepSpeed's own load."""
        ranks = self.size.loading
        source = self.source("same", ranks)
        pool = self.pool(ranks)
        _call(pool, on_rank.build, self.run)
        ours = lambda: _slowest(pool, on_rank.load_directly, str(source))  # noqa: E731
        unchecked = Way('ours: "load": "always", unchecked', source, self._unchecked(pool, source))
        ways = [Way('ours: "load": "always"', source, ours), unchecked, *self._limits(source)]
        if not self.large:
            natively = lambda: _slowest(pool, on_rank.load_natively, str(source))  # noqa: E731
            ways.append(Way("DeepSpeed's own load", source, natively))
            left = lambda: _slowest(pool, on_rank.load_natively, str(source), False, True)  # noqa: E731
            ways.append(Way("ours: left to DeepSpeed", source, left))
        self.compare("resume, same topology", ways)
        self._profile_load("resume, same topology", source)
        saved = self.folder / "saved"
        self.compare(
            "save",
            [
                Way("ours: hook on", source, lambda: _slowest(pool, on_rank.save, str(saved), True)),
                Way(
                    "ours: hook on, no checksums",
                    source,
                    lambda: _slowest(pool, on_rank.save, str(saved), True, False, False),
                ),
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
                Way(
                    "ours: asynchronous, no checksums",
                    saved,
                    lambda: _slowest(pool, on_rank.save, str(saved), True, True, False),
                ),
                Way(
                    "ours: asynchronous, the first of a run",
                    saved,
                    lambda: _slowest(pool, on_rank.save_first, str(saved)),
                ),
                Way("DeepSpeed's native save", saved, lambda: _slowest(pool, on_rank.save, str(saved), False)),
                Way("bare memory copy (the limit)", saved, lambda: _slowest(pool, on_rank.copy_state)),
            ],
        )

    def convert(self, source: Path) -> None:
        """To the universal form: whole commands, from start to end."""
        target = self.folder / "converted"

        def ours(workers: int) -> Callable[[], Measured]:
            return lambda: run_command(converter(source, target, workers), target)

        def theirs(workers: int) -> Callable[[], Measured]:
            return lambda: run_command(deepspeed_converter(source, target, workers), target)

        ways = [Way(f"ours: ucp convert, {n} worker{'s' * (n > 1)}", source, ours(n)) for n in (2, 1)]
        ways.append(Way("DeepSpeed: ds_to_universal, 2 workers", source, theirs(2)))
        if not self.large:  # it would take minutes each time
            ways.append(Way("DeepSpeed: ds_to_universal, 1 worker", source, theirs(1)))
        ways.append(Way("cp -r (the limit)", source, lambda: run_command(["cp", "-r", source / TAG, target], target)))
        durable = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source / TAG, target]
        ways.append(Way("cp -r, until it is on disk, as ucp convert is", source, lambda: run_command(durable, target)))
        self.compare("convert", ways)
        self._profile_convert(source, target)

    def export(self, source: Path) -> None:
        """The fp32 weights in one file for torch: whole commands, from start to end."""
        target = self.folder / "exported"

        def ours(workers: int) -> Callable[[], Measured]:
            return lambda: run_command(exporter(source, target, workers), target)

        ways = [Way(f"ours: ucp export --to torch, {n} worker{'s' * (n > 1)}", source, ours(n)) for n in (2, 1)]
        theirs = deepspeed_exporter(source, target)
        ways.append(Way("DeepSpeed: zero_to_fp32", source, lambda: run_command(theirs, target)))
        exported = self.folder / "weights"
        run_command(exporter(source, exported, 2), exported, keep=True)
        copy = ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', exported, target]
        ways.append(
            Way("cp of the exported file, until it is on disk (the limit)", exported, lambda: run_command(copy, target))
        )
        self.compare("export", ways)
        shutil.rmtree(exported)

    def resume_from_dcp(self, source: Path) -> None:
        """A folder of PyTorch's distributed checkpoint, into an engine by ours, and into tensors by PyTorch's own load."""
        folder = self.folder / "dcp"
        run_command([*converter(source, folder, 2), "--to", "dcp"], folder, keep=True)
        pool = self.pool(self.size.loading)
        _call(pool, on_rank.build, self.run)
        ours = lambda: _slowest(pool, on_rank.load_directly, str(folder))  # noqa: E731
        keys = _of_each_state(
            _shapes_of(UniversalView.of(open_checkpoint(source))), "model.{name}", "optim.state.{name}.{state}"
        )
        load = (keys, dict.fromkeys(keys, 0), str(folder / TAG), True)
        theirs = lambda: _slowest(pool, on_rank.distribute, *load)  # noqa: E731
        ways = [Way("ours: direct load", folder, ours), Way("PyTorch: dcp.load of the same files", folder, theirs)]
        self.compare(f"resume from DCP, DP{self.size.loading}, ZeRO-1", ways)
        _call(pool, on_rank.release)
        shutil.rmtree(folder)

    def _distributed(self, source: Path) -> list[Way]:
        """Other distributed checkpoints of the same whole state: cut as the source is, loaded cut over the ranks."""
        view = UniversalView.of(open_checkpoint(source))
        shapes = _shapes_of(view)
        patterns, tp = view.patterns, view.checkpoint.topology.tp
        cut = {name: pattern.dim if isinstance(pattern := patterns[name], Shard) else None for name in shapes}
        dims, ranks = (cut, tp) if tp > 1 else (dict.fromkeys(shapes, 0), self.size.saving)
        torch_folder, each = self.folder / f"{source.name}-distributed", "{name}/{state}"
        keys = _of_each_state(shapes, each)
        rows = dict.fromkeys(keys, 0)
        with closing(RankPool(ranks)) as savers:
            _call(savers, on_rank.distribute, keys, _of_each_state(dims, each), str(torch_folder), False)
        megatron_folder = self.folder / f"{source.name}-megatron"
        described = self.folder / f"{source.name}-megatron.json"
        described.write_text(json.dumps({"shapes": shapes, "dims": dims}))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
        run_command(
            [*torchrun, ROOT / "scripts" / "benchmark_megatron.py", megatron_folder, described],
            megatron_folder,
            keep=True,
        )
        load = (keys, rows, str(torch_folder), True)
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


def _shapes_of(view: UniversalView) -> dict[str, Shape]:
    held = view.parameters.items()
    return {name: view.logical_shape(name) for name, entry in held if entry.kind == "trainable"}


def _of_each_state(values: Mapping[str, T], *forms: str) -> dict[str, T]:
    """Values by the keys of states, in place of parameters. Forms: of all keys, or of the masters' and the others'."""
    return {
        forms[-1 if state != "fp32" else 0].format(name=name, state=state): value
        for name, value in values.items()
        for state in ("fp32", "exp_avg", "exp_avg_sq")
    }


def _call(pool: RankPool, function: Callable[..., object], *arguments: object) -> list:
    return pool.run(function, *arguments, timeout=TIMEOUT)


def _slowest(pool: RankPool, function: Callable[..., Measured], *arguments: object) -> Measured:
    """Seconds, memory and files of the rank that has most, bytes of all."""
    found: list[Measured] = _call(pool, function, *arguments)

    def known(name: str, together: Callable[[list[int]], int]) -> int | None:
        values = [getattr(each, name) for each in found]
        return None if None in values else together(values)

    return Measured(
        max(each.seconds for each in found),
        known("bytes_read", sum),
        known("bytes_written", sum),
        known("files", max),
        known("extra_memory", max),
        known("temporary", max),
        known("bytes_counted", sum),
    )


def _settled(run: Callable[[], Measured]) -> Measured:
    """Run once nothing is left to be written back, which would be measured too."""
    os.sync()
    return run()


@click.command(help=__doc__)
@click.option(
    "--params", "size", type=click.Choice(list(SIZES)), default="160m", show_default=True, help="Size of the model."
)
@click.option(
    "--repeats",
    type=click.IntRange(min=0),
    default=5,
    show_default=True,
    help="Timed runs of each way; 0: the watched ones alone.",
)
@click.option(
    "--only",
    type=click.Choice(PARTS),
    multiple=True,
    default=PARTS,
    help="Leave out the others; save is all on one topology. Can be given several times.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    default=ROOT / "build" / "benchmark",
    show_default=True,
    help="Folder of the results; while it runs, of the checkpoints too.",
)
@click.option("--profile", is_flag=True, help="Tell where the time of ours goes, too.")
@click.option("--gpu", is_flag=True, help="Instead, load and save on all GPUs of this machine.")
def main(size: str, repeats: int, only: Sequence[str], output: Path, profile: bool, gpu: bool) -> None:
    """Run everything, or a part of it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(f"{output}: {error.strerror}", param_hint="--output") from error
    if gpu:
        with ended_by_signals(), TemporaryDirectory(dir=output, prefix="checkpoints-") as work:
            click.echo(benchmark_gpu.table_of(benchmark_gpu.measure(SIZES[size].model, repeats, Path(work))))
        return
    with (
        ended_by_signals(),
        TemporaryDirectory(dir=output, prefix="checkpoints-") as work,
        closing(Bench(SIZES[size], repeats, Path(work), profile)) as bench,
    ):
        _run_parts(bench, only)
    table = table_of(bench.results) + ("\n" + profile_table(bench.profiles) if profile else "")
    settings = {
        "parameters": bench.parameters,
        "ranks that save and load": [bench.size.saving, bench.size.loading],
        "repeats": repeats,
    }
    written = {
        "machine": settings | machine(),
        "results": [asdict(result) for result in bench.results],
        "profiles": {operation: asdict(profile) for operation, profile in bench.profiles.items()},
    }
    (output / "benchmark.json").write_text(json.dumps(written, indent=1))
    (output / "benchmark.md").write_text(table)
    draw(bench.results, output / "benchmark.png")
    click.echo(table)


def _run_parts(bench: Bench, only: Sequence[str]) -> None:
    saving, loading = bench.size.saving, bench.size.loading
    data = bench.source("data", saving)
    if "resume" in only:
        tensor = bench.source("tensor", 2, tp=2)
        bench.resume(f"resume, DP{saving} → DP{loading}, ZeRO-1", data, peers=True)
        bench.resume(f"resume, TP2·DP1 → TP1·DP{loading}, ZeRO-1", tensor, peers=True)
        shutil.rmtree(tensor)
        if not bench.large:  # building the engine takes as much again
            for stage in (3, 0):
                operation = f"resume, DP{saving} ZeRO-1 → DP{loading} ZeRO-{stage}"
                bench.resume(operation, data, peers=False, zero={"stage": stage})
            bench.resume_from_dcp(data)
    if "save" in only:
        bench.same_topology()
    bench.close()  # conversions run without idle ranks beside them
    if "convert" in only:
        bench.convert(data)
    if "export" in only:
        bench.export(data)


if __name__ == "__main__":
    main()
