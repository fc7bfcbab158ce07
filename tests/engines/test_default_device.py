"""A default device that the script sets: what belongs on the host is there all the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from refusals import fingerprint

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train_step
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]


@contextmanager
def default_device(way: str) -> Iterator[None]:
    """Set the rank's accelerator as torch's default device, for all that follows or in a block."""
    device = torch.device(get_accelerator().current_device_name())
    if way == "block":
        with device:
            yield
        return
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def save_and_load(run: Run, folder: str, way: str) -> list[bool]:
    """On a rank: save in both ways, load both universally, and convert, diff and read under a default device. Returns whether
    each load gives the very state that was saved, which had been loaded without one."""
    engine, same = build_engine(run), []
    train_step(engine, run, 1)
    engine.save_checkpoint(folder, tag="a")
    train_step(engine, run, 2)
    engine.load_checkpoint(folder, tag="a")
    before = fingerprint(engine)
    config: Any = engine.universal_checkpoint_config
    with default_device(way):
        assert torch.empty(0).device.type == get_accelerator().device_name()
        for tag in ("b", "f"):
            engine.universal_checkpoint_config = config.model_copy(
                update={"save": config.save.model_copy(update={"asynchronous": tag == "b"})}
            )
            engine.save_checkpoint(folder, tag=tag)
            ucp_deepspeed.wait_for_save()
    for tag in ("b", "f"):
        train_step(engine, run, 2)
        with default_device(way):
            engine.load_checkpoint(folder, tag=tag)
        same.append(fingerprint(engine) == before)
    train_step(engine, run, 2)
    if dist.get_rank() == 0:
        with default_device(way):
            views = [UniversalView.of(open_checkpoint(Path(folder) / tag)) for tag in ("b", "f")]
            convert(views[0], Path(folder) / "universal")
            assert not compare(*views)
            opened = ucp_deepspeed.open_checkpoint(Path(folder) / "universal")
            assert all(opened.read(name).device.type == "cpu" for name in opened.parameters)
    dist.barrier()
    with default_device(way):
        engine.load_checkpoint(folder, tag="universal", custom_load_fn=lambda src, dst: dst.load_state_dict(src))
    return same


@pytest.mark.nccl_like("only")
@pytest.mark.parametrize(("stage", "way"), [(0, "block"), (1, "set"), (3, "set")])
def test_all_works_under_a_default_device(stage: int, way: str, ranks: Ranks, tmp_path: Path) -> None:
    """Each save and load used to end in an error of mixed devices."""
    universal = {"enabled": True, "load": "always", "shared_read_bytes": 0}
    run = Run("mlp", zero={"stage": stage}, precision="bf16", universal=universal)
    assert ranks(2).run(save_and_load, run, str(tmp_path), way, timeout=60.0) == [[True, True]] * 2
