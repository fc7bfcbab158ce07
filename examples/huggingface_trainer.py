"""A run with Hugging Face's ``Trainer`` and DeepSpeed, which goes on with another number of ranks.

    torchrun --nproc-per-node 2 examples/huggingface_trainer.py --steps 6             # the first steps on two ranks
    torchrun --nproc-per-node 1 examples/huggingface_trainer.py --batch 4 --resume    # the next ones on one

The second run begins at the sample after the last one. Without a GPU add ``--cpu``, and set ``DS_ACCELERATOR=cpu``.
"""

from __future__ import annotations

import argparse
import logging

import torch
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import ucp_deepspeed  # noqa: F401  before the Trainer makes its engine

CONFIG = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "universal_checkpoint": {"enabled": True, "save": {"async": True}},
}


class Counting(Dataset[dict[str, list[int]]]):
    """Sequences of numbers that count up, each from its own."""

    def __len__(self) -> int:
        return 60

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        words = [(index + step) % 32 for step in range(8)]
        return {"input_ids": words, "labels": words}


def main() -> None:
    """Train, or go on."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default="runs/trainer")
    parser.add_argument("--steps", type=int, default=-1, help="steps after which the run ends; by default two epochs")
    parser.add_argument("--batch", type=int, default=2, help="samples of each rank")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )  # a tiny one, with new weights
    )
    arguments = TrainingArguments(
        output_dir=options.folder,
        per_device_train_batch_size=options.batch,
        num_train_epochs=2,
        max_steps=options.steps,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_steps=3,
        save_total_limit=1,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=options.cpu,
        deepspeed=CONFIG,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=Counting())
    trainer.train(resume_from_checkpoint=options.resume or None)
    if trainer.is_world_process_zero():
        print(f"ended at step {trainer.state.global_step}, epoch {trainer.state.epoch:g}")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
