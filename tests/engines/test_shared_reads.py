"""Replicas that hold the same read each byte of the checkpoint once; DeepSpeed's ranks each read all of it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from checkpoints import STEP, differences
from deepspeed.accelerator import get_accelerator

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine import exchange
from ucp_deepspeed.engine.loading import planning
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train
from ucp_deepspeed.transfer.planning import targeting

Ranks = Callable[[int], RankPool]

ALL = {"enabled": True, "load": "always", "shared_read_bytes": 0}
"""Share however little it is."""

LLAMA = {"family": "llama"}
NORM = "decoder.final_layernorm.weight"

TARGETS = {
    "fp32": Run("mlp", zero={"stage": 0}),
    "bf16, one master for each parameter": Run("mlp", zero={"stage": 0}, precision="bf16"),
    "bf16, one master for each group": Run("mlp", zero={"stage": 0}, precision="bf16", fused=True),
    "frozen weights and buffers": Run("mlp", zero={"stage": 1}, frozen=("norm.bias", "layers.0.weight")),
    "norms on every tensor-parallel rank": Run("llama", tp=2, zero={"stage": 1}, precision="bf16"),
    "norms on all ranks": Run("llama", tp=2, zero={"stage": 0}),
    "slices of norms": Run("llama", tp=2, zero={"stage": 3}),
    "norms on every stage": Run("llama", tp=2, pp=2, zero={"stage": 1}),
    "frozen norms": Run("llama", tp=4, zero={"stage": 1}, frozen=(NORM,)),
    "embeddings of AutoTP": Run("huggingface", LLAMA, tp=2, zero={"stage": 2}),
    "experts on every rank": Run("moe", size={"ep": (1, 1)}, zero={"stage": 0}),
    "experts on two ranks each": Run("moe", size={"ep": (2, 2)}, zero={"stage": 0}),
}


def loaded(run: Run, folder: str, broadcasts: bool = False) -> tuple[Any, dict[str, str]]:
    """Load on this rank: its report, and a digest of each tensor that it holds.

    Args:
        broadcasts: exchange as over other backends than gloo.
    """
    engine = build_engine(run)
    with pytest.MonkeyPatch.context() as patch:
        if broadcasts:
            patch.setattr(exchange, "goes_over_gloo", lambda group, tensor: False)
            for module in (exchange, planning):
                patch.setattr(module, "reaches", lambda group, tensor: True)
        engine.load_checkpoint(folder)
    held = dict(engine.module.state_dict())
    optimizer = engine_optimizer(engine)
    for slot in optimizer.slots():
        held |= {f"{slot.names}/{key}": value for key, value in optimizer.state_of(slot).items()}
        held[f"{slot.names}/fp32"] = slot.master.data
    report = engine.universal_checkpoint_report
    engine.destroy()
    tensors = {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}
    return report, {name: _digest(value) for name, value in tensors.items()}


def _digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("broadcasts", [False, True], ids=["messages", "broadcasts"])
@pytest.mark.parametrize("name", TARGETS)
def test_what_ranks_read_for_one_another_is_what_each_would_read(
    name: str, broadcasts: bool, ranks: Ranks, tmp_path: Path
) -> None:
    target = replace(TARGETS[name], universal=ALL)
    ranks(2).run(train, replace(target, tp=1, pp=target.pp and 1, zero={"stage": 1}), STEP, save=str(tmp_path))
    alone = ranks(4).run(loaded, replace(target, universal={**ALL, "shared_read_bytes": 1 << 40}), str(tmp_path))
    shared = ranks(4).run(loaded, target, str(tmp_path), broadcasts)
    for (_, expected), (_, found) in zip(alone, shared, strict=True):
        assert found == expected
    assert sum(report.bytes_read for report, _ in shared) < sum(report.bytes_read for report, _ in alone)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (Run("llama", tp=2, zero={"stage": 1}), Run("llama", zero={"stage": 0})),
        (Run("llama", zero={"stage": 1}), Run("llama", tp=2, zero={"stage": 0})),
        (Run("llama", tp=2, zero={"stage": 1}), Run("llama", tp=4, zero={"stage": 1})),
        (Run("huggingface", LLAMA, zero={"stage": 1}), Run("huggingface", LLAMA, tp=2, zero={"stage": 2})),
        (Run("huggingface", LLAMA, tp=2, zero={"stage": 1}), Run("huggingface", LLAMA, tp=4, zero={"stage": 0})),
    ],
    ids=["replicas", "replicas and tensor-parallel", "tensor-parallel", "autotp", "autotp of autotp"],
)
def test_all_ranks_together_read_the_checkpoint_once(source: Run, target: Run, ranks: Ranks, tmp_path: Path) -> None:
    ranks(4).run(train, replace(source, universal=ALL), STEP, save=str(tmp_path / "a"))
    loading = replace(target, universal=ALL)
    outcomes = ranks(4).run(train, loading, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []
    view = UniversalView.of(open_checkpoint(tmp_path / "a"))
    elements = sum(torch.Size(view.logical_shape(name)).numel() for name in view.parameters)
    read = [outcome.report.bytes_read for outcome in outcomes]
    assert sum(read) <= 1.05 * 12 * elements
    if target.zero["stage"] == 0:  # else some partitions hold less that is shared than others
        assert max(read) - min(read) <= 128 * 3


def test_copies_that_differ_are_not_mixed(ranks: Ranks, tmp_path: Path) -> None:
    """All tensor-parallel ranks have the first, also where too little is held in common for them to divide it."""
    run = Run("llama", tp=2, zero={"stage": 0}, universal=ALL)
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    path = tmp_path / f"global_step{STEP}" / "mp_rank_01_model_states.pt"
    saved = torch.load(path, map_location="cpu", weights_only=False)
    saved["module"][NORM] = torch.nextafter(saved["module"][NORM], torch.tensor(9.0))
    torch.save(saved, path)
    (path.parent / "ucp_manifest.json").unlink()
    target = replace(run, tp=4)
    alone = ranks(4).run(loaded, replace(target, universal={**ALL, "shared_read_bytes": 1 << 40}), str(tmp_path))
    shared = ranks(4).run(loaded, target, str(tmp_path))
    assert [digests for _, digests in alone] == [digests for _, digests in shared]
    assert len({digests[NORM] for _, digests in shared}) == 1


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_little_memory(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Blocks of a few elements at a time, joined over tensor-parallel ranks and exchanged."""
    run = Run("llama", tp=2, zero={"stage": 1}, universal=ALL)
    ranks(4).run(train, run, STEP, save=str(tmp_path / "a"))
    target = replace(run, tp=1, zero={"stage": stage}, universal={**ALL, "read_memory_bytes": 2000})
    ranks(2).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def _experts(ep: int, stage: int = 0) -> Run:
    return Run("moe", size={"ep": (ep, ep)}, zero={"stage": stage})


