"""The benchmark counts and compares all that it should; no time is looked at."""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"

RESUMES = {
    "ours: direct load",
    "ours: direct load, unchecked",
    "bare mapped copy (the limit)",
    "sequential read of the same bytes (the limit, cold)",
}
PEERS = {
    "DeepSpeed: universal load, after converting",
    "DeepSpeed: ds_to_universal + universal load",
    "PyTorch: dcp.load of the same state",
    "Megatron-Core: dist_checkpointing.load of the same state",
}
NEARLY = 10_000
"""Bytes that looking at the figures may take itself."""

STRIDED = "resume, TP2·DP1 → TP1·DP2, ZeRO-1"

ROWS = {
    "resume, DP4 → DP2, ZeRO-1": RESUMES | PEERS,
    STRIDED: RESUMES | PEERS,
    "resume, DP4 ZeRO-1 → DP2 ZeRO-3": RESUMES,
    "resume, DP4 ZeRO-1 → DP2 ZeRO-0": RESUMES,
    "resume from DCP, DP2, ZeRO-1": {"ours: direct load", "PyTorch: dcp.load of the same files"},
    "resume, same topology": {
        'ours: "load": "always"',
        'ours: "load": "always", unchecked',
        "ours: left to DeepSpeed",
        "bare mapped copy (the limit)",
        "sequential read of the same bytes (the limit, cold)",
        "DeepSpeed's own load",
    },
    "save": {"ours: hook on", "ours: hook on, no checksums", "DeepSpeed alone"},
    "save stall": {
        "ours: asynchronous",
        "ours: asynchronous, no checksums",
        "ours: asynchronous, the first of a run",
        "DeepSpeed's native save",
        "bare memory copy (the limit)",
    },
    "convert": {
        "ours: ucp convert, 2 workers",
        "ours: ucp convert, 1 worker",
        "DeepSpeed: ds_to_universal, 2 workers",
        "DeepSpeed: ds_to_universal, 1 worker",
        "cp -r (the limit)",
        "cp -r, until it is on disk, as ucp convert is",
    },
    "export": {
        "ours: ucp export --to torch, 2 workers",
        "ours: ucp export --to torch, 1 worker",
        "DeepSpeed: zero_to_fp32",
        "cp of the exported file, until it is on disk (the limit)",
    },
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Its modules find one another, on the ranks too."""
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("benchmark")


def test_every_row_and_column(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All is composed as ever, and nothing is run."""

    def command(command: Any, target: Path, keep: bool = False) -> Any:
        target.mkdir(parents=True, exist_ok=True)
        return measured(seconds=4.0, bytes_written=10**9, temporary=2 * 10**9)

    def alternate(bench: Any, ways: Any) -> dict[str, Any]:
        for way in ways:
            way.source.mkdir(parents=True, exist_ok=True)
        pair = script.Pair(measured(seconds=2.0), measured(seconds=1.0, bytes_read=3 * 10**6))
        return {way.name: script.Runs(pair, [pair, pair]) for way in ways}

    measured = script.Measured
    view = SimpleNamespace(
        parameters={}, patterns={}, checkpoint=SimpleNamespace(topology=SimpleNamespace(tp=1, pp=1, dp=4))
    )
    monkeypatch.setattr(script, "_call", lambda pool, function, *arguments: [1000])
    monkeypatch.setattr(script, "run_command", command)
    monkeypatch.setattr(script, "open_checkpoint", lambda folder: None)
    monkeypatch.setattr(script.UniversalView, "of", lambda checkpoint: view)
    monkeypatch.setattr(script.Bench, "_alternate", alternate)
    (tmp_path / "work" / "of the user").mkdir(parents=True)
    ran = CliRunner().invoke(script.main, ["--params", "tiny", "--output", str(tmp_path)], catch_exceptions=False)
    assert ran.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"work", "benchmark.json", "benchmark.md", "benchmark.png"}
    assert (tmp_path / "work" / "of the user").is_dir()
    written = json.loads((tmp_path / "benchmark.json").read_text())
    rows = {(row["operation"], row["way"]): row for row in written["results"]}
    assert rows.keys() == {(operation, way) for operation, ways in ROWS.items() for way in ways}
    assert written["machine"].keys() >= {"cpu", "cores", "date", "python", "torch", "deepspeed", "megatron-core"}
    both = rows["resume, DP4 → DP2, ZeRO-1", "DeepSpeed: ds_to_universal + universal load"]
    assert (both["cold"], both["warm"], both["warm_runs"]) == (6.0, 5.0, [5.0, 5.0])
    assert (both["bytes_written"], both["temporary"], both["ratio"]) == (10**9, 2 * 10**9, 5.0)
    header, _, first, *_ = (tmp_path / "benchmark.md").read_text().splitlines()
    columns = ["warm s", "cold s", "× ours", "MB read", "MB written", "files", "extra MB", "temporary MB"]
    assert [cell.strip() for cell in header.split("|")[3:-1]] == columns
    assert [cell.strip() for cell in first.split("|")[6:-1]] == ["3", "", "", "", ""]


