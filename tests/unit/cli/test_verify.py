"""``ucp verify`` on checkpoints of real engines: the last one of `saved` has checksums of all bytes."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result

import ucp_deepspeed
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME

Ucp = Callable[..., Result]


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved`, to change."""
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def test_whole(saved: Path, ucp: Ucp) -> None:
    result = ucp("verify", saved)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "unchecked  nothing: each byte has a checksum\n" in result.stdout
    assert "random     states of 1 ranks\n" in result.stdout
    assert result.stdout.endswith("verdict    whole: all is as it was saved\n")


def test_json_tells_of_each_file(saved: Path, ucp: Ucp) -> None:
    report = json.loads(ucp("verify", saved, "--tag", "step2", "--json", "--threads", 1).stdout)
    files = {path.name: {"bytes": path.stat().st_size, "unchecked": 0} for path in (saved / "step2").iterdir()}
    size = sum(file["bytes"] for file in files.values())
    assert report == {
        "path": str(saved / "step2"),
        "form": "deepspeed zero-1/2",
        "global_steps": 2,
        "verdict": "whole",
        "bytes": size,
        "unchecked": 0,
        "files": files,
        "problems": [],
        "doubts": [],
        "others": [],
        "random_states": 1,
    }


def test_a_flipped_bit_in_any_file_is_told(folder: Path) -> None:
    """Each file, at random places: in tensors, pickles, headers, padding, texts."""
    pick, told = random.Random(18), 0
    for path in sorted((folder / "step3").iterdir()):
        whole = path.read_bytes()
        for _ in range(40):
            data = bytearray(whole)
            data[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
            path.write_bytes(data)
            told += ucp_deepspeed.verify(folder, threads=1).verdict == "damaged"
        path.write_bytes(whole)
    assert told == 40 * len(list((folder / "step3").iterdir()))
    assert ucp_deepspeed.verify(folder).verdict == "whole"


def test_a_missing_file_is_told(folder: Path) -> None:
    """Without its manifest a folder is as DeepSpeed alone saves, but for the checksums: nothing tells of which save these are."""
    for path in sorted((folder / "step3").iterdir()):
        whole = path.read_bytes()
        path.unlink()
        found = ucp_deepspeed.verify(folder)
        assert found.verdict == ("unproven" if path.name == MANIFEST_NAME else "damaged"), path
        assert path.name in str((found.problems, found.doubts))
        path.write_bytes(whole)


def test_a_file_of_another_save_is_told(folder: Path) -> None:
    """Each is whole by itself."""
    for path in sorted((folder / "step3").iterdir()):
        whole = path.read_bytes()
        shutil.copyfile(folder / "step2" / path.name, path)
        assert ucp_deepspeed.verify(folder).verdict == "damaged", path
        path.write_bytes(whole)


def test_a_file_that_was_saved_anew_is_told(folder: Path) -> None:
    """Its own CRC-32 fit; the sums of the save don't."""
    [path] = (folder / "step3").glob("*_optim_states.pt")
    saved = torch.load(path, weights_only=False)
    saved["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].detach()[7] += 1
    torch.save(saved, path)
    problems = ucp_deepspeed.verify(folder).problems
    assert problems[0].what == "content" and not any(problem.what == "archive" for problem in problems)
    assert any(re.search(r"bytes \d+ to \d+ differ", problem.detail) for problem in problems)


def test_steps_that_only_the_contents_tell(folder: Path, ucp: Ucp) -> None:
    """An optimizer's file of another save, among files that DeepSpeed saved alone."""
    for name in (MANIFEST_NAME, CHECKSUMS_NAME, RANDOM_STATES_NAME):
        (folder / "step3" / name).unlink()
    assert ucp("verify", folder).exit_code == 0
    [path] = (folder / "step3").glob("*_optim_states.pt")
    shutil.copyfile(folder / "step2" / path.name, path)
    result = ucp("verify", folder)
    assert result.exit_code == 2
    assert "note: the optimizer took 2 steps, and the run 3: files of two saves, or" in result.stdout


def test_damage_is_listed(folder: Path, ucp: Ucp) -> None:
    [path] = (folder / "step3").glob("*_optim_states.pt")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    result = ucp("verify", folder)
    assert result.exit_code == 1
    assert "verdict    damaged: 1 problem\n" in result.stdout
    assert f"  {path}: bytes " in result.stdout
    assert "ucp verify --all" in result.stdout
    report = json.loads(ucp("verify", folder, "--json").stdout)
    assert [(problem["file"], problem["what"]) for problem in report["problems"]] == [(path.name, "bytes")]


def test_files_of_others_are_named(folder: Path, ucp: Ucp) -> None:
    (folder / "step3" / "notes.txt").write_text("mine")
    result = ucp("verify", folder)
    assert result.exit_code == 0
    assert "note: no part of the checkpoint, and not verified: notes.txt\n" in result.stdout


def test_all_tags(folder: Path, ucp: Ucp) -> None:
    result = ucp("verify", folder, "--all")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["step3", "3", "whole", "latest"],
        ["step2", "2", "whole"],
    ]
    next((folder / "step2").glob("*_model_states.pt")).unlink()
    result = ucp("verify", folder, "--all")
    assert result.exit_code == 1
    assert result.stdout.splitlines()[2].split()[:2] == ["step2", "damaged"]
    report = json.loads(ucp("verify", folder, "--all", "--json").stdout)
    assert report["latest"] == "step3"
    assert {name: each["verdict"] for name, each in report["tags"].items()} == {"step3": "whole", "step2": "damaged"}
    assert ucp("verify", folder, "--all", "--tag", "step2").exit_code == 2
    shutil.rmtree(folder / "step3")
    write_latest(folder, "step2")
    assert ucp("verify", folder, "--all").exit_code == 1  # step2 is damaged


def write_latest(folder: Path, name: str) -> None:
    (folder / "latest").write_text(name, encoding="utf-8")


def test_all_tags_and_latest(folder: Path, ucp: Ucp) -> None:
    """A tag may lie deeper; a resume that finds nothing is no success."""
    (folder / "more").mkdir()
    (folder / "step2").rename(folder / "more" / "step2")
    write_latest(folder, "more/step2")
    result = ucp("verify", folder, "--all")
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["step3", "3", "whole"],
        ["more/step2", "2", "whole", "latest"],
    ]
    write_latest(folder, "step4")
    result = ucp("verify", folder, "--all")
    assert result.exit_code == 1 and "note: latest names step4, which isn't there" in result.stdout
    write_latest(folder, "")
    result = ucp("verify", folder, "--all")
    assert result.exit_code == 1 and "is empty; name the tag" in result.stdout


def test_nothing_to_verify(tmp_path: Path, ucp: Ucp) -> None:
    for arguments in ((tmp_path,), (tmp_path, "--all"), (tmp_path / "no", "--all")):
        result = ucp("verify", *arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
