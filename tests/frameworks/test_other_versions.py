"""Versions of the frameworks that lack a name which the package uses go on as without it, and one warning says what is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.testing.ranks import free_port

pytest.importorskip("accelerate")

SCRIPT = r"""
import importlib.abc, importlib.machinery, json, sys
from pathlib import Path

RENAMED = {  # names of another version
    "transformers.trainer": [("_run_epoch", "_run_one_epoch"), ("_load_rng_state", "_load_streams")],
    "accelerate.accelerator": [("_dataloaders", "_prepared_loaders")],
    "lightning.pytorch": [("_combined_loader", "_joined_loader"), ("_link_checkpoint", "_link_folder")],
}

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, name):
        text = self.get_data(self.path).decode()
        for package, names in RENAMED.items():
            for old, new in names if f"{name}.".startswith(f"{package}.") else ():
                text = text.replace(old, new)
        return compile(text, self.path, "exec", dont_inherit=True)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if not any(f"{name}.".startswith(f"{package}.") for package in RENAMED):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder())
folder = Path(sys.argv[1])
found = {}

import deepspeed
deepspeed.init_distributed("gloo")
from trainer_runs import Job, train
for name, block in (("off", None), ("on", {"enabled": True})):
    first = Job(folder / f"trainer-{name}", samples=16, universal=block, stop=3, arguments={"save_steps": 1})
    early = train(first).messages
    result = train(Job(folder / f"trainer-{name}-2", samples=16, universal=block, stop=6,
                       resume=str(first.folder / "checkpoint-3"), arguments={"per_device_train_batch_size": 4}))
    found[f"trainer-{name}"] = [result.samples, result.rates, early + result.messages]

import accelerate_jobs
for name, block in (("off", False), ("on", True)):
    jobs = [{"name": "a", "saves": {"3": str(folder / f"acc-{name}")}, "micro": 4},
            {"name": "b", "load": str(folder / f"acc-{name}"), "skip": 3, "micro": 4}]
    for job in jobs:
        accelerate_jobs.LINES.clear()
        seen = accelerate_jobs.train(job | {"block": block, "gas": 2})
        found.setdefault(f"accelerate-{name}", []).append([seen["steps"], list(accelerate_jobs.LINES)])

import lightning_run
for name, block in (("off", {}), ("on", {"block": {}})):
    save = {"epochs": 1, "save_at": 4, "saving": [{"dirpath": f"l-{name}", "save_last": "link"}]}
    for job in ({"name": f"a-{name}", **save}, {"name": f"b-{name}", "epochs": 1, "ckpt": f"a-{name}.ckpt"}):
        lightning_run.run(folder, job | block)
        told = json.loads((folder / f"{job['name']}_0.json").read_text())
        found.setdefault(f"lightning-{name}", []).append([told["seen"], told["lines"]])
(folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the libraries did without the block and with it."""
    folder = tmp_path_factory.mktemp("versions")
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), str(Path(__file__).parent)])
    more = {
        "MASTER_PORT": str(free_port()),
        "DS_ACCELERATOR": "cpu",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "PYTHONPATH": paths,
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        env=os.environ | own | more,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    told: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return told


def test_trainer_goes_on(found: dict[str, Any]) -> None:
    *off, before = found["trainer-off"]  # where testing has imported what an engine with the block does
    *on, messages = found["trainer-on"]
    assert on == off and len(on[0]) == 3
    for lost in (
        "Trainer._run_epoch): the place in the data is Trainer's own",
        "Trainer._load_rng_state): the streams of",
    ):
        assert sum(lost in text for text in before + messages) == 1


def test_accelerate_goes_on(found: dict[str, Any]) -> None:
    off, on = (found[f"accelerate-{name}"] for name in ("off", "on"))
    assert [steps for steps, _ in on] == [steps for steps, _ in off] and all(steps for steps, _ in on)
    told = [text for _, lines in on for text in lines if "isn't one that the package knows" in text]
    assert (
        len(told) == 1 and "no attribute '_dataloaders'" in told[0] and "load_state goes by Accelerate's own" in told[0]
    )


def test_lightning_goes_on(found: dict[str, Any]) -> None:
    off, on = (found[f"lightning-{name}"] for name in ("off", "on"))
    assert [seen for seen, _ in on] == [seen for seen, _ in off] and on[1][0]
    told = [text for _, lines in off + on for text in lines if "isn't one that the package knows" in text]
    assert len(told) == 2
    assert any("ModelCheckpoint._link_checkpoint): its callbacks don't wait" in text for text in told)
    assert any("the place within an epoch is Lightning's own" in text for text in told)
