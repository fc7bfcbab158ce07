"""Folders of ``torch.distributed.checkpoint`` that FSDP2 has saved: what they hold, and engines that resume from them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import deepspeed
import fsdp_runs
import pytest
import torch
from checkpoints import differences
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of

Ranks = Callable[[int], RankPool]

CONFIG: Mapping[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "universal_checkpoint": {"enabled": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A folder for each form, mesh and optimizer, which two or four ranks save once."""
    made: dict[tuple[str, ...], Path] = {}

    def get(ranks: Ranks, form: str, mesh: str = "fsdp", kind: str = "AdamW") -> Path:
        if (form, mesh, kind) not in made:
            made[form, mesh, kind] = folder = tmp_path_factory.mktemp("dcp") / form
            ranks(2 if mesh == "fsdp" else 4).run(fsdp_runs.save, str(folder), form, mesh, kind)
        return made[form, mesh, kind]

    return get


def start(stage: int, kind: str = "AdamW", config: Mapping[str, Any] | None = None) -> Any:
    reset_parallel_state()
    model = build_mlp(vocabulary=VOCABULARY, seed=1)
    optimizer = fsdp_runs.optimizer_of(model, kind)
    scheduler = fsdp_runs.schedule_of(optimizer)
    made = dict(CONFIG) | {"zero_optimization": {"stage": stage}} | dict(config or {})
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=scheduler, config=made)
    return engine


def resume(folder: str, stage: int, kind: str, states: tuple[str, ...], save: str | None = None) -> dict[str, Any]:
    """On a rank: load into an engine; all that it then holds, by torch's and DeepSpeed's own functions."""
    engine = start(stage, kind)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None
    if save is not None:
        engine.save_checkpoint(save)
    held = {}
    for name, parameter in engine.module.named_parameters():
        if stage == 0:  # DeepSpeed's functions know of no master then
            held[name, "fp32"] = parameter.detach()
            held |= {(name, state): engine.optimizer.state[parameter][state] for state in states}
        else:
            held[name, "fp32"] = safe_get_full_fp32_param(parameter)
            held |= {(name, state): safe_get_full_optimizer_state(parameter, state) for state in states}
    buffers = {(name, "weight"): value.clone() for name, value in engine.module.named_buffers() if name != "scratch"}
    groups = [{key: group[key] for key in ("lr", "weight_decay")} for group in engine.optimizer.param_groups]
    found = {
        "held": {key: value.clone() for key, value in (held | buffers).items()},
        "groups": groups,
        "client_state": client_state,
        "steps": engine.global_steps,
        "read": (engine.universal_checkpoint_report.bytes_read, engine.universal_checkpoint_report.bytes_needed),
        "schedule": engine.lr_scheduler.state_dict()["last_epoch"],
        "loss": float(engine(batch_of(Run(), 9)[:, :-1], batch_of(Run(), 9)[:, 1:])),
    }
    engine.destroy()
    gc.collect()
    return found


def expected(
    folder: Path, states: tuple[str, ...], home: str = "model.", optim: str = "optim."
) -> dict[Any, torch.Tensor]:
    read = fsdp_runs.read_by_torch(folder)
    model = build_mlp(vocabulary=VOCABULARY)
    found = {(name, "fp32"): read[f"{home}{name}"] for name, _ in model.named_parameters()}
    for name, _ in model.named_parameters():
        found |= {(name, state): read[f"{optim}state.{name}.{state}"] for state in states}
    return found | {(name, "weight"): read[f"{home}{name}"] for name, _ in model.named_buffers() if name != "scratch"}


def check_equal(found: Mapping[Any, torch.Tensor], wanted: Mapping[Any, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key].view_as(value), value), key


ADAM = ("exp_avg", "exp_avg_sq")


