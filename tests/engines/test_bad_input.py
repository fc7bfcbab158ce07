"""Bad input: a clear message that names the thing, on every rank, and an engine as it was before."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import STEP
from refusals import SAVED, TARGET, GetSource, Ranks, check_refused, failed_load

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DamagedCheckpointError,
    MismatchError,
    SaveError,
    SpecError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.testing.ranks import RankError
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.commit import write_atomically
from ucp_deepspeed.transfer.conversion import convert


@pytest.fixture
def copy(source: GetSource, tmp_path: Path) -> Path:
    """A copy of a TP2·DP2 ZeRO-1 checkpoint, to be damaged."""
    saved = source("zero1-bf16", SAVED, 4)
    copytree(saved.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_no_such_tag(copy: Path, ranks: Ranks) -> None:
    check_refused(
        ranks, TARGET, copy, CheckpointNotFoundError, "no tag 'step7'", f"tags there: global_step{STEP}", tag="step7"
    )


def test_missing_rank_file(copy: Path, ranks: Ranks) -> None:
    name = "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    (copy / f"global_step{STEP}" / name).unlink()
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, name, "TP2·DP2 ZeRO-1", "lacks 1 of 6 files")


@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_rank_file(manifest: bool, copy: Path, ranks: Ranks) -> None:
    path = copy / f"global_step{STEP}" / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if not manifest:
        (path.parent / "ucp_manifest.json").unlink()
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, path.name, "truncated")


class Foreign:
    """Not on the allow-list."""


def test_pickle_with_a_foreign_class(copy: Path, ranks: Ranks) -> None:
    path = copy / f"global_step{STEP}" / "mp_rank_00_model_states.pt"
    saved = torch.load(path, map_location="cpu", weights_only=False)
    torch.save(saved | {"client": Foreign()}, path)
    (path.parent / "ucp_manifest.json").unlink()
    hint = '"on_unreadable": "drop"'
    check_refused(ranks, TARGET, copy, UnsupportedError, f"client: {__name__}.Foreign", hint, "DeepSpeed reads them")
    run = replace(TARGET, universal={**(TARGET.universal or {}), "on_unreadable": "drop"})
    outcome = ranks(2).run(train, run, STEP, load=str(copy))[0]
    assert outcome.report is not None and outcome.report.unread == ("client",)
    assert "client" not in outcome.client_state and outcome.counters["global_steps"] == STEP
    saved["lr_scheduler"] = Foreign()
    torch.save(saved, path)
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, path.name, "Foreign", "refused")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"hidden": 64}, ["output_layer.weight: expected logical shape (48, 64), found (48, 48) in the checkpoint"]),
        ({"layers": 1}, ["decoder.layers.1.mlp.linear_fc2.weight: extra in the checkpoint"]),
        ({"layers": 3}, ["decoder.layers.2.mlp.linear_fc2.weight: missing in the checkpoint", "(48, 40)"]),
    ],
    ids=["hidden-size", "extra-layer", "missing-layer"],
)
def test_another_model(size: dict[str, int], expected: list[str], copy: Path, ranks: Ranks) -> None:
    check_refused(ranks, replace(TARGET, size=size), copy, MismatchError, *expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_engines_of_every_class_stay_as_they_were(stage: int, precision: Any, ranks: Ranks, copy: Path) -> None:
    target = replace(TARGET, tp=2, zero={"stage": stage}, precision=precision, size={"layers": 1})
    check_refused(ranks, target, copy, MismatchError, "extra in the checkpoint")


def test_all_problems_are_listed_at_once(copy: Path, ranks: Ranks) -> None:
    run = replace(TARGET, size={"hidden": 64})
    _, message, _ = ranks(2).run(failed_load, run, str(copy), None)[0]
    assert message.count("expected logical shape") == 15  # every parameter of two layers, the norms and both embeddings


SPECS = {
    "unknown-pattern": ("rules:\n  - {match: '**', pattern: shrad}\n", SpecError, "'shrad'"),
    "unmatched": (
        "rules:\n  - {match: 'decoder.**', pattern: replicate}\n",
        SpecError,
        "output_layer.weight: matches no rule",
    ),
    "ambiguous": (
        "rules:\n  - {match: '**', pattern: replicate}\n  - {match: 'output_*.weight', pattern: shard}\n",
        SpecError,
        "output_layer.weight: matches 2 rules",
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_bad_spec(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """Found when the engine is built, and not when the first checkpoint is saved."""
    text, error, message = SPECS[kind]
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"family: mine\n{text}")
    run = replace(TARGET, universal={"enabled": True, "spec": str(spec)})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, 0)
    assert isinstance(caught.value.original, error) and message in str(caught.value.original)


def test_a_spec_that_contradicts_what_was_recorded(copy: Path, tmp_path: Path) -> None:
    """The GPT flavour's spec fits a Llama's names, and would join its gate and up projections in another order."""
    with pytest.raises(MismatchError) as caught:
        UniversalView.of(open_checkpoint(copy), load_spec("megatron_core_gpt"))
    expected = "mlp.linear_fc1.weight: shard on dimension 0; recorded was shard on dimension 0 in parts 1:1"
    assert [problem.partition(".mlp")[0] for problem in caught.value.problems] == [
        "decoder.layers.0",
        "decoder.layers.1",
    ]
    assert all(expected in problem for problem in caught.value.problems)


def test_a_manifest_of_other_shapes(copy: Path) -> None:
    path = copy / f"global_step{STEP}" / "ucp_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parameters"]["decoder.final_layernorm.weight"]["logical_shape"] = [96]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        MismatchError, match=r"decoder\.final_layernorm\.weight: logical shape \(48,\); recorded was \(96,\)"
    ):
        UniversalView.of(open_checkpoint(copy))


def test_remains_of_a_conversion_are_not_taken_for_nothing(copy: Path, ranks: Ranks) -> None:
    """DeepSpeed returns ``(None, None)`` where nothing was saved, and a script starts anew; here something was."""
    (copy / f"global_step{STEP}").rename(copy / ".global_step3.partial-here-1")
    (copy / "latest").write_text(".global_step3.partial-here-1")
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, "interrupted conversion")


def test_never_opens_nothing(copy: Path, ranks: Ranks) -> None:
    """A file that our reader can't open is loaded where DeepSpeed can open it."""
    path = copy / f"global_step{STEP}" / "mp_rank_00_model_states.pt"
    saved = torch.load(path, map_location="cpu", weights_only=False)
    torch.save(saved | {"client": Foreign()}, path)
    run = replace(SAVED, universal={"enabled": True, "load": "never"})
    outcome = ranks(4).run(train, run, STEP, load=str(copy))
    assert outcome[0].counters["global_steps"] == STEP and outcome[0].report is None