@pytest.mark.parametrize(
    ("source", "target", "topology"),
    [
        (
            Run("llama", tp=2, zero={"stage": 1}, precision="bf16"),
            Run("llama", tp=2, zero={"stage": 0}),
            Topology(2, 1, 2, 0),
        ),
        (Run("llama", zero={"stage": 1}), Run("llama", tp=2, zero={"stage": 0}), Topology(2, 1, 2, 0)),
        (Run("llama", zero={"stage": 1}), Run("llama", tp=2, zero={"stage": 1}), Topology(2, 1, 2, 1)),
        (Run("llama", zero={"stage": 1}), Run("llama", tp=2, zero={"stage": 3}), Topology(2, 1, 2, 3)),
        (Run("huggingface", LLAMA), Run("huggingface", LLAMA, tp=4, zero={"stage": 1}), Topology(4, 1, 1, 1)),
        *((_experts(2, stage=1), _experts(ep), Topology(1, 1, 4, 0, ep)) for ep in (1, 2, 4)),
    ],
    ids=["stage 0", "TP and stage 0", "TP and stage 1", "TP and stage 3", "AutoTP", "EP 1", "EP 2", "EP 4"],
)
def test_the_plan_foretells_it(
    source: Run, target: Run, topology: Topology, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks(2).run(train, replace(source, universal=ALL), STEP, save=str(tmp_path))
    target = replace(target, precision=source.precision, universal=ALL)
    outcomes = ranks(4).run(train, target, STEP, load=str(tmp_path))
    assert outcomes[0].report.bytes_read < tunables.SHARED_READ_NUMBYTES
    monkeypatch.setattr(tunables, "SHARED_READ_NUMBYTES", 0)
    plan = targeting.plan_target(open_checkpoint(tmp_path), topology)
    by_place = {(rank.data_parallel_rank, rank.model_parallel_rank): rank.bytes_read for rank in plan.ranks}
    planned = [by_place[divmod(rank, topology.tp)] for rank in range(4)]
    assert planned == [outcome.report.bytes_read for outcome in outcomes]


def change_on_rank_0(src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """A ``custom_load_fn`` that does not do the same on all ranks."""
    if dist.get_rank() == 0:
        for param in dst.parameters():
            param.data.add_(1.0)


def weights_after_custom_load(run: Run, folder: str) -> tuple[str, list[bool]]:
    """On a rank: a digest of all weights, and whether they are those of this rank's masters."""
    engine = build_engine(run)
    engine.load_checkpoint(folder, custom_load_fn=change_on_rank_0)
    weights = dict(engine.module.named_parameters())
    found = [
        torch.equal(
            weights[name].data.view(-1)[part.local_start : part.local_start + part.numel],
            slot.master.data[part.buffer_start : part.buffer_start + part.numel].to(weights[name].dtype),
        )
        for slot in engine_optimizer(engine).slots()
        for name, part in slot.fragments()
    ]
    digest = "".join(_digest(weight.data) for weight in weights.values())
    engine.destroy()
    return digest, found


@pytest.mark.parametrize("stage", [1, 2])
def test_weights_are_exchanged_again_when_masters_change(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """The load makes the weights once, and once more after the user's function: all ranks end with those of the masters."""
    run = Run("mlp", zero={"stage": stage}, precision="bf16", universal=ALL)
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    outcomes = ranks(2).run(weights_after_custom_load, run, str(tmp_path))
    assert outcomes[0][0] == outcomes[1][0]
    assert all(all(found) for _, found in outcomes)


def exchange_small(broadcasts: bool) -> tuple[bool, int]:
    """Many small tensors, and a large one between them; whether each came, and most bytes packed at a time on this rank."""
    me, count = dist.get_rank(), dist.get_world_size()
    sizes = [3, 500, 1 << 16, 1, 0, *[100] * 40]
    device = get_accelerator().current_device_name()
    held = [
        [torch.full((size,), float(owner + 1) * (owner == me), device=device) for size in sizes]
        for owner in range(count)
    ]
    most = 0
    plain = exchange.Exchange.wait_for_packed

    def wait(self: exchange.Exchange) -> None:
        nonlocal most
        most = max(most, sum(pack.buffer.nbytes for pack in self._packed))
        plain(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchange.Exchange, "wait_for_packed", wait)
        if broadcasts:
            patch.setattr(exchange, "goes_over_gloo", lambda group, tensor: False)
        packing = exchange.Packing(4096 * count)
        packing.reserve(held)
        exchange.begin_exchange(held, dist.group.WORLD, packing).wait()
    came = all(bool((tensor == owner + 1).all()) for owner, tensors in enumerate(held) for tensor in tensors)
    return came, most


@pytest.mark.parametrize("broadcasts", [False, True], ids=["messages", "broadcasts"])
def test_small_tensors_take_little_memory_on_their_way(broadcasts: bool, ranks: Ranks) -> None:
    for came, most in ranks(2).run(exchange_small, broadcasts):
        assert came and 0 < most <= 2 * 4096
