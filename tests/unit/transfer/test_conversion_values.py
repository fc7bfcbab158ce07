"""Client state, schedulers and hyper-parameters when converting: exact, or refused by name before anything is written."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any
from uuid import UUID

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME, joined
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

VALUES: dict[str, Any] = {
    "none": None,
    "flags": [True, False],
    "integers": {"small": -3, "large": 2**80},
    "floats": [0.1, -0.0, math.inf, -math.inf, math.nan, 5e-324],
    "text": "naïve \u2028 \n",
    "tuple": (1, (2.5, "x"), []),
    "set": {1, 2, 3},
    "frozen set": {frozenset({1, 2}): frozenset()},
    "by number": {0: "a", (1, 2): "b", None: "c"},
    "tagged": {"$tensor": "not one", "$": 1},
    "dtype": torch.bfloat16,
    "bytes": b"\x00\xff raw",
    "tensors": {
        "generator": torch.arange(16, dtype=torch.uint8),
        "nested": [torch.tensor(1.5, dtype=torch.bfloat16), (torch.tensor([[True, False]]),)],
        "strided": torch.arange(12).view(3, 4).t(),
        "empty": torch.empty(0, 2),
    },
    "empty": {},
    "plain": [
        Decimal("1.50"),
        Fraction(1, 3),
        UUID(int=7),
        1 - 2j,
        slice(1, None, 2),
        deque([(1, 2)], maxlen=3),
        deque(),
    ],
    "paths": [Path("runs/a"), PurePosixPath("b"), PureWindowsPath("C:/c")],
}


def _saved(root: Path, client_state: Any) -> Path:
    parameter = NativeParameter("weight", torch.ones(4), {"exp_avg": torch.ones(4)})
    return write_native(root, NativeModel((parameter,)), NativeRun(stage=1), client_state=client_state)


def _converted(folder: Path, to: Path, **options: Any) -> dict[str, Any]:
    convert(UniversalView.of(open_checkpoint(folder)), to, UniversalOutput(**options))
    return open_checkpoint(to).client_state()[1]


def _typed(value: Any) -> Any:
    """A value with the types of everything in it, which `same_value` takes no notice of."""
    if isinstance(value, dict):
        return dict, [(_typed(key), _typed(item)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return type(value), [_typed(item) for item in value]
    return type(value)


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    found = _converted(_saved(tmp_path / "n", VALUES), tmp_path / "u")
    assert [key for key, value in VALUES.items() if not same_value(value, found[key])] == []
    assert [key for key, value in VALUES.items() if _typed(value) != _typed(found[key])] == []
    assert (tmp_path / "u" / "client_state.safetensors").is_file()
    again = tmp_path / "again"
    convert(UniversalView.of(open_checkpoint(tmp_path / "u")), again)
    assert same_value(found, open_checkpoint(again).client_state()[1])


def test_keys_of_any_kind(tmp_path: Path) -> None:
    """The client state's own, too."""
    found = _converted(_saved(tmp_path / "n", {7: "seven", (1, 2): "pair", "best": 1}), tmp_path / "u")
    assert found[7] == "seven" and found[1, 2] == "pair" and found["best"] == 1
    kept = _converted(tmp_path / "n", tmp_path / "v", drop_client_state=["7"])
    assert 7 not in kept and kept["best"] == 1


