"""Schedules of learning rates of the real Trainer: its own, outside of the engine, or one that it gives to the engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.testing.ranks import free_port

SCRIPT = """
import json, sys
import torch
import ucp_deepspeed
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

class Rates(TrainerCallback):
    def on_step_begin(self, args, state, control, optimizer=None, **rest):
        rates.append(optimizer.param_groups[0]["lr"])

def run(name, in_config, resume=None, scheduler="restore"):
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "zero_optimization": {"stage": 1},
        "universal_checkpoint": {"enabled": True, "scheduler": scheduler},
    }
    if in_config:
        config["optimizer"] = {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}}
    if in_config == "both":
        config["scheduler"] = {"type": "WarmupLR", "params": {"warmup_num_steps": 2}}
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    sample = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    arguments = TrainingArguments(
        name, max_steps=6, save_steps=3, per_device_train_batch_size=2, learning_rate=1e-3, warmup_steps=2, deepspeed=config,
        report_to=[], use_cpu=True, disable_tqdm=True, logging_strategy="no",
    )
    trainer = Trainer(LlamaForCausalLM(LlamaConfig(**size)), arguments, train_dataset=[sample] * 32, callbacks=[Rates()])
    try:
        trainer.train(resume_from_checkpoint=resume)
    except ucp_deepspeed.errors.MismatchError as error:
        rates.append(str(error))

found = {}
for name, *rest in json.loads(sys.argv[1]):
    rates = found[name] = []
    run(name, *rest)
json.dump(found, open("found.json", "w"))
"""


def trained(folder: Path, jobs: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Train in one process; the rate of each step of each job, or its error."""
    (folder / "train.py").write_text(
        SCRIPT.replace("import ucp_deepspeed\n", "import ucp_deepspeed, ucp_deepspeed.errors\n")
    )
    own = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [sys.executable, "train.py", json.dumps([[name, *job] for name, job in jobs.items()])],
        env=os.environ | own | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=200,
        cwd=folder,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, list[Any]] = json.loads((folder / "found.json").read_text())
    return found


@pytest.mark.timeout(300)
def test_an_optimizer_that_moves_into_the_config(tmp_path: Path) -> None:
    """The schedule began anew in the middle of the run: with warm-up, and at the wrong rates."""
    pytest.importorskip("accelerate")
    own, config = "own/checkpoint-3", "config/checkpoint-3"
    found = trained(
        tmp_path,
        {
            "own": [False],
            "config": [True],
            "own-again": [False, own],
            "config-again": [True, config],
            "moved": [True, own],
            "kept": [True, own, "keep"],
            "back": [False, config],
            "both": ["both"],
            "back-from-both": [False, "both/checkpoint-3"],
            "back-kept": [False, "both/checkpoint-3", "keep"],
        },
    )
    assert len(set(found["own"])) > 4 and found["own"] == found["config"]
    assert found["own-again"] == found["config-again"] == found["own"][3:]
    [message] = found["moved"]
    assert "holds no state of a learning rate scheduler" in message
    assert message.endswith('"scheduler": "keep" in "universal_checkpoint"')
    assert found["kept"] == found["own"][:3]
    assert found["back"] == found["own"][3:]
    [message] = found["back-from-both"]
    assert "both/checkpoint-3 has no scheduler.pt" in message and "Trainer makes a LambdaLR of its own" in message
    assert message.endswith('"scheduler": "keep" in "universal_checkpoint"')
    assert len(found["back-kept"]) == 3
