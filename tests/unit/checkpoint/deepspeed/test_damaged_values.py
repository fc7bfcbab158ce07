"""Any value of the index or of the manifest replaced by a wrong one: either it does no harm, or it is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from native_files import NativeRun, add_manifest, as_version_1, write_native
from native_models import SHAPES, model_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed import catalog, zero_slots
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import gather

WRONG: list[Any] = [None, True, -1, 0, 3, 1e30, "0", "", "x", [], [-1], [[1]], {}, {"$tuple": 3}, {"$tensor": "x"}]
"""Put in place of each value in turn."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value, at any depth."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        yield from places(item, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy with one value replaced."""
    copy = json.loads(json.dumps(document))
    inner = copy
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return copy


def read_all(folder: Path) -> None:
    """Read all of a checkpoint."""
    checkpoint = open_checkpoint(folder)
    view = UniversalView.of(checkpoint)
    checkpoint.client_state()
    for name, parameter in view.parameters.items():
        for state in parameter.states:
            gather(view, name, state, 0, torch.zeros(torch.Size(view.logical_shape(name)).numel()), FileReader())


def check_every_change(file: Path, read: Callable[[], None]) -> int:
    """Replace each value by each wrong one; returns how often the file was refused."""
    document, refused = json.loads(file.read_text()), 0
    for path in places(document):
        for value in WRONG:
            file.write_text(json.dumps(changed(document, path, value)))
            try:
                read()
            except UniversalCheckpointError:
                refused += 1
            except Exception as error:
                raise AssertionError(f"{path} as {value!r}: {type(error).__name__}: {error}") from error
    return refused


@pytest.mark.parametrize("run", [NativeRun(stage=0), NativeRun(stage=0, precision="bf16")], ids=str)
def test_manifest(run: NativeRun, tmp_path: Path) -> None:
    model = model_of({name: SHAPES[name] for name in ("gain", "up.weight")})
    folder = write_native(tmp_path, model, run)
    add_manifest(folder, model, run)
    assert check_every_change(folder / "ucp_manifest.json", lambda: read_all(folder)) > 100


def test_index(tmp_path: Path) -> None:
    folder = write_native(tmp_path / "n", model_of({"a": (3, 2)}, ()), NativeRun(stage=1, precision="fp16"))
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    as_version_1(tmp_path / "u")
    assert check_every_change(tmp_path / "u" / "ucp_index.json", lambda: read_all(tmp_path / "u")) > 300


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "/latest is empty; name the tag; tags there: step"),
        (" \n", "/latest is empty; name the tag; tags there: step"),
        (b"\xff\xfe", "/latest holds no tag's name in UTF-8 .*; write it so, or name the tag; tags there: step"),
        (b"\xef\xbb\xbfstep2", "no tag 'step2' in .*; tags there: step"),
        ("../other/step", "no tag '../other/step' in .*; tags there: step"),
        ("step/../../other/step", "no tag "),
        (b"\xef\xbb\xbfstep2", "no tag 'step2' in .*; tags there: step"),
        ("{}/other/step", "no tag "),
    ],
)
def test_latest(content: str | bytes, reason: str, tmp_path: Path) -> None:
    """A tag lies in the folder: what else is sound isn't meant."""
    for root in ("runs", "other"):
        write_native(tmp_path / root, model_of({"a": (3,)}), NativeRun(), tag="step")
    raw = content if isinstance(content, bytes) else content.format(tmp_path).encode()
    (tmp_path / "runs" / "latest").write_bytes(raw)
    with pytest.raises(UniversalCheckpointError, match=reason):
        open_checkpoint(tmp_path / "runs")


@pytest.mark.parametrize("tag", ["../other/step", "step/../../other/step", "{}/other/step"])
def test_a_tag_outside_the_folder(tag: str, tmp_path: Path) -> None:
    """Nobody but the user may name one: DeepSpeed saves and loads it."""
    for root in ("runs", "other"):
        write_native(tmp_path / root, model_of({"a": (3,)}), NativeRun(), tag="step")
    named = open_checkpoint(tmp_path / "runs", tag.format(tmp_path))
    assert named.path.resolve() == tmp_path / "other" / "step"
    (tmp_path / "runs" / "latest").write_text(tag.format(tmp_path))
    with pytest.raises(CheckpointNotFoundError, match="no tag '"):
        open_checkpoint(tmp_path / "runs")


@pytest.mark.parametrize(("stage", "later"), [(1, 3), (3, 1)])
def test_a_manifest_of_the_run_before_with_files_of_its_own(stage: int, later: int, tmp_path: Path) -> None:
    """DeepSpeed left the former files in place, as the manifest describes them: they aren't what was saved last."""
    model, run = model_of({"a": (3,)}), NativeRun(stage=stage)
    folder = write_native(tmp_path, model, run)
    add_manifest(folder, model, run)
    again = write_native(tmp_path / "again", model, NativeRun(stage=later))
    shutil.copytree(again, folder, dirs_exist_ok=True)
    with pytest.raises(DamagedCheckpointError, match=r"model_states\.pt isn't in ucp_manifest\.json.*remove"):
        open_checkpoint(folder)


def test_a_manifest_of_the_run_before(tmp_path: Path) -> None:
    """The tag was saved again, by DeepSpeed alone: nothing is truncated."""
    model, run = model_of({"a": (3,)}), NativeRun(stage=1)
    folder = write_native(tmp_path, model, run)
    add_manifest(folder, model, run)
    shutil.copytree(
        write_native(tmp_path / "again", model_of({"a": (3,), "b": (700,)}), run), folder, dirs_exist_ok=True
    )
    with pytest.raises(DamagedCheckpointError, match=r"isn't the file that ucp_manifest\.json describes.*remove"):
        open_checkpoint(folder)


def items(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a file of DeepSpeed's, whose keys need not be strings."""
    if path:
        yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in entries:
        if key != "ds_config":
            yield from items(item, (*path, key))


@pytest.mark.parametrize(
    "run",
    [NativeRun(stage=1), NativeRun(stage=3), NativeRun(), NativeRun(precision="fp16", optimizer="unfused")],
    ids=str,
)
def test_any_value_of_deepspeeds_files(run: NativeRun, tmp_path: Path) -> None:
    """The archive is whole, and one value in it has another type: refused in words, or of no account."""
    source, folder = write_native(tmp_path / "n", model_of(dict(list(SHAPES.items())[:3])), run), tmp_path / "changed"
    refused = 0
    shutil.copytree(source, folder)
    for file in sorted(source.glob("*.pt")):
        for path in items(torch.load(file, weights_only=False)):
            for value in (None, 0, "x", [], {}):
                saved = torch.load(file, weights_only=False)
                inner = saved
                for key in path[:-1]:
                    inner = inner[key]
                inner[path[-1]] = value
                torch.save(saved, folder / file.name)
                try:
                    read_all(folder)
                except UniversalCheckpointError as error:
                    refused += 1
                    assert str(folder) in str(error), error
        shutil.copy(file, folder / file.name)
    assert refused > 50


@pytest.mark.parametrize(
    ("module", "name"),
    [(catalog, "names_on_all"), (catalog, "DifferingNumbers"), (zero_slots, "split_states"), (zero_slots, "FlatGroup")],
)
@pytest.mark.parametrize(
    "bug", [KeyError("ours"), TypeError("ours"), AttributeError("ours"), ValueError("ours")], ids=repr
)
def test_a_bug_of_the_package_is_not_called_damage(
    module: ModuleType, name: str, bug: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_native(tmp_path, model_of({"a": (3,)}), NativeRun(stage=1))
    monkeypatch.setattr(module, name, Mock(side_effect=bug))
    with pytest.raises(type(bug), match="ours"):
        read_all(folder)


def test_parameters_without_elements_are_not_tied(tmp_path: Path) -> None:
    """DeepSpeed lists the second as another name of the first: both have the address 0."""
    run, model = NativeRun(stage=1), model_of({"full": (3,), "empty": (0, 4), "void": (3, 0)})
    folder = write_native(tmp_path, model, run)
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"shared_params": {"void": "empty"}}, path)
    assert set(open_checkpoint(folder).parameters) == {"full", "empty", "void"}
