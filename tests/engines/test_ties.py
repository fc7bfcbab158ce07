"""Models that tie other parameters than the checkpoint: each gets the shared value, and two values are never made one."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from torch import nn

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import gather

Ranks = Callable[[int], RankPool]

WORDS, HEAD = "embedding.weight", "head.weight"


class Model(nn.Module):
    """An embedding and a head, tied or not; they begin with the same values. Frozen on demand, but for the norm."""

    def __init__(self, tied: bool, frozen: bool, head_first: bool = False) -> None:
        super().__init__()
        torch.manual_seed(7)
        words, head = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        head.weight = words.weight if tied else nn.Parameter(words.weight.detach().clone())
        if head_first:
            self.head = head
        self.embedding = words
        self.norm = nn.LayerNorm(3)
        if not head_first:
            self.head = head
        self.embedding.weight.requires_grad_(not frozen)
        self.head.weight.requires_grad_(not frozen)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.norm(self.embedding(tokens))), tokens)


def run(
    model: Mapping[str, Any],
    stage: int,
    save: str,
    load: str | None = None,
    steps: int = 0,
    universal: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Build the model, load, train and save; returns the weights that a forward pass sees."""
    reset_parallel_state()
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.05, "torch_adam": True}},
        "zero_optimization": {"stage": stage},
        "universal_checkpoint": {"enabled": True, **(universal or {})},
    }
    module: nn.Module = Model(**{key: value for key, value in model.items() if key != "compiled"})
    if model.get("compiled"):
        module = torch.compile(module, backend="eager")  # type: ignore[assignment]
    trained = [param for param in module.parameters() if param.requires_grad]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=config)
    if load is not None:
        engine.load_checkpoint(load)
    for _ in range(steps):
        engine.backward(engine(torch.tensor([1 + torch.distributed.get_rank(), 4], device=engine.device)))
        engine.step()
    engine.save_checkpoint(save, tag="t")
    with deepspeed.zero.GatheredParameters(list(module.parameters())):
        seen = {name: param.detach().clone() for name, param in module.named_parameters(remove_duplicate=False)}
    engine.destroy()
    del engine
    gc.collect()
    return seen


def states(folder: Path, name: str) -> dict[str, Any]:
    """All that a checkpoint holds of a parameter, whole."""
    view = UniversalView.of(open_checkpoint(folder))
    found: dict[str, Any] = dict(view.parameters[name].scalars)
    for state in view.parameters[name].states:
        flat = torch.zeros(torch.Size(view.logical_shape(name)).numel())
        gather(view, name, state, 0, flat, FileReader())
        found[state] = flat.tolist()
    return found


def test_untying_without_a_manifest_where_nothing_is_cut(ranks: Ranks, tmp_path: Path) -> None:
    """The topology is the same, and DeepSpeed would give up: the optimizer has another number of tensors."""
    saved = ranks(2).run(run, {"tied": True, "frozen": False}, 0, str(tmp_path / "a"), steps=2)
    (tmp_path / "a" / "t" / "ucp_manifest.json").unlink()
    found = ranks(2).run(run, {"tied": False, "frozen": False}, 0, str(tmp_path / "b"), load=str(tmp_path / "a"))
    for before, after in zip(saved, found, strict=True):
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert states(tmp_path / "b", WORDS) == states(tmp_path / "b", HEAD) == states(tmp_path / "a", WORDS)


@pytest.mark.parametrize("frozen", [False, True], ids=["trained", "frozen"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_untying_and_tying_again(stage: int, frozen: bool, ranks: Ranks, tmp_path: Path) -> None:
    """Both get the shared value and its states; as long as they are equal, so does what ties them again."""
    tied, apart = {"tied": True, "frozen": frozen}, {"tied": False, "frozen": frozen}
    two = ranks(2)
    seen = two.run(run, tied, stage, str(tmp_path / "tied"), steps=2)[0]
    expected = states(tmp_path / "tied", WORDS)
    assert expected.keys() == ({"weight"} if frozen else {"fp32", "exp_avg", "exp_avg_sq", "step"})
    convert(UniversalView.of(open_checkpoint(tmp_path / "tied")), tmp_path / "u")
    for source in ("tied", "u"):
        found = two.run(run, apart, stage, str(tmp_path / "apart"), str(tmp_path / source))[0]
        assert all(torch.equal(found[name], value) for name, value in seen.items())
        assert states(tmp_path / "apart", WORDS) == states(tmp_path / "apart", HEAD) == expected
        assert not open_checkpoint(tmp_path / "apart").tied
    other = {**tied, "head_first": True}
    found = two.run(run, other, stage, str(tmp_path / "again"), str(tmp_path / "apart"))[0]
    assert all(torch.equal(found[name], value) for name, value in seen.items())
    assert states(tmp_path / "again", HEAD) == expected
    assert open_checkpoint(tmp_path / "again").tied == {WORDS: HEAD}
    for a, b in (("tied", "apart"), ("apart", "u")):
        assert main(["diff", str(tmp_path / a), str(tmp_path / b)], standalone_mode=False) in (0, None)
    plan = ["plan", str(tmp_path / "u"), "--model", str(tmp_path / "apart"), "--dp", "2", "--zero", str(stage)]
    assert main(plan, standalone_mode=False) in (0, None)


def test_ties_are_found_through_wrappers(ranks: Ranks, tmp_path: Path) -> None:
    """Tied and plain, then untied and compiled, then tied and plain again."""
    tied, apart = {"tied": True, "frozen": False}, {"tied": False, "frozen": False, "compiled": True}
    seen = ranks(1).run(run, tied, 1, str(tmp_path / "tied"), steps=2)[0]
    found = ranks(1).run(run, apart, 1, str(tmp_path / "apart"), str(tmp_path / "tied"))[0]
    assert all(torch.equal(found[f"_orig_mod.{name}"], value) for name, value in seen.items())
    found = ranks(1).run(run, tied, 1, str(tmp_path / "again"), str(tmp_path / "apart"))[0]
    assert all(torch.equal(found[name], value) for name, value in seen.items())
    assert states(tmp_path / "again", WORDS) == states(tmp_path / "tied", WORDS)


@pytest.mark.parametrize(("stage", "frozen"), [(0, False), (1, True), (2, False), (3, False)])
def test_two_values_are_never_made_one(stage: int, frozen: bool, ranks: Ranks, tmp_path: Path) -> None:
    """Refused by name, also where what is extra may be dropped."""
    ranks(2).run(run, {"tied": False, "frozen": False}, stage, str(tmp_path / "apart"), steps=2)
    source = tmp_path / "apart"
    if frozen:
        ranks(2).run(run, {"tied": False, "frozen": True}, 3, str(tmp_path / "u"), str(source), universal=DROP)
        source = tmp_path / "u"
    for policies in ({}, DROP):
        with pytest.raises(RankError) as caught:
            ranks(2).run(
                run, {"tied": True, "frozen": frozen}, stage, str(tmp_path / "b"), str(source), universal=policies
            )
        assert isinstance(caught.value.original, MismatchError)
        [problem] = caught.value.original.problems
        assert problem.startswith("head.weight: tied to embedding.weight in the model, and not in the checkpoint")
        assert problem.endswith("configuration does") and '"tie_word_embeddings": false' in problem


DROP = {"on_extra": "drop"}
