"""The stand-in device is as strict as an accelerator, and its backend as NCCL."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ucp_deepspeed.testing.ranks import RankError, RankPool, get_pool


def on_device(function: Any, count: int = 1) -> list[Any]:
    return get_pool(count, "standin").run(function, timeout=60.0)


def late_copies() -> list[Any]:
    """On a rank: what is seen before and after each way to wait for copies that don't block."""
    source, target, back = torch.ones(4).pin_memory(), torch.zeros(4, device="standin"), torch.zeros(4).pin_memory()
    side, seen = torch.Stream(device="standin"), []
    with side:
        target.copy_(source, non_blocking=True)
        copied = side.record_event()
    seen.append((target.sum().item(), copied.query()))
    torch.accelerator.current_stream().wait_event(copied)
    seen.append((target.sum().item(), copied.query()))
    target.copy_(2 * source, non_blocking=True)  # not pinned: at once
    back.copy_(target, non_blocking=True)
    seen.append(back.sum().item())
    torch.accelerator.synchronize()
    return [*seen, back.sum().item()]


def test_copies_are_late_and_streams_wait_by_events() -> None:
    assert on_device(late_copies) == [[(0.0, False), (4.0, True), 0.0, 8.0]]


def operations() -> list[str]:
    """On a rank: what an operation on tensors of both devices, and too much memory of either kind, answer."""
    from ucp_deepspeed.testing.device.stand_in import extension

    compiled, told = extension(), []
    compiled.set_pinned_budget(compiled.pinned_bytes() + (8 << 20))
    compiled.set_device_budget(compiled.device_bytes() + 64)
    held = torch.empty(5 << 20, dtype=torch.uint8, pin_memory=True)  # charged as 8 MiB
    for wrong in (
        lambda: torch.ones(2, device="standin") + torch.ones(2),
        lambda: torch.empty(1, pin_memory=True),
        lambda: torch.empty(65, dtype=torch.uint8, device="standin"),
    ):
        try:
            told.append(str(wrong()))
        except RuntimeError as error:
            told.append(f"{type(error).__name__}: {str(error).splitlines()[0]}")
    compiled.set_pinned_budget(-1)
    compiled.set_device_budget(-1)
    return [*told, str(held.is_pinned())]


def test_devices_do_not_mix_and_memory_ends() -> None:
    [(mixed, pinned, device, is_pinned)] = on_device(operations)
    assert "same device" in mixed and "no pinned memory left" in pinned and is_pinned == "True"
    assert device.startswith("OutOfMemoryError: the device has no room")


def moved_parameters() -> tuple[bool, str, int]:
    """On a rank: whether a module that was moved has its parameter, with its attribute, and where the gradient is."""
    layer = torch.nn.Linear(2, 2)
    weight = layer.weight
    weight.tensor_model_parallel = 7  # type: ignore[attr-defined]
    layer.to("standin")
    layer(torch.ones(1, 2, device="standin")).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight is weight, layer.weight.grad.device.type, layer.weight.tensor_model_parallel  # type: ignore[attr-defined]


def test_parameters_are_the_same_after_a_move() -> None:
    assert on_device(moved_parameters) == [(True, "standin", 7)]


def collectives() -> list[Any]:
    """On one of two ranks: what is refused, and a sum before and after the wait for it."""
    rank, told = dist.get_rank(), [dist.get_backend()]
    for wrong in (
        torch.ones(2),
        torch.ones(2, dtype=torch.int16, device="standin"),
        torch.ones(2, 2, device="standin").t(),
    ):
        try:
            dist.all_reduce(wrong)
        except RuntimeError as error:
            told.append(str(error))
    tensor = torch.full((3,), float(rank + 1), device="standin")
    work = dist.all_reduce(tensor, async_op=True)
    assert work is not None
    before = tensor[0].item()
    work.wait()
    return [*told, before == rank + 1, tensor[0].item()]


def test_the_backend_is_strict() -> None:
    for name, cpu, dtype, strided, unchanged, total in on_device(collectives, 2):
        assert (
            name == "nccl_like" and "of the device alone" in cpu and "torch.int16" in dtype and "contiguous" in strided
        )
        assert unchanged and total == 3.0


def wait_alone() -> None:
    """On one of two ranks: rank 0 waits for the other, which doesn't come."""
    from ucp_deepspeed.testing.device import nccl_like

    nccl_like.WATCHDOG_SECONDS = 2.0
    group = dist.new_group([0, 1])
    if dist.get_rank() == 0:
        dist.all_reduce(torch.ones(1, device="standin"), group=group)
    time.sleep(30)


def test_a_rank_that_is_missing_ends_the_process() -> None:
    pool = RankPool(2, device="standin")
    try:
        with pytest.raises(RankError, match="a rank is missing after 2 s"):
            pool.run(wait_alone, timeout=20.0)
    finally:
        pool.close()
