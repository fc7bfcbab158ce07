"""Names and values in a checkpoint's files stay inside the checkpoint, and within bounds."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from native_files import NativeRun, add_manifest, as_version_1, write_native
from spec_models import model_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATE_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MAX_LISTED, DamagedCheckpointError, MismatchError, UniversalCheckpointError, escaped
from ucp_deepspeed.transfer.conversion import convert

ATOMS = "atoms-00001-of-00001.safetensors"

UNSEEN = "\x1b[31m\x1b]0;title\x07\r\x9b31m\u202egnp\u2066\u200b\x7f\ud800"
"""Characters that color the text, name the window, turn the text around, and show nothing."""


@pytest.fixture
def universal(one: Path, tmp_path: Path) -> Path:
    convert(UniversalView.of(open_checkpoint(one)), tmp_path / "u" / "t")
    return tmp_path / "u" / "t"


def edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file."""
    held = json.loads(path.read_text())
    change(held)
    path.write_text(json.dumps(held))


def name_atoms(folder: Path, name: str) -> None:
    """Have the index name another file of atoms."""

    def change(index: dict[str, Any]) -> None:
        index["files"][name] = index["files"].pop(ATOMS)
        for entry in index["parameters"].values():
            entry["states"] = dict.fromkeys(entry["states"], name)

    edit(folder / "ucp_index.json", change)


@pytest.mark.parametrize("name", ["../out", "/abs", "a/../../out", "", ".", "..", "a\0b", "x" * 300, "é" * 200])
def test_an_index_names_files_of_its_folder(name: str, universal: Path) -> None:
    """Also where there is such a file, of the right size and content: it isn't even looked for."""
    shutil.move(universal / ATOMS, universal.parent / "out")
    name_atoms(universal, str(universal.parent / "out") if name == "/abs" else name)
    with pytest.raises(DamagedCheckpointError, match="can't be the name of a file in this folder"):
        open_checkpoint(universal)


@pytest.mark.parametrize("name", ["../layer_01-model_00-model_states.pt", "/etc/passwd", "a\0b"])
def test_a_manifest_names_files_of_its_folder(name: str, one: Path) -> None:
    add_manifest(one, model_of(), NativeRun(dp=2, stage=2))
    edit(one / "ucp_manifest.json", lambda held: held["files"].update({name: 7}))
    with pytest.raises(DamagedCheckpointError, match="can't be the name of a file in this folder"):
        open_checkpoint(one)


