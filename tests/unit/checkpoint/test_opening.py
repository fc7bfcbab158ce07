"""From a path to a tag folder."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from native_files import NativeRun, write_native
from native_models import SHAPES, check_reads_back, model_of

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint, resolve_tag
from ucp_deepspeed.checkpoint.tags import tags_in
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK, REPLACED_MARK
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError, UnsupportedError

RUN = NativeRun(stage=1, dp=2)


@pytest.mark.parametrize("name", ["run+v1", "a[1]", "a*b?", "with space", "ünïcode", "{x}", "100%"])
def test_any_folder_name(tmp_path: Path, name: str) -> None:
    """Names that mean something in a glob, a regular expression or a URL are names like any other."""
    model = model_of(SHAPES)
    folder = write_native(tmp_path / name, model, RUN, tag=f"{name}_tag")
    assert resolve_tag(tmp_path / name) == folder
    assert resolve_tag(tmp_path / name, f"{name}_tag") == folder
    check_reads_back(folder, model, RUN)


def test_latest_is_followed(tmp_path: Path) -> None:
    first = write_native(tmp_path, model_of(SHAPES), RUN, tag="one")
    second = write_native(tmp_path, model_of(SHAPES), RUN, tag="two")
    assert resolve_tag(tmp_path) == second
    (tmp_path / "latest").write_text("one\n", encoding="utf-8")
    assert resolve_tag(str(tmp_path)) == first
    assert open_checkpoint(tmp_path, "two").path == second


def test_a_tag_folder_by_itself(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), RUN)
    assert resolve_tag(folder) == folder


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match=r"no checkpoint folder at .*nowhere"):
        open_checkpoint(tmp_path / "nowhere")


def test_a_file_names_its_folder(tmp_path: Path) -> None:
    folder = write_native(tmp_path, model_of(SHAPES), RUN)
    for file in (tmp_path / "latest", folder / "mp_rank_00_model_states.pt"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            open_checkpoint(file)
        assert str(caught.value) == f"no checkpoint folder at {file}: it is a file; name its folder, {file.parent}"


def test_a_folder_of_runs_names_them(tmp_path: Path) -> None:
    for run in ("b", "a"):
        write_native(tmp_path / run, model_of(SHAPES), RUN, tag="step")
    (tmp_path / "logs").mkdir()
    for tag in (None, "step"):
        with pytest.raises(CheckpointNotFoundError, match=r"; runs there: a, b; name the folder of one$"):
            open_checkpoint(tmp_path, tag)


@pytest.mark.parametrize(("latest", "shown"), [("x" * 5000, f"'{'x' * 100}…'"), ("a\0b", r"'a\x00b'"), (".", "'.'")])
def test_latest_that_names_nothing(latest: str, shown: str, tmp_path: Path) -> None:
    write_native(tmp_path, model_of(SHAPES), RUN, tag="step")
    (tmp_path / "latest").write_text(latest, encoding="utf-8")
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(tmp_path)
    told = f"no tag {shown} in {tmp_path}, which {tmp_path / 'latest'} names; tags there: step"
    assert str(caught.value) == told


def test_no_such_tag_lists_the_tags(tmp_path: Path) -> None:
    for tag in ("global_step10", "global_step5"):
        write_native(tmp_path, model_of(SHAPES), RUN, tag=tag)
    (tmp_path / "logs").mkdir()
    with pytest.raises(CheckpointNotFoundError) as caught:
        open_checkpoint(tmp_path, "global_step7")
    assert "no tag 'global_step7'" in str(caught.value)
    assert "tags there: global_step10, global_step5" in str(caught.value)
    assert "logs" not in str(caught.value)


@pytest.mark.parametrize("tag", ["", "."])
def test_a_tag_that_means_the_folder_itself(tag: str, tmp_path: Path) -> None:
    """As a tag it is one only if the folder is a tag folder."""
    folder = write_native(tmp_path, model_of(SHAPES), RUN, tag="step1")
    assert resolve_tag(folder, tag) == folder
    with pytest.raises(CheckpointNotFoundError, match=re.escape(f"no tag {tag!r} in {tmp_path}; tags there: step1")):
        resolve_tag(tmp_path, tag)


def test_no_latest_lists_the_tags(tmp_path: Path) -> None:
    write_native(tmp_path, model_of(SHAPES), RUN, tag="step1")
    (tmp_path / "latest").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"'latest' file; tags there: step1"):
        open_checkpoint(tmp_path)


def test_latest_of_a_tag_that_is_gone(tmp_path: Path) -> None:
    write_native(tmp_path, model_of(SHAPES), RUN, tag="step1")
    (tmp_path / "latest").write_text("step2", encoding="utf-8")
    with pytest.raises(CheckpointNotFoundError, match=r"no tag 'step2'.*tags there: step1"):
        open_checkpoint(tmp_path)


def test_no_tags_at_all(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no tag folders there"):
        open_checkpoint(tmp_path)


def test_empty_tag_folder(tmp_path: Path) -> None:
    (tmp_path / "tag").mkdir()
    with pytest.raises(DamagedCheckpointError, match="holds no model_states file"):
        open_checkpoint(tmp_path, "tag")


@pytest.mark.parametrize("name", ["layer_00-model_states.pt", "layer_02-model_01-model_states.pt"])
def test_pipeline_layers(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "tag"
    folder.mkdir()
    (folder / name).write_bytes(b"")
    with pytest.raises(UnsupportedError, match="pipeline"):
        open_checkpoint(tmp_path, "tag")


def test_deepspeeds_universal_folder(tmp_path: Path) -> None:
    """It has model_states files and none of the optimizer's, and a file of its own tells the latest."""
    folder = write_native(tmp_path, model_of(SHAPES), NativeRun(stage=1, dp=2), tag="tag")
    (folder / "zero").mkdir()
    assert (
        open_checkpoint(tmp_path).topology.dp == 2
    )  # converted within the folder: DeepSpeed's own files are all there
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    (tmp_path / "latest").rename(tmp_path / "latest_universal")
    for path in (tmp_path, folder):
        with pytest.raises(DamagedCheckpointError, match=r"zero/optimizer_state.pt is missing"):
            open_checkpoint(path)