def test_what_fails_leaves_nothing(script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(script.Bench, "source", lambda bench, *_: (bench.folder / "data").mkdir() or 1 / 0)
    ran = CliRunner().invoke(script.main, ["--params", "tiny", "--output", str(tmp_path)])
    assert isinstance(ran.exception, ZeroDivisionError) and list(tmp_path.iterdir()) == []
    refused = CliRunner().invoke(script.main, ["--repeats", "-1", "--output", str(tmp_path)])
    assert refused.exit_code == 2 and "-1 is not in the range" in refused.output


def run_a_command_for_ever(script: ModuleType, output: Path) -> None:
    """In a process of its own: a part of the benchmark that runs a command whose own children write.

    A background job, or one under nohup, would ignore some signals.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)

    def source(bench: Any, *_: Any) -> None:
        (bench.folder / "data").mkdir()
        writing = f"(while true; do date > {bench.folder}/data/$$; done) & echo $$ > {output}/pid; wait"
        script.run_command(["sh", "-c", writing], bench.folder / "target")

    script.Bench.source = source
    script.main(["--params", "tiny", "--output", str(output)])


def states_in(group: int) -> Iterator[str]:
    """Yield the state of each process in a process group."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, _, of_group, *_ = path.read_text().rpartition(")")[2].split()
            if int(of_group) == group:
                yield state


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_what_is_ended_leaves_nothing(number: signal.Signals, script: ModuleType, tmp_path: Path) -> None:
    """Neither files nor processes, also if it is told twice."""
    running = multiprocessing.get_context("fork").Process(target=run_a_command_for_ever, args=(script, tmp_path))
    running.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not list(tmp_path.glob("checkpoints-*/data/*")):
        assert running.is_alive() and time.monotonic() < deadline
        time.sleep(0.05)
    group = int((tmp_path / "pid").read_text())
    try:
        for _ in range(2):
            os.kill(running.pid, number)
            time.sleep(0.02)
        running.join(60)
        assert running.exitcode == 128 + number
        assert [path.name for path in tmp_path.iterdir()] == ["pid"]
        assert [state for state in states_in(group) if state != "Z"] == []
    finally:  # or it would go on for ever
        running.kill()
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def test_rows_alternate_and_begin_on_a_settled_disk(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(script.os, "sync", lambda: told.append("sync"))
    monkeypatch.setattr(script, "forget_pages", lambda folder: None)
    bench = script.Bench(script.SIZES["tiny"], 2, Path())
    bench._alternate([script.Way(name, Path(), lambda name=name: told.append(name)) for name in "ab"])
    assert told[::2] == ["sync"] * 12
    assert told[1::2] == list("aabb" + "bbaa" + "aabb")


def test_what_loads_saves_and_conversions_count(script: ModuleType, tmp_path: Path) -> None:
    """Two ranks, and whole commands: ours reads each byte of the masters and moments once."""
    bench = script.Bench(script.replace(script.SIZES["tiny"], saving=2), 0, tmp_path, profiling=True)
    try:
        source = bench.source("data", 2)
        sizes = {path.name: path.stat().st_size for path in (source / script.TAG).iterdir()}
        command = script.converter(source, tmp_path / "converted", 1)
        conversion = script.run_command(command, tmp_path / "converted")
        copy = script.run_command(["cp", "-r", source / script.TAG, tmp_path / "copy"], tmp_path / "copy")
        files = sum(path.is_file() for path in source.rglob("*"))
        bench.resume(STRIDED, bench.source("tensor", 2, tp=2), peers=False)
        bench.same_topology()
    finally:
        bench.close()
    held = 12 * bench.parameters
    assert min(conversion.bytes_read, conversion.bytes_written) >= held and conversion.temporary < held
    assert copy.files == len(sizes) and abs(copy.bytes_written - sum(sizes.values())) < NEARLY
    rows = {(row.operation, row.way): row for row in bench.results}
    assert rows.keys() == {
        (name, way) for name in ("resume, same topology", "save", "save stall") for way in ROWS[name]
    } | {(STRIDED, way) for way in RESUMES}
    assert (
        rows[STRIDED, "ours: direct load"].bytes_read >= held
    )  # through memory maps in part, which the kernel doesn't count
    ours = rows["resume, same topology", 'ours: "load": "always"']
    assert ours.bytes_counted == held
    assert (
        held <= ours.bytes_read <= held + 1_000_000
    )  # manifest, checksums, each file's directory, and what opening compares come on top, for each rank
    optimizer_files = [numbytes for name, numbytes in sizes.items() if name.endswith("optim_states.pt")]
    assert len(optimizer_files) <= ours.files <= 2 * len(optimizer_files) + 3
    read = rows["resume, same topology", "sequential read of the same bytes (the limit, cold)"]
    assert read.files == len(optimizer_files) and abs(read.bytes_read - sum(optimizer_files)) < NEARLY
    assert rows["save", "ours: hook on"].bytes_written >= held and rows["save", "ours: hook on"].files == files
    assert rows["save stall", "ours: asynchronous"].bytes_written >= held
    profile = bench.profiles["resume, same topology"]
    assert profile.warm.keys() & profile.cold.keys() >= {"open and plan", "read", "other"}
