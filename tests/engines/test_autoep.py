"""DeepSpeed's AutoEP on Hugging Face models: another expert-parallel size, data-parallel size and ZeRO stage, state bit for bit.

Experts given to the wrong rank keep every byte and ruin the model. So the oracle is a plain model without DeepSpeed that is given
the checkpoint's whole weights: it has to say the same about some tokens as the engines do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import differences, shared_differences
from safetensors.torch import load_file

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.testing.huggingface_models import EXPERT_FAMILIES, build_huggingface, causal_logits
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of, build_engine, train_step
from ucp_deepspeed.transfer.convert import convert

Ranks = Callable[[int], RankPool]

UNIVERSAL = {"enabled": True, "load": "always"}

STEPS = 2
"""Trained before the source is saved."""

BOUND = 1e-5
"""Largest accepted difference of logits of about 1 to 5, in float32: sums over ranks run in another order."""

RENAMED = (("router.gate", "gate"), ("router", "gate"))
"""Modules as AutoEP calls them, and as transformers does."""

QWEN = (("shared_experts", "shared_expert"), ("shared_experts_gate", "shared_expert_gate"))
"""The same of Qwen alone."""


def autoep(ep: int, stage: int, family: str = "mixtral", **changes: Any) -> Run:
    """A run of a family; loads are universal ones also where DeepSpeed could load by itself."""
    config = {"expert_parallel": {"enabled": True, "autoep_size": ep}, **changes.pop("config", {})}
    settings: dict[str, Any] = {"universal": UNIVERSAL, **changes}
    zero = {"stage": stage, **settings.pop("zero", {})}
    return Run("huggingface", {"family": family, **settings.pop("size", {})}, zero=zero, config=config, **settings)


def run_once(run: Run, steps: int, save: str, load: str | None = None) -> dict[str, Any]:
    """On a rank: build, load if asked to, train, save; returns what the engine says then, and the report of the load."""
    engine = build_engine(run)
    if load is not None:
        engine.load_checkpoint(load)
    for step in range(1, steps + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(save, tag="step")
    with torch.no_grad():
        logits = causal_logits(engine, batch_of(run, 100)[:, :-1])
    report = getattr(engine, "universal_checkpoint_report", None)
    loss = train_step(engine, run, steps + 1)
    engine.destroy()
    return {"logits": logits, "report": report, "loss": loss}


def whole_states(checkpoint: Path, folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's states, whole, by parameter and state."""
    convert(UniversalView.of(open_checkpoint(checkpoint)), folder)
    return {key: atom for path in folder.glob("atoms-*") for key, atom in load_file(path).items()}


def logits_of_whole(run: Run, checkpoint: Path, folder: Path) -> torch.Tensor:
    """What a plain model says that is given the checkpoint's whole weights."""
    atoms = whole_states(checkpoint, folder)
    held = {key.rpartition("/")[0]: atom for key, atom in atoms.items() if key.endswith(("/fp32", "/weight"))}
    model = build_huggingface(**{"vocabulary": VOCABULARY, "seed": 1, **run.size})
    missing, unexpected = model.load_state_dict(plain_weights(held, run.size["family"]), strict=False)
    assert not missing and not unexpected
    with torch.no_grad():
        return causal_logits(model, batch_of(run, 100)[:, :-1])


def plain_weights(held: dict[str, torch.Tensor], family: str) -> dict[str, torch.Tensor]:
    """Whole tensors of AutoEP's layers as those of transformers' modules."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in held.items():
        layer, _, weight = name.rpartition(".experts.")
        if weight == "w1":
            found[f"{layer}.experts.gate_up_proj"] = torch.cat([tensor, held[f"{layer}.experts.w3"]], dim=1)
        elif weight == "w2":
            found[f"{layer}.experts.down_proj"] = tensor
        elif weight != "w3":
            for renamed, plain in (*RENAMED, *(QWEN if family == "qwen2_moe" else ())):
                name = name.replace(f".mlp.{renamed}.", f".mlp.{plain}.")
            found[name] = tensor
    return found


CHAIN = ((4, 4), (1, 2), (2, 2), (1, 1), (2, 4))
"""Expert-parallel sizes, each with a number of ranks; the last is the source's."""


