"""State that modules hold beside trained parameters: frozen parameters, buffers and extra states, also with two names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
import torch
from checkpoints import STEP, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]


def test_frozen_parameters_and_buffers(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's universal load leaves both at their fresh values, without a word."""
    frozen = ("embedding.weight", "norm.bias")
    chain = [(1, 2, 0), (3, 4, 1), (0, 1, 2), (3, 2, 3), (2, 2, 4)]
    for position, (stage, world_size, seed) in enumerate(chain):
        run = Run("mlp", zero={"stage": stage}, frozen=frozen, seed=seed, precision="bf16")
        load = str(tmp_path / str(position - 1)) if position else None
        ranks(world_size).run(train, run, STEP, load=load, save=str(tmp_path / str(position)))
        checkpoint = open_checkpoint(tmp_path / str(position))
        kinds = {name: parameter.kind for name, parameter in checkpoint.parameters.items()}
        assert [name for name, kind in kinds.items() if kind == "frozen"] == list(frozen)
        assert [name for name, kind in kinds.items() if kind == "buffer"] == ["calibration", "calls"]
        assert differences(tmp_path / "0", tmp_path / str(position)) == []


@pytest.mark.parametrize(("source", "target"), [(1, 3), (3, 2), (0, 1)])
def test_complex_buffers_and_extra_states(source: int, target: int, ranks: Ranks, tmp_path: Path) -> None:
    """Extra states of modules and complex buffers are restored too, also by way of a conversion.

    DeepSpeed's universal load restores neither (peers: frozen parameters and buffers are silently not restored).
    """
    run = Run("mlp", size={"remembers": True}, zero={"stage": source})
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    view = UniversalView.of(open_checkpoint(tmp_path / "a"))
    assert view.parameters["angles"].states == {"weight": "C64"}
    assert view.checkpoint.extra_states() == ({"_extra_state": {"passes": STEP}},)
    convert(view, tmp_path / "u" / "step")
    other = replace(run, zero={"stage": target}, size={"remembers": True}, seed=1)
    for folder in (tmp_path / "a", tmp_path / "u" / "step"):
        again = tmp_path / f"again-{folder.name}"
        ranks(1).run(train, other, STEP, load=str(folder), save=str(again), save_first=True)
        assert differences(tmp_path / "a", again) == []
    ranks(1).run(train, other, STEP + 1, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert open_checkpoint(tmp_path / "b").extra_states() == ({"_extra_state": {"passes": STEP + 1}},)
    assert "extra_state passes" not in "".join(differences(tmp_path / "a", again))
    assert "_extra_state is {'passes': 3} in A, {'passes': 4} in B" in "".join(
        differences(tmp_path / "a", tmp_path / "b")
    )


def save_with_complex128(run: Run, folder: str) -> None:
    """On a rank: save with a buffer of a dtype that the universal form lacks; then DeepSpeed loads it by itself."""
    engine = build_engine(run)
    engine.module.register_buffer("angles", torch.full((3,), 1j, dtype=torch.complex128))
    train_step(engine, run, 1)
    engine.save_checkpoint(folder)
    engine.module.angles.zero_()
    engine.load_checkpoint(folder)
    assert engine.module.angles.tolist() == [1j] * 3


def test_a_buffer_of_another_dtype_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", size={"remembers": True}, zero={"stage": 1})
    ranks(2).run(save_with_complex128, run, str(tmp_path / "a"))
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, run, STEP, load=str(tmp_path / "a"))
    assert "angles: torch.complex128 has no universal form" in str(caught.value.original)
    with pytest.raises(UnsupportedError, match=r"angles: torch\.complex128 has no universal form"):
        convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")


def test_an_extra_state_that_one_side_lacks(ranks: Ranks, tmp_path: Path) -> None:
    plain, remembering = Run("mlp", zero={"stage": 1}), Run("mlp", size={"remembers": True}, zero={"stage": 2})
    ranks(2).run(train, plain, STEP, save=str(tmp_path / "plain"))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, remembering, STEP, load=str(tmp_path / "plain"), options={"load_module_strict": True})
    assert "angles: missing in the checkpoint" in str(caught.value.original)
    ranks(2).run(train, remembering, STEP, save=str(tmp_path / "remembering"))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, plain, STEP, load=str(tmp_path / "remembering"))
    assert "angles: extra in the checkpoint" in str(caught.value.original)
    loose = {"load_module_strict": False}
    assert ranks(2).run(train, plain, STEP, load=str(tmp_path / "remembering"), options=loose)[0].report is not None


