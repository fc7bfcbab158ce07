"""``ucp convert``."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from ucp_deepspeed.checkpoint import open_checkpoint

Ucp = Callable[..., Result]


def test_a_folder_that_can_be_loaded_from(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    result = ucp("convert", saved, tmp_path / "deep" / "u")
    assert result.exit_code == 0
    found = sorted(str(path.relative_to(tmp_path / "deep" / "u")) for path in (tmp_path / "deep" / "u").rglob("*"))
    files = ["atoms-00001-of-00001.safetensors", "ucp_checksums.jsonl", "ucp_index.json", "ucp_random_states.jsonl"]
    assert found == ["latest", "step3", *(f"step3/{file}" for file in files)]
    assert (tmp_path / "deep" / "u" / "latest").read_text() == "step3"
    [line] = result.stdout.splitlines()
    assert re.fullmatch(r".*/u/step3: read [\d.]+ KiB from 2 files, wrote [\d.]+ KiB to 4 files in [\d.]+ s", line)
    assert result.stderr == ""  # no terminal, no bar
    assert open_checkpoint(tmp_path / "deep" / "u").run.global_steps == 3


def test_on_a_terminal_the_bar_makes_place(
    saved: Path, tmp_path: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    result = ucp("convert", saved, tmp_path / "u")
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in result.stderr and result.stderr.endswith("\x1b[2K")


def test_quiet(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    result = ucp("convert", saved, tmp_path / "u", "--quiet", "--workers", 1)
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize("options", [(), ("--quiet",)], ids=str)
@pytest.mark.parametrize("tags", [("step2", "step3"), ("step3", "step2")])
def test_a_second_tag_beside_the_first(
    tags: tuple[str, str], options: tuple[str, ...], saved: Path, tmp_path: Path, ucp: Ucp
) -> None:
    """``latest`` never goes back to an earlier step."""
    results = [ucp("convert", saved, tmp_path / "u", "--tag", tag, *options) for tag in tags]
    assert [result.exit_code for result in results] == [0, 0]
    assert (tmp_path / "u" / "latest").read_text() == "step3"
    assert ("still names step3" in results[1].stderr) == (tags[1] == "step2")
    assert sorted(path.name for path in (tmp_path / "u").iterdir()) == ["latest", "step2", "step3"]


@pytest.mark.parametrize("inside", ["step3", "step3/universal"])
def test_a_destination_in_the_checkpoint_itself(inside: str, saved: Path, ucp: Ucp) -> None:
    before = sorted(saved.rglob("*"))
    result = ucp("convert", saved, saved / inside)
    assert result.exit_code == 2 and "lies in the checkpoint that is read; name a folder outside it" in result.stderr
    assert sorted(saved.rglob("*")) == before


def test_a_tag_with_a_slash(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    """It keeps its name, so that the script that resumes finds it."""
    source = tmp_path / "s"
    shutil.copytree(saved / "step3", source / "run" / "step3")
    (source / "latest").write_text("run/step3")
    assert ucp("convert", source, tmp_path / "u").exit_code == 0
    assert (tmp_path / "u" / "latest").read_text() == "run/step3"
    assert sorted(path.name for path in (tmp_path / "u").iterdir()) == ["latest", "run"]
    assert open_checkpoint(tmp_path / "u").path == tmp_path / "u" / "run" / "step3"
    again = ucp("convert", source / "run" / "step3", tmp_path / "v")
    assert (again.exit_code, (tmp_path / "v" / "latest").read_text()) == (0, "step3")


@pytest.mark.parametrize("content", ["", "file"])
def test_what_exists_is_not_touched(content: str, saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "u" / "step3").mkdir(parents=True)
    (tmp_path / "u" / "latest").write_text("mine")
    if content:
        (tmp_path / "u" / "step3" / "file").write_text("kept")
    before = sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))
    result = ucp("convert", saved, tmp_path / "u")
    assert result.exit_code == 2 and "step3 exists already; nothing was written" in result.stderr
    assert before == sorted((str(path), path.stat().st_mtime_ns) for path in tmp_path.rglob("*"))


def test_the_name_of_the_folder_one_stands_in(
    saved: Path, tmp_path: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(saved / "step2")
    assert ucp("convert", ".", tmp_path / "u").exit_code == 0
    assert (tmp_path / "u" / "latest").read_text() == "step2"


def test_names_that_look_like_patterns(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    target = tmp_path / "run+v1 [a]*"
    assert ucp("convert", saved, target).exit_code == 0
    assert ucp("diff", saved, target).exit_code == 0
    assert f"path             {target}/step3" in ucp("inspect", target).stdout


def test_universal_to_universal(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    assert ucp("convert", saved, tmp_path / "u").exit_code == 0
    assert ucp("convert", tmp_path / "u", tmp_path / "v").exit_code == 0
    atoms = "step3/atoms-00001-of-00001.safetensors"
    assert (tmp_path / "u" / atoms).read_bytes() == (tmp_path / "v" / atoms).read_bytes()


def test_dropped_keys_of_the_client_state(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    assert ucp("convert", saved, tmp_path / "u").exit_code == 0
    assert open_checkpoint(tmp_path / "u").client_state()[1]["epoch"] == 7
    drop = ("--drop-client-state", "epoch", "--drop-client-state", "ds_config")
    assert ucp("convert", saved, tmp_path / "v", *drop).exit_code == 0
    assert open_checkpoint(tmp_path / "v").client_state()[1].keys() == {"ds_version"}
    result = ucp("convert", saved, tmp_path / "w", "--drop-client-state", "epochs")
    assert result.exit_code == 2 and "no key epochs" in result.stderr and not (tmp_path / "w").exists()


def test_tensor_parallelism_needs_layouts(sharded: Path, spec_file: Path, tmp_path: Path, ucp: Ucp) -> None:
    result = ucp("convert", sharded, tmp_path / "u")
    assert result.exit_code == 2 and "no layout is known for 2 parameters" in result.stderr
    assert not (tmp_path / "u").exists()
    assert ucp("convert", sharded, tmp_path / "u", "--spec", spec_file).exit_code == 0
    assert open_checkpoint(tmp_path / "u").parameters["block.rows"].local_shapes == ((6, 8),)


def test_a_link_that_leads_nowhere(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    done = ucp("convert", saved, tmp_path / "link")
    assert done.exit_code == 2 and "link is a link that leads nowhere; nothing was written; name another" in done.stderr
