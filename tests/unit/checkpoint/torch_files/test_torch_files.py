"""Names that a ``torch.save`` file may use: stand-ins without behaviour, and nothing that could reach further."""

from __future__ import annotations

import copyreg
import inspect
import zipfile
from collections import deque
from datetime import timedelta
from fractions import Fraction
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ucp_deepspeed.checkpoint.torch_files import archives, foreign, safe_load, unpickling
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file, read_tensors
from ucp_deepspeed.checkpoint.torch_files.unpickling import ZeroStage
from ucp_deepspeed.errors import DamagedCheckpointError


class ByCall:
    """Pickled as a call, whatever its class, and perhaps a state of its result."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.reduced = function, arguments, state

    def __reduce__(self) -> tuple[Any, Any, Any]:
        return self.reduced


class TooLong(ByCall):
    """Says to ``pickle`` that it is a time."""

    __class__ = property(lambda _: timedelta)  # type: ignore[assignment]


@pytest.mark.parametrize(
    "pickled",
    [ByCall(ZeroStageEnum, 2), ByCall(getattr, ZeroStageEnum, "gradients")],
    ids=["by value, as Python 3.11.7", "by name, as Python 3.11.2"],
)
def test_an_enum_is_read_however_python_pickled_it(tmp_path: Path, pickled: ByCall) -> None:
    torch.save({"zero_stage": pickled}, tmp_path / "file.pt")
    assert open_torch_file(tmp_path / "file.pt")["zero_stage"] is ZeroStage.gradients


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (ByCall(getattr, ZeroStageEnum, "__init__"), "getattr"),
        (ByCall(getattr, LossScaler, "__init__"), "getattr"),
        (ByCall(eval, "1"), "eval"),
    ],
)
def test_a_builtin_that_reaches_further_is_refused(tmp_path: Path, call: ByCall, name: str) -> None:
    torch.save({"value": call}, tmp_path / "file.pt")
    with pytest.raises(DamagedCheckpointError, match=rf"file.pt holds an object of class {name}.* is refused$"):
        open_torch_file(tmp_path / "file.pt")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "call",
    [ByCall(Fraction, 1, 2, state={"x": 1}), TooLong(copyreg.__newobj__, timedelta, 10**12), ByCall(range, 3, state=5)],
    ids=["attribute", "number", "kind"],
)
def test_a_value_that_no_program_saves_is_damage(tmp_path: Path, call: ByCall, zipped: bool) -> None:
    torch.save({"value": call}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(DamagedCheckpointError, match=r"file.pt (can't be read|holds an object of class)"):
        open_torch_file(tmp_path / "file.pt")


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Files as torch writes them today and before its archives, and an archive that another program has written anew."""
    foreign = deque([1])  # torch's own unpickler refuses it
    held = {"weight": torch.ones(3), "step": torch.tensor(2), "seen": foreign}
    torch.save(held, tmp_path / "file.pt")
    torch.save(held, tmp_path / "older.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "file.pt") as file, zipfile.ZipFile(tmp_path / "anew.pt", "w", 8) as anew:
        for record in file.infolist():
            anew.writestr(record.filename, file.read(record))
    return [tmp_path / name for name in ("file.pt", "older.pt", "anew.pt")]


def read_all(files: list[Path]) -> None:
    for path in files:
        found = open_torch_file(path, foreign=True)
        assert found["seen"] == deque([1])
        if path.name != "anew.pt":  # its tensors are in memory
            assert read_tensors(found, path)["step"] == 2
        open_torch_file(path, tensors=True, foreign=True)


LAYER = archives, safe_load, unpickling

CALLED_BACK = {"make", "_check_depth", "is_opaque", "parts_of", *vars(foreign.Notes), *vars(unpickling.Unpickler)}
"""Methods that an unpickler calls: there nobody can tell a bug from damage."""


def own_functions() -> list[tuple[Any, str]]:
    """All other functions and methods of the layer, each with its module or class."""
    owners = [*LAYER, *(held for module in LAYER for held in vars(module).values() if inspect.isclass(held))]
    homes = {module.__name__ for module in (*LAYER, foreign)}
    return [
        (owner, name)
        for owner in owners
        for name in vars(owner)
        if inspect.isroutine(held := getattr(owner, name)) and getattr(held, "__module__", "") in homes
        if not name.startswith("__") and name not in CALLED_BACK
    ]


@pytest.mark.parametrize("kind", [KeyError, TypeError, AttributeError])
def test_a_bug_isnt_called_damage(kind: type[Exception], files: list[Path]) -> None:
    read_all(files)
    reached = set()
    for owner, name in own_functions():
        with mock.patch.object(owner, name, side_effect=kind("planted")) as planted:
            try:
                read_all(files)
            except kind:
                reached.add(name)
            except DamagedCheckpointError as error:
                pytest.fail(f"{name}: {error}")
            assert (name in reached) == planted.called
    assert len(reached) >= 15 and {"of", "_by_list", "place", "everything_in"} <= reached
