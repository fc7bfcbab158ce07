"""Jobs with Lightning on the ranks of one launch: ``lightning_run.py FOLDER JOBS``, with a JSON list of jobs.

Each writes ``FOLDER/<name>_<rank>.json`` with what it has seen.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler, SequentialSampler

import ucp_deepspeed
from ucp_deepspeed.checkpoint.whole import problem_of
from ucp_deepspeed.engine.saving import background

PACKAGE = os.environ.get("LIGHTNING", "lightning.pytorch")
"""The same code is published under two names."""

pl = import_module(PACKAGE)
DeepSpeedStrategy = import_module(f"{PACKAGE}.strategies").DeepSpeedStrategy
CPUForDeepSpeed = import_module("ucp_deepspeed.testing.lightning_cpu").CPUForDeepSpeed
RANK, RANKS = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


class Numbers(Dataset):
    """Samples of small integers, each with its index."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        return index, torch.randint(-4, 4, (8,), generator=torch.Generator().manual_seed(index)).float()


class Backwards(Sampler[int]):
    """A sampler of the user's own."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __iter__(self) -> Any:
        return iter(range(self.samples - 1, -1, -1))


class Batches(BatchSampler):
    """A batch sampler of the user's own."""


class Model(pl.LightningModule):
    """A linear loss, whose sums are exact in fp32 however a batch is dealt; or with ``layers`` a network with dropout."""

    def __init__(self, layers: bool = False, interval: str = "step") -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layers, self.interval = layers, interval
        self.seen: list[Any] = []
        self.validated: list[Any] = []
        self.weights: list[float] = []

    def configure_model(self) -> None:
        if not hasattr(self, "net"):
            torch.manual_seed(3)
            inner = [torch.nn.Linear(8, 16), torch.nn.Dropout(0.5), torch.nn.Linear(16, 1)]
            self.net = torch.nn.Sequential(*inner) if self.layers else torch.nn.Linear(8, 1, bias=False)
            if not self.layers:
                self.net.weight.data.fill_(1.0)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        loss = self.net(batch[1]).square() if self.layers else batch[1].double() @ self.net.weight.double().T
        loss = loss.mean()
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append([self.trainer.current_epoch, self.trainer.global_step, batch[0].tolist(), rate, loss.item()])
        return loss

    def on_validation_start(self) -> None:
        if not self.trainer.sanity_checking:
            self.validated.append([self.trainer.current_epoch, self.trainer.global_step])

    def validation_step(self, batch: Any, number: int) -> None:
        self.log("score", self.net(batch[1]).mean(), sync_dist=True)

    def test_step(self, batch: Any, number: int) -> None:
        self.log("tested", self.net(batch[1]).mean(), sync_dist=True)

    def configure_optimizers(self) -> Any:
        if self.layers:
            optimizer: Any = torch.optim.Adam(self.parameters(), 1e-2)
        else:
            optimizer = torch.optim.SGD(self.parameters(), 0.5, momentum=0.5)
        every = 4 if self.interval == "step" else 1
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, every, 0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": self.interval}}

    def keep_weights(self) -> None:
        with deepspeed.zero.GatheredParameters(list(self.parameters())):
            self.weights = [value for parameter in self.parameters() for value in parameter.flatten().tolist()]


class Counter(pl.Callback):
    """A callback with a state, and one that saves by itself."""

    def __init__(self, save_at: int | None, path: str) -> None:
        self.batches, self.save_at, self.path = 0, save_at, path

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        self.batches += 1
        if self.batches == self.save_at:
            trainer.save_checkpoint(self.path)

    def on_train_end(self, trainer: Any, module: Any) -> None:
        module.keep_weights()

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.batches = state["batches"]


def names_in(folder: Any) -> list[str]:
    return sorted(path.name for path in Path(folder).iterdir())


class Checkpoints(pl.callbacks.ModelCheckpoint):
    """Notes what lies in its folder after it has saved, and what of that is whole; ends the process after one of its saves."""

    def __init__(self, die_at: int | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.die_at = die_at
        self.noted: list[Any] = []

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        if trainer.global_step == self.die_at and RANK == 1:
            background.Writing._write = lambda *_: time.sleep(60)  # type: ignore[method-assign]
        super()._save_checkpoint(trainer, filepath)

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: Any) -> None:
        super()._save_last_checkpoint(trainer, monitor_candidates)
        whole = ucp_deepspeed.last_checkpoint(self.dirpath)
        self.noted.append([trainer.global_step, names_in(self.dirpath), whole and Path(whole).name])
        if trainer.global_step == self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)


