"""Checkpoints whose files are missing or inconsistent: refused, with the file's name and the reason."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from damage import FIRST, LAST, MODEL, ZERO_2, edit, read_all, refused
from native_files import NativeRun, write_native
from native_models import SHAPES, model_of, write_manifest

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, read_manifest
from ucp_deepspeed.checkpoint.deepspeed.written_names import check_written_name
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError


@pytest.mark.parametrize("stage", [1, 3])
def test_a_partition_of_another_step(stage: int, tmp_path: Path) -> None:
    """As a save under the same tag leaves it that was interrupted between two files."""
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(stage=stage, dp=2, precision="bf16"))

    def step_once_more(saved: dict[str, Any]) -> None:
        held = saved["optimizer_state_dict"]
        base = held.get("base_optimizer_state") or held["optimizer_state_dict"]
        for entry in base["state"].values():
            entry["step"] = entry["step"] + 1

    read_all(folder)
    edit(folder / LAST, step_once_more)
    refused(folder, DamagedCheckpointError, LAST, "at step 6", FIRST, "at step 5", "files of two saves")


@pytest.mark.parametrize(
    ("run", "name"),
    [
        (NativeRun(tp=2, dp=2, stage=1), "mp_rank_01_model_states.pt"),
        (NativeRun(dp=2, stage=3), "zero_pp_rank_1_mp_rank_00_model_states.pt"),
    ],
)
def test_model_states_of_another_step(run: NativeRun, name: str, tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), run)
    edit(folder / name, lambda saved: saved.update(global_steps=saved["global_steps"] + 1))
    with pytest.raises(DamagedCheckpointError, match=f"{name} is of step .* files of two saves"):
        DeepSpeedFiles(folder).model_states(run.tp - 1, 1 if run.stage == 3 else 0)


@pytest.mark.parametrize("name", [FIRST, LAST])
def test_missing_optimizer_file(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, DamagedCheckpointError, name)


def test_missing_model_file_of_a_tensor_parallel_rank(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(tp=2, dp=2, stage=1))
    (folder / "mp_rank_01_model_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"lacks 1 of 6 files: mp_rank_01_model_states\.pt"):
        open_checkpoint(folder)


def test_missing_model_file_of_stage_3(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(dp=3, stage=3))
    (folder / "zero_pp_rank_2_mp_rank_00_model_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match="zero_pp_rank_2_mp_rank_00_model_states"):
        open_checkpoint(folder)


def test_missing_first_model_file(folder: Path) -> None:
    (folder / MODEL).unlink()
    with pytest.raises(DamagedCheckpointError, match="holds no model_states file"):
        open_checkpoint(folder.parent, folder.name)


def _shorten(saved: dict[str, Any]) -> None:
    masters = saved["optimizer_state_dict"]["single_partition_of_fp32_groups"]
    masters[0] = masters[0][:-1].clone()


def test_partition_of_another_length(folder: Path) -> None:
    edit(folder / LAST, _shorten)
    refused(folder, DamagedCheckpointError, LAST, "'fp32'", "expected")


def test_optimizer_state_of_another_length_on_one_rank(folder: Path) -> None:
    def change(saved: dict[str, Any]) -> None:
        entry = saved["optimizer_state_dict"]["base_optimizer_state"]["state"][0]
        entry["exp_avg"] = entry["exp_avg"][:-3].clone()

    edit(folder / LAST, change)
    refused(folder, DamagedCheckpointError, LAST, "'exp_avg'")


def test_optimizer_state_that_one_rank_lacks(folder: Path) -> None:
    edit(folder / LAST, lambda saved: saved["optimizer_state_dict"]["base_optimizer_state"]["state"].clear())
    refused(folder, DamagedCheckpointError, LAST, "lacks 'exp_avg' of flat group 0, which other ranks have")


def test_groups_that_model_states_does_not_describe(folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved["param_shapes"].append({"more": torch.Size([2])}))
    refused(folder, DamagedCheckpointError, FIRST, "1 flat groups", "describes 2")


def test_shapes_that_do_not_add_up(folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved["param_shapes"][0].update(tail=torch.Size([40])))
    with pytest.raises((DamagedCheckpointError, UnsupportedError), match=FIRST):
        read_all(folder)


@pytest.mark.parametrize("key", ["mp_world_size", "dp_world_size", "module", "buffer_names", "global_steps"])
def test_model_states_without_a_key(folder: Path, key: str) -> None:
    edit(folder / MODEL, lambda saved: saved.pop(key))
    refused(folder, DamagedCheckpointError, MODEL, key)


def test_optimizer_file_without_its_state(folder: Path) -> None:
    edit(folder / LAST, lambda saved: saved.pop("optimizer_state_dict"))
    refused(folder, DamagedCheckpointError, LAST, "lacks 'optimizer_state_dict'")


def test_missing_frozen_fragment(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES | {"still": (5,)}, frozen=("still",)), NativeRun(stage=3, dp=2))
    path = folder / "zero_pp_rank_1_mp_rank_00_model_states.pt"
    edit(path, lambda saved: saved["frozen_param_fragments"].pop("still"))
    refused(folder, DamagedCheckpointError, path.name, "still")


def test_other_parameters_on_another_tensor_parallel_rank(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(tp=2))
    edit(folder / "mp_rank_01_model_states.pt", lambda saved: saved["module"].update(extra=torch.zeros(2)))
    with pytest.raises(DamagedCheckpointError, match=r"rank 1 has other parameters than rank 0: \['extra'\]"):
        assert open_checkpoint(folder).parameters


def test_unsupported_models(folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved.update(ds_autoep_layers={"a": 1}))
    refused(folder, UnsupportedError, "AutoEP")


def test_groups_over_fewer_ranks(folder: Path) -> None:
    """Only experts' groups are cut over a part of the data-parallel ranks."""
    edit(folder / FIRST, lambda saved: saved["optimizer_state_dict"].update(partition_count=[1]))
    refused(folder, UnsupportedError, FIRST, "holds group 0 cut over 1 ranks, where 2 hold it")