class Turning(torch.nn.Module):
    """Two layers that share a module with a buffer, as layers share rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        shared = torch.nn.BatchNorm1d(4, affine=False)
        self.first, self.second = (torch.nn.Sequential(torch.nn.Linear(4, 4), shared) for _ in range(2))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.second(self.first(values)).square().mean()
        return result


def turned(stage: int, named: int, folder: str, load: bool) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    """On a rank: load or train the model of shared modules, with groups of named parameters; its state and those names."""
    reset_parallel_state()
    torch.manual_seed(load)
    model = Turning()
    parameters = list(model.named_parameters())
    groups = [{"params": parameters}] if named == 1 else [{"params": parameters[:1]}, {"params": parameters[1:]}]
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "universal_checkpoint": {"enabled": True},
    }
    optimizer = torch.optim.AdamW(groups)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    if load:
        engine.load_checkpoint(folder)
    else:
        engine.backward(engine(torch.randn(8 // engine.dp_world_size, 4).to(engine.device)))
        engine.step()
        engine.save_checkpoint(folder)
    buffers = {name: value.clone() for name, value in engine.module.named_buffers(remove_duplicate=False)}
    names = [group["param_names"] for group in engine.optimizer.param_groups]
    engine.destroy()
    return buffers, names


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_buffer_with_two_names_and_groups_with_torchs_names(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """A module shared by layers: DeepSpeed saves its buffers under each name. torch's own lists of names stay the target's."""
    expected, names = ranks(2).run(turned, 1, 1, str(tmp_path), False)[0]
    found, parted = ranks(1).run(turned, stage, 2, str(tmp_path), True)[0]
    assert {"first.1.running_mean", "second.1.running_mean"} <= expected.keys() == found.keys()
    assert all(found[name].equal(expected[name]) for name in expected)
    assert parted == [names[0][:1], names[0][1:]]


def tied(head_first: bool, stage: int, folder: str, load: bool) -> tuple[torch.Tensor, tuple[str, ...]]:
    """On a rank: load or train an embedding and a tied head, in one order or the other; the weight, and what began anew."""
    reset_parallel_state()
    torch.manual_seed(load)
    embedding, head = torch.nn.Embedding(12, 6), torch.nn.Linear(6, 12, bias=False)
    parts = {"head": head, "embedding": embedding} if head_first else {"embedding": embedding, "head": head}
    model = torch.nn.ModuleDict(parts)
    head.weight = embedding.weight
    model.forward = lambda tokens: head(embedding(tokens)).square().mean()  # type: ignore[method-assign]
    config = {
        "train_batch_size": 8,
        "zero_optimization": {"stage": stage},
        "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
        "universal_checkpoint": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
    if load:
        engine.load_checkpoint(folder)
    else:
        engine.backward(engine(torch.arange(8 // engine.dp_world_size, device=engine.device)))
        engine.step()
        engine.save_checkpoint(folder)
    report = getattr(engine, "universal_checkpoint_report", None)
    with deepspeed.zero.GatheredParameters([embedding.weight]):
        weight = embedding.weight.detach().clone()
    engine.destroy()
    return weight, report.initialised if report else ()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_tied_parameters_in_another_order(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed stores a tied parameter under the first of its names, which depends on the order of the modules."""
    [saved] = ranks(1).run(tied, False, stage, str(tmp_path), False)
    for loaded, initialised in ranks(2).run(tied, True, 1, str(tmp_path), True):
        assert loaded.equal(saved[0]) and initialised == ()


def with_a_grid(run: Run, turned: bool, folder: str | None, save: str | None) -> torch.Tensor:
    """On a rank: a model with one more buffer, whose elements lie column by column if ``turned``; returns it row by row."""
    engine = build_engine(run)
    grid = torch.arange(15.0).view(3, 5) * (run.seed + 1)
    engine.module.register_buffer("grid", grid.t().contiguous().t() if turned else grid)
    if folder is not None:
        engine.load_checkpoint(folder)
    if save is not None:
        engine.save_checkpoint(save)
    assert engine.module.grid.is_contiguous() != turned
    found = engine.module.grid.clone(memory_format=torch.contiguous_format)
    engine.destroy()
    return found


def test_a_buffer_in_another_order_of_elements(ranks: Ranks, tmp_path: Path) -> None:
    """As with channels_last: filled as if it were row-major, every element would be there and in a wrong place."""
    run, other = Run("mlp", zero={"stage": 1}), Run("mlp", zero={"stage": 2}, seed=3)
    [saved] = ranks(1).run(with_a_grid, run, False, None, str(tmp_path / "a"))
    [loaded] = ranks(1).run(with_a_grid, other, True, str(tmp_path / "a"), None)
    assert saved.equal(loaded)
    ranks(1).run(with_a_grid, run, True, None, str(tmp_path / "b"))
    with pytest.raises(RankError) as caught:
        ranks(1).run(with_a_grid, other, False, str(tmp_path / "b"), None)
    assert isinstance(caught.value.original, UnsupportedError)
    assert "holds a tensor of shape (3, 5) that isn't contiguous" in str(caught.value.original)