def _with_hyperparameter(folder: Path, key: Any, value: Any) -> Path:
    for path in folder.glob("*_optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        for group in saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group[key] = value
        torch.save(saved, path)
    return folder


@pytest.mark.parametrize("schedule", [{0: {"last_epoch": 1}, 1: {"last_epoch": 2}}, {"$x": 1}, {"a": {2: 1}, None: 2}])
def test_keys_of_any_kind_in_schedulers_and_groups(schedule: Any, tmp_path: Path) -> None:
    folder = _with_hyperparameter(_saved(tmp_path / "n", {"lr_scheduler": schedule}), 0, (1, 2.5))
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    found = open_checkpoint(tmp_path / "u")
    assert _typed(found.run.lr_scheduler) == _typed(schedule) and found.run.lr_scheduler == schedule
    assert found.groups[0].hyperparameters[0] == (1, 2.5)
    assert compare(UniversalView.of(open_checkpoint(folder)), UniversalView.of(found)) == []


@pytest.mark.parametrize("schedule", [[{"last_epoch": 1}], "text", 7])
def test_a_scheduler_that_is_no_mapping_is_refused_before_anything_is_written(schedule: Any, tmp_path: Path) -> None:
    view = UniversalView.of(open_checkpoint(_saved(tmp_path / "n", {"lr_scheduler": schedule})))
    with pytest.raises(UnsupportedError, match=f"^lr_scheduler is a {type(schedule).__name__}"):
        convert(view, tmp_path / "u")
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_what_cant_be_opened_again_is_not_committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    view = UniversalView.of(open_checkpoint(_saved(tmp_path / "n", {})))
    monkeypatch.setattr(
        "ucp_deepspeed.checkpoint.universal.atoms_output._encoded_scalars", lambda value, name: {"step": "text"}
    )
    with pytest.raises(DamagedCheckpointError, match=r"weight\.scalars is"):
        convert(view, tmp_path / "u")
    assert [path.name for path in tmp_path.iterdir()] == ["n"]


def test_every_file_but_the_index_is_listed(tmp_path: Path) -> None:
    """Also the seed of random streams."""
    folder = _saved(tmp_path / "n", {"tensor": torch.ones(2)})
    place = ["world_size", "rank", "data_parallel_rank", "sequence_parallel_rank", "stage", "tensor_parallel_rank"]
    state = {"place": dict.fromkeys(place, 0) | {"accelerator": "cpu"}, "global_steps": 5, "seed": 1, "streams": {}}
    (folder / RANDOM_STATES_NAME).write_text(joined([json.dumps({"format_version": 1} | state)]))
    add_manifest(folder, NativeModel((NativeParameter("weight", torch.ones(2)),)), NativeRun())
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    listed = json.loads((tmp_path / "u" / "ucp_index.json").read_text())["files"]
    found = {path.name: path.stat().st_size for path in (tmp_path / "u").iterdir() if path.name != "ucp_index.json"}
    assert listed == found and len(found) == 4
    open_checkpoint(tmp_path / "u").client_state()


def test_what_no_index_could_hold_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    """Lists in lists beyond what is read again, and the name of a file that isn't UTF-8."""
    nested: list[Any] = []
    for _ in range(240):
        nested = [nested]
    state = {"nested": nested, "file": os.fsdecode(b"\xff.txt"), "fine": 1}
    folder = _saved(tmp_path / "n", state)
    with pytest.raises(UnsupportedError) as caught:
        convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    assert "client_state.nested" in str(caught.value) and "client_state.file holds a string" in str(caught.value)
    assert "fine" not in str(caught.value) and not (tmp_path / "u").exists()


def test_what_has_no_form_is_refused_by_name(tmp_path: Path) -> None:
    state = {"fine": 1, "device": torch.device("cpu"), "deep": {"list": [0, torch.ones(2, dtype=torch.complex128)]}}
    folder = _saved(tmp_path / "n", state)
    with pytest.raises(UnsupportedError) as caught:
        _converted(folder, tmp_path / "u")
    message = str(caught.value)
    assert "client_state.device is a torch.device" in message
    assert "client_state.deep.list[1] is a tensor of torch.complex128" in message
    assert "--drop-client-state device --drop-client-state deep" in message
    assert [path.name for path in tmp_path.iterdir()] == ["n"]
    found = _converted(folder, tmp_path / "u", drop_client_state=["device", "deep"])
    assert found.keys() == {"fine", "ds_config", "ds_version"}


class Settings(dict[str, Any]):
    """A mapping of a class of its own."""


def test_what_cant_be_read_is_refused_or_left_out(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "n", {"settings": Settings(a=1), "epoch": 3})
    with pytest.raises(UnsupportedError) as caught:
        _converted(folder, tmp_path / "u")
    assert f"client_state.settings: it can't be read without running code of {__name__}.Settings" in str(caught.value)
    assert "--on-unreadable drop" in str(caught.value) and not (tmp_path / "u").exists()
    for number, way in enumerate(({"on_unreadable": "drop"}, {"drop_client_state": ["settings"]})):
        found = _converted(folder, tmp_path / f"u{number}", **way)
        assert found["epoch"] == 3 and "settings" not in found


def test_dropping_what_is_not_there_is_an_error(tmp_path: Path) -> None:
    folder = _saved(tmp_path / "n", {"epoch": 1})
    with pytest.raises(ConfigError, match="no key epochs; its keys: ds_config, ds_version, epoch"):
        _converted(folder, tmp_path / "u", drop_client_state=["epochs"])
    assert not (tmp_path / "u").exists()


@pytest.mark.parametrize(
    "state",
    [{"a.b": torch.ones(1), "a": {"b": torch.zeros(1)}}, {"x": {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}}],
)
def test_tensors_never_overwrite_each_other(state: dict[str, Any], tmp_path: Path) -> None:
    folder = _saved(tmp_path / "n", state)
    try:
        found = _converted(folder, tmp_path / "u")
    except UnsupportedError as error:
        assert "two tensors" in str(error) and not (tmp_path / "u").exists()
    else:
        assert same_value(state, {key: found[key] for key in state})


@pytest.mark.parametrize("place", ["group 1.lr", "lr_scheduler.base"])
def test_a_tensor_where_the_index_has_no_room_is_refused(
    place: str, engine_copy: Callable[[str, str], Path], tmp_path: Path
) -> None:
    folder = engine_copy("zero1", "source")
    (folder / "ucp_manifest.json").unlink()  # it knows the sizes of the files
    [path] = folder.glob("*_optim_states.pt" if "group" in place else "*_model_states.pt")
    saved = torch.load(path, weights_only=False)
    if "group" in place:
        saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][1]["lr"] = torch.ones(2)
    else:
        saved["lr_scheduler"]["base"] = torch.tensor(0.1)
    torch.save(saved, path)
    view = UniversalView.of(open_checkpoint(folder))
    with pytest.raises(UnsupportedError, match=place):
        convert(view, tmp_path / "u")
    assert not (tmp_path / "u").exists()
