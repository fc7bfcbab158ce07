"""Train with Accelerate, stop, and go on with another number of processes; see docs/accelerate.md.

accelerate launch --config_file examples/accelerate.yaml --num_processes 2 examples/accelerate_train.py
accelerate launch --config_file examples/accelerate.yaml --num_processes 1 examples/accelerate_train.py --resume
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from torch.utils.data import DataLoader, TensorDataset

import ucp_deepspeed

GLOBAL_BATCH, ACCUMULATION, STEPS = 32, 2, 12


class Progress:
    """Counters of the script, saved with the checkpoint."""

    def __init__(self) -> None:
        self.epoch = self.batch = self.step = 0

    def state_dict(self) -> dict[str, int]:
        """Return the counters."""
        return dict(vars(self))

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take the counters over."""
        vars(self).update(state)


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/accelerate", help="folder of the checkpoints")
    parser.add_argument("--resume", action="store_true", help="go on from the newest whole checkpoint")
    parser.add_argument("--stop", type=int, default=STEPS, help="stop after so many optimizer steps")
    arguments = parser.parse_args()

    project = ProjectConfiguration(project_dir=arguments.out, automatic_checkpoint_naming=True, total_limit=2)
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    accelerator = Accelerator(
        gradient_accumulation_steps=ACCUMULATION,
        project_config=project,
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[InitProcessGroupKwargs(backend=backend)],
    )
    set_seed(0)
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(0))
    data = TensorDataset(rows, rows.sum(dim=1, keepdim=True))
    batch = GLOBAL_BATCH // ACCUMULATION // accelerator.num_processes
    loader = DataLoader(data, batch_size=batch, shuffle=True)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=STEPS * accelerator.num_processes)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if arguments.resume:
        accelerator.load_state()

    while progress.step < STEPS:
        loader.set_epoch(progress.epoch)
        for inputs, targets in accelerator.skip_first_batches(loader, progress.batch):
            with accelerator.accumulate(model):
                loss = torch.nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
            progress.batch += 1
            if not accelerator.sync_gradients:
                continue
            progress.step += 1
            accelerator.print(f"step {progress.step}: loss {loss.item():.4f}, rate {schedule.get_last_lr()[0]:.6f}")
            if progress.step % 3 == 0:
                accelerator.save_state()
            if progress.step >= arguments.stop:
                break
        else:
            progress.epoch, progress.batch = progress.epoch + 1, 0
            continue
        break
    ucp_deepspeed.wait_for_save()
    accelerator.end_training()


if __name__ == "__main__":
    main()
