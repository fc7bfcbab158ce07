"""The ways of saving in `test_never_worse`, and the changes to the files afterwards."""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed.testing.runs import Run, train_step

SAVED_STEPS = 2
"""Steps that a source has taken when it saves."""


def train_and_save(engine: Any, run: Run, folder: str) -> None:
    """The usual source: two steps, and a save with a number in its client state."""
    for step in range(1, SAVED_STEPS + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(folder, client_state={"epoch": 7})


def train_save_and_publish(engine: Any, run: Run, folder: str) -> None:
    """Weights alone: what the optimizer keeps is deleted."""
    train_save_and_change(lambda path: path.unlink() if "optim" in path.name else None, engine, run, folder)


def train_save_and_change(change: Callable[[Path], None], engine: Any, run: Run, folder: str) -> None:
    """Something is done with each file of DeepSpeed's."""
    train_and_save(engine, run, folder)
    dist.barrier()
    if dist.get_rank() == 0:
        for path in list(Path(folder).rglob("*_states.pt")):
            change(path)
    dist.barrier()


def compress(path: Path) -> None:
    """As an archiver leaves it that packs an unpacked folder again."""
    with zipfile.ZipFile(path) as file:
        records = [(record.filename, file.read(record)) for record in file.infolist()]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for record in records:
            file.writestr(*record)
    (path.parent / "ucp_manifest.json").unlink(missing_ok=True)


def litter(path: Path) -> None:
    """Write files that file managers and people leave beside a checkpoint's."""
    (path.parent / f"._{path.name}").write_bytes(b"\0\5\26\7")
    shutil.copy(path, path.parent / f"old_{path.name}")
    (path.parent / "pytorch_model_states.pt").write_bytes(b"weights")


def train_save_and_rewrite(rewrite: Callable[[dict[str, Any]], None], engine: Any, run: Run, folder: str) -> None:
    """Each file is written again with what ``rewrite`` makes of it, and nothing else tells what it was."""

    def change(path: Path) -> None:
        saved = torch.load(path, map_location="cpu", weights_only=False)
        rewrite(saved)
        torch.save(saved, path)
        (path.parent / "ucp_manifest.json").unlink(missing_ok=True)

    train_save_and_change(change, engine, run, folder)


def age(saved: dict[str, Any]) -> None:
    """As DeepSpeed before 0.7.3 saved mixtures of experts under ZeRO: nothing tells the names of what the optimizer has."""
    for key in ("buffer_names", "param_shapes", "ds_config"):
        saved.pop(key, None)
    if "optimizer_state_dict" in saved:
        del saved["optimizer_state_dict"]["param_slice_mappings"]


def record_oddly(saved: dict[str, Any]) -> None:
    """A record that this release can't read, and DeepSpeed has no use for."""
    if "module" in saved:
        saved["universal_checkpoint_info"] = {"original_vocab_size": "many", "vocabulary_parameter_patterns": []}


def forget_paddings(saved: dict[str, Any]) -> None:
    """As DeepSpeed before 0.19.8 saved ZeRO-1 and 2."""
    saved.get("optimizer_state_dict", {}).pop("param_alignment_paddings", None)
