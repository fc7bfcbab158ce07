"""DeepSpeed's mixture-of-experts layers: another expert-parallel size, data-parallel size and ZeRO stage, state bit for bit.

DeepSpeed's universal checkpointing skips native mixture-of-experts layers, and its own load with another expert-parallel size
fails with a misleading message.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences, shared_differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, UnsupportedError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import gather

Ranks = Callable[[int], RankPool]


def moe(ep: int, stage: int, **changes: Any) -> Run:
    """A model with two layers of four experts."""
    return Run("moe", size={"ep": (ep, ep), **changes.pop("size", {})}, zero={"stage": stage}, **changes)


@pytest.mark.parametrize(("groups", "precision"), [("one", "fp32"), ("decay", "bf16")])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_every_expert_parallel_size(stage: int, groups: Any, precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """From EP2 on four ranks to EP4, EP1, fewer ranks and the other stages, and back."""
    source = moe(2, stage, groups=groups, precision=precision)
    ranks(4).run(train, source, STEP, save=str(tmp_path / "a"))
    assert open_checkpoint(tmp_path / "a").topology.ep == 2
    for ep, world_size, target in [(4, 4, 1), (1, 2, 2), (2, 2, 0), (1, 1, 1)]:
        run = replace(moe(ep, target), groups=groups, precision=precision)
        middle, back = tmp_path / f"ep{ep}", tmp_path / f"back{ep}"
        outcome = ranks(world_size).run(train, run, STEP, load=str(tmp_path / "a"), save=str(middle), save_first=True)
        assert outcome[0].report is not None
        ranks(4).run(train, source, STEP, load=str(middle), save=str(back), save_first=True)
        assert shared_differences(tmp_path / "a", middle) == shared_differences(tmp_path / "a", back) == []


def test_each_expert_is_one_parameter(ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks' experts 0 are not one: every expert has been trained on other tokens, and has its number in the layer."""
    ranks(4).run(train, moe(2, 1), STEP, save=str(tmp_path))
    names = [f"layers.1.deepspeed_moe.experts.deepspeed_experts.{expert}.linear_in.weight" for expert in range(4)]
    values = [whole(tmp_path, name) for name in names]
    assert all(not values[one].equal(values[other]) for one in range(4) for other in range(one))
    held = open_checkpoint(tmp_path).parameters
    assert (
        sum("deepspeed_experts" in name for name in held) == 2 * 4 * 4
    )  # layers, experts, two weights, a bias, a buffer
    assert not any(".4." in name for name in held)


