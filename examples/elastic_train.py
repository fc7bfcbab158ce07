"""A run that goes on when nodes are lost or join: a small language model over bytes of a text.

    ucp run --nproc-per-node 2 --batch 24 examples/elastic_train.py --save runs/a --steps 100
    ucp run --nodes 1:4 --store HOST:29400 --batch 24 examples/elastic_train.py --save runs/a --steps 100

It saves every ten steps, and when it is told to go. Without a GPU it runs on CPU ranks; set ``DS_ACCELERATOR=cpu``.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

import ucp_deepspeed
from ucp_deepspeed.data import ResumableSampler

TEXT = Path(__file__).parents[1] / "scripts" / "data" / "lower_quay.txt"
LENGTH = 64


class Pieces(Dataset[torch.Tensor]):
    """Pieces of a text, as bytes; each overlaps the next by half."""

    def __init__(self) -> None:
        self._text = torch.frombuffer(bytearray(TEXT.read_bytes()), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return (len(self._text) - LENGTH - 1) // (LENGTH // 2)

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * (LENGTH // 2)
        return self._text[start : start + LENGTH + 1]


class Model(torch.nn.Module):
    """A transformer that foretells the next byte; returns the loss of a batch."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bytes, self.places = torch.nn.Embedding(256, width), torch.nn.Embedding(LENGTH, width)
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.layers = torch.nn.TransformerEncoder(layer, 2)
        self.head = torch.nn.Linear(width, 256)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        """Return the mean loss."""
        inputs, targets = batch[:, :-1], batch[:, 1:]
        hidden = self.bytes(inputs) + self.places(torch.arange(LENGTH, device=batch.device))
        mask = torch.nn.Transformer.generate_square_subsequent_mask(LENGTH, device=batch.device)
        logits = self.head(self.layers(hidden, mask=mask, is_causal=True))
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def config_of(folder: Path) -> dict[str, object]:
    """The DeepSpeed config: the batch stays on any number of ranks, and a signal saves the very step."""
    return {
        "train_batch_size": 24,
        "train_micro_batch_size_per_gpu": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-3, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "universal_checkpoint": {
            "enabled": True,
            "batch": "keep",
            "save": {"on_signal": str(folder), "keep": {"last": 2}},
        },
    }


def main() -> None:
    """Train from the last checkpoint to the last step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--save", type=Path, required=True, metavar="DIR", help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-every", type=int, default=10, metavar="N")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append a line of JSON for each step")
    parser.add_argument(
        "--pause", type=float, default=0.0, metavar="SECONDS", help="wait after each step, as a larger model would"
    )
    options = parser.parse_args()

    torch.manual_seed(1)
    engine, *_ = deepspeed.initialize(model=Model(), config=config_of(options.save))
    if ucp_deepspeed.last_checkpoint(options.save) is not None:
        engine.load_checkpoint(str(options.save))
    data = Pieces()
    sampler = ResumableSampler(data, seed=1).follow(engine)
    loader = DataLoader(data, batch_size=engine.train_micro_batch_size_per_gpu(), sampler=sampler)
    while engine.global_steps < options.steps:
        for batch in loader:
            loss = engine(batch.to(engine.device))
            engine.backward(loss)
            boundary = engine.is_gradient_accumulation_boundary()
            engine.step()
            if not boundary:
                continue
            tell(engine.global_steps, loss.detach(), options.log)
            time.sleep(options.pause)
            if engine.global_steps % options.save_every == 0 or engine.global_steps == options.steps:
                engine.save_checkpoint(str(options.save))
            if engine.global_steps == options.steps:
                break
    dist.barrier()
    dist.destroy_process_group()


def tell(step: int, loss: torch.Tensor, log: Path | None) -> None:
    """Print the mean loss of the last micro-batches, and append it to a file."""
    dist.all_reduce(loss)
    if dist.get_rank() == 0:
        ranks, start = dist.get_world_size(), os.environ.get("MASTER_PORT")
        line = {"time": time.time(), "step": step, "loss": loss.item() / ranks, "ranks": ranks, "start": start}
        print(f"step {step}: loss {line['loss']:.3f} on {ranks} ranks", flush=True)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
