"""Comparing checkpoints: bit by bit, whatever the topologies, and every difference by name."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from native_files import as_version_1

from ucp_deepspeed.checkpoint.encoding import same_value
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.transfer import compare as compare_module
from ucp_deepspeed.transfer.compare import Difference, compare
from ucp_deepspeed.transfer.conversion import convert

Native = Callable[..., Path]
View = Callable[[Path], UniversalView]
Values = dict[tuple[str, str], torch.Tensor]


@pytest.mark.parametrize(
    "run",
    [{"tp": 2, "dp": 2, "stage": 1}, {"dp": 3, "stage": 3}, {"tp": 2, "stage": 2}, {"integer_step": True, "stage": 1}],
)
@pytest.mark.parametrize("chunk_numbytes", [12, 1 << 20])
def test_topologies_do_not_matter(run: dict[str, Any], chunk_numbytes: int, native: Native, view_of: View) -> None:
    a, b = view_of(native("a", stage=1)), view_of(native("b", **run))
    found = compare(a, b, chunk_numbytes=chunk_numbytes)
    assert {difference.name for difference in found} <= {"global_samples"}  # the oracle's grow with the ranks


def test_progress_ends_with_all_bytes(native: Native, view_of: View) -> None:
    a, b = view_of(native("a", tp=2, dp=2, stage=1)), view_of(native("b", stage=1))
    sizes = {
        name: math.prod(a.logical_shape(name)) * sum(ITEMSIZE[dtype] for dtype in parameter.states.values())
        for name, parameter in a.parameters.items()
    }
    seen: list[tuple[int, int]] = []
    compare(a, b, chunk_numbytes=64, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(sizes.values()),) * 2 and seen == sorted(seen) and len(seen) > len(sizes)


def test_the_converted_checkpoint_is_equal(native: Native, view_of: View, tmp_path: Path) -> None:
    a = view_of(native("a", tp=2, dp=2, stage=2, precision="fp16"))
    convert(a, tmp_path / "u")
    assert compare(a, view_of(tmp_path / "u")) == []


def test_the_same_nan_is_equal_and_another_is_not(native: Native, view_of: View) -> None:
    def first(values: Values) -> None:
        values["rows", "exp_avg"][4, 5] = math.nan

    def other(values: Values) -> None:
        values["rows", "exp_avg"].view(torch.int32)[4, 5] = 0x7FC00001

    a = view_of(native("a", first, stage=1))
    assert compare(a, view_of(native("b", first, stage=3, dp=1))) == []
    [found] = compare(a, view_of(native("c", other, stage=1)))
    assert (found.name, found.state, found.count, found.first_index) == ("rows", "exp_avg", 1, (4, 5))
    assert found.max_abs is not None and math.isnan(found.max_abs)


def test_signs_of_zero_differ(native: Native, view_of: View) -> None:
    sides = []
    for name, zero in (("a", 0.0), ("b", -0.0)):
        sides.append(view_of(native(name, lambda values, zero=zero: values["first", "fp32"].fill_(zero), stage=1)))
    assert compare(*sides) == [
        Difference("first", "elements", "5 of 5 elements differ, first at [0], at most by 0", "fp32", 5, (0,), 0.0)
    ]


@pytest.mark.parametrize("chunk_numbytes", [4, 20, 1 << 20])
def test_differing_elements_are_counted_and_placed(chunk_numbytes: int, native: Native, view_of: View) -> None:
    def change(values: Values) -> None:
        values["rows", "fp32"][1, 3] += 0.5
        values["rows", "fp32"][2, 0] -= 2.0
        values["rows", "fp32"][5, 7] += 1.0

    a, b = native("a", tp=2, stage=1), native("b", change, tp=2, stage=1)
    [found] = compare(view_of(a), view_of(b), chunk_numbytes=chunk_numbytes)
    assert (found.what, found.state, found.count, found.first_index) == ("elements", "fp32", 3, (1, 3))
    assert found.max_abs == pytest.approx(2.0)
    assert str(found) == "rows/fp32: 3 of 48 elements differ, first at [1, 3], at most by 2"


def test_integers_have_no_distance(native: Native, view_of: View, tmp_path: Path) -> None:
    a = native("a", stage=1)
    convert(view_of(a), tmp_path / "u")
    as_version_1(tmp_path / "u")
    path = tmp_path / "u" / "atoms-00001-of-00001.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw.replace(torch.arange(4).numpy().tobytes(), torch.tensor([0, 1, 9, 3]).numpy().tobytes()))
    [found] = compare(view_of(a), view_of(tmp_path / "u"))
    assert found == Difference("mask", "elements", "1 of 4 elements differ, first at [2]", "weight", 1, (2,), None)


def _edited(folder: Path, pattern: str, change: Callable[[Any], None]) -> Path:
    [path] = folder.glob(pattern)
    saved = torch.load(path, weights_only=False)
    change(saved)
    torch.save(saved, path)
    return folder


def _group(**settings: Any) -> Callable[[Any], None]:
    return lambda saved: saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"][0].update(settings)


def test_hyperparameters_follow_the_names(native: Native, view_of: View) -> None:
    a = view_of(native("a", stage=1))
    b = view_of(_edited(native("b", stage=1), "*optim_states.pt", _group(lr=0.5, betas=[0.9, 0.999], weight_decay=0.1)))
    found = compare(a, b)
    assert [(d.name, d.what) for d in found] == [(n, "hyperparameter") for n in ("first", "rows", "columns", "same")]
    assert found[0].detail == "lr is 0.001 in A, 0.5 in B"


def test_groups_may_be_cut_in_another_way(native: Native, view_of: View) -> None:
    def even(saved: Any) -> None:
        for group in saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group["weight_decay"] = 0.1

    groups = (("same", "first"), ("columns", "rows"))
    b = _edited(native("b", stage=1, groups=groups), "*optim_states.pt", even)
    assert compare(view_of(native("a", stage=1)), view_of(b)) == []


def test_switches_of_the_implementation_do_not_matter(native: Native, view_of: View) -> None:
    switches = {"foreach": True, "fused": True, "capturable": True, "differentiable": True, "step": 0}
    b = _edited(native("b", stage=1), "*optim_states.pt", _group(**switches))
    assert compare(view_of(native("a", stage=1)), view_of(b)) == []


def test_a_step_that_groups_count(native: Native, view_of: View) -> None:
    """Apex's FusedAdam keeps it there; DeepSpeed's leaves a zero, which means none."""
    b = _edited(native("b", stage=1), "*optim_states.pt", _group(step=9))
    assert "step = 9 only in B" in {found.detail for found in compare(view_of(native("a", stage=1)), view_of(b))}


@pytest.mark.parametrize(("step", "told"), [(5, set()), (9, {"step is 5.0 in A, 9 in B"})])
def test_a_step_that_groups_count_alone(step: int, told: set[str], native: Native, view_of: View) -> None:
    """It is the step of their parameters."""

    def only_in_groups(saved: Any) -> None:
        base = saved["optimizer_state_dict"]["base_optimizer_state"]
        for state in base["state"].values():
            del state["step"]
        for group in base["param_groups"]:
            group["step"] = step

    b = _edited(native("b", stage=1), "*optim_states.pt", only_in_groups)
    assert {found.detail for found in compare(view_of(native("a", stage=1)), view_of(b))} == told


def test_counters_scheduler_and_scalars(native: Native, view_of: View) -> None:
    def change(saved: Any) -> None:
        saved.update(global_steps=6, skipped_steps=1, global_samples=None)
        saved["lr_scheduler"]["last_batch_iteration"] = 6

    def step(saved: Any) -> None:
        saved["optimizer_state_dict"]["base_optimizer_state"]["state"][0]["step"] = 7

    b = _edited(_edited(native("b", stage=1), "*model_states.pt", change), "*optim_states.pt", step)
    found = compare(view_of(native("a", stage=1)), view_of(b))
    assert [(d.name, d.what, d.detail) for d in found] == [
        *((name, "scalar", "step is 5.0 in A, 7 in B") for name in ("first", "rows", "columns", "same")),
        ("global_steps", "counter", "5 in A, 6 in B"),
        ("global_samples", "counter", "20 in A, None in B"),
        ("skipped_steps", "counter", "0 in A, 1 in B"),
        ("lr_scheduler", "lr_scheduler", "last_batch_iteration is 5 in A, 6 in B"),
    ]


def test_a_missing_scheduler(native: Native, view_of: View) -> None:
    b = _edited(native("b", stage=1), "*model_states.pt", lambda saved: saved.update(lr_scheduler=None))
    assert compare(view_of(native("a", stage=1)), view_of(b)) == [
        Difference("lr_scheduler", "lr_scheduler", "only in A")
    ]


def test_loss_scale(native: Native, view_of: View) -> None:
    def change(saved: Any) -> None:
        saved["optimizer_state_dict"]["loss_scaler"].cur_scale *= 2

    runs = {"stage": 1, "precision": "fp16"}
    b = _edited(native("b", **runs), "*optim_states.pt", change)
    [found] = compare(view_of(native("a", **runs)), view_of(b))
    assert found.what == "loss_scale" and found.detail.startswith("cur_scale is")


def test_structure_of_universal_checkpoints(native: Native, view_of: View, tmp_path: Path) -> None:
    a = view_of(native("a", stage=1))
    convert(a, tmp_path / "u")
    as_version_1(tmp_path / "u")
    path = tmp_path / "u" / "ucp_index.json"
    index = json.loads(path.read_text())
    parameters = index["parameters"]
    del parameters["first"]
    parameters["new"] = parameters.pop("same")
    del parameters["rows"]["states"]["exp_avg_sq"]
    atoms = parameters["columns"]["states"]["fp32"]
    parameters["columns"] |= {"kind": "frozen", "states": {"weight": atoms}}
    path.write_text(json.dumps(index))
    raw = (path.parent / atoms).read_bytes()
    for old, new in ((f'"same/{state}"', f'"new/{state}" ') for state in parameters["new"]["states"]):
        raw = raw.replace(old.encode(), new.encode())
    (path.parent / atoms).write_bytes(raw.replace(b'"columns/exp_avg"', b'"columns/weight" '))
    found = {(d.name, d.what, d.detail) for d in compare(a, view_of(tmp_path / "u")) if d.what != "hyperparameter"}
    assert found == {
        ("first", "presence", "only in A"),
        ("same", "presence", "only in A"),
        ("new", "presence", "only in B"),
        ("rows", "states", "state 'exp_avg_sq' only in A"),
        ("columns", "kind", "trainable in A, frozen in B"),
        ("columns", "states", "state 'weight' only in B"),
        *(("columns", "states", f"state {state!r} only in A") for state in ("fp32", "exp_avg", "exp_avg_sq")),
    }


def test_shape_and_dtype(native: Native, view_of: View, tmp_path: Path) -> None:
    def reshape(values: Values) -> None:
        for state in ("fp32", "exp_avg", "exp_avg_sq"):
            values["rows", state] = values["rows", state].reshape(8, 6)
            values["first", state] = values["first", state].double()

    found = compare(view_of(native("a", stage=0)), view_of(native("b", reshape, stage=0)))
    assert ("rows", "shape", "[6, 8] in A, [8, 6] in B") in [(d.name, d.what, d.detail) for d in found]
    assert ("first", "dtype", "exp_avg") in [(d.name, d.what, d.state) for d in found]
    assert not [d for d in found if d.what == "elements"]


def test_memory_is_bounded(native: Native, view_of: View, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    gather = compare_module.gather

    def spy(view: Any, name: str, state: str, start: int, target: torch.Tensor, reader: Any) -> Any:
        asked.append(target.numel() * target.element_size())
        return gather(view, name, state, start, target, reader)

    monkeypatch.setattr(compare_module, "gather", spy)
    assert compare(view_of(native("a", stage=1)), view_of(native("b", stage=3)), chunk_numbytes=24) == []
    assert max(asked) == 24 and sum(asked) == 2 * (3 * 4 * (5 + 48 + 30 + 28) + 32)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (1, 1.0, True),
        (True, 1, False),
        (0.0, -0.0, False),
        (math.nan, math.nan, True),
        ((1, 2), [1, 2], True),
        ([1], [1, 2], False),
        ({"a": [1.0]}, {"a": (1,)}, True),
        ({"a": 1}, {"b": 1}, False),
        (None, 0, False),
        ("x", "x", True),
        (torch.tensor([1.0, math.nan]), torch.tensor([1.0, math.nan]), True),
        (torch.tensor(1.0), torch.tensor(1), False),
        (torch.tensor(1.0), 1.0, False),
        (np.arange(3), np.arange(3), True),
        (np.arange(3), np.arange(3.0), False),
        (np.array([math.nan, 0.0]), np.array([math.nan, 0.0]), True),
        (np.arange(3), [0, 1, 2], False),
        (torch.empty(2, device="meta"), torch.empty(2, device="meta"), False),
    ],
)
def test_values(a: Any, b: Any, same: bool) -> None:
    assert same_value(a, b) is same and same_value(b, a) is same
