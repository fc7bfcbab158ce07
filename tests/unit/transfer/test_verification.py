"""Verifying files with few checksums, or none: nothing passes as sound that can't be checked."""

from __future__ import annotations

import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import as_version_1

import ucp_deepspeed
from ucp_deepspeed.checkpoint.torch_files.structure import structure_of
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.transfer.conversion import convert

GOLDEN = Path(__file__).parents[2] / "golden"
FORMS = [
    {"tp": 1, "dp": 2, "stage": 1},
    {"tp": 2, "dp": 2, "stage": 3},
    {"tp": 2, "dp": 1, "stage": 0, "precision": "bf16"},
]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_flipped_bit_in_files_of_deepspeeds(form: dict[str, Any], native: Callable[..., Path]) -> None:
    """CRC-32 for each record, and one way only to write all other bytes of an archive."""
    folder, pick = native("a", **form), random.Random(18)
    whole = ucp_deepspeed.verify(folder)
    assert (whole.verdict, whole.unchecked, whole.random_states) == ("whole", 0, 0)
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        for _ in range(60):
            changed = bytearray(data)
            changed[pick.randrange(len(data))] ^= 1 << pick.randrange(8)
            path.write_bytes(changed)
            found = ucp_deepspeed.verify(folder, threads=1)
            assert found.verdict == "damaged"
            assert any(path.name in problem.detail for problem in found.problems)
        path.write_bytes(data)


def test_files_of_older_releases() -> None:
    for folder in sorted(GOLDEN.glob("*/*/t")):
        assert ucp_deepspeed.verify(folder).verdict == "whole", folder


@pytest.mark.parametrize("keep", [0, 10, 0.5, -1])
def test_a_file_that_was_cut_or_is_longer(keep: float, native: Callable[..., Path]) -> None:
    folder = native("a", tp=1, dp=2, stage=1)
    path = sorted(folder.glob("*_optim_states.pt"))[1]
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if 0 < keep < 1 else int(keep) if keep >= 0 else size - 1)
    assert ucp_deepspeed.verify(folder).verdict == "damaged"
    os.truncate(path, size + 10)
    assert ucp_deepspeed.verify(folder).verdict == "damaged"
    path.unlink()
    found = ucp_deepspeed.verify(folder)
    assert found.verdict == "damaged" and path.name in found.problems[0].detail


def test_a_model_states_file_of_another_step(native: Callable[..., Path]) -> None:
    folder = native("a", tp=2, dp=1, stage=0)
    path = folder / "mp_rank_01_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save({**saved, "global_steps": saved["global_steps"] + 5}, path)
    [problem] = ucp_deepspeed.verify(folder).problems
    assert problem.what == "step" and path.name in problem.detail


def saved_again(folder: Path, **settings: Any) -> None:
    for path in folder.iterdir():
        torch.save(torch.load(path, weights_only=False), path, **settings)


def test_files_without_sums_are_unproven(native: Callable[..., Path]) -> None:
    """torch's format from before its archives, and archives whose sums torch was told to leave out."""
    folder = native("a", tp=1, dp=2, stage=1)
    saved_again(folder, _use_new_zipfile_serialization=False)
    found = ucp_deepspeed.verify(folder)
    assert (found.verdict, found.unchecked) == ("unproven", found.numbytes)
    torch.serialization.set_crc32_options(False)
    try:
        saved_again(folder)
    finally:
        torch.serialization.set_crc32_options(True)
    found = ucp_deepspeed.verify(folder)
    assert found.verdict == "unproven"
    assert 0 < found.unchecked < found.numbytes


def test_an_archive_of_another_program_is_unproven(native: Callable[..., Path]) -> None:
    folder = native("a", tp=1, dp=1, stage=0)
    [path] = folder.iterdir()
    with zipfile.ZipFile(path) as archive:
        held = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    found = ucp_deepspeed.verify(folder)
    assert found.verdict == "unproven"
    assert found.unchecked == structure_of(path).numbytes


def test_a_universal_checkpoint_of_version_1_is_unproven(
    native: Callable[..., Path], view_of: Callable[..., UniversalView], tmp_path: Path
) -> None:
    convert(view_of(native("a", tp=1, dp=2, stage=1)), tmp_path / "u")
    found = ucp_deepspeed.verify(tmp_path / "u")
    assert (found.verdict, found.unchecked) == ("whole", 0)
    as_version_1(tmp_path / "u")
    found = ucp_deepspeed.verify(tmp_path / "u")
    assert (found.verdict, found.unchecked) == ("unproven", found.numbytes)
    os.truncate(tmp_path / "u" / "atoms-00001-of-00001.safetensors", 100)
    found = ucp_deepspeed.verify(tmp_path / "u")
    assert [problem.what for problem in found.problems] == ["size"]


def test_a_file_that_is_written_meanwhile(native: Callable[..., Path]) -> None:
    folder = native("a", tp=1, dp=1, stage=1)
    path = next(folder.glob("*_optim_states.pt"))
    data = path.read_bytes()

    def write(done: int, total: int) -> None:
        assert 0 < done <= total
        path.unlink()
        path.write_bytes(data)

    with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
        ucp_deepspeed.verify(folder, threads=1, progress=write)
    assert ucp_deepspeed.verify(folder).verdict == "whole"


def test_parts_of_an_archive_outside_of_its_records(tmp_path: Path) -> None:
    """Each byte of them, one after the other."""
    path, pick = tmp_path / "a.pt", random.Random(5)
    torch.save({"a": torch.arange(7.0), "b": [1, 2], "c": torch.zeros(0)}, path)
    whole, found = path.read_bytes(), structure_of(path)
    assert not found.altered and found.is_torchs
    with zipfile.ZipFile(path) as archive:
        inside = sum(entry.file_size for entry in archive.infolist())
    assert found.numbytes == len(whole) - inside
    silent = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << pick.randrange(8)]) + whole[place + 1 :])
        try:
            silent += not structure_of(path).altered
        except DamagedCheckpointError:
            continue
    assert silent <= inside  # what lies in records is for their sums to tell
