"""Files that are missing, cut, foreign or inconsistent: refused, with the file's name and the reason."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from native_files import NativeRun, write_native
from native_models import SHAPES, model_of, write_manifest

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, read_manifest
from ucp_deepspeed.checkpoint.torch_files.archives import content_start
from ucp_deepspeed.checkpoint.torch_files.reading import open_torch_file
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError, UnsupportedError

ZERO_2 = NativeRun(stage=2, dp=2, precision="bf16")
LAST = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
FIRST = "bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt"
MODEL = "mp_rank_00_model_states.pt"


def read_all(folder: Path) -> Checkpoint:
    """Open, and locate every element of every state."""
    checkpoint = open_checkpoint(folder)
    view = UniversalView.of(checkpoint)
    for name, parameter in checkpoint.parameters.items():
        numel = torch.Size(view.logical_shape(name)).numel()
        for state in parameter.states:
            assert sum(part.numel for part in checkpoint.fragments(name, state, 0, 0, numel)) == numel
    return checkpoint


def refused(folder: Path, error: type[UniversalCheckpointError], *parts: str) -> None:
    with pytest.raises(error) as caught:
        read_all(folder)
    assert type(caught.value) is error
    for part in parts:
        assert part in str(caught.value), str(caught.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_native(tmp_path, model_of(SHAPES), ZERO_2)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change what a file of this test holds."""
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)


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


@pytest.mark.parametrize("name", [MODEL, FIRST, LAST])
@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99, -1])
def test_cut_file(folder: Path, name: str, keep: float) -> None:
    """Wherever a file was cut off, it is refused by name."""
    path = folder / name
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if 0 < keep < 1 else int(keep) if keep >= 0 else size - 1)
    refused(folder, DamagedCheckpointError, name)


def test_a_cut_file_is_called_truncated(folder: Path) -> None:
    os.truncate(folder / LAST, 500)
    refused(folder, DamagedCheckpointError, LAST, "truncated (500 bytes)")


def test_manifest_knows_the_size(folder: Path) -> None:
    """A file that is whole by itself but not the one that was committed."""
    write_manifest(folder, ZERO_2, (tuple(SHAPES),))
    size = (folder / LAST).stat().st_size
    edit(folder / LAST, lambda saved: saved.update(more=list(range(500))))
    found = (folder / LAST).stat().st_size
    assert found > size
    refused(folder, DamagedCheckpointError, LAST, "isn't the file that", f"{size} bytes then, {found} now")
    os.truncate(folder / LAST, size - 10)
    refused(folder, DamagedCheckpointError, LAST, f"truncated: expected {size} bytes, found {size - 10}")


class WritesAFile:
    """Pickles as a call that writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


class Foreign:
    """Any class of the user's."""


@pytest.mark.parametrize("name", [MODEL, FIRST, LAST])
def test_foreign_code_is_not_run(folder: Path, tmp_path: Path, name: str) -> None:
    mark = tmp_path / "code-was-run"
    edit(folder / name, lambda saved: saved.update(mine=WritesAFile(mark)))
    if name == MODEL:  # in the client state, which is left out
        assert open_checkpoint(folder).unreadable() == {"mine": "getattr"}
        assert "mine" not in open_checkpoint(folder).client_state()[1]
        edit(folder / name, lambda saved: saved.update(lr_scheduler=WritesAFile(mark)))
        mark.unlink()  # `edit` has loaded it
    refused(folder, DamagedCheckpointError, name, "refused")
    assert not mark.exists()
    torch.load(folder / name, weights_only=False)
    assert mark.exists()


def test_foreign_class_is_named(folder: Path) -> None:
    edit(folder / MODEL, lambda saved: saved.update(lr_scheduler=Foreign()))
    refused(folder, DamagedCheckpointError, MODEL, f"{__name__}.Foreign", "add_safe_globals([Foreign])")


def in_older_format(path: Path) -> bytes:
    """Save a file anew, in torch's format from before its zip archives."""
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    return path.read_bytes()


@pytest.mark.parametrize("kept", [1, 20, 100, 1000, -1])
@pytest.mark.parametrize("name", [MODEL, LAST])
def test_cut_in_the_older_format(name: str, kept: int, folder: Path) -> None:
    whole = in_older_format(folder / name)
    (folder / name).write_bytes(whole[:kept])
    refused(folder, DamagedCheckpointError, name, "can't be read")


@pytest.mark.parametrize(
    ("held", "put", "reason"),
    [
        (b"little_endianq\x02\x88", b"little_endianq\x02\x89", "big-endian"),
        (b"X\x07\x00\x00\x00storage", b"X\x07\x00\x00\x00another", "isn't a storage"),
        (b"\x80\x02M\xe9\x03.", b"\x80\x02M\xe8\x03.", "begins with"),
    ],
)
def test_another_than_the_older_format(held: bytes, put: bytes, reason: str, folder: Path) -> None:
    whole = in_older_format(folder / MODEL)
    assert held in whole
    (folder / MODEL).write_bytes(whole.replace(held, put))
    refused(folder, DamagedCheckpointError, MODEL, "can't be read", reason)