def test_optimizer_class_that_is_not_known(folder: Path) -> None:
    edit(folder / FIRST, lambda saved: saved.update(optimizer_state_dict={"strange": 1}))
    refused(folder, UnsupportedError, FIRST, "strange")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"format_version": "x"}', '{"format_version": 1}'])
def test_damaged_manifest(folder: Path, content: str) -> None:
    (folder / MANIFEST_NAME).write_text(content, encoding="utf-8")
    with pytest.raises(DamagedCheckpointError, match=MANIFEST_NAME):
        read_manifest(folder)


def test_manifest_of_a_later_version(folder: Path) -> None:
    (folder / MANIFEST_NAME).write_text('{"format_version": 99}', encoding="utf-8")
    with pytest.raises(UnsupportedError, match="version 99"):
        open_checkpoint(folder)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"gone\.pt is missing"):
        open_torch_file(tmp_path / "gone.pt")


def test_files_of_two_runs_are_not_mixed(folder: Path, tmp_path: Path) -> None:
    """DeepSpeed overwrites a tag's files but leaves those that the later stage doesn't write. The manifest tells which are
    which; without one nothing does."""
    later = write_native(tmp_path / "later", model_of(SHAPES), NativeRun(stage=3, dp=2, precision="bf16"))
    copytree(later, folder, dirs_exist_ok=True)
    refused(folder, DamagedCheckpointError, "holds the files of two runs", "zero_pp_rank_")
    write_manifest(folder, NativeRun(stage=3, dp=2, precision="bf16"), (tuple(SHAPES),))
    assert read_all(folder).topology.zero_stage == 3


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("key", ["dp_world_size", "mp_world_size"])
def test_sizes_that_no_folder_has_files_for(key: str, stage: int, tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(stage=stage, dp=2, precision="bf16"))
    for path in folder.glob("*model_states.pt"):
        edit(path, lambda saved: saved.update({key: 10**9}) or saved.pop("checkpoint_parallel_dimensions"))
    refused(folder, DamagedCheckpointError, "0000000", "files: ", "and lacks")


def test_model_parallel_ranks_that_nothing_tells_of(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(stage=1, tp=2))
    one = {"mp_world_size": 1, "checkpoint_parallel_dimensions": {"pp_degree": 1, "tp_degree": 1}}
    edit(folder / MODEL, lambda saved: saved.update(one))
    refused(folder, DamagedCheckpointError, "mp_rank_01_model_states.pt", "tells of 1 model-parallel ranks")


@pytest.mark.parametrize("key", ["global_steps", "skipped_steps", "global_samples"])
@pytest.mark.parametrize("value", ["x", -1, 2.5, True])
def test_counters_that_count_nothing(value: object, key: str, folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved.update({key: value}))
    refused(folder, DamagedCheckpointError, MODEL, f"has {key} {value!r}; expected a whole number from 0 on")


