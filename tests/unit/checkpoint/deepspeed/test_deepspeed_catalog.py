"""The catalog of native files, against the brute-force writer: each optimizer class, each layout option."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from native_models import SHAPES, awkward_model, check_reads_back, group_decay, model_of, whole, write_manifest

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.transfer.conversion import convert

GROUPS = (("up.weight", "embedding.weight", "down.weight"), ("tail", "gain"), ("norm.bias", "scale", "norm.weight"))

RUNS: dict[str, NativeRun] = {
    "plain": NativeRun(),
    "unfused": NativeRun(precision="bf16", dp=2),
    "fused": NativeRun(precision="bf16", optimizer="fused", dp=2),
    "fused integer step": NativeRun(precision="bf16", optimizer="fused", integer_step=True),
    "bf16 optimizer": NativeRun(stage=1, dp=3, precision="bf16", optimizer="bf16"),
    "bf16 optimizer in groups": NativeRun(stage=1, dp=4, precision="bf16", optimizer="bf16", groups=GROUPS),
    "elastic": NativeRun(stage=1, dp=3, elastic=True),
    "elastic in groups": NativeRun(stage=2, dp=2, elastic=True, groups=GROUPS, integer_step=True),
    "zero-2 without frozen": NativeRun(stage=2, dp=2, exclude_frozen=True),
    "zero-3 without frozen": NativeRun(stage=3, dp=2, exclude_frozen=True),
    "empty shards": NativeRun(stage=1, dp=64, precision="bf16"),
    "empty slices": NativeRun(stage=3, dp=16, precision="bf16"),
    **{f"zero-{s} dp{dp}": NativeRun(stage=s, dp=dp, precision="bf16") for s in (1, 2, 3) for dp in (1, 2, 3, 4)},
    **{f"round robin dp{dp}": NativeRun(stage=2, dp=dp, round_robin=True) for dp in (2, 3, 4)},
    **{f"round robin in groups dp{dp}": NativeRun(stage=1, dp=dp, round_robin=True, groups=GROUPS) for dp in (2, 3, 4)},
    **{f"aligned {p}": NativeRun(stage=1, dp=2, precision=p, parameter_alignment=True) for p in ("fp32", "bf16")},
    "aligned round robin": NativeRun(stage=2, dp=3, round_robin=True, parameter_alignment=True, groups=GROUPS),
    **{f"sub-groups of {n}": NativeRun(stage=3, dp=2, sub_group_size=n) for n in (1, 10, 30)},
    **{f"sub-groups of {n} in groups": NativeRun(stage=3, dp=3, sub_group_size=n, groups=GROUPS) for n in (1, 9)},
    "zero-1 in groups": NativeRun(stage=1, dp=3, groups=GROUPS),
    **{f"zero-{s} before a step": NativeRun(stage=s, dp=2, precision="bf16", steps=0) for s in (1, 2, 3)},
    "plain before a step": NativeRun(steps=0),
    "unfused before a step": NativeRun(precision="bf16", steps=0),
}


def written(tmp_path: Path, model: NativeModel, run: NativeRun) -> Path:
    """The tag folder, with a manifest where frozen parameters make it impossible to tell the names otherwise."""
    folder = write_native(tmp_path, model, run)
    if run.kind == "fused" or (run.kind == "plain" and not run.steps):
        write_manifest(folder, run, (tuple(SHAPES),))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_everything_is_read_back(tmp_path: Path, name: str) -> None:
    run, model = RUNS[name], awkward_model()
    checkpoint = check_reads_back(written(tmp_path, model, run), model, run)
    assert checkpoint.topology.dp == run.dp and checkpoint.topology.zero_stage == run.stage
    assert (checkpoint.run.precision, checkpoint.run.global_steps) == (run.precision, run.steps)
    assert checkpoint.run.lr_scheduler == {"last_batch_iteration": run.steps}
    wrapped = run.kind in ("unfused", "fused")
    steps = {"step": run.steps + wrapped} if run.steps or wrapped else {}
    for parameter in model.parameters:
        if parameter.optimized:
            assert checkpoint.parameters[parameter.name].scalars == steps


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.kind != "zero" or not run.elastic])
def test_parameter_groups(tmp_path: Path, name: str) -> None:
    """Names are those of each group, whatever their flat order; hyper-parameters are the group's own."""
    run, model = RUNS[name], awkward_model()
    groups = open_checkpoint(written(tmp_path, model, run)).groups
    expected = run.groups or (tuple(SHAPES),)
    assert [set(group.names) for group in groups] == [set(names) for names in expected]
    decays = [group.hyperparameters["weight_decay"] for group in groups]
    assert decays == [group_decay(index, run) for index in range(len(expected))]
    assert all("params" not in group.hyperparameters and "lr" in group.hyperparameters for group in groups)


