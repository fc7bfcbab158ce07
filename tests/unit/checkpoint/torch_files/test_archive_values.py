"""Archives of any value: DeepSpeed alone loads what it would have saved itself."""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from safetensors.torch import save_file

from ucp_deepspeed.checkpoint.huggingface import HuggingFaceCheckpoint
from ucp_deepspeed.checkpoint.output import Output, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.torch_files import unpickling
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file, open_torch_object
from ucp_deepspeed.checkpoint.torch_files.writing import value_archive, write_sums
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.transfer.conversion import convert

WEIGHTS = {
    "first": torch.arange(6.0).view(2, 3),
    "empty": torch.empty(0, 4),
    "last": torch.tensor(7, dtype=torch.int64),
}


def dynamic(kind: Any) -> Any:
    """Make a scaler, of DeepSpeed's class or of that in its place, with a state of its own."""
    made = kind.__new__(kind)
    vars(made).update(vars(DynamicLossScaler(2.0**8, 1000, 1, 2, False, dtype=torch.half)), cur_scale=4.0)
    return made


def static(kind: Any) -> Any:
    """Make a static scaler of either class."""
    made = kind.__new__(kind)
    vars(made).update(vars(LossScaler(scale=3.0)))
    return made


def value(tensors: dict[str, Any], classes: Any) -> dict[str, Any]:
    """Make a value as DeepSpeed saves it, with tensors and classes of either kind."""
    scaler = dynamic(classes.DynamicLossScaler)
    return {
        "module": OrderedDict(tensors) | {"tied": tensors["first"]},
        "nested": [
            {"state": {0: {"exp_avg": tensors["first"], "step": torch.tensor(5.0)}}},
            (1, None, True, 2.5, "text", b"x"),
        ],
        "optimizer": {"loss_scaler": scaler, "again": scaler, "static": static(classes.LossScaler)},
        "zero_stage": classes.ZeroStage(2),
        "mapping": OrderedDict(first=classes.FragmentAddress(numel=6, start=2)),
        "sub_param_shape": classes.SubparamShape(["a.*"], ((2, 4), 8), 0),
        "shapes": [OrderedDict(first=torch.Size([2, 3]))],
        "dtype": torch.bfloat16,
        "counts": torch.arange(4)[1:3],
        0.4: {"cat_dim": 1},
    }


class Real:
    """DeepSpeed's classes, under the names of those in their place."""

    DynamicLossScaler, LossScaler, ZeroStage = DynamicLossScaler, LossScaler, ZeroStageEnum
    FragmentAddress, SubparamShape = fragment_address, SubparamShape


class AsSaved(Output):
    """One archive of a value."""

    def __init__(self, make: Any) -> None:
        self.make = make

    def plan(self, view: UniversalView) -> OutputPlan:
        tensors = {name: StoredTensor.of(Region.whole(view, name, "weight")) for name in WEIGHTS}
        archive = value_archive("saved.pt", self.make(tensors))
        return OutputPlan((archive.file,), finish_records=partial(write_sums, [archive]))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("archives")
    (root / "source").mkdir()
    save_file(WEIGHTS, root / "source" / "model.safetensors")
    view = UniversalView.of(HuggingFaceCheckpoint(root / "source"))
    convert(view, root / "out", AsSaved(lambda tensors: value(tensors, unpickling)))
    torch.save(value(WEIGHTS, Real), root / "saved.pt")
    return root


def described(held: Any) -> Any:
    """Return a value in a form that ``==`` compares: tensors by their bytes, objects by class and attributes."""
    if isinstance(held, torch.Tensor):
        return held.dtype, tuple(held.shape), held.stride(), held.storage_offset(), held.tolist()
    if isinstance(held, dict):
        return type(held), [(key, described(item)) for key, item in held.items()]
    if isinstance(held, (list, tuple)):
        return type(held), [described(item) for item in held]
    if type(held).__module__.startswith(("deepspeed", "ucp_deepspeed")):
        return type(held), described(getattr(held, "__dict__", {})), getattr(held, "value", None)
    return type(held), held


def test_torch_loads_the_objects_that_it_would_have_saved(written: Path) -> None:
    found = torch.load(written / "out" / "saved.pt", weights_only=False)
    assert described(found) == described(torch.load(written / "saved.pt", weights_only=False))
    assert (
        type(found["optimizer"]["loss_scaler"]) is DynamicLossScaler and found["zero_stage"] is ZeroStageEnum.gradients
    )
    assert found["optimizer"]["loss_scaler"] is found["optimizer"]["again"]
    module = found["module"]
    assert (
        module["tied"].data_ptr() == module["first"].data_ptr() == found["nested"][0]["state"][0]["exp_avg"].data_ptr()
    )


def test_the_file_is_to_the_byte_that_of_torch(written: Path) -> None:
    """But for the id at its end, which is random."""
    with zipfile.ZipFile(written / "out" / "saved.pt") as ours, zipfile.ZipFile(written / "saved.pt") as theirs:
        for found, expected in zip(ours.infolist(), theirs.infolist(), strict=True):
            assert (found.filename, found.header_offset) == (expected.filename, expected.header_offset)
            assert ours.read(found) == theirs.read(expected) or found.filename.endswith("serialization_id")


def test_the_package_reads_what_it_reads_from_deepspeed(written: Path) -> None:
    ours, theirs = (
        open_torch_file(path, tensors=True) for path in (written / "out" / "saved.pt", written / "saved.pt")
    )
    assert described(ours) == described(theirs)
    assert isinstance(ours["sub_param_shape"], unpickling.SubparamShape)


def test_a_value_may_be_one_tensor_or_a_number(tmp_path: Path) -> None:
    for held in (torch.ones(3), 5, {"step": 5}):
        (tmp_path / "whole").write_bytes(b"".join(part.data for part in value_archive("whole.pt", held).file.parts))  # type: ignore[union-attr]
        assert described(open_torch_object(tmp_path / "whole", tensors=True)) == described(held)


def test_what_has_no_place_in_a_pickle_is_an_error() -> None:
    with pytest.raises(pickle.PicklingError):
        value_archive("file.pt", {"held": unpickling.opaque("some.Class")()})
