"""Beside DeepSpeed, not instead of it: its files stay its own, and checkpoints saved without the plugin load through it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, read_manifest
from ucp_deepspeed.checkpoint.random_files import joined
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

STOCK = None
"""No ``universal_checkpoint`` block."""


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_alone_loads_what_was_saved(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": stage}, precision="bf16")
    saved = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path), save_at=STEP)
    assert (tmp_path / f"global_step{STEP}" / MANIFEST_NAME).is_file()
    alone = Run("mlp", zero={"stage": stage}, precision="bf16", universal=STOCK)
    resumed = ranks(2).run(train, alone, LAST_STEP, load=str(tmp_path))
    for found, expected in zip(resumed, saved, strict=True):
        assert found.losses == {step: loss for step, loss in expected.losses.items() if step > STEP}


def test_nothing_happens_without_the_block(ranks: Ranks, tmp_path: Path) -> None:
    """No manifest, and DeepSpeed's own refusal of another data-parallel size."""
    run = Run("mlp", zero={"stage": 1}, universal=STOCK)
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    assert not list(tmp_path.rglob("ucp_*"))
    with pytest.raises(RankError, match="DP world size of 2"):
        ranks(4).run(train, run, STEP, load=str(tmp_path))


def save_as_without_the_plugin(run: Run, folder: str) -> None:
    """On a rank: as a script with the same config that doesn't import the plugin would, since DeepSpeed ignores the block."""
    engine = build_engine(run)
    for step in range(1, STEP + 1):
        train_step(engine, run, step)
    engine.universal_checkpoint_config = UniversalCheckpointConfig()
    engine.save_checkpoint(folder)
    engine.destroy()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_tag_saved_again_without_the_plugin(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """All files have the sizes that the manifest of the run before records; names and orders may be others."""
    run = Run("mlp", zero={"stage": stage}, universal={"enabled": True, "load": "always"})
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    manifest = read_manifest(tmp_path / f"global_step{STEP}")
    assert manifest is not None
    ranks(2).run(save_as_without_the_plugin, replace(run, seed=run.seed + 1), str(tmp_path))
    sizes = {name: (tmp_path / f"global_step{STEP}" / name).stat().st_size for name in manifest.files}
    assert sizes == manifest.files
    with pytest.raises(RankError, match=r"isn't the file that ucp_manifest\.json describes, though of its size"):
        ranks(2).run(train, run, STEP, load=str(tmp_path))
    (tmp_path / f"global_step{STEP}" / MANIFEST_NAME).unlink()
    ranks(2).run(train, run, STEP, load=str(tmp_path))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_saved_without_the_plugin(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """Tensor parallel, no manifest: the live model's attributes tell the layouts."""
    source = Run("llama", tp=2, zero={"stage": stage}, precision="bf16", universal=STOCK)
    ranks(2).run(train, source, STEP, save=str(tmp_path / "a"))
    target = Run("llama", tp=1, zero={"stage": 3 - stage}, precision="bf16")
    ranks(2).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b", "megatron_core_llama") == []


def test_converted_without_a_manifest_and_without_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    """Each parameter was on one rank, which says nothing about more ranks: the live model's attributes tell."""
    source = Run("llama", zero={"stage": 1}, universal=STOCK)
    ranks(2).run(train, source, STEP, save=str(tmp_path / "a"))
    convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")
    ranks(2).run(train, Run("llama", tp=2), STEP, load=str(tmp_path / "u"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_without_a_manifest_shapes_tell_families_apart_whose_names_are_the_same(ranks: Ranks, tmp_path: Path) -> None:
    """Gated or not: the names fit both of Megatron-Core's families, the shapes one."""
    source = Run("llama", tp=2, zero={"stage": 1}, universal=STOCK)
    ranks(2).run(train, source, STEP, save=str(tmp_path / "a"))
    assert differences(tmp_path / "a", tmp_path / "a") == []
    ranks(2).run(train, Run("llama", tp=1), STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def test_round_robin_order_is_ours_to_get_right(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's own mappings are wrong with round_robin_gradients, and its native load into an engine without that
    setting corrupts the run silently: the first loss is right, then it diverges."""
    source = Run("mlp", zero={"stage": 2, "round_robin_gradients": True}, universal=STOCK)
    plain = Run("mlp", zero={"stage": 2})
    whole = ranks(4).run(train, source, LAST_STEP, save=str(tmp_path / "a"), save_at=STEP)
    resumed = ranks(4).run(train, plain, LAST_STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    assert all(found.report is not None for found in resumed)
    for step in range(STEP + 1, LAST_STEP + 1):
        assert abs(resumed[0].losses[step] - whole[0].losses[step]) < 1e-6


def test_stage_0_names_come_from_the_manifest(ranks: Ranks, tmp_path: Path) -> None:
    """Two groups of like-shaped parameters: without the names that the manifest records, the order is ambiguous."""
    run = Run("llama", zero={"stage": 0}, groups="decay", precision="bf16")
    ranks(1).run(train, run, STEP, save=str(tmp_path))
    folder = tmp_path / f"global_step{STEP}"
    named = open_checkpoint(folder).groups
    assert "decoder.final_layernorm.weight" in named[1].names
    recorded = json.loads((folder / MANIFEST_NAME).read_text())["parameter_groups"]
    assert [list(group.names) for group in named] == recorded[0]


def test_stage_0_without_names_on_another_data_parallel_size(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed goes by the order of the optimizer's parameters, and each rank has all of them; not so tensor-parallel ones."""
    run = Run("llama", zero={"stage": 0}, groups="decay", precision="bf16", fused=True, universal=STOCK)
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    assert open_checkpoint(tmp_path).lacking is not None
    alone = ranks(1).run(train, run, LAST_STEP, load=str(tmp_path))[0]
    found = ranks(1).run(train, replace(run, universal={"enabled": True}), LAST_STEP, load=str(tmp_path))[0]
    assert (found.losses, found.rates, found.counters) == (alone.losses, alone.rates, alone.counters)
    with pytest.raises(RankError, match="names no parameters in its optimizer state"):
        ranks(2).run(train, replace(run, tp=2, universal={"enabled": True}), STEP, load=str(tmp_path))


def test_save_moves_latest_last(ranks: Ranks, tmp_path: Path) -> None:
    """``latest`` names the new tag, the manifest lists every file at its size, and nothing temporary stays."""
    ranks(2).run(train, Run("mlp", zero={"stage": 3}), STEP, save=str(tmp_path))
    assert (tmp_path / "latest").read_text() == f"global_step{STEP}"
    folder = tmp_path / f"global_step{STEP}"
    files = json.loads((folder / MANIFEST_NAME).read_text())["files"]
    assert files == {p.name: p.stat().st_size for p in folder.iterdir() if p.name != MANIFEST_NAME}
    assert len(files) == 6
    assert not [p for p in tmp_path.rglob("*") if "partial" in p.name]


def test_wrong_spec_is_refused_when_saving(ranks: Ranks, tmp_path: Path) -> None:
    """A spec that contradicts the live parameters: a gated layer declared as a plain shard."""
    spec = tmp_path / "wrong.yaml"
    spec.write_text(
        "family: wrong\nrules:\n"
        "  - {match: ['**.word_embeddings.weight', output_layer.weight, '**.linear_qkv.weight'], pattern: shard, dim: 0}\n"
        "  - {match: ['**.linear_fc1.weight'], pattern: shard, dim: 0}\n"
        "  - {match: ['**.linear_proj.weight', '**.linear_fc2.weight'], pattern: shard, dim: 0}\n"
        "  - {match: ['**layernorm.weight'], pattern: replicate}\n"
    )
    run = Run("llama", tp=2, zero={"stage": 1}, universal={"enabled": True, "spec": str(spec)})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, 0, save=str(tmp_path / "a"))
    assert isinstance(caught.value.original, MismatchError)
    problems = "\n".join(caught.value.original.problems)
    assert "linear_fc1.weight: spec 'wrong' says shard on dimension 0, the live parameter is" in problems
    assert (
        "linear_fc2.weight: spec 'wrong' says shard on dimension 0, the live parameter is shard on dimension 1"
        in problems
    )
    assert not (tmp_path / "a").exists()


def test_a_random_state_of_another_step(ranks: Ranks, tmp_path: Path) -> None:
    """A save without the plugin leaves an older file of random states beside its own."""
    run = Run("mlp", zero={"stage": 1})
    ranks(2).run(train, run, STEP, save=str(tmp_path))
    path = tmp_path / f"global_step{STEP}" / "ucp_random_states.jsonl"
    header, *states = path.read_text().replace(f'"global_steps": {STEP}', f'"global_steps": {STEP + 2}').splitlines()
    path.write_text(joined(states, json.loads(header)["save_id"]))
    with pytest.raises(RankError, match=f"is of step {STEP + 2}, and the checkpoint of step {STEP}"):
        ranks(2).run(train, run, STEP, load=str(tmp_path))
    kept = replace(run, universal={"enabled": True, "random_state": "keep"})
    ranks(2).run(train, kept, STEP, load=str(tmp_path))