@pytest.mark.parametrize(
    ("run", "name", "key"),
    [
        (NativeRun(stage=2, dp=2, precision="fp16"), FIRST.removeprefix("bf16_"), "loss_scaler"),
        (NativeRun(stage=3, dp=2, precision="fp16"), FIRST.removeprefix("bf16_"), "loss_scaler"),
        (NativeRun(precision="fp16"), MODEL, "cur_scale"),
        (NativeRun(precision="fp16", optimizer="fused"), MODEL, "cur_scale"),
    ],
    ids=str,
)
def test_a_loss_scale_that_is_in_no_file(run: NativeRun, name: str, key: str, tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), run)
    edit(folder / name, lambda saved: saved["optimizer" if name == MODEL else "optimizer_state_dict"].pop(key))
    refused(folder, DamagedCheckpointError, name, f"lacks '{key}'")


@pytest.mark.parametrize("exchanged", [True, False])
@pytest.mark.parametrize(
    "run",
    [
        ZERO_2,
        NativeRun(dp=2, stage=1, precision="bf16", parameter_alignment=True),
        NativeRun(dp=2, stage=1, precision="bf16", optimizer="bf16"),
    ],
    ids=["plain", "aligned", "bf16-optimizer"],
)
def test_the_file_of_another_partition(run: NativeRun, exchanged: bool, tmp_path: Path) -> None:
    """Its size is the same; which elements it has is recorded in it. Here torch wrote it under no name."""
    folder = write_native(tmp_path, model_of(SHAPES), run)
    for name in (FIRST, LAST):
        unnamed = io.BytesIO()
        torch.save(torch.load(folder / name, weights_only=False), unnamed)
        (folder / name).write_bytes(unnamed.getvalue())
    read_all(folder)
    contents = (folder / FIRST).read_bytes(), (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(contents[0])
    if exchanged:
        (folder / FIRST).write_bytes(contents[1])
    refused(folder, DamagedCheckpointError, "records that it holds", "this is another rank's file")


def test_a_manifest_that_is_cut(folder: Path) -> None:
    """It is this package's alone; without it the files are read as DeepSpeed wrote them."""
    write_manifest(folder, ZERO_2, (tuple(SHAPES),))
    path = folder / MANIFEST_NAME
    path.write_bytes(path.read_bytes()[:100])
    refused(
        folder,
        DamagedCheckpointError,
        "is not a manifest",
        f"remove {MANIFEST_NAME}, and they are read as it alone wrote",
    )
    path.unlink()
    read_all(folder)


@pytest.mark.parametrize(
    "names",
    [
        ("layer_01-model_00-model_states.pt", "layer_02-model_00-model_states.pt"),
        ("layer_00-model_states.pt", "layer_03-model_states.pt"),
        ("layer_0_expert_1_mp_rank_00_model_states.pt", "layer_1_expert_3_mp_rank_00_model_states.pt"),
        ("expp_rank_0_mp_rank_00_optim_states.pt", "expp_rank_1_mp_rank_00_optim_states.pt"),
    ],
)
def test_files_of_layers_and_experts_that_were_exchanged(
    names: tuple[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whoever drops a layer renames those behind it: that is told, unless the other file is gone."""
    one, other = (tmp_path / name for name in names)
    torch.save({"weight": torch.ones(3)}, one)
    torch.save({"weight": torch.zeros(3)}, other)
    for path in (one, other):
        check_written_name(path)
    one.rename(tmp_path / "aside")
    other.rename(one)
    (tmp_path / "aside").rename(other)
    for path, name in ((one, other.name), (other, one.name)):
        with pytest.raises(
            DamagedCheckpointError, match=f"{path.name} and {name} were exchanged.*give each its own name again"
        ):
            check_written_name(path)
    assert not caplog.records
    torch.save({"weight": torch.zeros(4)}, other)
    check_written_name(one)
    assert f"{one.name} was written as {other.name}" in caplog.text
    caplog.clear()
    shutil.copy(one, other)  # which was written under the other's name
    check_written_name(one)
    assert f"{one.name} was written as {other.name}, which is here too: it is a copy" in caplog.text
    caplog.clear()
    other.unlink()
    check_written_name(one)
    assert not caplog.records
