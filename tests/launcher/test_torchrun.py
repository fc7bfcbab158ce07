"""The real ``torchrun``: a conversion by two processes, whole or absent, whatever happens to one of them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

UNLUCKY = """
import os, time
from ucp_deepspeed.convert import main
pwrite = os.pwrite
def unlucky(*arguments):
    if os.environ["RANK"] == "1":
        {what}
    return pwrite(*arguments)
os.pwrite = unlucky
main()
"""
"""The command, on rank 1 with another ``pwrite``."""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Files of two ranks, of which the second rank of a conversion alone needs the second's."""
    weights = [torch.arange(300_000.0) + number for number in range(4)]
    parameters = tuple(NativeParameter(f"p{n}", weight, {"exp_avg": weight / 3}) for n, weight in enumerate(weights))
    model, run = NativeModel(parameters), NativeRun(stage=1, dp=2)
    folder = write_native(tmp_path / "source", model, run)
    add_manifest(
        folder, model, run, layouts=True
    )  # by which the second's file needn't be opened for the optimizer's numbers
    return folder.parent


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    """A Python process in a session of its own."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Its status and what it wrote; nothing of it stays."""
    try:
        out, err = process.communicate(timeout=120)
        return process.returncode, out, err
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def unlucky(tmp_path: Path, what: str) -> Path:
    script = tmp_path / "unlucky.py"
    script.write_text(UNLUCKY.format(what=what))
    return script


def test_two_processes_write_what_one_does(source: Path, tmp_path: Path) -> None:
    module = ("-m", "ucp_deepspeed.convert", source)
    status, alone, err = finish(start(*module, tmp_path / "one", "--workers", "1"))
    assert status == 0, err
    status, out, err = finish(start(*TORCHRUN, *module, tmp_path / "two"))
    assert status == 0, err
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(out.splitlines()) == 1  # rank 0's summary, of all ranks
    assert alone.split(" in ")[0].replace("/one/", "/two/") == out.split(" in ")[0]
    names = sorted(path.name for path in (tmp_path / "two").iterdir())
    assert names == sorted(["latest", *(path.name for path in (tmp_path / "one").iterdir() if path.is_dir())])


def test_a_truncated_file_that_one_rank_reads(source: Path, tmp_path: Path) -> None:
    [path] = source.rglob("zero_pp_rank_1_*_optim_states.pt")
    os.truncate(path, 3_000_000)
    status, out, err = finish(start(*TORCHRUN, "-m", "ucp_deepspeed.convert", source, tmp_path / "to"))
    assert status != 0 and out == "" and list((tmp_path / "to").iterdir()) == []
    told = [line for line in err.splitlines() if line.startswith("error: ")]
    assert told and all(path.name in line for line in told)
    assert any(line.startswith("error: rank 1 on ") for line in told)


def test_a_full_disk_of_one_rank(source: Path, tmp_path: Path) -> None:
    script = unlucky(tmp_path, "raise OSError(28, 'No space left on device')")
    status, _, err = finish(start(*TORCHRUN, script, source, tmp_path / "to"))
    assert status != 0 and list((tmp_path / "to").iterdir()) == []
    assert "error: [Errno 28] No space left on device" in err or "error: rank 1 on " in err
    assert "ucp_deepspeed/" not in err  # torchrun shows where it is itself; no file of ours


@pytest.mark.parametrize(
    ("whom", "number"), [("all", signal.SIGTERM), ("all", signal.SIGINT), ("rank 1", signal.SIGTERM)]
)
def test_stopped_midway(whom: str, number: signal.Signals, source: Path, tmp_path: Path) -> None:
    """By a signal to the launcher, which passes it on, or to one rank."""
    pid = tmp_path / "pid"
    (tmp_path / "to").mkdir()
    what = (
        f"open({str(pid)!r}, 'w').write(str(os.getpid())); os.rename({str(pid)!r}, {str(pid) + 's'!r}); time.sleep(1)"
    )
    process = start(*TORCHRUN, unlucky(tmp_path, what), source, tmp_path / "to")
    while not (tmp_path / "pids").exists():
        assert process.poll() is None, finish(process)
    os.kill(process.pid if whom == "all" else int((tmp_path / "pids").read_text()), number)
    status, _, err = finish(process)
    assert status != 0 and list((tmp_path / "to").iterdir()) == [], err


def test_a_killed_rank_ends_the_others(source: Path, tmp_path: Path) -> None:
    script = unlucky(tmp_path, "os.kill(os.getpid(), 9)")
    status, _, err = finish(start(*TORCHRUN, script, source, tmp_path / "to"))
    assert status != 0 and list((tmp_path / "to").iterdir()) == [], err