def test_links_out_of_the_folder(universal: Path, one: Path, tmp_path: Path, ucp: Callable[..., Result]) -> None:
    """Inside the folder, and in a hub's cache to its own blobs, they are followed."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "0a1b" / "t"
    blobs.mkdir(parents=True)
    shutil.copytree(universal, snapshot)
    shutil.move(snapshot / ATOMS, blobs / "c0ffee")
    (snapshot / ATOMS).symlink_to("../../../blobs/c0ffee")
    assert open_checkpoint(snapshot).parameters
    shutil.move(universal / ATOMS, universal / "moved")
    (universal / ATOMS).symlink_to("moved")
    assert open_checkpoint(universal).parameters
    shutil.move(universal / "moved", universal.parent / "moved")
    for target in ("../moved", str(universal.parent / "moved"), ATOMS):
        (universal / ATOMS).unlink()
        (universal / ATOMS).symlink_to(target)
        with pytest.raises(DamagedCheckpointError, match=rf"{ATOMS} is a link"):
            open_checkpoint(universal)
    name = "mp_rank_00_model_states.pt"
    shutil.move(one / name, tmp_path / name)
    (one / name).symlink_to(tmp_path / name)
    assert open_checkpoint(one).parameters  # DeepSpeed follows them too
    done = ucp("convert", one, tmp_path / "out", "--quiet")
    assert done.exit_code == 2 and "outside the checkpoint" in done.output and not (tmp_path / "out").exists()


@pytest.mark.parametrize("secret", ["SECRET", '{"format_version": 1}', "/dev/zero", "link"])
def test_a_conversion_copies_no_other_file(secret: str, universal: Path, tmp_path: Path) -> None:
    path = universal / RANDOM_STATE_NAME.format(rank=0)
    if secret == "link":
        (tmp_path / "secret").write_text("SECRET")
        path.symlink_to(tmp_path / "secret")
    elif secret.startswith("/dev"):
        path.symlink_to(secret)
    else:
        path.write_text(secret)
    view = UniversalView.of(open_checkpoint(universal))
    if secret.startswith("/dev"):  # no file, so that there is no random state
        convert(view, tmp_path / "v")
        assert not (tmp_path / "v" / path.name).exists()
        return
    with pytest.raises(DamagedCheckpointError, match=path.name):
        convert(view, tmp_path / "v")
    assert not (tmp_path / "v").exists()


@pytest.mark.parametrize("name", ["ucp_index.json", "latest", ATOMS])
@pytest.mark.parametrize("kind", ["pipe", "zeros", "huge", "folder", "bytes", "long"])
def test_odd_files(name: str, kind: str, universal: Path) -> None:
    """None is waited for, and none fills the memory."""
    root = universal.parent
    path = root / name if name == "latest" else universal / name
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_bytes({"bytes": b"\xff\0", "long": b"x" * 100_000, "huge": b"\xff" * 8}[kind])
        if kind == "huge":
            os.truncate(path, 1 << 40)
    if name == ATOMS and path.is_file():
        edit(universal / "ucp_index.json", lambda held: held["files"].update({ATOMS: path.stat().st_size}))
    with pytest.raises(UniversalCheckpointError) as caught:
        open_checkpoint(root if name == "latest" else universal)
    assert len(str(caught.value)) < 2000


def test_a_folder_that_may_not_be_read(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> Any:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(DamagedCheckpointError, match=f"{one} can't be read: Permission denied"):
        open_checkpoint(one)


def test_messages_are_safe_to_show() -> None:
    assert escaped(UNSEEN) == r"\x1b[31m\x1b]0;title\x07\r\x9b31m\u202egnp\u2066\u200b\x7f\ud800"
    assert escaped("ä é 漢\tx\n") == "ä é 漢\tx\n"
    assert str(DamagedCheckpointError(UNSEEN)) == escaped(UNSEEN)
    told = str(MismatchError("many", [f"{UNSEEN}{'x' * 5000}"] * (MAX_LISTED + 7)))
    assert len(told) < 34_000 and "\x1b" not in told and told.endswith("more characters")


@pytest.mark.parametrize(
    "command", [["inspect"], ["inspect", "--all"], ["inspect", "--json"], ["convert"], ["diff"], ["plan"]]
)
def test_names_are_escaped(command: list[str], tmp_path: Path, ucp: Callable[..., Result]) -> None:
    name = UNSEEN.replace("\ud800", "\n")
    model = model_of()
    first = model.parameters[0]
    odd = type(model)((type(first)(name, first.fp32, first.states), *model.parameters[1:]))
    folder = write_native(tmp_path / "one", odd, NativeRun(dp=2, stage=2), client_state={name: 1})
    more = {"convert": [tmp_path / "u"], "diff": [folder], "plan": ["--dp", 2, "--zero", 1]}.get(command[0], [])
    done = ucp(command[0], folder, *more, *command[1:])
    assert done.output and not any(
        character in done.output for character in name if not character.isprintable() and character != "\n"
    )


def test_inspect_shows_odd_values(one: Path, tmp_path: Path, ucp: Callable[..., Result]) -> None:
    import torch

    path = one / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    odd = {
        "nan": float("nan"),
        "huge": 10**5000,
        "bytes": b"\xff",
        "surrogate": "\ud800",
        "range": range(4),
        "keys": {1: 2, (3, None): 10**5000},
        "tensor": torch.zeros(3),
        "complex": 1 + 2j,
    }
    torch.save({**saved, "lr_scheduler": odd, "x\ud800": 1, 10**5000: 1, float("nan"): 2}, path)
    shown = json.loads(ucp("inspect", one, "--json").output)
    assert shown["lr_scheduler"]["range"] == {"$shown": "range(0, 4)"} and "huge" in shown["lr_scheduler"]
    assert ucp("inspect", one).exit_code == 0
    torch.save({**saved, "global_steps": 10**5000}, path)
    done = ucp("inspect", one, "--json")
    assert done.exit_code == 2 and "has global_steps 'of many digits'" in done.output


@pytest.mark.parametrize(
    "value",
    [
        *({"$plain": ["fraction", "1e999999999"]}, {"$plain": ["deque", [[], 2**70]]}, {"$plain": ["uuid", 5]}),
        *({"$plain": ["decimal", "x"]}, {"$plain": [[], 1]}, {"$bytes": "é"}, {"$unknown": "x" * 10**6}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_values_of_an_index_that_nothing_encodes(value: dict[str, Any], universal: Path) -> None:
    as_version_1(universal)
    edit(universal / "ucp_index.json", lambda index: index.update(client_state={"a": value}))
    with pytest.raises(DamagedCheckpointError, match="the index holds a value that can't be decoded") as caught:
        open_checkpoint(universal).client_state()
    assert len(str(caught.value)) < 300
