"""Differences of older DeepSpeed's files from today's, and what a script may have put in their place."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import deepspeed.runtime.bf16_optimizer
import deepspeed.utils.tensor_fragment
import pytest
import torch
from native_files import NativeRun, write_native
from native_models import awkward_model, check_reads_back, model_of
from test_pipeline_files import check, pipeline_model

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import Topology

RUNS = [
    NativeRun(dp=2, stage=1, precision="bf16"),
    NativeRun(dp=2, stage=2, precision="fp16"),
    NativeRun(dp=2, stage=3, precision="bf16"),
    NativeRun(dp=2, stage=3, precision="fp16"),
    NativeRun(dp=2, stage=3),
    NativeRun(precision="fp16"),
    NativeRun(),
]


def rewrite(folder: Path, pattern: str, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the content of files."""
    for path in folder.glob(pattern):
        saved = torch.load(path, weights_only=False)
        change(saved)
        torch.save(saved, path)


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_torchs_format_from_before_its_archives(tmp_path: Path, run: NativeRun) -> None:
    """``"checkpoint_serialization": false`` still writes it."""
    model = awkward_model()
    folder = write_native(tmp_path, model, run)
    for path in folder.glob("*.pt"):
        torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    check_reads_back(folder, model, run)
    state = open_checkpoint(folder).client_state()[1]
    assert state["global_steps"] == open_checkpoint(folder).run.global_steps


@pytest.mark.parametrize("config", ["runs/ds_config.yaml", None, {"lr": 0.1}, ...], ids=str)
@pytest.mark.parametrize("run", RUNS, ids=str)
def test_without_a_config_the_files_tell(tmp_path: Path, run: NativeRun, config: Any) -> None:
    """Precision, which of two names the optimizer's files have, and the loss scale."""
    model = awkward_model()
    folder = write_native(tmp_path, model, run)
    rewrite(
        folder,
        "*model_states.pt",
        lambda saved: saved.pop("ds_config") if config is ... else saved.update(ds_config=config),
    )
    found = check_reads_back(folder, model, run).run
    assert found.precision == run.precision
    assert (found.loss_scale is not None) == (run.precision == "fp16")


def test_of_two_runs_in_a_folder_the_weights_tell_the_last(tmp_path: Path) -> None:
    model = awkward_model()
    folder = write_native(tmp_path, model, NativeRun(dp=2, stage=2, precision="bf16"))
    run = NativeRun(dp=2, stage=2, precision="fp16", steps=7)
    for path in write_native(tmp_path / "later", model, run).iterdir():
        path.rename(folder / path.name)
    assert len(list(folder.glob("*optim_states.pt"))) == 4
    rewrite(folder, "*model_states.pt", lambda saved: saved.update(ds_config="config.json"))
    assert check_reads_back(folder, model, run).parameters["tail"].scalars["step"] == 7


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_had_no_prefix(tmp_path: Path, stage: int) -> None:
    model, run = awkward_model(), NativeRun(dp=2, stage=stage, precision="bf16")
    folder = write_native(tmp_path, model, run)
    for path in folder.glob("bf16_*"):
        path.rename(folder / path.name.removeprefix("bf16_"))
    check_reads_back(folder, model, run)


def test_another_precisions_files_are_not_taken(tmp_path: Path) -> None:
    """An fp16 run never wrote such names: they are what an earlier run left, and its own are gone."""
    folder = write_native(tmp_path, awkward_model(), NativeRun(dp=2, stage=1, precision="fp16"))
    for path in folder.glob("zero_*"):
        path.rename(folder / f"bf16_{path.name}")
    assert "the optimizer's files (*_optim_states.pt) aren't there" in str(open_checkpoint(folder).lacking)