@pytest.mark.parametrize(
    ("form", "home", "optim"),
    [
        ("nested", "model.", "optim."),
        ("app", "app.model.", "app.optim."),
        ("flat", "model.", "optimizer."),
        ("top", "", "optimizer."),
        ("wrapped", "model._orig_mod.", "optim."),
    ],
)
def test_an_engine_of_another_topology_has_what_torch_reads(
    form: str, home: str, optim: str, saved: Callable[..., Path], ranks: Ranks
) -> None:
    folder = saved(ranks, form)
    stage, count = {"nested": (3, 2), "app": (1, 2), "flat": (2, 1), "top": (0, 1), "wrapped": (0, 1)}[form]
    for found in ranks(count).run(resume, str(folder), stage, "AdamW", ADAM):
        check_equal(found["held"], expected(folder, ADAM, home, optim))
        assert found["groups"] == [
            {"lr": 0.01 * (1 / 3), "weight_decay": 0.1},
            {"lr": 0.01 * (1 / 3), "weight_decay": 0.0},
        ]
        assert found["client_state"]["train_state"]["seen"] == [3, "a"]
        assert (found["steps"], found["schedule"]) == (2, 2)
        assert found["read"][0] == found["read"][1]


@pytest.mark.parametrize("mesh", ["hsdp", "tp"])
def test_meshes_of_two_dimensions(mesh: str, saved: Callable[..., Path], ranks: Ranks) -> None:
    folder = saved(ranks, "nested", mesh)
    (found,) = ranks(1).run(resume, str(folder), 0, "AdamW", ADAM)
    check_equal(found["held"], expected(folder, ADAM))


def test_momentum(saved: Callable[..., Path], ranks: Ranks) -> None:
    folder = saved(ranks, "nested", kind="SGD")
    for found in ranks(2).run(resume, str(folder), 1, "SGD", ("momentum_buffer",)):
        check_equal(found["held"], expected(folder, ("momentum_buffer",)))


def test_the_tools_agree_on_all_forms(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path, capsys: Any) -> None:
    folder = saved(ranks, "nested")
    assert differences(folder, saved(ranks, "app")) == []
    assert differences(folder, saved(ranks, "flat")) == []
    with pytest.raises(SystemExit) as left:
        main(["convert", str(folder), str(tmp_path / "universal"), "--quiet"])
    assert left.value.code == 0
    assert differences(folder, tmp_path / "universal") == []
    for arguments in (["inspect", str(folder)], ["plan", str(folder), "--dp", "3", "--zero", "1"]):
        with pytest.raises(SystemExit) as left:
            main(arguments)
        assert left.value.code == 0
    assert "torch.distributed.checkpoint" in capsys.readouterr().out


def test_saved_again_by_the_engine_it_is_equal(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    folder = saved(ranks, "nested")
    ranks(2).run(resume, str(folder), 2, "AdamW", ADAM, str(tmp_path / "saved"))
    (samples,) = differences(folder, tmp_path / "saved")
    assert samples.startswith("global_samples  None in A")  # DCP doesn't count them


def test_weights_alone_load_and_a_resume_says_why_it_cannot(saved: Callable[..., Path], ranks: Ranks) -> None:
    for form in ("weights", "numbered"):
        folder = saved(ranks, form)
        assert isinstance(open_checkpoint(folder).lacking, MismatchError)
        with pytest.raises(RankError, match="load_module_only=True"):
            ranks(1).run(resume, str(folder), 1, "AdamW", ())
        (found,) = ranks(1).run(only_weights, str(folder))
        home = "" if form == "weights" else "model."
        check_equal(found, expected(folder, (), home))


def only_weights(folder: str) -> dict[Any, torch.Tensor]:
    """On a rank: load the weights alone."""
    engine = start(1)
    engine.load_checkpoint(folder, load_module_only=True)
    held = {(name, "fp32"): value.detach().clone() for name, value in engine.module.named_parameters()}
    held |= {(name, "weight"): value.clone() for name, value in engine.module.named_buffers() if name != "scratch"}
    engine.destroy()
    return held