@pytest.mark.parametrize(
    ("run", "form"),
    [
        (NativeRun(), "deepspeed plain"),
        (NativeRun(precision="bf16"), "deepspeed fp16-unfused"),
        (NativeRun(precision="bf16", optimizer="fused"), "deepspeed fp16-fused"),
        (NativeRun(stage=2, dp=2), "deepspeed zero-1/2"),
        (NativeRun(stage=1, precision="bf16", optimizer="bf16"), "deepspeed bf16-optimizer"),
        (NativeRun(stage=3), "deepspeed zero-3"),
    ],
)
def test_form(tmp_path: Path, run: NativeRun, form: str) -> None:
    assert open_checkpoint(write_native(tmp_path, model_of({"a": (3,)}), run)).form == form


@pytest.mark.parametrize("dp", [2, 3, 4])
def test_round_robin_disagrees_with_the_recorded_mapping(tmp_path: Path, dp: int) -> None:
    """``param_slice_mappings`` is of another order than the buffer: a reader that believed it would mix parameters up."""
    run = NativeRun(stage=2, dp=dp, round_robin=True)
    folder = write_native(tmp_path, model_of(SHAPES), run)
    checkpoint = open_checkpoint(folder)
    wrong = 0
    for rank in range(dp):
        saved = torch.load(folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt", weights_only=False)
        mapping = saved["optimizer_state_dict"]["param_slice_mappings"][0]
        for name, shape in SHAPES.items():
            parts = checkpoint.fragments(name, "fp32", 0, 0, torch.Size(shape).numel())
            real = {part.buffer_start for part in parts if f"rank_{rank}_mp" in part.buffer.path}
            wrong += (name in mapping) != bool(real) or (name in mapping and mapping[name].start not in real)
    assert wrong


@pytest.mark.parametrize("run", [NativeRun(stage=1, dp=2), NativeRun(stage=3, dp=2), NativeRun()], ids=str)
def test_tensor_parallel_local_shapes(tmp_path: Path, run: NativeRun) -> None:
    """Each rank's own shape is listed; without a spec nothing is known about how they join."""
    model = NativeModel(
        tuple(
            NativeParameter(name, torch.randn(shape), {"exp_avg": torch.randn(shape)}, cut)
            for name, shape, cut in (("r", (6, 5), "rows"), ("c", (5, 6), "columns"), ("n", (5,), "replicated"))
        )
    )
    checkpoint = open_checkpoint(write_native(tmp_path, model, replace(run, tp=3)))
    assert checkpoint.topology.tp == 3
    shapes = {name: parameter.local_shapes for name, parameter in checkpoint.parameters.items()}
    assert shapes == {"r": ((2, 5),) * 3, "c": ((5, 2),) * 3, "n": ((5,),) * 3}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_dynamic_loss_scale(tmp_path: Path, stage: int) -> None:
    run = NativeRun(stage=stage, dp=2, precision="fp16")
    scale = open_checkpoint(write_native(tmp_path, model_of(SHAPES), run)).run.loss_scale
    assert scale is not None and scale.dynamic
    expected = {"cur_scale": 256.0, "cur_iter": 5, "last_overflow_iter": 1, "scale_factor": 2.0, "scale_window": 1000}
    assert expected.items() <= scale.values.items()
    assert scale.values["cur_hysteresis"] == 1 and "dtype" not in scale.values


@pytest.mark.parametrize("kind", ["unfused", "fused"])
def test_dynamic_loss_scale_of_stage_0(tmp_path: Path, kind: Any) -> None:
    run = NativeRun(precision="fp16", optimizer=kind)
    scale = open_checkpoint(write_native(tmp_path, model_of(SHAPES), run)).run.loss_scale
    assert scale is not None and scale.dynamic
    assert scale.values == {
        "cur_scale": 256.0,
        "cur_iter": 5,
        "last_overflow_iter": 1,
        "scale_factor": 2.0,
        "scale_window": 1000,
    }


def test_static_loss_scale(tmp_path: Path) -> None:
    run = NativeRun(stage=1, precision="fp16", dynamic_scale=False)
    scale = open_checkpoint(write_native(tmp_path, model_of(SHAPES), run)).run.loss_scale
    assert scale is not None and not scale.dynamic and scale.values["cur_scale"] == 1.0


@pytest.mark.parametrize("run", [NativeRun(), NativeRun(precision="bf16", stage=2), NativeRun(stage=3)], ids=str)
def test_no_loss_scale_without_fp16(tmp_path: Path, run: NativeRun) -> None:
    assert open_checkpoint(write_native(tmp_path, model_of(SHAPES), run)).run.loss_scale is None


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_client_state(tmp_path: Path, stage: int) -> None:
    """The user's entries come back, with their tensors; the model doesn't."""
    mine = {"epoch": 3, "rng": torch.arange(4), "nested": {"a": [1, (2, None)]}}
    folder = write_native(tmp_path, awkward_model(), NativeRun(stage=stage), client_state=mine)
    path, found = open_checkpoint(folder).client_state()
    assert Path(path).is_file() and Path(path).parent == folder
    assert found["epoch"] == 3 and found["nested"] == {"a": [1, (2, None)]}
    assert torch.equal(found["rng"], torch.arange(4))
    assert "module" not in found


@pytest.mark.parametrize("run", [NativeRun(), NativeRun(stage=2, dp=2), NativeRun(stage=3, dp=2)], ids=str)
def test_other_elementwise_states(tmp_path: Path, run: NativeRun) -> None:
    """Any state of the parameter's size is carried, under its own name."""
    states = {"exp_avg": torch.randn(5), "exp_avg_sq": torch.rand(5), "max_exp_avg_sq": torch.rand(5)}
    model = NativeModel((NativeParameter("a", torch.randn(5), states),))
    view = UniversalView.of(open_checkpoint(write_native(tmp_path, model, run)))
    for state, tensor in states.items():
        assert torch.equal(whole(view, "a", state), tensor)


def test_half_precision_masters(tmp_path: Path) -> None:
    """With ``bf16_master_weights_and_grads`` the partitions are bf16, and are read as such."""
    half = [torch.randn(7, 3).bfloat16() for _ in range(3)]
    model = NativeModel((NativeParameter("a", half[0], {"exp_avg": half[1], "exp_avg_sq": half[2]}),))
    run = NativeRun(stage=1, dp=2, precision="bf16")
    view = UniversalView.of(open_checkpoint(write_native(tmp_path, model, run)))
    assert view.parameters["a"].states == dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), "BF16")
    assert torch.equal(whole(view, "a", "exp_avg"), half[1])


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_state_of_another_size_is_refused(tmp_path: Path, stage: int) -> None:
    """A factored state can't be moved element by element; the message names it and its owner."""
    run = NativeRun(stage=stage, dp=1)
    folder = write_native(tmp_path, model_of({"up.weight": (4, 6)}), run)
    name = "zero_pp_rank_0_mp_rank_00_optim_states.pt" if stage else "mp_rank_00_model_states.pt"
    saved = torch.load(folder / name, weights_only=False)
    state = saved["optimizer_state_dict"] if stage else saved
    base = state[{0: "optimizer", 1: "base_optimizer_state", 3: "optimizer_state_dict"}[stage]]
    base["state"][0]["variance_row"] = torch.zeros(4)
    torch.save(saved, folder / name)
    parameter = open_checkpoint(folder).parameters["up.weight"]
    assert "variance_row" not in parameter.states
    reason = parameter.refused["variance_row"]
    for part in ("'variance_row'", "isn't element-wise", "(4,)", name):
        assert part in reason
    with pytest.raises(UnsupportedError, match=r"up\.weight: optimizer state 'variance_row'"):
        convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_shapes_as_tuples(tmp_path: Path) -> None:
    """``param_shapes`` may hold plain tuples in place of ``torch.Size``."""
    run, model = NativeRun(stage=2, dp=2), model_of(SHAPES)
    folder = write_native(tmp_path, model, run)
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    saved["param_shapes"] = [{name: tuple(shape) for name, shape in group.items()} for group in saved["param_shapes"]]
    torch.save(saved, path)
    check_reads_back(folder, model, run)


def test_aliases_that_share_nothing(tmp_path: Path) -> None:
    """Under ZeRO the list of tied names counts, also where copies in the file hide that the storage was shared."""
    run, model = NativeRun(stage=2, dp=2), awkward_model()
    folder = write_native(tmp_path, model, run)
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    saved["module"]["head.weight"] = saved["module"]["head.weight"].clone()
    torch.save(saved, path)
    check_reads_back(folder, model, run)
