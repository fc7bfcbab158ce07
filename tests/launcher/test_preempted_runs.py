"""Signals under the real launchers: the run saves at the very step, ends as its launcher needs it, and goes on there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from preempted import LAST_STEP, SAMPLES, seen_in_training

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.checkpoint.whole import checkpoints_in
from ucp_deepspeed.data import SampleStream
from ucp_deepspeed.testing.ranks import free_port, get_pool
from ucp_deepspeed.transfer.compare import compare

ROOT = Path(__file__).parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone")


def start(folder: Path, events: list[dict[str, Any]], *launcher: str) -> tuple[int, str]:
    """Run the script under a launcher; return its status and what all have written."""
    script = str(Path(__file__).with_name("preempted.py"))
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "UCP_DEEPSPEED")}
    own |= {
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    command = [sys.executable, *launcher, script, str(folder), json.dumps(events)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=own, cwd=folder, check=False)
    return done.returncode, done.stdout + done.stderr


def seen(folder: Path) -> list[int]:
    """All samples that were trained on, in the order of the stream."""
    turns: dict[tuple[int, int], dict[str, list[int]]] = {}
    for log in sorted(folder.glob("*-rank*.jsonl")):
        for line in log.read_text().splitlines():
            step, micro, indices = json.loads(line)
            assert turns.setdefault((step, micro), {}).setdefault(log.name, indices) is indices
            assert len({name.split("-")[0] for name in turns[step, micro]}) == 1, "a step was taken twice"
    return [
        index for _, shares in sorted(turns.items()) for turn in zip(*shares.values(), strict=True) for index in turn
    ]


def differences(first: Path, second: Path) -> list[str]:
    views = [UniversalView.of(open_checkpoint(path), None) for path in (first, second)]
    return [f"{found.name} {found.state or ''} {found.detail}" for found in compare(*views)]


@pytest.fixture(scope="module")
def preempted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of two ranks under one agent of torch's: at step 2 one rank gets a signal, and at step 4 the agent; with what was
    written."""
    folder = tmp_path_factory.mktemp("preempted")
    events = [
        {"step": 2, "rank": 1, "to": "rank", "signal": "SIGTERM"},
        {"step": 4, "rank": 0, "to": "launcher", "signal": "SIGTERM"},
    ]
    status, told = start(folder, events, *TORCHRUN, "--nproc-per-node", "2", "--max-restarts", "1")
    assert status != 0
    return folder, told


@pytest.mark.timeout(600)
def test_no_step_is_lost_under_torchrun(preempted: tuple[Path, str], tmp_path: Path) -> None:
    """The agent begins a second round after the first signal, and ends after the second. A run on another number of ranks goes
    on. The state is that of the run without signals, and all samples are the stream's."""
    folder, told = preempted
    assert re.search(r"SIGTERM \d+\.\d s ago on rank 1: step 2 is saved", told), told[-3000:]
    assert "ends for now, with status 0 on rank 1 and 75 on rank 0" in told, told[-3000:]
    assert "ends for now, with status 0 on all ranks" in told
    assert told.count("left the script") == 4
    assert (folder / "runs" / "latest").read_text() == "global_step4"
    get_pool(2).run(seen_in_training, str(tmp_path), "whole", 4)
    assert differences(folder / "runs" / "global_step4", tmp_path / "runs" / "global_step4") == []
    get_pool(1).run(seen_in_training, str(folder), "other", LAST_STEP)
    assert seen(folder) == SampleStream(SAMPLES, seed=5).at(np.arange(8 * LAST_STEP)).tolist()


@pytest.mark.timeout(600)
def test_grace_that_is_too_short(preempted: tuple[Path, str], tmp_path: Path) -> None:
    """The agent kills the run while it saves: the tag from before is the newest whole one, and a run goes on from it."""
    shutil.copytree(preempted[0] / "runs" / "global_step4", tmp_path / "runs" / "global_step4")
    (tmp_path / "runs" / "latest").write_text("global_step4")
    events = [{"step": 5, "rank": 0, "to": "launcher", "signal": "SIGTERM", "hangs": True}]
    _, told = start(tmp_path, events, *TORCHRUN, "--nproc-per-node", "1", "--shutdown-timeout", "2")
    assert "step 5 is saved into" in told and "is on disk" not in told
    assert [(each.step, each.problem is None) for each in checkpoints_in(tmp_path / "runs")] == [(5, False), (4, True)]
    get_pool(1).run(seen_in_training, str(tmp_path), "after", 5)
    assert (tmp_path / "runs" / "latest").read_text() == "global_step5"


@pytest.mark.timeout(600)
def test_deepspeeds_launcher(tmp_path: Path) -> None:
    """It sends SIGTERM to one rank after the other, and waits for each."""
    deepspeed = str(Path(sys.executable).parent / "deepspeed")
    events = [{"step": 2, "rank": 0, "to": "launcher", "signal": "SIGTERM"}]
    status, told = start(tmp_path, events, deepspeed, "--master_port", str(free_port()), "--num_accelerators", "2")
    assert (status, told.count("left the script")) == (1, 2), told
    [checkpoint] = checkpoints_in(tmp_path / "runs")
    assert (checkpoint.step, checkpoint.problem) == (2, None)
    assert "with status 75 on all ranks" in told
