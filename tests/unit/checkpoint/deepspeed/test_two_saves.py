"""Files of another step, run or rank in a checkpoint without a manifest: what they hold tells them, as far as it can."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest
import torch
from damage import edit
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from native_models import SHAPES, whole

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.one_save import check_one_save, places_of
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError
from ucp_deepspeed.layout.pattern import Replicate
from ucp_deepspeed.transfer.compare import compare

LAYERS = {"0.w": (11, 3), "0.b": (7,), "1.w": (5, 7), "2.w": (7, 5), "3.w": (2, 3, 2)}

State = dict[tuple[str, str], torch.Tensor]


def model_of(seed: int, run: NativeRun) -> NativeModel:
    generator, shapes = torch.Generator().manual_seed(seed), SHAPES if run.pp is None else LAYERS
    parameters = []
    for name, shape in shapes.items():
        master, moment, square = (torch.randn(shape, generator=generator) for _ in range(3))
        parameters.append(NativeParameter(name, master, {"exp_avg": moment, "exp_avg_sq": square.square()}))
    return NativeModel(tuple(parameters), layers=0 if run.pp is None else 4)


def read(folder: Path) -> State:
    """All that a load takes, after the check that it makes."""
    checkpoint = open_checkpoint(folder)
    assert isinstance(checkpoint, DeepSpeedCheckpoint)
    check_one_save(checkpoint, places_of(checkpoint))
    names = checkpoint.parameters
    view = UniversalView(checkpoint, {name: name for name in names}, dict.fromkeys(names, Replicate()))
    found = {(name, state): whole(view, name, state) for name, held in names.items() for state in held.states}
    steps = {(name, key): torch.tensor(step) for name, held in names.items() for key, step in held.scalars.items()}
    return found | steps | {("", "steps"): torch.tensor(checkpoint.run.global_steps)}


def is_same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def faults(folders: list[Path]) -> Iterator[tuple[str, dict[str, Path]]]:
    """Kind of a fault, and the files to put into the first folder."""
    first, *others = folders
    names = sorted(path.name for path in first.iterdir())
    for kind, other in zip(("step", "run"), others, strict=True):
        yield from ((kind, {name: other / name}) for name in names)
    for one, other in combinations(names, 2):
        if re.sub(r"rank_\d+|model_\d+", "", one) == re.sub(r"rank_\d+|model_\d+", "", other):
            yield "swapped", {one: first / other, other: first / one}
            yield "copied", {one: first / other}


BF16 = NativeRun(precision="bf16")
OF_RUN = {("run", "silent"): 3}
OF_LAYERS = {("step", "silent"): 4, ("run", "silent"): 4}

RUNS: dict[str, tuple[NativeRun, dict[tuple[str, str], int]]] = {
    "plain": (NativeRun(tp=2), {}),
    "fp16-unfused": (NativeRun(tp=2, precision="fp16", optimizer="unfused"), {}),
    "fp16-fused": (NativeRun(tp=2, precision="fp16", optimizer="fused"), {}),
    "zero-1": (replace(BF16, stage=1, dp=3), {}),
    "zero-1 fp32": (NativeRun(stage=1, dp=2), {}),
    "zero-1 elastic": (replace(BF16, stage=1, dp=2, elastic=True), {}),
    "zero-1 of two tensor-parallel ranks": (replace(BF16, stage=1, dp=2, tp=2), {}),
    "zero-2 fp16": (NativeRun(stage=2, dp=2, precision="fp16"), {}),
    "zero-2, round robin": (replace(BF16, stage=2, dp=2, round_robin=True), {}),
    "zero-3": (replace(BF16, stage=3, dp=3), OF_RUN),
    "bf16-optimizer": (replace(BF16, dp=2, pp=2), {}),
    "pipeline, zero-1": (replace(BF16, stage=1, dp=2, pp=2), {}),
    "pipeline, plain": (NativeRun(pp=2), OF_LAYERS),
}
"""Form → the run, and the faults that nothing in the files tells."""


@pytest.mark.parametrize("form", RUNS)
def test_files_that_were_exchanged(form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every single file, by that of another step, of another run at the same step, and of another rank."""
    run, untold = RUNS[form]
    steps = {"a": 5, "b": 9, "c": 5}
    folders = [
        write_native(tmp_path / name, model_of(seed, run), replace(run, steps=taken))
        for seed, (name, taken) in enumerate(steps.items())
    ]
    sound = [read(folder) for folder in folders]
    assert not caplog.messages
    counts: Counter[tuple[str, str]] = Counter()
    for number, (kind, files) in enumerate(faults(folders)):
        folder = tmp_path / f"fault{number}" / "tag"
        shutil.copytree(folders[0], folder)
        for name, source in files.items():
            shutil.copyfile(source, folder / name)
        caplog.clear()
        try:
            found = read(folder)
        except UniversalCheckpointError:
            counts[kind, "error"] += 1
            continue
        right = any(is_same(found, other) for other in sound)
        counts[kind, "right" if right else "warned" if caplog.messages else "silent"] += 1
    assert {key: count for key, count in counts.items() if key[1] == "silent"} == untold
    assert sum(counts.values()) > len(counts)


