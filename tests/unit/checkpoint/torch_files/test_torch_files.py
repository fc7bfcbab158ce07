"""Names that a ``torch.save`` file may use: stand-ins without behaviour, and nothing that could reach further."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.checkpoint.torch_files.unpickling import ZeroStage
from ucp_deepspeed.errors import DamagedCheckpointError


class ByCall:
    """Pickled as a call, whatever its class."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.reduced = function, arguments

    def __reduce__(self) -> tuple[Any, Any]:
        return self.reduced


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