def test_interrupted_conversion(tmp_path: Path) -> None:
    folder = tmp_path / ".tag.partial-123"
    folder.mkdir()
    with pytest.raises(DamagedCheckpointError, match="interrupted"):
        open_checkpoint(folder)


def test_a_tag_whose_save_was_killed_between_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On file systems that can't exchange folders: it is read where it lies, and nothing is changed. Others that are hidden count
    as no tags."""
    monkeypatch.setattr(tunables, "REPLACING_SECONDS", 0.0)
    half, whole = (tmp_path / f".a{PARTIAL_MARK}elsewhere-7{mark}" for mark in ("", REPLACED_MARK))
    write_native(tmp_path, model_of({"weight": (3, 2)}), NativeRun(stage=1), tag="a").rename(whole)
    half.mkdir()
    (half / "mp_rank_00_model_states.pt").touch()
    (tmp_path / "latest").write_text("a")
    with pytest.raises(CheckpointNotFoundError, match=r"no tag 'b' in .*; tags there: a$"):
        resolve_tag(tmp_path, "b")
    for opened in (open_checkpoint(tmp_path), open_checkpoint(tmp_path, "a"), open_checkpoint(whole)):
        assert opened.path == whole and set(opened.parameters) == {"weight"}
    assert tags_in(tmp_path) == ["a"]
    assert sorted(tmp_path.iterdir()) == sorted([half, whole, tmp_path / "latest"])
    (tmp_path / "a").mkdir()  # then what lies aside is what nobody got to remove
    with pytest.raises(DamagedCheckpointError, match="interrupted"):
        open_checkpoint(whole)