STAGE_1 = replace(BF16, stage=1, dp=2)


def test_an_optimizer_that_was_begun_anew_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its steps are fewer than the run's; the weights are its masters'. Skipped steps aren't the optimizer's either."""
    for name, taken, skipped in (("skipped", 7, 2), ("anew", 40, 0)):
        assert not caplog.messages
        folder = write_native(tmp_path / name, model_of(0, STAGE_1), STAGE_1)
        edit(
            folder / "mp_rank_00_model_states.pt",
            lambda saved, taken=taken, skipped=skipped: saved.update(global_steps=taken, skipped_steps=skipped),
        )
        read(folder)
    assert len(caplog.messages) == 2
    assert all("has taken 5 steps, and the run 40. Unless the optimizer was begun" in line for line in caplog.messages)


def test_weights_that_somebody_changed_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A load takes the masters, as DeepSpeed does: that may be meant."""
    folder = write_native(tmp_path, model_of(0, STAGE_1), STAGE_1)
    before = read(folder)
    edit(folder / "mp_rank_00_model_states.pt", lambda saved: [each.mul_(2) for each in saved["module"].values()])
    assert is_same(read(folder), before)
    assert all("aren't the weights in mp_rank_00_model_states.pt" in line for line in caplog.messages)
    assert len(caplog.messages) == 2


def test_a_copy_of_model_states_that_are_the_same_is_accepted(tmp_path: Path) -> None:
    """Some scripts restore ZeRO-3's so, which hold no weights. An optimizer's file is a rank's own."""
    run = replace(BF16, stage=3, dp=2)
    folder = write_native(tmp_path, model_of(0, run), run)
    before = read(folder)
    shutil.copyfile(*(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in (0, 1)))
    assert is_same(read(folder), before)
    shutil.copyfile(*(folder / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)))
    with pytest.raises(DamagedCheckpointError, match=r"was written as bf16_zero_pp_rank_0_.*: files of two ranks"):
        read(folder)


def test_reading_and_comparing_tell_too(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = replace(BF16, stage=1, dp=2)
    first, second = (write_native(tmp_path / str(seed), model_of(seed, run), run) for seed in (1, 2))
    name = next(first.glob("*zero_pp_rank_1_mp_rank_00_optim_states.pt")).name
    shutil.copy(second / name, first / name)
    told = rf"{name}: its master weights of \S+ aren't the weights in mp_rank_00_model_states\.pt"
    with ucp_deepspeed.open_checkpoint(first) as held:
        for parameter in held.parameters:
            held.read(parameter)
    assert [bool(re.search(told, record.getMessage())) for record in caplog.records] == [True]
    caplog.clear()
    views = [UniversalView.of(open_checkpoint(folder)) for folder in (first, second)]
    assert compare(*views)
    assert [bool(re.search(told, record.getMessage())) for record in caplog.records] == [True]
