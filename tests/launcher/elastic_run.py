"""A training script that knows nothing of the package: DeepSpeed's engine, a folder of checkpoints, and a line per step.

    ucp run … elastic_run.py CONFIG FOLDER SAVE_EVERY SECONDS

It trains until a file ``FOLDER/until`` names a step. If ``FOLDER/lose`` names one, the node of rank 0 is lost when that step's
save has begun. The model has as many numbers more as ``FOLDER/ballast`` says, so that a save takes its time.

The loss is linear in the weights, and the samples are small whole numbers: gradients are exact on every number of ranks that is a
power of two, and so the weights after each step are the same to the bit. Their number is a multiple of what a processor computes
at once: what is left over is rounded in another way. Each rank appends to ``FOLDER/rank-R.jsonl``.
"""

import json
import math
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist


def samples(step: int, batch: int) -> list[int]:
    """Numbers of a step's samples: the stream's next ones."""
    return list(range(step * batch, (step + 1) * batch))


def features(numbers: list[int]) -> torch.Tensor:
    """Whole numbers from -4 to 4, another row for each sample."""
    return torch.tensor([[(number * (place + 3)) % 9 - 4.0 for place in range(16)] for number in numbers])


def last_step(folder: Path) -> float:
    """The step to train to, as far as it is known. All ranks see it before they are there."""
    path = folder / "until"
    return int(path.read_text()) if path.exists() else math.inf


def lose_node() -> None:
    """Lose the agent and this process, as if the machine had lost its power."""
    os.kill(os.getppid(), signal.SIGSTOP)  # it tells nobody of its rank's end
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def number_in(path: Path) -> int:
    """The number in a file; 0 if there is none."""
    return int(path.read_text()) if path.exists() else 0


def train(config: dict[str, Any], folder: Path, every: int, seconds: float) -> None:
    """Train from the last checkpoint to the last step; save all so many steps, and wait for some seconds after each."""
    torch.manual_seed(1)
    model = torch.nn.Linear(16, 8, bias=False)
    model.register_buffer("ballast", torch.zeros(number_in(folder / "ballast")))
    engine, *_ = deepspeed.initialize(model=model, config=config)
    if (folder / "checkpoints" / "latest").exists():
        engine.load_checkpoint(str(folder / "checkpoints"))
    rank, ranks, batch = dist.get_rank(), dist.get_world_size(), config["train_batch_size"]
    micro, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    with (folder / f"rank-{rank}.jsonl").open("a") as log:
        while engine.global_steps < last_step(folder):
            step = engine.global_steps
            own = samples(step, batch)[rank * micro * parts : (rank + 1) * micro * parts]
            try:
                for part in range(parts):
                    engine.backward(engine(features(own[part * micro : (part + 1) * micro])).mean())
                    engine.step()
            finally:  # at a signal the engine saves after its step, and leaves
                if engine.global_steps > step:
                    weights = torch.cat([value.detach().flatten() for value in engine.module.parameters()])
                    done = {"done": step + 1, "round": os.environ["MASTER_PORT"], "ranks": ranks, "samples": own}
                    log.write(json.dumps(done | {"weights": weights.double().tolist()}) + "\n")
                    log.flush()
            time.sleep(seconds)
            if every and engine.global_steps % every == 0:
                engine.save_checkpoint(str(folder / "checkpoints"))
                if rank == 0 and engine.global_steps == number_in(folder / "lose"):
                    lose_node()


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
    dist.barrier()
    dist.destroy_process_group()
