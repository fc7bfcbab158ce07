"""A training script that knows nothing of the package: DeepSpeed's engine, a folder of checkpoints, and a line per step.

    ucp run … elastic_train.py CONFIG FOLDER SAVE_EVERY SECONDS

It trains until a file ``FOLDER/until`` names a step.

The loss is linear in the weights, and the samples are small whole numbers: gradients are exact on every number of ranks that is a
power of two, and so the weights after each step are the same to the bit. Each rank appends to ``FOLDER/rank-R.jsonl``.
"""

import json
import math
import os
import sys
import time
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist


def samples(step: int, batch: int) -> list[int]:
    """Numbers of a step's samples: the stream's next ones."""
    return list(range(step * batch, (step + 1) * batch))


def features(numbers: list[int]) -> torch.Tensor:
    """Whole numbers from -4 to 4, another row for each sample."""
    return torch.tensor([[(number * (place + 3)) % 9 - 4.0 for place in range(8)] for number in numbers])


def last_step(folder: Path) -> float:
    """The step to train to, as far as it is known. All ranks see it before they are there."""
    path = folder / "until"
    return int(path.read_text()) if path.exists() else math.inf


def main() -> None:
    """Train from the last checkpoint to a step."""
    config, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    every, seconds = int(sys.argv[3]), float(sys.argv[4])
    torch.manual_seed(1)
    engine, *_ = deepspeed.initialize(model=torch.nn.Linear(8, 4), config=config)
    if (folder / "checkpoints" / "latest").exists():
        engine.load_checkpoint(str(folder / "checkpoints"))
    rank, ranks, batch = dist.get_rank(), dist.get_world_size(), config["train_batch_size"]
    micro, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    with (folder / f"rank-{rank}.jsonl").open("a") as log:
        while engine.global_steps < last_step(folder):
            step = engine.global_steps
            own = samples(step, batch)[rank * micro * parts : (rank + 1) * micro * parts]
            for part in range(parts):
                loss = engine(features(own[part * micro : (part + 1) * micro])).mean()
                engine.backward(loss)
                log.write(
                    json.dumps({"step": step, "samples": own, "ranks": ranks, "micro": micro, "pid": os.getpid()})
                    + "\n"
                )
                log.flush()
                engine.step()
            weights = torch.cat([value.detach().flatten() for value in engine.module.parameters()])
            log.write(json.dumps({"done": step + 1, "weights": weights.double().tolist()}) + "\n")
            log.flush()
            time.sleep(seconds)
            if every and engine.global_steps % every == 0:
                engine.save_checkpoint(str(folder / "checkpoints"))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
