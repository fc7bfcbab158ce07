"""A run with Lightning's ``Trainer`` and DeepSpeed, which goes on with another number of ranks.

    python examples/lightning_train.py --devices 2 --epochs 2              # the first epochs on two ranks
    python examples/lightning_train.py --devices 1 --epochs 4 --resume     # the next ones on one

The batch over all ranks stays the same. Without a GPU it runs on CPU ranks; set ``DS_ACCELERATOR=cpu``.
"""

from __future__ import annotations

import argparse
import logging
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader, TensorDataset

import ucp_deepspeed  # noqa: F401  before the Trainer makes its engine

GLOBAL_BATCH = 16

CONFIG = {
    "zero_optimization": {"stage": 2},
    "zero_allow_untested_optimizer": True,
    "universal_checkpoint": {"enabled": True, "save": {"async": True}},
}


class Regression(pl.LightningModule):
    """Learns a sum of sines."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        """Return the loss of a batch."""
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.net(inputs), targets)

    def validation_step(self, batch: Any, _: int) -> None:
        """Log the loss of a batch that isn't trained on."""
        inputs, targets = batch
        self.log("loss", torch.nn.functional.mse_loss(self.net(inputs), targets), sync_dist=True)

    def configure_optimizers(self) -> dict[str, Any]:
        """Return AdamW, and a schedule over steps."""
        optimizer = torch.optim.AdamW(self.parameters(), 1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_train_start(self) -> None:
        """Say where the run stands."""
        self.print(f"begins at step {self.trainer.global_step}")

    def on_train_end(self) -> None:
        """Say how the run ended."""
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.print(
            f"step {self.trainer.global_step}: rate {rate:.6f}, loss {self.trainer.callback_metrics['loss']:.6f}"
        )


def samples(number: int, seed: int) -> TensorDataset:
    """Return made-up samples."""
    inputs = torch.rand(number, 4, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(inputs, inputs.mul(6).sin().sum(1, keepdim=True))


def main() -> None:
    """Train."""
    parser = argparse.ArgumentParser(description="A run that goes on with another number of ranks.")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--folder", default="runs/lightning")
    parser.add_argument("--resume", action="store_true")
    arguments = parser.parse_args()
    logging.basicConfig()
    pl.seed_everything(1)
    accelerator: Any = "gpu"
    if not torch.cuda.is_available():
        from ucp_deepspeed.testing.lightning_cpu import CPUForDeepSpeed

        accelerator = CPUForDeepSpeed()
    trainer = pl.Trainer(
        accelerator=accelerator,
        devices=arguments.devices,
        strategy=DeepSpeedStrategy(config=CONFIG),
        max_epochs=arguments.epochs,
        callbacks=[ModelCheckpoint(arguments.folder, monitor="loss", save_top_k=2, save_last="link")],
        logger=False,
        enable_progress_bar=False,
    )
    batch = GLOBAL_BATCH // arguments.devices
    train, ahead = DataLoader(samples(256, 0), batch, shuffle=True), DataLoader(samples(64, 1), batch)
    trainer.fit(Regression(), train, ahead, ckpt_path="last" if arguments.resume else None)


if __name__ == "__main__":
    main()
