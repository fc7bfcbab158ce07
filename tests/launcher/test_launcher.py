"""The real launchers: the training script on two topologies, and a script that knows nothing of the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from ucp_deepspeed.testing.ranks import free_port

ROOT = Path(__file__).parents[2]
TRAIN = ROOT / "scripts" / "train_gpt.py"
TINY = ["--layers", "2", "--hidden", "64", "--heads", "8", "--ffn", "64", "--sequence", "16", "--decay", "50"]

UNMODIFIED = """
import argparse, deepspeed, os, sys, torch
parser = argparse.ArgumentParser()
parser.add_argument("--stage", type=int)
parser.add_argument("--load")
parser.add_argument("--save")
arguments = parser.parse_args()
other = argparse.ArgumentParser()
other.add_argument("--local_rank", type=int, default=0)
assert other.parse_known_args()[0].local_rank == int(os.environ["LOCAL_RANK"])
assert ("ucp_deepspeed" in sys.modules) == (os.environ.get("UCP_DEEPSPEED") == "1")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.ReLU(), torch.nn.Linear(13, 5))
config = {
    "train_batch_size": 4,
    "zero_optimization": {"stage": arguments.stage},
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
}
if not arguments.load:
    config["universal_checkpoint"] = {"save": {"async": True}}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
if arguments.load:
    path, _ = engine.load_checkpoint(arguments.load)
    assert path is not None and engine.global_steps > 1, (path, engine.global_steps)
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
    return start(command, ROOT, PATH=f"{Path(sys.executable).parent}:{os.environ['PATH']}")


def start(command: list[str], folder: Path, **environment: str) -> str:
    """Run a command in a folder, without what a launcher around it has set; returns what it printed."""
    own = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "UCP_DEEPSPEED")}
    own |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=own, cwd=folder, check=False)
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
def test_unmodified_scripts(tmp_path: Path) -> None:
    """A strict parser, and a block only in the first run, which saves in the background and ends at once. The runs are started by
    DeepSpeed's launcher, by torch's, and by neither, in an environment that ``ucp arm`` has armed."""
    script, run = tmp_path / "train.py", ["ucp_deepspeed.run"]
    script.write_text(UNMODIFIED)
    launch(2, "--module", *run, str(script), "--stage", "2", "--save", str(tmp_path / "a"))
    assert (tmp_path / "a" / "global_step2" / "ucp_manifest.json").is_file()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1", "-m", *run]
    last = ["--stage", "3", "--load", "a", "--save", "b"]
    start([*torchrun, "-m", "train", *last], tmp_path)
    assert (tmp_path / "b" / "global_step4" / "ucp_manifest.json").is_file()

    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True, timeout=120)
    python, [packages] = tmp_path / "venv" / "bin" / "python", (tmp_path / "venv").glob("lib/python*/site-packages")
    (packages / "a_present.pth").write_text(f"{sysconfig.get_path('purelib')}\n{ROOT}\n")
    start([str(python), "-m", "ucp_deepspeed.cli", "arm"], tmp_path)
    alone = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    last = ["--stage", "1", "--load", "b", "--save", "c"]
    start([str(python), "train.py", *last], tmp_path, **alone, UCP_DEEPSPEED="1")
    assert (tmp_path / "c" / "global_step4" / "ucp_manifest.json").is_file()


def test_accelerates_launcher(tmp_path: Path) -> None:
    """It runs the module that runs the script."""
    pytest.importorskip("accelerate")
    (tmp_path / "train.py").write_text(
        "import os, sys; print([*sys.argv, os.environ['UCP_DEEPSPEED'], 'ucp_deepspeed' in sys.modules])"
    )
    options = [
        "--cpu",
        "--num_processes",
        "1",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
    ]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "-m", "ucp_deepspeed.run", "train.py"]
    assert "['train.py', '--steps', '5', '1', True]" in start([*command, "--steps", "5"], tmp_path)