def test_code_in_the_older_format(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    saved = torch.load(folder / MODEL, weights_only=False)
    saved["lr_scheduler"] = WritesAFile(mark)
    torch.save(saved, folder / MODEL, _use_new_zipfile_serialization=False)
    refused(folder, DamagedCheckpointError, MODEL, "refused")
    assert not mark.exists()


@pytest.mark.parametrize(("content", "kind"), [(b"", "empty"), (b"hello", "not a torch file")])
def test_not_a_torch_file(folder: Path, content: bytes, kind: str) -> None:
    (folder / LAST).write_bytes(content)
    refused(folder, DamagedCheckpointError, LAST, f"{kind} ({len(content)} bytes)")


def test_not_a_dictionary(folder: Path) -> None:
    torch.save([1, 2], folder / MODEL)
    refused(folder, DamagedCheckpointError, MODEL, "holds a list")


def test_another_zip_file(folder: Path) -> None:
    with zipfile.ZipFile(folder / LAST, "w") as archive:
        archive.writestr("a.txt", "a")
    refused(folder, DamagedCheckpointError, LAST)


def test_an_archive_with_an_empty_pickle(folder: Path) -> None:
    with zipfile.ZipFile(folder / MODEL) as archive:
        entries = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(folder / MODEL, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, b"" if name.endswith("data.pkl") else content)
    refused(folder, DamagedCheckpointError, MODEL)


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


@pytest.mark.parametrize("name", [MODEL, LAST, MANIFEST_NAME])
@pytest.mark.parametrize("kind", ["a device", "a pipe", "a folder"])
def test_what_is_no_file_is_not_read(kind: str, name: str, folder: Path) -> None:
    path = folder / name
    path.unlink(missing_ok=True)
    if kind == "a device":
        path.symlink_to("/dev/zero")
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    refused(folder, DamagedCheckpointError, f"{name} is {kind}, not a file")
    if name == LAST:
        with pytest.raises(DamagedCheckpointError, match=f"{name} is {kind}"):
            open_checkpoint(folder).check_sizes()


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
    """Its size is the same; which elements it has is recorded in it."""
    folder = write_native(tmp_path, model_of(SHAPES), run)
    read_all(folder)
    contents = (folder / FIRST).read_bytes(), (folder / LAST).read_bytes()
    (folder / LAST).write_bytes(contents[0])
    if exchanged:
        (folder / FIRST).write_bytes(contents[1])
    refused(folder, DamagedCheckpointError, "records that it holds", "this is another rank's file")


def test_what_lies_in_the_place_of_a_file(folder: Path) -> None:
    """A pointer that nobody has followed, and an archive behind something else."""
    path = folder / LAST
    whole = path.read_bytes()
    path.write_bytes(b"\n" + whole)
    refused(folder, DamagedCheckpointError, LAST, "is not a torch file")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    refused(folder, DamagedCheckpointError, LAST, 'a pointer to a file, which "git lfs pull" would fetch')


def rewrite(path: Path, how: int, change: Callable[[str, bytes], bytes] = lambda name, content: content) -> None:
    """Write an archive anew, as other programs than torch do; ``change``: of each record, by its name."""
    with zipfile.ZipFile(path) as file:
        records = [(record.filename, file.read(record)) for record in file.infolist()]
    with zipfile.ZipFile(path, "w", how) as file:
        for name, content in records:
            file.writestr(name, change(name.partition("/")[2], content))


def swapped(name: str, content: bytes) -> bytes:
    return b"big" if name == "byteorder" else content


@pytest.mark.parametrize(
    ("name", "how", "change", "told"),
    [
        (MODEL, zipfile.ZIP_DEFLATED, None, "is compressed, which torch doesn't do"),
        (LAST, zipfile.ZIP_DEFLATED, None, "is compressed, which torch doesn't do"),
        (LAST, zipfile.ZIP_STORED, None, "was written anew by another program than torch"),
        (MODEL, zipfile.ZIP_STORED, swapped, "was written on a machine of the other byte order"),
    ],
    ids=["compressed weights", "compressed states", "stored", "byte order"],
)
def test_an_archive_that_torch_did_not_lay_out(name: str, how: int, change: Any, told: str, folder: Path) -> None:
    """torch looks where its own archives would have the tensors; written anew by torch all is as it was."""
    before = torch.load(folder / name, weights_only=False)
    rewrite(folder / name, how, *([] if change is None else [change]))
    refused(folder, UnsupportedError, name, told, "torch.save(torch.load(path, weights_only=False), path)")
    if change is None:
        torch.save(torch.load(folder / name, weights_only=False), folder / name)
        read_all(folder)
        assert str(torch.load(folder / name, weights_only=False)) == str(before)


def test_torch_lays_records_out_as_is_calculated(folder: Path) -> None:
    """Also records that are too large for a test, and that begin behind the first 4 GiB."""
    reader = torch._C.PyTorchFileReader(str(folder / MODEL))
    with zipfile.ZipFile(folder / MODEL) as file:
        prefix = len(file.namelist()[0].partition("/")[0]) + 1
    for header in (0, 63, 64, 2**32 - 2, 2**32 - 1, 2**40 + 7):
        for numbytes in (0, 1, 100, 2**32 - 2, 2**32 - 1, 2**35):
            for name in ("data/0", "data/12345"):
                expected = reader.get_record_offset_no_read(header, name, numbytes, 64)
                assert content_start(header, prefix + len(name), numbytes, 64) == expected


@pytest.mark.parametrize("length", [8, 80])
def test_a_record_that_is_shorter_or_longer_than_its_tensor(length: int, folder: Path) -> None:
    """The bytes behind a shorter one are another tensor's."""

    def cut(name: str, content: bytes) -> bytes:
        return content[:length].ljust(length, b"\0") if name == "data/0" else content

    path = folder / LAST
    rewrite(path, zipfile.ZIP_STORED, cut)
    with zipfile.ZipFile(path) as file:
        kept = [(record.filename, file.read(record)) for record in file.infolist()]
    with zipfile.ZipFile(path, "w") as file:
        for name, content in kept:
            if not name.endswith(
                (".format_version", ".storage_alignment")
            ):  # so that torch looks, and doesn't calculate
                file.writestr(name, content)
    refused(folder, DamagedCheckpointError, LAST, f"holds {length} bytes in", "data/0, for a storage of ")


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
