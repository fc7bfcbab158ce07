"""A training script that only trains, saves and loads: DeepSpeed's engine, a folder of checkpoints, and a line per step.

    ucp run … elastic_run.py CONFIG FOLDER SAVE_EVERY SECONDS [TP]

It trains until a file ``FOLDER/until`` names a step. If ``FOLDER/lose`` names one, the node of rank 0 is lost when that step's
save has begun. The model has as many numbers more as ``FOLDER/ballast`` says, so that a save takes its time. With TP, so
many ranks share its outputs.

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

from ucp_deepspeed.parallel import Mpu


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


class Columns(torch.nn.Module):
    """A share of a linear layer's outputs, marked as Megatron marks it; all ranks that share them return the whole.

    Args:
        whole: the layer.
    """

    def __init__(self, whole: torch.nn.Linear, mpu: Mpu) -> None:
        super().__init__()
        self.group, self.rank = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_rank()
        self.size = mpu.get_tensor_model_parallel_world_size()
        self.weight = torch.nn.Parameter(whole.weight.detach().chunk(self.size)[self.rank].clone())
        marks = {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
        for name, value in marks.items():
            setattr(self.weight, name, value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return ``[samples, outputs]``; the gradient is that of this rank's share."""
        own = torch.nn.functional.linear(inputs, self.weight)
        shares = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(shares, own.detach(), group=self.group)
        shares[self.rank] = own
        return torch.cat(shares, dim=1)


def train(config: dict[str, Any], folder: Path, every: int, seconds: float, tp: int | None = None) -> None:
    """Train from the last checkpoint to the last step; save all so many steps, and wait for some seconds after each."""
    torch.manual_seed(1)
    model: torch.nn.Module = torch.nn.Linear(16, 8, bias=False)
    deepspeed.init_distributed()
    mpu, rank, ranks = None, dist.get_rank(), dist.get_world_size()
    part, tensor = rank, {"tp": 1, "tp_rank": 0}
    if tp is None:
        model.register_buffer("ballast", torch.zeros(number_in(folder / "ballast")))
    else:
        mpu = Mpu(tp)
        model = Columns(model, mpu)
        part, tensor = mpu.get_data_parallel_rank(), {"tp": tp, "tp_rank": model.rank}
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=config)
    if (folder / "checkpoints" / "latest").exists():
        engine.load_checkpoint(str(folder / "checkpoints"))
    batch = config["train_batch_size"]
    micro, parts = engine.train_micro_batch_size_per_gpu(), engine.gradient_accumulation_steps()
    with (folder / f"rank-{rank}.jsonl").open("a") as log:
        while engine.global_steps < last_step(folder):
            step = engine.global_steps
            own = samples(step, batch)[part * micro * parts : (part + 1) * micro * parts]
            try:
                for start in range(0, len(own), micro):
                    engine.backward(engine(features(own[start : start + micro])).mean())
                    engine.step()
            finally:  # at a signal the engine saves after its step, and leaves
                if engine.global_steps > step:
                    weights = torch.cat([value.detach().flatten() for value in engine.module.parameters()])
                    done = {"done": step + 1, "round": os.environ["MASTER_PORT"], "ranks": ranks, "samples": own}
                    log.write(json.dumps(done | tensor | {"weights": weights.double().tolist()}) + "\n")
                    log.flush()
            time.sleep(seconds)
            if every and engine.global_steps % every == 0:
                engine.save_checkpoint(str(folder / "checkpoints"))
                if rank == 0 and engine.global_steps == number_in(folder / "lose"):
                    lose_node()


if __name__ == "__main__":
    given = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    train(json.loads(given[0].read_text()), *given[1:], *map(int, sys.argv[5:]))
    dist.barrier()
    dist.destroy_process_group()