def test_universal_load_switched_off(copy: Path, ranks: Ranks) -> None:
    """``"load": "never"`` leaves even a hopeless load to DeepSpeed."""
    run = replace(TARGET, universal={"enabled": True, "load": "never"})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, STEP, load=str(copy))
    assert not isinstance(caught.value.original, UniversalCheckpointError)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enabled": True, "sepc": "auto"}, "universal_checkpoint.sepc: unknown key"),
        ({"enabled": "yes"}, "universal_checkpoint.enabled"),
        ({"enabled": True, "load": "sometimes"}, "universal_checkpoint.load"),
    ],
)
def test_bad_config_block(block: dict[str, Any], message: str, ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, Run("mlp", universal=block), 0)
    assert isinstance(caught.value.original, ConfigError)
    assert message in str(caught.value.original)


def test_saving_over_a_universal_checkpoint(copy: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Its index would go before DeepSpeed's files at the next load, and what was trained since would be lost."""
    tag = f"global_step{STEP}"
    convert(UniversalView.of(open_checkpoint(copy)), tmp_path / "u" / tag)
    write_atomically(tmp_path / "u" / "latest", tag)
    before = sorted(path.name for path in (tmp_path / "u" / tag).iterdir())
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, TARGET, STEP, load=str(tmp_path / "u"), save=str(tmp_path / "u"))
    assert isinstance(caught.value.original, SaveError)
    assert f"{tmp_path / 'u' / tag} holds a universal checkpoint" in str(caught.value.original)
    assert sorted(path.name for path in (tmp_path / "u" / tag).iterdir()) == before
    stock = replace(TARGET, universal=None)  # which doesn't look
    ranks(2).run(train, stock, STEP, save=str(tmp_path / "u"))
    check_refused(ranks, TARGET, tmp_path / "u", DamagedCheckpointError, "holds two checkpoints", "ucp_index.json")


def test_two_universal_loads_at_once(ranks: Ranks) -> None:
    run = replace(TARGET, config={"checkpoint": {"load_universal": True}})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, 0)
    assert isinstance(caught.value.original, ConfigError)
    assert "'checkpoint.load_universal' and 'universal_checkpoint' are two ways to load" in str(caught.value.original)
