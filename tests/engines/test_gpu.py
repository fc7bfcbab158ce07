"""Tests for a machine with a GPU (``pytest -m gpu``), which run on the stand-in device too."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STEP, differences
from deepspeed.accelerator import get_accelerator

from ucp_deepspeed import wait_for_save
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.saving.snapshot import HostBuffers, describe
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

pytestmark = pytest.mark.gpu

Ranks = Callable[[int], RankPool]

COUNT = min(torch.cuda.device_count(), 2) or 2
"""Ranks of a test: one for each GPU, at most two."""

ALWAYS = {"enabled": True, "load": "always"}
MLP = Run("mlp", zero={"stage": 1}, precision="bf16")


def device() -> str:
    """On a rank: its device."""
    return str(get_accelerator().current_device_name())


def a_snapshot(folder: str) -> bool:
    """On a rank: whether a snapshot of tensors on the device has the bytes that ``torch.save`` writes."""
    flat = torch.arange(4096, dtype=torch.float32, device=device())
    half = torch.linspace(-1, 1, 1000, device=device()).to(torch.bfloat16)
    state = {"view": flat[64:128].view(8, 8), "strided": flat.view(64, 64).t(), "half": half, "host": torch.ones(3)}
    expected = io.BytesIO()
    torch.save(state, expected)
    (found,) = HostBuffers().copy([describe(state, "archive.pt", apart=False)])
    flat.zero_(), half.zero_()  # later changes are not in it
    found.write(Path(folder))
    loaded, wanted = torch.load(Path(folder) / "archive.pt"), torch.load(io.BytesIO(expected.getvalue()))
    return all(torch.equal(loaded[key].cpu(), wanted[key].cpu()) for key in state) and (
        loaded["strided"].stride() == wanted["strided"].stride()
    )


def test_a_snapshot_holds_what_torch_would_save(ranks: Ranks, tmp_path: Path) -> None:
    assert ranks(1).run(a_snapshot, str(tmp_path)) == [True]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize(("saved", "loaded"), [(1, 3), (3, 2), (0, 1), (2, 0)])
def test_a_change_of_stage(saved: int, loaded: int, precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """Masters and states are equal bit for bit, and training goes on."""
    run = replace(MLP, zero={"stage": saved}, precision=precision)
    ranks(COUNT).run(train, run, STEP, save=str(tmp_path / "a"))
    target = replace(run, zero={"stage": loaded}, seed=5)
    saving = {"save": str(tmp_path), "save_tag": "b", "save_first": True}
    outcomes = ranks(COUNT).run(train, target, STEP + 1, load=str(tmp_path / "a"), **saving)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert all(len(outcome.losses) == 1 for outcome in outcomes)


class RateOnDevice(torch.optim.AdamW):
    """Its learning rate is a tensor on the device, as CUDA graphs need it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=torch.tensor(1e-3, device=device()), capturable=True)


OPTIMIZERS: dict[str, Any] = {
    "fused": ("AdamW", {"lr": 1e-3, "fused": True}),
    "capturable": ("AdamW", {"lr": 1e-3, "capturable": True}),
    "for each": ("AdamW", {"lr": 1e-3, "foreach": True}),
    "rate on the device": (RateOnDevice, {}),
}


def last_losses(run: Run, **options: Any) -> list[float]:
    """On a rank: losses of the last two steps of a run."""
    losses = train(run, STEP + 2, **options).losses
    return [losses[step] for step in (STEP + 1, STEP + 2)]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_forms_of_adam_go_on_bit_for_bit(name: str, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": stage}, optimizer=OPTIMIZERS[name])
    whole = ranks(COUNT).run(last_losses, run, save=str(tmp_path), save_at=STEP)
    assert ranks(COUNT).run(last_losses, replace(run, universal=ALWAYS, seed=7), load=str(tmp_path)) == whole


def load_within_a_stream(run: Run, folder: str) -> list[bool]:
    """On a rank: whether masters are the same after a load in a stream of the user's, whose work comes before and after."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    slots = engine_optimizer(engine).slots()
    expected = [slot.master.detach().clone() for slot in slots]
    stream = torch.Stream(device=torch.device(device()))
    stream.wait_stream(torch.accelerator.current_stream())
    with stream:
        for slot in slots:
            slot.master.data.fill_(-1)
        engine.load_checkpoint(folder)
        found = [slot.master.detach().clone() for slot in engine_optimizer(engine).slots()]
    torch.accelerator.synchronize()
    same = [torch.equal(one, other) for one, other in zip(found, expected, strict=True)]
    engine.destroy()
    return same


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_load_in_a_stream_of_the_users(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    run = replace(MLP, zero={"stage": stage}, universal=ALWAYS)
    ranks(COUNT).run(train, run, STEP, save=str(tmp_path))
    assert all(all(same) for same in ranks(COUNT).run(load_within_a_stream, run, str(tmp_path)))


def save_and_go_on(run: Run, folder: str) -> None:
    """On a rank: train a step, save, and train on at once, while the save may still be written."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)
    for step in (2, 3, 4):
        train_step(engine, run, step)
    wait_for_save()
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_training_goes_on_beside_a_save(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """The files hold the moment of the call."""
    run = replace(MLP, zero={"stage": stage})
    ranks(COUNT).run(save_and_go_on, run, str(tmp_path / "a"))
    in_background = replace(run, universal={"enabled": True, "save": {"async": True}})
    ranks(COUNT).run(save_and_go_on, in_background, str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def draw(run: Run, folder: str, load: bool) -> list[float]:
    """On a rank: numbers that the device's stream gives after a save, or after a load of it."""
    engine = build_engine(run)
    torch.manual_seed(1 if load else 2)
    if load:
        engine.load_checkpoint(folder)
    else:
        torch.rand(5, device=device())
        engine.save_checkpoint(folder)
        wait_for_save()
    found: list[float] = torch.rand(4, device=device()).tolist()
    engine.destroy()
    return found


def test_the_devices_random_stream_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    expected = ranks(COUNT).run(draw, MLP, str(tmp_path), False)
    assert ranks(COUNT).run(draw, replace(MLP, zero={"stage": 2}), str(tmp_path), True) == expected