class Uploads(pl.loggers.CSVLogger):
    """Uploads each checkpoint as soon as it is saved: here it looks whether it is whole."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.looked: list[str | None] = []

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.looked.append(problem_of(Path(checkpoint_callback.best_model_path)))


class Lines(logging.Handler):
    """The package's messages."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


def run(folder: Path, job: dict[str, Any]) -> None:
    """Do one job, and write what it has seen."""
    name = job["name"]
    pl.seed_everything(job.get("seed", 7), verbose=False)
    lines = Lines()
    logging.getLogger("ucp_deepspeed").addHandler(lines)
    counter = Counter(job.get("save_at"), str(folder / f"{name}.ckpt"))
    saving = [Checkpoints(**{**each, "dirpath": str(folder / each["dirpath"])}) for each in job.get("saving", ())]
    uploads = Uploads(folder) if job.get("uploads") else None
    trainer = pl.Trainer(
        accelerator=CPUForDeepSpeed(),
        devices=RANKS,
        strategy=strategy_for(folder, job),
        max_epochs=job.get("epochs", 3),
        max_steps=job.get("steps", -1),
        accumulate_grad_batches=job.get("accumulate", 1),
        val_check_interval=job.get("interval"),
        logger=uploads or False,
        callbacks=[counter, *saving],
        enable_checkpointing=bool(saving),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(folder),
    )
    model = Model(**job.get("model", {}))
    results = [do(what, trainer, model, folder, job) for what in job.get("do", ["fit"])]
    logging.getLogger("ucp_deepspeed").removeHandler(lines)
    told = {
        "seen": model.seen,
        "validated": model.validated,
        "weights": model.weights,
        "step": trainer.global_step,
        "epoch": trainer.current_epoch,
        "batches": counter.batches,
        "results": results,
        "noted": [each.noted for each in saving],
        "uploads": uploads and uploads.looked,
        "scheduler": [each.scheduler.last_epoch for each in trainer.lr_scheduler_configs],
        "lines": lines.lines,
    }
    (folder / f"{name}_{RANK}.json").write_text(json.dumps(told))


def strategy_for(folder: Path, job: dict[str, Any]) -> Any:
    """The strategy with its config; or its name, with the config in a file that the environment names."""
    config: dict[str, Any] = {"zero_optimization": {"stage": job.get("stage", 2)}}
    if not job.get("bare"):
        config["zero_allow_untested_optimizer"] = True
    if "block" in job:
        config["universal_checkpoint"] = {"enabled": True, **job["block"]}
    os.environ.pop("PL_DEEPSPEED_CONFIG_PATH", None)
    if "strategy" in job:
        path = folder / f"config_{RANK}.json"
        path.write_text(json.dumps(config))
        os.environ["PL_DEEPSPEED_CONFIG_PATH"] = str(path)
        return job["strategy"]
    return DeepSpeedStrategy(config=config)


def do(what: str, trainer: Any, model: Model, folder: Path, job: dict[str, Any]) -> Any:
    """One call of the trainer's."""
    batch, workers = job.get("batch", 8 // RANKS), job.get("workers", 0)
    samples = Numbers(job.get("samples", 48))
    loader = DataLoader(samples, batch_size=batch, shuffle=True, num_workers=workers)
    if job.get("own") == "sampler":
        loader = DataLoader(samples, batch_size=batch, sampler=Backwards(len(samples)))
    elif job.get("own") == "batches":
        loader = DataLoader(samples, batch_sampler=Batches(SequentialSampler(samples), batch, False))
    ahead = DataLoader(Numbers(16), batch_size=4 // RANKS)
    path = job.get("ckpt")
    path = path if path in (None, "last", "best") else str(folder / path)
    if what == "again":  # with a checkpoint of the first call
        trainer.fit_loop.max_epochs, path = 3, str(folder / f"{job['name']}.ckpt")
    if what in ("fit", "again"):
        trainer.fit(model, loader, ahead if job.get("validates") else None, ckpt_path=path)
        return [list(each.best_k_models) for each in trainer.checkpoint_callbacks]
    if what == "spoil":
        torch.distributed.barrier()
        if RANK == 0:
            next(Path(trainer.checkpoint_callback.best_model_path).glob("checkpoint/*optim_states.pt")).unlink()
        torch.distributed.barrier()
        return None
    if what == "best":
        what, path = "test", "best"
    result = getattr(trainer, what)(model, ahead, ckpt_path=path, verbose=False)
    model.keep_weights()
    return result


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[2]).read_text()):
        run(Path(sys.argv[1]), each)