@pytest.mark.nccl_like
@pytest.mark.parametrize("stage", [0, 1])
def test_losses_go_on(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Losses go on as without interruption, on other expert-parallel sizes. Sums of floats in another order differ a little."""
    whole_run = ranks(4).run(train, moe(2, stage), LAST_STEP, save=str(tmp_path), save_at=STEP)[0].losses
    same = ranks(4).run(train, moe(2, stage), LAST_STEP, load=str(tmp_path))[0]
    assert same.report is None and same.losses == {step: whole_run[step] for step in same.losses}
    always = replace(moe(2, stage), universal={"enabled": True, "load": "always"})
    assert ranks(4).run(train, always, LAST_STEP, load=str(tmp_path))[0].losses == same.losses
    for ep, world_size in [(4, 4), (1, 2), (1, 1)]:
        losses = ranks(world_size).run(train, moe(ep, 2), LAST_STEP, load=str(tmp_path))[0].losses
        assert losses.keys() == same.losses.keys()
        assert all(abs(losses[step] - same.losses[step]) < 1e-5 for step in losses)


SGD = {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}

OTHERS: dict[str, dict[str, Any]] = {
    "data-first": {"config": {"use_data_before_expert_parallelism": True}},
    "residual": {"size": {"residual": True}},
    "mixed-sizes": {"size": {"ep": (2, 4)}},
    "mixed-experts": {"size": {"experts": (4, 6)}},
    "frozen": {
        "frozen": tuple(f"layers.0.deepspeed_moe.experts.deepspeed_experts.{i}.linear_in.weight" for i in (0, 1))
    },
    "round-robin": {"zero": {"stage": 2, "round_robin_gradients": True}},
    "fp32-accumulation": {"precision": "bf16", "config": {"data_types": {"grad_accum_dtype": "fp32"}}},
    "sgd": {"config": {"optimizer": SGD, "zero_allow_untested_optimizer": True}, "groups": "decay"},
}


TOLD_BY_NUMBERS = ("data-first", "mixed-sizes", "mixed-experts", "frozen")
"""Cases that don't need the manifest."""


@pytest.mark.parametrize(
    ("other", "manifest"), [*((key, True) for key in OTHERS), *((key, False) for key in TOLD_BY_NUMBERS)]
)
def test_settings(other: str, manifest: bool, ranks: Ranks, tmp_path: Path) -> None:
    """With the manifest, and as stock DeepSpeed writes it."""
    source = moe(2, 1, **{key: value for key, value in OTHERS[other].items() if key != "zero"})
    if "zero" in OTHERS[other]:
        source = replace(source, zero=OTHERS[other]["zero"])
    written = source if manifest else replace(source, universal=None)
    ranks(4).run(train, written, STEP, save=str(tmp_path / "a"))
    size = {key: value for key, value in source.size.items()} | {"ep": (1, 1)}
    frozen = tuple(f"layers.0.deepspeed_moe.experts.deepspeed_experts.{i}.linear_in.weight" for i in range(4))
    target = replace(source, size=size, frozen=frozen if source.frozen else ())
    ranks(2).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    ranks(4).run(train, source, STEP, load=str(tmp_path / "b"), save=str(tmp_path / "c"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == differences(tmp_path / "a", tmp_path / "c") == []


SPEC = """
family: tiny_moe
rules:
  - {match: "layers.*.deepspeed_moe.experts.deepspeed_experts.*.linear_in.*", pattern: shard, dim: 0}
  - {match: "layers.*.deepspeed_moe.experts.deepspeed_experts.*.linear_out.weight", pattern: shard, dim: 1}
  - {match: ["embedding.*", "norm.*", "head.*", "layers.*.deepspeed_moe.gate.**"], pattern: replicate}
"""


@pytest.mark.parametrize(("stage", "manifest"), [(0, True), (1, False)], ids=["zero0-manifest", "zero1-stock"])
def test_experts_cut_over_tensor_parallel_ranks(manifest: bool, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """``enable_expert_tensor_parallelism``: TP2·DP2·EP2 to TP1·DP2·EP1, TP1·DP4·EP4 and TP2·DP1·EP1, and back."""
    spec = tmp_path / "moe.yaml"
    spec.write_text(SPEC)
    universal = {"enabled": True, "spec": str(spec)}
    source = moe(2, stage, tp=2, size={"cut": True, "ffn": 10}, universal=universal)
    ranks(4).run(train, source if manifest else replace(source, universal=None), STEP, save=str(tmp_path / "a"))
    for tp, ep, world_size in [(1, 1, 2), (1, 4, 4), (2, 1, 2)]:
        target = moe(ep, 1, tp=tp, size={"cut": tp > 1, "ffn": 10}, universal=universal)
        middle, back = tmp_path / f"{tp}{ep}", tmp_path / f"back{tp}{ep}"
        ranks(world_size).run(train, target, STEP, load=str(tmp_path / "a"), save=str(middle), save_first=True)
        ranks(4).run(train, source, STEP, load=str(middle), save=str(back), save_first=True)
        assert shared_differences(tmp_path / "a", middle, str(spec)) == []
        assert shared_differences(tmp_path / "a", back, str(spec)) == []


@pytest.mark.parametrize(("ep", "stage", "manifest"), [(2, 0, True), (2, 1, False), (4, 0, False), (4, 1, True)])
def test_experts_spread_over_tensor_parallel_ranks(
    ep: int, manifest: bool, stage: int, ranks: Ranks, tmp_path: Path
) -> None:
    """Without expert tensor parallelism, DeepSpeed's default, tensor-parallel ranks hold different experts."""
    spec = tmp_path / "moe.yaml"
    spec.write_text('{family: tiny_moe, rules: [{match: "**", pattern: replicate}]}')
    universal = {"enabled": True, "spec": str(spec), "shared_read_bytes": 0}
    source = moe(ep, stage, tp=2, universal=universal)
    ranks(4).run(train, source if manifest else replace(source, universal=None), STEP, save=str(tmp_path / "a"))
    for tp, target_ep, world_size in [(1, 1, 2), (1, 4, 4), (2, 2, 2)]:
        target = moe(target_ep, 1, tp=tp, universal=universal)
        middle, back = tmp_path / f"{tp}{target_ep}", tmp_path / f"back{tp}{target_ep}"
        ranks(world_size).run(train, target, STEP, load=str(tmp_path / "a"), save=str(middle), save_first=True)
        ranks(4).run(train, source, STEP, load=str(middle), save=str(back), save_first=True)
        assert shared_differences(tmp_path / "a", middle, str(spec)) == []
        assert shared_differences(tmp_path / "a", back, str(spec)) == []


def test_what_deepspeed_saves_incompletely_is_refused_when_the_engine_is_built(ranks: Ranks) -> None:
    """EP1 on TP2: DeepSpeed writes mp_rank_00_model_states.pt alone, and can't load that itself."""
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, moe(1, 1, tp=2, universal={"enabled": True, "load": "always"}), 0)
    assert isinstance(caught.value.original, UnsupportedError)
    assert "an expert-parallel size (1) below the tensor-parallel one" in str(caught.value.original)


def test_several_expert_parallel_sizes_at_stage_0_are_left_to_deepspeed(ranks: Ranks, tmp_path: Path) -> None:
    """Its save takes away the manifest of other files; without ZeRO it goes on with more replicas, as DeepSpeed alone does."""
    mixed = moe(2, 0, size={"ep": (1, 2)})
    for run in (moe(2, 0), mixed):
        ranks(2).run(train, run, 1, save=str(tmp_path), save_tag="a")
        assert (tmp_path / "a" / MANIFEST_NAME).exists() == (run != mixed)
    losses = [
        ranks(4).run(train, replace(mixed, universal=block), 3, load=str(tmp_path), tag="a")[0].losses
        for block in (None, {"enabled": True})
    ]
    assert losses[0] == losses[1] and losses[0].keys() == {2, 3}


def test_stage_0_of_stock_deepspeed(ranks: Ranks, tmp_path: Path) -> None:
    """Its files name no parameters, and experts of one layer have the same shapes: the model's order tells, or nothing does."""
    ranks(4).run(train, moe(2, 0, universal=None), STEP, save=str(tmp_path / "a"))
    ranks(4).run(train, moe(2, 0), STEP, save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_universal_form(ranks: Ranks, tmp_path: Path) -> None:
    ranks(4).run(train, moe(2, 1), STEP, save=str(tmp_path / "a"))
    convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")
    assert differences(tmp_path / "a", tmp_path / "u") == []
    ranks(2).run(train, moe(2, 2), STEP, load=str(tmp_path / "u"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_another_number_of_experts(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, moe(2, 1), STEP, save=str(tmp_path))
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, moe(2, 1, size={"experts": (4, 6)}), STEP, load=str(tmp_path))
    message = str(caught.value.original)
    assert isinstance(caught.value.original, MismatchError)
    assert "layers.1.deepspeed_moe.experts.deepspeed_experts.4.linear_in.weight: missing in the checkpoint" in message
    assert "deepspeed_experts.3." not in message


LEFT_OUT = (
    "buffer_names optimizer param_shapes frozen_param_shapes frozen_param_fragments shared_params ds_config ds_version"
)


@pytest.mark.parametrize("manifest", [False, True], ids=["stock", "manifest"])
@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "bf16")])
def test_files_from_before_they_told_as_much(
    stage: int, precision: Any, manifest: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """Up to DeepSpeed 0.19.2: names in flat order, shapes and precision are told by the rest."""
    ranks(4).run(
        train, moe(2, stage, groups="decay", precision=precision), STEP, save=str(tmp_path / "a"), save_tag="step"
    )
    old = copytree(tmp_path / "a" / "step", tmp_path / "old")
    saved = torch.load(old / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
    for key in (*LEFT_OUT.split(), "checkpoint_parallel_dimensions"):
        del saved[key]
    torch.save(saved, old / "mp_rank_00_model_states.pt")
    manifest_path = old / "ucp_manifest.json"
    if manifest:
        content = json.loads(manifest_path.read_text())
        for record in ("files", "contents"):
            del content[record]["mp_rank_00_model_states.pt"]
        for told in ("checksums", "sum"):
            content.pop(told, None)
        manifest_path.write_text(json.dumps(content))
    else:
        manifest_path.unlink()
    found = [line for line in differences(tmp_path / "a" / "step", old) if "buffer in A, frozen in B" not in line]
    assert found == []  # without a manifest nothing tells buffers from frozen parameters; a load takes them for either
    [target] = ranks(1).run(train, moe(1, 2, groups="decay", precision=precision), STEP + 1, load=str(old))
    assert target.report is not None


def test_a_file_of_an_expert_is_missing(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, moe(2, 0), STEP, save=str(tmp_path / "a"))
    for name in ("layer_1_expert_3_mp_rank_00_model_states.pt", "expp_rank_1_mp_rank_00_optim_states.pt"):
        folder = tmp_path / name
        copytree(tmp_path / "a" / f"global_step{STEP}", folder)
        (folder / name).unlink()
        with pytest.raises(DamagedCheckpointError, match=name):
            open_checkpoint(folder)


def whole(folder: Path, name: str) -> torch.Tensor:
    """A whole master weight."""
    view = UniversalView.of(open_checkpoint(folder))
    buffer = torch.empty(view.logical_shape(name)).flatten()
    gather(view, name, "fp32", 0, buffer, FileReader())
    return buffer
