"""Version 2 of the universal format: its sums are those of the bytes, whatever changes is told, and version 1 is read."""

from __future__ import annotations

import base64
import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from native_files import NativeModel, NativeRun, write_native
from native_models import model_of
from safetensors.torch import load_file
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

VERSION_1 = Path(__file__).parents[3] / "golden_universal" / "version_1"

SHAPES = {"wide": (700, 1024), "b": (3,), "c": (5, 2)}
"""Shapes: the first has more than two pieces in fp32."""


@pytest.fixture(scope="module")
def universal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with all kinds of files."""
    root = tmp_path_factory.mktemp("universal")
    native = write_native(root / "n", model_of(SHAPES), NativeRun(stage=1), client_state={"order": torch.arange(5)})
    convert(UniversalView.of(open_checkpoint(native)), root / "u")
    return root / "u"


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """Read what a load reads: everything."""
    with ucp_deepspeed.open_checkpoint(folder) as held:
        _ = held.client_state
        return {
            f"{name}/{state}": held.read(name, state) for name, info in held.parameters.items() for state in info.states
        }


def test_the_sums_are_those_of_the_bytes(universal: Path) -> None:
    """By brute force, over the slices of each file."""
    index = json.loads((universal / "ucp_index.json").read_text())
    sums = (universal / "ucp_checksums.jsonl").read_bytes()
    assert index["checksums"] == xxh3_64_hexdigest(sums)
    lines = [json.loads(line) for line in sums.splitlines()]
    assert lines[0]["save_id"] == index["save_id"]
    assert {line["file"] for line in lines[1:]} == index["files"].keys() - {"ucp_checksums.jsonl"}
    for line in lines[1:]:
        content = (universal / line["file"]).read_bytes()
        if line["file"].startswith("atoms"):
            header = 8 + int.from_bytes(content[:8], "little")
            assert line["ranges"] == [[header, len(content) - header]]
        [[start, numbytes]] = line["ranges"]
        pieces = [content[at : at + line["piece"]] for at in range(start, start + numbytes, line["piece"])]
        expected = np.array([xxh3_64_intdigest(piece) for piece in pieces], dtype="<u8")
        assert np.array_equal(np.frombuffer(base64.b64decode(line["sums"]), dtype="<u8"), expected)
        assert line["rest"] == xxh3_64_hexdigest(content[:start])
    text = (universal / "ucp_index.json").read_text()
    assert list(index)[-1] == "sum" and index["sum"] == xxh3_64_hexdigest(text.replace(index["sum"], "").encode())


@pytest.mark.parametrize("chunk", [100_000, tunables.PIECE_NUMBYTES, 3 * tunables.PIECE_NUMBYTES + 8])
def test_chunks_change_no_byte(chunk: int, universal: Path, tmp_path: Path) -> None:
    """Pieces that lie in several chunks are summed from the file."""
    view = UniversalView.of(open_checkpoint(universal.parent / "n"))
    convert(view, tmp_path / "u", chunk_numbytes=chunk)
    for path in universal.iterdir():
        assert (tmp_path / "u" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("seed", range(60))
def test_a_changed_byte_is_told(seed: int, universal: Path, tmp_path: Path) -> None:
    dice = random.Random(seed)
    folder = Path(shutil.copytree(universal, tmp_path / "u"))
    path = sorted(folder.iterdir())[seed % len(list(folder.iterdir()))]
    content = bytearray(path.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    path.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=path.name):
        read_all(folder)


@pytest.mark.parametrize(
    "name", ["ucp_checksums.jsonl", "atoms-00001-of-00001.safetensors", "client_state.safetensors"]
)
def test_a_file_of_another_conversion(name: str, universal: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(universal, tmp_path / "u"))
    order = torch.arange(5).flip(0)
    others = tuple(replace(each, fp32=each.fp32 + 1) for each in model_of(SHAPES).parameters)
    native = write_native(tmp_path / "n", NativeModel(others), NativeRun(stage=1), client_state={"order": order})
    convert(UniversalView.of(open_checkpoint(native)), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / name, folder / name)
    with pytest.raises(DamagedCheckpointError, match=name):
        read_all(folder)


def test_version_1_is_read(tmp_path: Path) -> None:
    """As an earlier release wrote it; its values by the safetensors library."""
    held = open_checkpoint(VERSION_1)
    assert held.form == "universal 1"
    found, expected = read_all(VERSION_1), load_file(VERSION_1 / "atoms-00001-of-00001.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)
    convert(UniversalView.of(held), tmp_path / "u")
    again = open_checkpoint(tmp_path / "u")
    assert again.form == "universal 2" and compare(UniversalView.of(held), UniversalView.of(again)) == []
