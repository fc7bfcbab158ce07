"""One real checkpoint, and the command line in this process."""

from __future__ import annotations

from pathlib import Path

import pytest

from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder to load from, in which a real DeepSpeed engine saved ``step2`` and then ``step3``. Not to be changed."""
    root = tmp_path_factory.mktemp("cli")
    run = Run(zero={"stage": 1}, precision="bf16", groups="decay", frozen=("linear_in.bias",))
    for step in (2, 3):
        get_pool(1).run(
            train, run, step, save=str(root), save_tag=f"step{step}", client_state={"epoch": 7}, timeout=280
        )
    return root


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A checkpoint of two tensor-parallel ranks whose parameters belong to no family; saved without a manifest."""
    import torch
    from native_files import NativeModel, NativeParameter, NativeRun, write_native

    rows = NativeParameter("block.rows", torch.arange(48.0).view(6, 8), {"exp_avg": torch.ones(6, 8)}, cut="rows")
    same = NativeParameter("block.same", torch.ones(5), {"exp_avg": torch.ones(5)})
    return write_native(tmp_path / "sharded", NativeModel((rows, same)), NativeRun(tp=2, stage=1))


@pytest.fixture
def spec_file(tmp_path: Path) -> Path:
    """The layouts of `sharded`."""
    path = tmp_path / "spec.yaml"
    path.write_text(
        "family: mine\nrules:\n"
        "  - {match: block.rows, pattern: shard, dim: 0}\n"
        "  - {match: block.same, pattern: replicate}\n"
    )
    return path
