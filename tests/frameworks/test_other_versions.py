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
import importlib.abc, importlib.machinery, json, logging, sys
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
told = []

class Keep(logging.Handler):
    def emit(self, record):
        told.append(record.getMessage())

logging.getLogger("ucp_deepspeed").addHandler(Keep())
import deepspeed
deepspeed.init_distributed("gloo")
from trainer_runs import Job, train
for name, block in (("off", None), ("on", {"enabled": True})):
    first = Job(folder / f"trainer-{name}", samples=16, universal=block, stop=3, arguments={"save_steps": 1})
    train(first)
    result = train(Job(folder / f"trainer-{name}-2", samples=16, universal=block, stop=6,
                       resume=str(first.folder / "checkpoint-3"), arguments={"per_device_train_batch_size": 4}))
    found[f"trainer-{name}"] = [result.samples, result.rates]

import accelerate_jobs
for name, block in (("off", False), ("on", True)):
    jobs = [{"name": "a", "saves": {"3": str(folder / f"acc-{name}")}, "micro": 4},
            {"name": "b", "load": str(folder / f"acc-{name}"), "skip": 3, "micro": 4}]
    for job in jobs:
        seen = accelerate_jobs.train(job | {"block": block, "gas": 2})
        found.setdefault(f"accelerate-{name}", []).append(seen["steps"])

import lightning_run
for name, block in (("off", {}), ("on", {"block": {}})):
    save = {"epochs": 1, "save_at": 4, "saving": [{"dirpath": f"l-{name}", "save_last": "link"}]}
    for job in ({"name": f"a-{name}", **save}, {"name": f"b-{name}", "epochs": 1, "ckpt": f"a-{name}.ckpt"}):
        lightning_run.run(folder, job | block)
        seen = json.loads((folder / f"{job['name']}_0.json").read_text())["seen"]
        found.setdefault(f"lightning-{name}", []).append(seen)
found["told"] = [text for text in told if "isn't one that the package knows" in text]
(folder / "found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Samples, rates and messages of the libraries without the block and with it."""
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


@pytest.mark.parametrize("library", ["trainer", "accelerate", "lightning"])
def test_it_goes_on_as_without_the_package(library: str, found: dict[str, Any]) -> None:
    first, resumed = found[f"{library}-on"]
    assert [first, resumed] == found[f"{library}-off"] and first and resumed


LOST = (
    "Trainer._run_epoch): the place in the data is Trainer's own",
    "Trainer._load_rng_state): the streams of random numbers are read",
    "no attribute '_dataloaders'): load_state goes by Accelerate's own files",
    "ModelCheckpoint._link_checkpoint): its callbacks don't wait",
    "no attribute '_combined_loader'): the place within an epoch is Lightning's own",
)


def test_one_warning_says_what_is_lost(found: dict[str, Any]) -> None:
    assert [sum(lost in text for text in found["told"]) for lost in LOST] == [1] * 5 and len(found["told"]) == 5
