"""Client state: plain data of any common kind is read; what could run code is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

import numpy as np
import pytest
import torch

from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file, read_tensors
from ucp_deepspeed.errors import DamagedCheckpointError

PLAIN: dict[str, Any] = {
    "arguments": Namespace(lr=0.1, out=Path("runs/a"), layers=[2, 3]),
    "simple": SimpleNamespace(epoch=3),
    "when": datetime(2026, 2, 3, 4, 5, tzinfo=timezone.utc),
    "spent": timedelta(minutes=3),
    "range": range(2, 9, 3),
    "bytes": b"\x00\xff",
    "number": np.float64(1.5),
    "count": np.int64(7),
    "flag": np.bool_(True),
    "dtype": np.dtype("int16"),
}

ARRAYS = {
    "order": np.arange(6).reshape(2, 3),
    "columns": np.asfortranarray(np.ones((2, 3), dtype=np.float16)),
    "empty": np.zeros((0, 3)),
    "names": np.array(["a", "bc"]),
}


@pytest.mark.parametrize("tensors", [False, True])
def test_plain_data(tensors: bool, tmp_path: Path) -> None:
    torch.save(PLAIN | ARRAYS, tmp_path / "a.pt")
    found = open_torch_file(tmp_path / "a.pt", tensors=tensors)
    for name, value in PLAIN.items():
        assert found[name] == value and type(found[name]) is type(value)
    for name, array in ARRAYS.items():
        assert found[name].dtype == array.dtype and np.array_equal(found[name], array)


@dataclass
class Foreign:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("ran",)


@pytest.mark.parametrize(
    "hidden", [Foreign(), [Foreign()], np.array([Foreign()], dtype=object), Namespace(a=Foreign())]
)
def test_code_is_refused_wherever_it_hides(hidden: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"hidden": hidden}, tmp_path / "a.pt")
    with pytest.raises(DamagedCheckpointError, match=r"a\.pt"):
        open_torch_file(tmp_path / "a.pt")
    assert "ran" not in capsys.readouterr().out


def test_tensors_are_read_wherever_they_lie(tmp_path: Path) -> None:
    rate, empty = torch.tensor(0.125), torch.empty(0, 4)
    state = {"_last_lr": [rate, 0.5], "nested": {"pair": (torch.arange(6).view(2, 3)[1:], "x")}, "empty": empty}
    torch.save(state, tmp_path / "a.pt")
    found = read_tensors(open_torch_file(tmp_path / "a.pt"), tmp_path / "a.pt")
    assert torch.equal(found["_last_lr"][0], rate) and found["_last_lr"][1] == 0.5
    assert torch.equal(found["nested"]["pair"][0], torch.tensor([[3, 4, 5]])) and found["nested"]["pair"][1] == "x"
    assert found["empty"].shape == (0, 4) and found["empty"].device.type == "cpu"


STANDARD: dict[str, Any] = {
    "decimal": Decimal("1.50"),
    "fraction": Fraction(2, 6),
    "uuid": UUID(int=7),
    "deque": deque([1, "two"], maxlen=3),
    "default": defaultdict(list, {"a": [1]}),
    "ordered": OrderedDict(b=1, a=2),
    "counter": Counter("abca"),
    "slice": slice(1, None, 2),
    "complex": 1 - 2j,
    "path": PurePosixPath("runs/a"),
    "windows": PureWindowsPath("C:/runs"),
    "version": torch.__version__,
}


@pytest.mark.parametrize("tensors", [False, True])
def test_the_standard_librarys_plain_values(tensors: bool, tmp_path: Path) -> None:
    """Also those for which torch's own unpickler refuses the file."""
    torch.save(STANDARD | {"all": list(STANDARD.values()), "order": ARRAYS["order"]}, tmp_path / "a.pt")
    found = open_torch_file(tmp_path / "a.pt", tensors=tensors)
    for name, value in STANDARD.items():
        assert found[name] == value and type(found[name]) is type(value)
    assert found["all"] == list(STANDARD.values())
    assert found["default"]["new"] == [] and found["deque"].maxlen == 3


class Settings(dict[str, Any]):
    """A mapping of a class of its own, as configuration libraries have them."""


FOREIGN = {
    "partial": partial(json.dumps, indent=1),
    "settings": Settings(a=1),
    "class": Settings,
    "nested": [{"deep": (1, {Settings(a=1).get})}],
    "objects": np.array([Fraction(1, 2), "text"], dtype=object),
    "record": np.zeros(2, dtype=[("a", "i4"), ("b", "f8")]),
    "attribute": Namespace(settings=Settings(b=[2])),
    "factory": defaultdict(Settings),
    "zone": datetime(2026, 1, 1, tzinfo=ZoneInfo("UTC")),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_what_is_foreign_hinders_nothing_else(name: str, tmp_path: Path) -> None:
    weight = torch.arange(3.0)
    torch.save({"module": {"weight": weight}, "mine": FOREIGN[name], "epoch": 7}, tmp_path / "a.pt")
    found = open_torch_file(tmp_path / "a.pt", tensors=True, owned=("module",))
    assert torch.equal(found["module"]["weight"], weight) and found["epoch"] == 7
    assert opaque_in(found["mine"]) is not None and opaque_in(found["epoch"]) is None
    described = open_torch_file(tmp_path / "a.pt", owned=("module",))["module"]["weight"]
    assert torch.equal(read_tensors(described, tmp_path / "a.pt"), weight)
    with pytest.raises(DamagedCheckpointError, match=r"holds an object of class .* is refused"):
        open_torch_file(tmp_path / "a.pt", owned=("module", "mine"))


CRAFTED = """
import sys
import numpy as np
import torch
from pathlib import Path
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file

reconstruct = np.empty(0).__reduce__()[0]
scalar = np.float64(0).__reduce__()[0]
objects = {"a": (np.dtype("O"), 0)}

class Call:
    def __init__(self, *reduced):
        self.reduced = reduced
    def __reduce__(self):
        return self.reduced

def dtype(name, *state):
    return Call(np.dtype, (name, False, True), (3, "|", *state))

flat = dtype("V8", None, ("a",), objects, 8, 1, 0)
nested = dtype("V8", None, ("b",), {"b": (flat, 0)}, 8, 1, 0)
forms = {
    "fields": flat,
    "nested": nested,
    "subarray": dtype("V8", (np.dtype("O"), (1,)), None, None, 8, 1, 0),
    "number": dtype("f8", None, ("a",), objects, 8, 1, 0),
}
for name, form in forms.items():
    array = Call(reconstruct, (np.ndarray, (0,), b"b"), (1, (1,), form, False, b"AAAAAAAA"))
    for kind, value in (("array", array), ("scalar", Call(scalar, (form, b"AAAAAAAA")))):
        path = Path(sys.argv[1]) / f"{name}_{kind}.pt"
        torch.save({"mine": value, "module": {}}, path)
        try:
            repr(open_torch_file(path, owned=("module",)))
        except Exception as error:
            print(type(error).__name__, "class numpy.ndarray" in str(error))
"""


def test_bytes_that_would_be_taken_for_objects(tmp_path: Path) -> None:
    """Fields of a dtype may say that there are objects, and its flags that there are none."""
    done = subprocess.run([sys.executable, "-c", CRAFTED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["DamagedCheckpointError", "True"] * 8