@pytest.mark.parametrize("run", RUNS[:5], ids=str)
def test_param_shapes_lay_in_the_optimizers_files(tmp_path: Path, run: NativeRun) -> None:
    model = awkward_model()
    folder = write_native(tmp_path, model, run)
    shapes: list[Any] = []
    rewrite(folder, "*model_states.pt", lambda saved: shapes.append(saved.pop("param_shapes")))
    rewrite(folder, "*optim_states.pt", lambda saved: saved.update(param_shapes=shapes[0]))
    check_reads_back(folder, model, run)


@pytest.mark.parametrize("stage", [2, 3])
def test_param_shapes_were_one_list_of_all_groups(tmp_path: Path, stage: int) -> None:
    """Sizes alone tell how to cut the list into groups, and at ZeRO-3 into sub-groups."""
    names = [parameter.name for parameter in awkward_model().parameters if parameter.optimized]
    groups = tuple(names[1::2]), tuple(names[0::2])
    model, run = awkward_model(), NativeRun(dp=3, stage=stage, groups=groups, sub_group_size=20, elastic=stage == 2)
    folder = write_native(tmp_path, model, run)
    shapes: list[Any] = []
    rewrite(folder, "*model_states.pt", lambda saved: shapes.append(saved.pop("param_shapes")))
    one = OrderedDict(item for group in shapes[0] for item in group.items())
    rewrite(folder, "*optim_states.pt", lambda saved: saved.update(param_shapes=one))
    check_reads_back(folder, model, run)
    wrong = OrderedDict(one, more=(5,))
    rewrite(folder, "*optim_states.pt", lambda saved: saved.update(param_shapes=wrong))
    with pytest.raises(DamagedCheckpointError, match="param_shapes doesn't fit flat groups of"):
        open_checkpoint(folder)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize(("tp", "pp"), [(1, 2), (1, 1), (2, 2), (2, 1)])
def test_stages_of_a_pipeline_are_told_by_its_layer_files(tmp_path: Path, tp: int, pp: int, stage: int) -> None:
    run, model = NativeRun(stage=stage, tp=tp, dp=2, pp=pp, precision="bf16"), pipeline_model()
    folder = write_native(tmp_path, model, run)
    rewrite(folder, "mp_rank_*model_states.pt", lambda saved: saved.pop("checkpoint_parallel_dimensions"))
    if tp == 1:
        check(folder, model, run)
    assert open_checkpoint(folder).topology == Topology(tp, pp, 2, stage)


def test_layer_files_of_too_many_ranks(tmp_path: Path) -> None:
    folder = write_native(tmp_path, pipeline_model(), NativeRun(stage=1, dp=2, pp=3, precision="bf16"))
    rewrite(folder, "mp_rank_*model_states.pt", lambda saved: saved.pop("checkpoint_parallel_dimensions"))
    (folder / "layer_02-model_01-model_states.pt").touch()
    with pytest.raises(
        DamagedCheckpointError, match="layer files of 2 tensor-parallel ranks, which don't divide the 3"
    ):
        open_checkpoint(folder)


@dataclass
class _Address:
    numel: int
    start: int


def test_an_address_has_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, run = awkward_model(), NativeRun(dp=2, stage=1, precision="bf16", optimizer="bf16")
    folder = write_native(tmp_path, model, run)
    old = deepspeed.runtime.bf16_optimizer
    _Address.__module__, _Address.__qualname__ = old.__name__, "fragment_address"
    monkeypatch.setattr(old, "fragment_address", _Address, raising=False)

    def age(saved: dict[str, Any]) -> None:
        for mapping in saved["optimizer_state_dict"]["param_slice_mappings"]:
            for name, address in mapping.items():
                mapping[name] = _Address(address.numel, address.start)

    rewrite(folder, "*optim_states.pt", age)
    check_reads_back(folder, model, run)


