"""Universal checkpoints whose files are wrong are refused with the file and what is wrong with it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, as_version_1, write_native

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

ATOMS = "atoms-00001-of-00001.safetensors"


@pytest.fixture
def universal(engine_checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """One of version 1, whose files the tests may change."""
    convert(UniversalView.of(open_checkpoint(engine_checkpoints["zero1"])), tmp_path / "u")
    as_version_1(tmp_path / "u")
    return tmp_path / "u"


def _edit_index(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "ucp_index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def _edit_header(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / ATOMS
    raw = path.read_bytes()
    assert old in raw and len(old) == len(new)
    path.write_bytes(raw.replace(old, new, 1))


@pytest.mark.parametrize("shift", [1, 2, 4])
def test_elements_may_lie_anywhere(shift: int, universal: Path, engine_checkpoints: dict[str, Path]) -> None:
    """The safetensors format aligns nothing."""
    path = universal / ATOMS
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length] + b" " * shift
    path.write_bytes((length + shift).to_bytes(8, "little") + header + raw[8 + length :])
    _edit_index(universal, lambda index: index["files"].update({ATOMS: path.stat().st_size}))
    views = [UniversalView.of(open_checkpoint(folder)) for folder in (universal, engine_checkpoints["zero1"])]
    assert compare(*views) == []


def test_missing_atoms(universal: Path) -> None:
    (universal / ATOMS).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"{ATOMS} is missing"):
        open_checkpoint(universal)


@pytest.mark.parametrize("change", [-1, 1, -10_000])
def test_atoms_of_another_size(change: int, universal: Path) -> None:
    size = (universal / ATOMS).stat().st_size
    os.truncate(universal / ATOMS, size + change)
    with pytest.raises(DamagedCheckpointError, match=f"{ATOMS} has {size + change} bytes; the index says {size}"):
        open_checkpoint(universal)


@pytest.mark.parametrize("version", [3, 99, 0])
def test_index_of_a_later_version(version: object, universal: Path) -> None:
    _edit_index(universal, lambda index: index.update(format_version=version))
    with pytest.raises(UnsupportedError, match=f"format version {version}"):
        open_checkpoint(universal)


@pytest.mark.parametrize("version", ["1", 1.5, True, None])
def test_index_whose_version_is_no_integer(version: object, universal: Path) -> None:
    _edit_index(universal, lambda index: index.update(format_version=version))
    with pytest.raises(DamagedCheckpointError, match=f"format_version must be an integer, found {version!r}"):
        open_checkpoint(universal)


def test_wrong_values_are_named_by_their_place(universal: Path) -> None:
    def change(index: dict[str, Any]) -> None:
        index["parameters"]["norm.bias"].update(kind="x", shape=[-1], scalars=3)
        index["run"].update(global_steps="5")

    _edit_index(universal, change)
    with pytest.raises(DamagedCheckpointError) as caught:
        open_checkpoint(universal)
    message = str(caught.value)
    assert "\n" not in message and "run.global_steps: expected a whole number" in message
    assert "parameters.norm.bias.kind: expected 'trainable'" in message and message.endswith("; and 1 more")


def test_client_state_that_cant_be_read(tmp_path: Path) -> None:
    model = NativeModel((NativeParameter("weight", torch.ones(3), {"exp_avg": torch.ones(3)}),))
    folder = write_native(tmp_path / "n", model, NativeRun(stage=1), client_state={"order": torch.arange(3)})
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    as_version_1(tmp_path / "u")
    path = tmp_path / "u" / "client_state.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(DamagedCheckpointError, match=r"client_state\.safetensors can't be read: "):
        open_checkpoint(tmp_path / "u").client_state()


@pytest.mark.parametrize("offsets", [(0, 1), (0, 3841), (-8, 3832), (1 << 40, (1 << 40) + 3840)])
def test_an_atom_that_lies_elsewhere(offsets: tuple[int, int], universal: Path) -> None:
    raw = (universal / ATOMS).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header["embedding.weight/fp32"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (universal / ATOMS).write_bytes(len(text).to_bytes(8, "little") + text + raw[start:])
    _edit_index(universal, lambda index: index["files"].update({ATOMS: (universal / ATOMS).stat().st_size}))
    with pytest.raises(DamagedCheckpointError, match=r"embedding\.weight/fp32, F32 of shape \[48, 20\], can't lie in"):
        open_checkpoint(universal)


def test_index_that_is_not_json(universal: Path) -> None:
    os.truncate(universal / "ucp_index.json", 200)
    with pytest.raises(DamagedCheckpointError, match="is not an index"):
        open_checkpoint(universal)


@pytest.mark.parametrize("key", ["run", "parameters", "groups", "files", "format_version"])
def test_index_without_a_key(key: str, universal: Path) -> None:
    def drop(index: dict[str, Any]) -> None:
        del index[key]

    _edit_index(universal, drop)
    with pytest.raises(DamagedCheckpointError, match=rf"is not an index[\s\S]*{key}"):
        open_checkpoint(universal)


def test_header_with_another_shape(universal: Path) -> None:
    _edit_header(universal, b'"shape":[48,20]', b'"shape":[20,48]')
    with pytest.raises(
        DamagedCheckpointError, match=r"embedding.weight/\w+ has shape \[20, 48\]; the index says \[48, 20\]"
    ):
        open_checkpoint(universal)


def test_header_without_an_atom(universal: Path) -> None:
    _edit_header(universal, b'"norm.bias/exp_avg"', b'"norm.bias/exp_abc"')
    with pytest.raises(DamagedCheckpointError, match=r"lacks norm\.bias/exp_avg"):
        open_checkpoint(universal)


def test_header_with_another_dtype(universal: Path) -> None:
    _edit_header(universal, b'"dtype":"F32"', b'"dtype":"F64"')
    with pytest.raises(DamagedCheckpointError, match=r"F64 of shape .* can't lie in bytes"):
        open_checkpoint(universal)


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_header_entry_without_a_key(key: str, universal: Path) -> None:
    _edit_header(universal, f'"{key}":'.encode(), f'"{key[::-1]}":'.encode())
    with pytest.raises(DamagedCheckpointError, match=f"no safetensors header: {key}: is missing"):
        open_checkpoint(universal)


def test_header_that_is_none(universal: Path) -> None:
    with (universal / ATOMS).open("r+b") as file:
        file.write(b"\xff" * 8)
    with pytest.raises(DamagedCheckpointError, match="no safetensors header"):
        open_checkpoint(universal)


def test_an_atom_in_a_file_that_the_index_does_not_list(universal: Path) -> None:
    _edit_index(universal, lambda index: index.update(files={}))
    with pytest.raises(DamagedCheckpointError, match="doesn't list"):
        open_checkpoint(universal)
