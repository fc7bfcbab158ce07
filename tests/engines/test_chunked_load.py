"""Engines go on from a form that tells boxes: a folder of ``torch.distributed.checkpoint``, cut unevenly along two dimensions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from checkpoints import STEP, differences
from chunked import ChunkedCheckpoint, Grid, write_chunks

from ucp_deepspeed.checkpoint import open_checkpoint, opening
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Outcome, Run, train
from ucp_deepspeed.transfer import FileReader, gather


class TrainedChunks(ChunkedCheckpoint):
    """The chunks of a run; what isn't in tensors is read from DeepSpeed's folder, which a file names."""

    def __init__(self, path: Path, verify: bool = True) -> None:
        super().__init__(path)
        origin = open_checkpoint((path / INDEX_NAME).read_text())
        self.run, self.groups = origin.run, origin.groups
        self.parameters = {
            name: replace(origin.parameters[name], local_shapes=held.local_shapes)
            for name, held in self.parameters.items()
        }


def train_from_chunks(run: Run, steps: int, load: str, save: str) -> Outcome:
    """On a rank: load chunks, save before any step, and go on."""
    with patch.object(opening, "UniversalCheckpoint", TrainedChunks):
        return train(run, steps, load=load, tag="step3", save=save, save_first=True)


def as_chunks(source: Path, folder: Path) -> None:
    view = UniversalView.of(open_checkpoint(source))
    grids: dict[str, Grid] = {}
    for name, parameter in view.parameters.items():
        shape = view.logical_shape(name)
        cuts = tuple((extent // 3,) if extent > 2 else () for extent in shape)
        for state, dtype in parameter.states.items():
            flat = torch.empty(prod(shape), dtype=NAMED_DTYPES[dtype])
            gather(view, name, state, 0, flat, FileReader())
            grids[f"{name}/{state}"] = Grid(flat.view(shape), cuts)
    write_chunks(folder, grids)
    (folder / INDEX_NAME).write_text(str(source))


TARGETS = [
    Run("llama", zero={"stage": 3}, precision="bf16"),
    Run("llama", tp=2, zero={"stage": 1}, precision="bf16"),
]


@pytest.mark.parametrize("target", TARGETS, ids=["zero-3", "tensor parallel"])
def test_a_load_from_chunks_is_exact(target: Run, ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    source = Run("llama", zero={"stage": 1}, precision="bf16")
    going_on = ranks(2).run(train, source, STEP + 1, save=str(tmp_path / "source"), save_tag="step3", save_at=STEP)
    as_chunks(tmp_path / "source" / "step3", tmp_path / "chunks" / "step3")
    found = ranks(2).run(train_from_chunks, target, STEP + 1, str(tmp_path / "chunks"), str(tmp_path / "again"))
    assert differences(tmp_path / "source", tmp_path / "again") == []
    assert found[0].losses[STEP + 1] == pytest.approx(going_on[0].losses[STEP + 1], rel=1e-2)
