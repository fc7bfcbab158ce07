"""Stage 0 stores no parameter names: what the model's order tells, what it doesn't, and how a manifest helps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeRun, write_native
from native_models import SHAPES, awkward_model, check_reads_back, model_of, write_manifest

from ucp_deepspeed.checkpoint import open_checkpoint

DISTINCT = {"a": (2, 3), "b": (4,), "c": (5, 2), "d": (6,)}
TWINS = {"first.weight": (3, 2), "first.bias": (3,), "second.weight": (3, 2), "second.bias": (3,), "last": (7,)}
PER_TENSOR = [NativeRun(), NativeRun(precision="bf16")]


@pytest.mark.parametrize("run", [*PER_TENSOR, NativeRun(precision="bf16", optimizer="fused")], ids=str)
def test_one_group_in_the_models_order(tmp_path: Path, run: NativeRun) -> None:
    """Several parameters of one shape are told apart by their order."""
    model = model_of(TWINS)
    checkpoint = check_reads_back(write_native(tmp_path, model, run), model, run)
    assert [group.names for group in checkpoint.groups] == [tuple(TWINS)]


@pytest.mark.parametrize("run", PER_TENSOR, ids=str)
def test_groups_with_distinct_shapes(tmp_path: Path, run: NativeRun) -> None:
    run, model = replace(run, groups=(("a", "c"), ("b", "d"))), model_of(DISTINCT)
    checkpoint = check_reads_back(write_native(tmp_path, model, run), model, run)
    assert [group.names for group in checkpoint.groups] == [("a", "c"), ("b", "d")]


@pytest.mark.parametrize("run", PER_TENSOR, ids=str)
def test_decay_groups_by_number_of_dimensions(tmp_path: Path, run: NativeRun) -> None:
    """The usual grouping is told by shapes alone, also where the model repeats them."""
    groups = (("first.weight", "second.weight"), ("first.bias", "second.bias", "last"))
    run, model = replace(run, groups=groups), model_of(TWINS)
    checkpoint = check_reads_back(write_native(tmp_path, model, run), model, run)
    assert tuple(group.names for group in checkpoint.groups) == groups


@pytest.mark.parametrize("run", PER_TENSOR, ids=str)
def test_ambiguous_groups_are_refused_with_every_name(tmp_path: Path, run: NativeRun) -> None:
    """Nothing tells which of the two equal matrices is in which group; a wrong guess would be silent."""
    groups = (("second.weight", "first.bias"), ("first.weight", "second.bias", "last"))
    folder = write_native(tmp_path, model_of(TWINS), replace(run, groups=groups))
    lacking = open_checkpoint(folder).lacking
    assert lacking is not None and {"first.weight", "second.weight"} <= set(lacking.problems)
    assert "last" not in lacking.problems
    assert "save with ucp_deepspeed enabled" in str(lacking) and folder.name in str(lacking)


@pytest.mark.parametrize("run", [*PER_TENSOR, NativeRun(precision="bf16", optimizer="fused")], ids=str)
def test_manifest_names_what_is_ambiguous(tmp_path: Path, run: NativeRun) -> None:
    groups = (("second.weight", "first.bias"), ("first.weight", "second.bias", "last"))
    run, model = replace(run, groups=groups), model_of(TWINS)
    folder = write_native(tmp_path, model, run)
    write_manifest(folder, run, groups)
    checkpoint = check_reads_back(folder, model, run)
    assert tuple(group.names for group in checkpoint.groups) == groups


def test_fused_groups_are_refused_without_a_manifest(tmp_path: Path) -> None:
    """Flat buffers don't even tell shapes."""
    run = NativeRun(precision="bf16", optimizer="fused", groups=(("a", "c"), ("b", "d")))
    lacking = open_checkpoint(write_native(tmp_path, model_of(DISTINCT), run)).lacking
    assert lacking is not None and "2 flat groups of [16, 10] elements" in str(lacking)
    assert set(lacking.problems) == set(DISTINCT)


def test_fused_with_frozen_parameters_is_refused_without_a_manifest(tmp_path: Path) -> None:
    run = NativeRun(precision="bf16", optimizer="fused")
    assert open_checkpoint(write_native(tmp_path, awkward_model(), run)).lacking is not None


def test_frozen_parameters_that_the_optimizer_was_given(tmp_path: Path) -> None:
    """They have a number in the torch optimizer, but no state."""
    names = tuple(SHAPES)
    run, model = NativeRun(groups=(("position", *names),)), awkward_model()
    folder = write_native(tmp_path, model, run)
    write_manifest(folder, run, (("position", *names),))
    checkpoint = check_reads_back(folder, model, run)
    assert [group.names for group in checkpoint.groups] == [names]


def test_index_without_a_parameter(tmp_path: Path) -> None:
    """The user's optimizer may hold a parameter that isn't in the model; the manifest says null."""
    model = model_of(DISTINCT | {"outside": (9,)})
    run = NativeRun(groups=(("a", "outside", "b", "c", "d"),))
    folder = write_native(tmp_path, model, run)
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    del saved["module"]["outside"]
    torch.save(saved, path)
    write_manifest(folder, run, (("a", None, "b", "c", "d"),))
    inner = replace(model, parameters=model.parameters[:-1])
    assert [group.names for group in check_reads_back(folder, inner, run).groups] == [("a", "b", "c", "d")]


@pytest.mark.parametrize("run", [NativeRun(), NativeRun(stage=2, dp=2, precision="bf16")], ids=str)
def test_tied_names_are_kept_once(tmp_path: Path, run: NativeRun) -> None:
    """Under ZeRO DeepSpeed lists aliases; in stage 0 they are found since they share their storage."""
    model = replace(model_of(DISTINCT), aliases={"tied": "c", "tied.again": "a"})
    checkpoint = check_reads_back(write_native(tmp_path, model, run), model, run)
    assert not {"tied", "tied.again"} & checkpoint.parameters.keys()


def test_unknown_optimizer_class(tmp_path: Path) -> None:
    from ucp_deepspeed.errors import UnsupportedError

    folder = write_native(tmp_path, model_of(DISTINCT), NativeRun())
    path = folder / "mp_rank_00_model_states.pt"
    saved: dict[str, Any] = torch.load(path, weights_only=False)
    saved["optimizer"] = {"mystery": 1}
    torch.save(saved, path)
    with pytest.raises(UnsupportedError, match="mystery"):
        assert open_checkpoint(folder).parameters


def test_states_of_other_shapes_than_the_parameter(tmp_path: Path) -> None:
    """NAdam's product of momenta comes before its moments; one of the states has the parameter's own shape."""
    run, model = NativeRun(groups=(("a", "c"), ("b", "d"))), model_of(DISTINCT)
    folder = write_native(tmp_path, model, run)
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    states = saved["optimizer"]["state"]
    for key, entry in states.items():
        states[key] = {"mu_product": torch.tensor(0.5), "rows": torch.zeros(9), **entry}
    torch.save(saved, path)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.lacking is None
    assert [group.names for group in checkpoint.groups] == [("a", "c"), ("b", "d")]
    assert {each.scalars["mu_product"] for each in checkpoint.parameters.values()} == {0.5}
