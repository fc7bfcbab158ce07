"""The example, by torchrun: two ranks, then one."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "huggingface_trainer.py"


def run(ranks: int, folder: Path, *arguments: str) -> str:
    """Start the example; return what it wrote."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    found = subprocess.run(
        [*command, str(EXAMPLE), "--cpu", "--folder", str(folder), *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
    )
    assert found.returncode == 0, found.stderr[-3000:]
    return found.stdout + found.stderr


def test_the_example_goes_on_with_one_rank(tmp_path: Path) -> None:
    assert "ended at step 6, epoch 0.4" in run(2, tmp_path, "--steps", "6")
    told = run(1, tmp_path, "--batch", "4", "--resume")
    assert "ended at step 30, epoch 2" in told and re.search(r"loaded \S+checkpoint-6/global_step6", told)
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_dir()] == ["checkpoint-30"]