@pytest.mark.parametrize("placeholder", [0, 1])
def test_ties_of_zero_3_were_not_listed(tmp_path: Path, placeholder: int) -> None:
    """All names of a tied parameter share one placeholder, whether it has an element or none."""
    shapes = {"embedding.weight": (5, 3), "norm.bias": (4,)}
    model, run = replace(model_of(shapes), aliases={"head.weight": "embedding.weight"}), NativeRun(dp=2, stage=3)
    folder = write_native(tmp_path, model, run)

    def age(saved: dict[str, Any]) -> None:
        for key in ("shared_params", "frozen_param_shapes", "frozen_param_fragments"):
            del saved[key]
        held = {name: torch.ones(placeholder) for name in shapes}
        saved["module"] = held | {"head.weight": held["embedding.weight"]}

    rewrite(folder, "*model_states.pt", age)
    checkpoint = check_reads_back(folder, model, run)
    assert checkpoint.tied == {"head.weight": "embedding.weight"} and checkpoint.unrecorded == {}


@pytest.mark.parametrize("run", [RUNS[0], RUNS[1], NativeRun(stage=1, dp=2, pp=2, precision="bf16")], ids=str)
def test_without_the_optimizers_files_weights_are_read(tmp_path: Path, run: NativeRun) -> None:
    model = awkward_model() if run.pp is None else pipeline_model()
    folder = write_native(tmp_path, model, run)
    whole = {name: parameter.kind for name, parameter in open_checkpoint(folder).parameters.items()}
    for path in folder.glob("*optim_states.pt"):
        path.unlink()
    checkpoint = open_checkpoint(folder)
    assert {name: parameter.kind for name, parameter in checkpoint.parameters.items()} == whole
    trained = [parameter for parameter in checkpoint.parameters.values() if parameter.kind == "trainable"]
    assert {tuple(parameter.states.items()) for parameter in trained} == {
        (("fp32", {"bf16": "BF16", "fp16": "F16"}[run.precision]),)
    }
    assert "aren't there" in str(checkpoint.lacking) and "load_module_only=True" in str(checkpoint.lacking)


def age(folder: Path) -> None:
    """As up to 0.5.10, when nothing but ZeRO's files named the parameters; then these are lost."""
    rewrite(folder, "mp_rank*model_states.pt", lambda saved: saved.pop("param_shapes"))
    for path in folder.glob("*optim_states.pt"):
        path.unlink()


@pytest.mark.parametrize("config", [True, False])
@pytest.mark.parametrize("run", [RUNS[1], NativeRun(stage=1, dp=2, pp=2)], ids=str)
def test_lost_files_of_the_optimizer_that_alone_named_the_parameters(
    run: NativeRun, config: bool, tmp_path: Path
) -> None:
    """Nothing tells what was trained: all weights may have been."""
    model = awkward_model() if run.pp is None else pipeline_model()
    folder = write_native(tmp_path, model, run)
    age(folder)
    if not config:
        rewrite(folder, "mp_rank*model_states.pt", lambda saved: saved.update(ds_config="runs/config.json"))
    checkpoint = open_checkpoint(folder)
    assert {parameter.kind for parameter in checkpoint.parameters.values()} == {"trainable", "buffer"}
    assert "aren't there" in str(checkpoint.lacking) and "load_module_only=True" in str(checkpoint.lacking)


@pytest.mark.parametrize("stage", [0, 1])
def test_an_engine_that_has_no_optimizer_lost_none(stage: int, tmp_path: Path) -> None:
    """Later versions save such under ZeRO too, and say that there are no shapes; before, without ZeRO."""
    folder = write_native(tmp_path, awkward_model(), NativeRun(stage=stage, dp=2, precision="fp16"))
    age(folder)
    more = {"param_shapes": None} if stage else {}
    rewrite(folder, "*model_states.pt", lambda saved: saved.update(optimizer=None, **more))
    checkpoint = open_checkpoint(folder)
    assert checkpoint.lacking is None
    assert {parameter.kind for parameter in checkpoint.parameters.values()} == {"frozen", "buffer"}
