"""Committed or absent: what is left when a conversion is stopped, killed, or runs out of disk."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from click.testing import CliRunner
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed.checkpoint import open_checkpoint, random_files
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME, joined
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import ConfigError, DamagedCheckpointError
from ucp_deepspeed.transfer.commit import _exchange, committed_folder, write_atomically
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.signals import terminated_as_exception

SLOWLY = """
import signal, sys, time
from pathlib import Path
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.transfer.conversion import convert
def progress(written, total):
    print(written, flush=True)
    time.sleep(0.1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started without it
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and what nohup starts, without this
convert(UniversalView.of(open_checkpoint(sys.argv[1])), Path(sys.argv[2]), chunk_numbytes=64, progress=progress)
"""


def _stop_midway(source: Path, destination: Path, number: signal.Signals) -> tuple[int, int]:
    """Start a slow conversion, send it a signal after its first chunk; returns its exit status and chunks written."""
    process = subprocess.Popen([sys.executable, "-c", SLOWLY, source, destination], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline()
        process.send_signal(number)
        written, _ = process.communicate(timeout=120)
        return process.returncode, 1 + len(written.splitlines())
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_conversion_leaves_nothing(
    number: signal.Signals, engine_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    status, written = _stop_midway(engine_checkpoints["zero1"], tmp_path / "u" / "step3", number)
    assert status != 0 and written < 100  # more than 600 in all
    assert list((tmp_path / "u").iterdir()) == []


def test_a_killed_conversion_is_refused_and_then_replaced(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source, destination = engine_checkpoints["zero1"], tmp_path / "u"
    status, _ = _stop_midway(source, destination / "step3", signal.SIGKILL)
    assert status == -signal.SIGKILL
    [partial] = destination.iterdir()
    assert partial.name.startswith(f".step3{PARTIAL_MARK}")
    with pytest.raises(DamagedCheckpointError, match="interrupted conversion"):
        open_checkpoint(partial)
    with pytest.raises(DamagedCheckpointError, match="interrupted conversion"):
        open_checkpoint(destination, partial.name)
    shown = CliRunner().invoke(main, ["inspect", str(partial)])
    assert shown.exit_code == 2 and "convert again" in shown.stderr
    shown = CliRunner().invoke(main, ["inspect", str(destination)])
    assert shown.exit_code == 2 and "no tag folders there" in shown.stderr
    assert CliRunner().invoke(main, ["convert", str(source), str(destination)]).exit_code == 0
    assert sorted(path.name for path in destination.iterdir()) == ["latest", "step3"]


def test_only_what_is_abandoned_on_this_machine_is_removed(tmp_path: Path) -> None:
    prefix = f".final{PARTIAL_MARK}{socket.gethostname()}"
    ended = subprocess.Popen(["true"])
    ended.wait()
    kept = [
        f"{prefix}-{os.getppid()}",
        f"{prefix}-2-{ended.pid}",
        f".final{PARTIAL_MARK}elsewhere-{ended.pid}",
        "other",
    ]
    for name in [*kept, f"{prefix}-{ended.pid}"]:
        (tmp_path / name).mkdir()
    with committed_folder(tmp_path / "final") as folder:
        assert folder.parent == tmp_path and folder.name.startswith(".")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, "final"}


def test_a_folder_that_exists_is_not_touched(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "mine").write_text("kept")
    with pytest.raises(ConfigError, match="exists already"):
        convert(UniversalView.of(open_checkpoint(engine_checkpoints["zero0"])), tmp_path / "u")
    assert [path.name for path in tmp_path.rglob("*")] == ["u", "mine"]


def test_too_little_space_is_told_before_anything_is_written(
    engine_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero0"]))
    convert(view, tmp_path / "room")
    wanted = sum(entry.stat().st_size for entry in (tmp_path / "room").glob("*.safetensors"))
    asked, size = [], 1 << 40

    def usage(path: Path) -> Any:
        asked.append(path)
        return SimpleNamespace(free=wanted - 1, total=size)

    monkeypatch.setattr("ucp_deepspeed.transfer.conversion.shutil.disk_usage", usage)
    with pytest.raises(ConfigError, match="are free there; nothing was written"):
        convert(view, tmp_path / "none" / "yet")
    assert asked == [tmp_path] and not (tmp_path / "none").exists()
    wanted += 1
    convert(view, tmp_path / "enough")
    wanted, size = 1, 0  # as ramfs says
    convert(view, tmp_path / "unknown")


@pytest.mark.parametrize("failing", [0, 1, 7])
def test_a_full_disk_leaves_nothing(
    failing: int, engine_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, calls = os.pwrite, iter(range(1000))

    def full(*args: Any) -> int:
        if next(calls) == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(*args)

    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero1"]))
    monkeypatch.setattr(os, "pwrite", full)
    open_before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(OSError, match="No space left"):
        convert(view, tmp_path / "u", UniversalOutput(file_numbytes=9000), chunk_numbytes=1024)
    assert list(tmp_path.iterdir()) == []
    assert len(list(Path("/proc/self/fd").iterdir())) == open_before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_is_ignored(number: signal.Signals) -> None:
    """SIGHUP is under nohup; SIGTERM is taken in any case. Afterwards both are as they were."""
    previous = signal.signal(number, signal.SIG_IGN)
    try:
        with terminated_as_exception():
            ignored = signal.getsignal(number) == signal.SIG_IGN
        assert ignored == (number == signal.SIGHUP) and signal.getsignal(number) == signal.SIG_IGN
    finally:
        signal.signal(number, previous)


def test_a_disk_that_is_full_when_the_client_state_comes(
    engine_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: object, path: Path) -> None:
        raise safetensors.SafetensorError("I/O error: No space left on device (os error 28)")

    parameter = NativeParameter("weight", torch.ones(4), {"exp_avg": torch.ones(4)})
    state = {"tensor": torch.ones(2)}
    folder = write_native(tmp_path / "n", NativeModel((parameter,)), NativeRun(stage=1), client_state=state)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match=r"client_state\.safetensors can't be written: .*No space left"):
        convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_the_systems_file_size_limit(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ucp_deepspeed.cli",
        "convert",
        str(engine_checkpoints["zero1"]),
        str(tmp_path / "u"),
    ]
    limit: Callable[[], None] = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # noqa: E731
    run = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60)
    assert run.returncode == 2 and "File too large" in run.stderr and "Traceback" not in run.stderr
    assert list((tmp_path / "u").iterdir()) == []


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "latest", "one")

    def failing(descriptor: int) -> None:
        raise OSError(errno.EIO, "failed")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="failed"):
        write_atomically(tmp_path / "latest", "two")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]
    assert (tmp_path / "latest").read_text() == "one"


def test_a_source_that_shrinks_leaves_nothing(engine_copy: Callable[[str, str], Path], tmp_path: Path) -> None:
    folder = engine_copy("zero1", "source")
    view = UniversalView.of(open_checkpoint(folder))
    convert(view, tmp_path / "before")
    [path] = folder.glob("*_optim_states.pt")
    os.truncate(path, 5000)
    with pytest.raises(DamagedCheckpointError, match=f"{path.name} was changed"):
        convert(view, tmp_path / "u")
    assert not (tmp_path / "u").exists() and not list(tmp_path.glob(".u*"))


@pytest.mark.parametrize("how", ["in place", "replaced", "removed"])
@pytest.mark.parametrize("most_open", [1, 100], ids=["opened again", "open all the time"])
def test_a_source_that_is_saved_again_meanwhile_leaves_nothing(
    how: str, most_open: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parameters = tuple(NativeParameter(name, torch.ones(4000), {"exp_avg": torch.ones(4000)}) for name in "abc")
    folder = write_native(tmp_path / "n", NativeModel(parameters), NativeRun(stage=1, dp=2))
    paths = sorted(folder.glob("*_optim_states.pt"))
    for path in paths:
        os.utime(path, (0, 0))

    def save_again(written: int, total: int) -> None:
        if written > total // 2:
            for path in paths:
                new = path.with_suffix(".new")
                if how == "replaced":
                    shutil.copyfile(path, new)
                    new.replace(path)
                elif how == "removed":
                    path.unlink(missing_ok=True)
                else:
                    path.write_bytes(path.read_bytes())

    monkeypatch.setattr("ucp_deepspeed.transfer.copying.most_open", lambda: most_open)
    view = UniversalView.of(open_checkpoint(folder))
    with pytest.raises(DamagedCheckpointError, match=r"was changed while it was read|is missing"):
        convert(view, tmp_path / "u", workers=1, chunk_numbytes=4096, progress=save_again)
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


PLACE = ["world_size", "rank", "data_parallel_rank", "sequence_parallel_rank", "stage", "tensor_parallel_rank"]
STATE = json.dumps(
    {"format_version": 1, "place": dict.fromkeys(PLACE, 0) | {"accelerator": "cpu"}}
    | {"global_steps": 5, "seed": 1, "streams": {}}
)


@pytest.mark.parametrize("moment", ["opened", "described", "first chunk", "random state"])
def test_a_source_of_which_another_step_takes_the_place(
    moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an asynchronous save of the same tag does: in one step, with files of the same names and sizes."""
    for step in (1, 2):
        parameter = NativeParameter("a", torch.full((4000,), float(step)), {"exp_avg": torch.ones(4000)})
        model, run = NativeModel((parameter,)), NativeRun(stage=1, dp=2, steps=step)
        folder = write_native(tmp_path / str(step), model, run)
        (folder / RANDOM_STATES_NAME).write_text(joined([STATE]))
        add_manifest(folder, model, run)
        os.utime(folder / RANDOM_STATES_NAME, (step, step))

    def save_again(*_: Any) -> None:
        _exchange(tmp_path / "1", tmp_path / "2")

    checkpoint = open_checkpoint(tmp_path / "1")
    if moment == "opened":
        save_again()
    view = UniversalView.of(checkpoint)
    if moment == "described":
        save_again()
    if moment == "random state":
        read_state = random_files.read_state
        monkeypatch.setattr(random_files, "read_state", lambda *found: (save_again(), read_state(*found))[1])
    with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
        convert(view, tmp_path / "u", progress=save_again if moment == "first chunk" else None, workers=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]


BETWEEN = """
import os, signal, sys
from ucp_deepspeed.cli import convert, main
point_to = convert._point_to
def signalled(*arguments):
    os.kill(os.getpid(), int(sys.argv[1]))
    point_to(*arguments)
convert._point_to = signalled
main(["convert", *sys.argv[2:]], prog_name="ucp")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_stopped_before_latest_names_the_new_folder(
    number: signal.Signals, engine_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Signals are ignored for so short a time. SIGKILL leaves a checkpoint that is whole, and the next call says so."""
    arguments = [str(engine_checkpoints["zero1"]), str(tmp_path / "u")]
    ended = subprocess.run([sys.executable, "-c", BETWEEN, str(int(number)), *arguments], timeout=120, check=False)
    killed = number == signal.SIGKILL
    assert ended.returncode == (-signal.SIGKILL if killed else 0)
    assert (tmp_path / "u" / "latest").exists() != killed
    assert open_checkpoint(tmp_path / "u", "step3").run.global_steps == 3
    again = CliRunner().invoke(main, ["convert", *arguments])
    assert again.exit_code == 2 and "exists already; nothing was written" in again.stderr
    assert ("It is whole" in again.stderr and "load it by its tag, 'step3'" in again.stderr) == killed


def test_latest_that_is_a_folder_is_told_first(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "u" / "latest").mkdir(parents=True)
    found = CliRunner().invoke(main, ["convert", str(engine_checkpoints["zero1"]), str(tmp_path / "u")])
    assert found.exit_code == 2 and "latest is a folder, where a file is to name the tag" in found.stderr
    assert [path.name for path in (tmp_path / "u").iterdir()] == ["latest"]
