"""The real ``deepspeed`` launcher: the training script on two topologies, and a script that knows nothing of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ucp_deepspeed.testing.ranks import free_port

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train_gpt.py"
TINY = ["--layers", "2", "--hidden", "64", "--heads", "8", "--ffn", "64", "--sequence", "16", "--decay", "50"]

UNMODIFIED = """
import argparse, deepspeed, torch
parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int)
parser.add_argument("--load")
parser.add_argument("--save")
parser.add_argument("--local_rank", type=int)
arguments = parser.parse_args()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.ReLU(), torch.nn.Linear(13, 5))
config = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": arguments.stage},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
    "universal_checkpoint": {"enabled": True, "save": {"async": not arguments.load}},
}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
if arguments.load:
    path, _ = engine.load_checkpoint(arguments.load)
    assert path is not None and engine.global_steps == 2, (path, engine.global_steps)
rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
while engine.global_steps < (4 if arguments.load else 2):
    generator = torch.Generator().manual_seed(engine.global_steps)
    batch = torch.randn(4, 7, generator=generator).chunk(world)[rank]
    loss = engine(batch).square().mean()
    engine.backward(loss)
    engine.step()
engine.save_checkpoint(arguments.save)
torch.distributed.destroy_process_group()
"""


def launch(world_size: int, *arguments: str) -> str:
    """Run the ``deepspeed`` launcher; returns what it printed."""
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--master_port",
        str(free_port()),
        "--num_accelerators",
        str(world_size),
        *arguments,
    ]
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def losses(log: Path) -> dict[int, float]:
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    return {entry["step"]: entry["loss"] for entry in entries if "loss" in entry}


@pytest.mark.timeout(900)
def test_resuming_is_rerunning_with_other_numbers(tmp_path: Path) -> None:
    script = str(TRAIN)
    common = [*TINY, "--precision", "fp32"]
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    saved = str(tmp_path / "saved")
    launch(
        2,
        script,
        *common,
        "--tp",
        "2",
        "--zero",
        "1",
        "--steps",
        "6",
        "--save",
        saved,
        "--save-every",
        "3",
        "--log",
        str(first),
    )
    load = ["--load", saved, "--tag", "global_step3", "--log", str(second)]
    launch(2, script, *common, "--tp", "1", "--zero", "3", "--steps", "6", *load)
    whole, resumed = losses(first), losses(second)
    assert list(resumed) == [4, 5, 6]
    assert all(abs(resumed[step] - whole[step]) < 2e-5 for step in resumed), (resumed, whole)


@pytest.mark.timeout(900)
def test_unmodified_script(tmp_path: Path) -> None:
    """Its first run saves in the background, and ends at once."""
    script = tmp_path / "train.py"
    script.write_text(UNMODIFIED)
    run = ["--module", "ucp_deepspeed.run", str(script)]
    launch(2, *run, "--stage", "2", "--save", str(tmp_path / "a"))
    launch(1, *run, "--stage", "3", "--load", str(tmp_path / "a"), "--save", str(tmp_path / "b"))
    assert (tmp_path / "b" / "global_step4" / "ucp_manifest.json").is_file()
