"""Client state: plain data of any common kind is read; what could run code is refused by name."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ucp_deepspeed.checkpoint.torch_files import open_torch_file, read_tensors
from ucp_deepspeed.errors import DamagedCheckpointError

PLAIN: dict[str, Any] = {
    "arguments": Namespace(lr=0.1, out=Path("runs/a"), layers=[2, 3]),
    "simple": SimpleNamespace(epoch=3),
    "when": datetime(2026, 2, 3, 4, 5, tzinfo=UTC),
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