@pytest.mark.parametrize(
    ("stage", "stages", "settings"),
    [
        (0, (1, 3, 2, 0, 0), {}),
        (1, (3, 0, 3, 2, 1), {"precision": "bf16"}),
        (2, (2, 1, 0, 3, 2), {"groups": "decay"}),
        (3, (0, 2, 1, 1, 3), {}),
        (0, (2, 0, 1, 3, 0), {"precision": "bf16"}),
        (0, (0, 2, 1, 3, 0), {"precision": "bf16", "fused": True}),
    ],
)
def test_every_expert_parallel_size(
    stage: int, stages: tuple[int, ...], settings: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """From EP2 on four ranks to other sizes, numbers of ranks and stages, one after the other, and back to the first."""
    source = autoep(2, stage, **settings)
    ranks(4).run(run_once, source, STEPS, str(tmp_path / "a"))
    opened = open_checkpoint(tmp_path / "a" / "step")
    assert (opened.topology.ep, opened.topology.dp) == (2, 4)
    before = tmp_path / "a"
    for number, ((ep, world), target) in enumerate(zip(CHAIN, stages, strict=True)):
        after = tmp_path / str(number)
        found = ranks(world).run(run_once, autoep(ep, target, **settings), 0, str(after), str(before))
        assert found[0]["report"] is not None
        assert shared_differences(tmp_path / "a" / "step", after / "step") == []
        before = after


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_each_family(family: str, ranks: Ranks, tmp_path: Path) -> None:
    """Logits of the engine that saved, of those that went on, and of the oracle."""
    source = autoep(2, 1, family)
    first = ranks(2).run(run_once, source, STEPS, str(tmp_path / "a"))
    expected = logits_of_whole(source, tmp_path / "a" / "step", tmp_path / "whole")
    ranks(4).run(run_once, autoep(4, 3, family), 0, str(tmp_path / "b"), str(tmp_path / "a"))
    last = ranks(2).run(run_once, autoep(1, 2, family), 0, str(tmp_path / "c"), str(tmp_path / "b"))
    for logits in (found["logits"] for found in (*first, *last)):
        assert float((logits - expected).abs().max()) <= BOUND
    assert differences(tmp_path / "a" / "step", tmp_path / "c" / "step") == []


def plain(stage: int, family: str = "mixtral", **size: Any) -> Run:
    """A run of the same model without AutoEP."""
    return Run("huggingface", {"family": family, **size}, zero={"stage": stage}, universal=UNIVERSAL)


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [*((family, 1, 3) for family in EXPERT_FAMILIES), ("mixtral", 3, 0), ("mixtral", 0, 2), ("deepseek_v3", 2, 1)],
)
def test_from_and_to_the_model_of_transformers(
    first: int, second: int, family: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Fused tensors of all experts on each rank, AutoEP's tensors, and fused ones again: the same state, and the same logits."""
    source = plain(first, family)
    expected = ranks(2).run(run_once, source, STEPS, str(tmp_path / "a"))[0]["logits"]
    middle = ranks(2).run(run_once, autoep(2, second, family), 0, str(tmp_path / "b"), str(tmp_path / "a"))
    last = ranks(2).run(run_once, source, 0, str(tmp_path / "c"), str(tmp_path / "b"))
    assert differences(tmp_path / "a" / "step", tmp_path / "c" / "step") == []
    oracle = logits_of_whole(source, tmp_path / "b" / "step", tmp_path / "whole")
    for logits in (oracle, *(found["logits"] for found in (*middle, *last))):
        assert float((logits - expected).abs().max()) <= BOUND


@pytest.mark.parametrize(("first", "second"), [(1, 3), (3, 0), (0, 2)])
def test_experts_that_are_modules_of_their_own(first: int, second: int, ranks: Ranks, tmp_path: Path) -> None:
    """As transformers 4 has Mixtral's: to fused ones, to AutoEP's, and back."""
    source = plain(first, single=True)
    expected = ranks(2).run(run_once, source, STEPS, str(tmp_path / "0"))[0]["logits"]
    for number, run in enumerate((plain(second), autoep(2, second), source), start=1):
        before, after = str(tmp_path / str(number - 1)), str(tmp_path / str(number))
        for found in ranks(2).run(run_once, run, 0, after, before):
            assert float((found["logits"] - expected).abs().max()) <= BOUND
    assert differences(tmp_path / "0" / "step", tmp_path / "3" / "step") == []
