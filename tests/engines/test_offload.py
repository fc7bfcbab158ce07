"""Settings that move tensors, or keep second copies of them: offload, hpZ, persistent parameters, accumulation in fp32.

None of them changes what a checkpoint holds, but each has copies of its own that a load must refresh. NVMe is left to
DeepSpeed, or refused: its universal checkpointing skips the load of the optimizer there, without a word
(``runtime/engine.py:4456``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from checkpoints import LAST_STEP, STEP, Source, differences, warnings_of_building
from deepspeed import comm as dist
from deepspeed.runtime.superoffload.superoffload_stage3 import SuperOffloadOptimizer_Stage3
from deepspeed.runtime.zenflow.zenflow_stage_1_and_2 import ZenFlowZeroOptimizerParallel
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from nvme import nvme_as_files, nvme_run

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.optimizers.zero3 import Zero3Optimizer
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, batch_of, build_engine, train, train_step
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]
Sources = Callable[[str, Run, int], Source]

CPU = {"device": "cpu", "pin_memory": False}
FROZEN = ("linear_in.weight",)
PLAIN = Run("mlp", zero={"stage": 1}, precision="bf16", frozen=FROZEN)

SETTINGS: dict[str, Mapping[str, Any]] = {
    "zero-1, offloaded": {"stage": 1, "offload_optimizer": CPU},
    "zero-2, offloaded": {"stage": 2, "offload_optimizer": CPU},
    "zero-3, offloaded": {"stage": 3, "offload_optimizer": CPU},
    "zero-3, weights offloaded": {"stage": 3, "offload_param": CPU},
    "zero-3, both offloaded": {"stage": 3, "offload_optimizer": CPU, "offload_param": CPU, "sub_group_size": 600},
    "zero-3, hpZ": {"stage": 3, "zero_hpz_partition_size": 2},
    "zero-3, all persistent": {"stage": 3, "stage3_param_persistence_threshold": 10**6},
    "zero-3, none persistent": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def run_with(setting: str, **changes: Any) -> Run:
    """The plain run with one of the settings."""
    return replace(PLAIN, zero=SETTINGS[setting], **changes)


class Reloaded(NamedTuple):
    """The result of `reload`: the loss of a forward pass right after the load, and the later losses by step."""

    first: float
    losses: dict[int, float]


def reload(run: Run, load: str, save: str) -> Reloaded:
    """On a rank: train an engine that begins elsewhere, load into it, save at once, and go on."""
    engine = build_engine(replace(run, seed=5, universal={"enabled": True, "load": "always"}))
    for step in (1, 2):
        train_step(engine, run, step)
    engine.load_checkpoint(load)
    first = loss_of_forward(engine, run, STEP + 1)
    engine.save_checkpoint(save)
    losses = {step: train_step(engine, run, step) for step in range(STEP + 1, LAST_STEP + 1)}
    engine.destroy()
    return Reloaded(first, losses)


def loss_of_forward(engine: Any, run: Run, step: int) -> float:
    """Return the loss that `train_step` would return, without a step."""
    tokens = batch_of(run, step).chunk(dist.get_world_size())[dist.get_rank()]
    engine.eval()
    with torch.no_grad():
        total = engine(tokens[:, :-1], tokens[:, 1:]).float().clone()
    engine.train()
    dist.all_reduce(total)
    return float(total) / dist.get_world_size()


def check_reload(ranks: Ranks, source: Source, run: Run, folder: Path) -> None:
    """Nothing differs, and the first forward pass has the source's loss bit for bit, so all weights are the source's."""
    found = ranks(source.world_size).run(reload, run, str(source.folder), str(folder))[0]
    assert found.first == found.losses[STEP + 1] == source.losses[STEP + 1]
    assert differences(source.folder, folder) == []
    assert max(abs(found.losses[step] - source.losses[step]) for step in found.losses) < 2e-4


@pytest.mark.parametrize("setting", SETTINGS)
def test_as_target(setting: str, source: Sources, ranks: Ranks, tmp_path: Path) -> None:
    """From ZeRO-1 into an engine that has trained: ZeRO 1 → 3 fails in DeepSpeed, which restores no frozen parameter either."""
    check_reload(ranks, source("plain_bf16", PLAIN, 4), run_with(setting), tmp_path)


@pytest.mark.parametrize("setting", SETTINGS)
def test_as_source(setting: str, source: Sources, ranks: Ranks, tmp_path: Path) -> None:
    """Into ZeRO-2 without any of it, which in DeepSpeed no ZeRO-3 checkpoint can be loaded into."""
    saved = source(setting.replace(", ", "_").replace(" ", "_"), run_with(setting), 4)
    check_reload(ranks, saved, replace(PLAIN, zero={"stage": 2, "round_robin_gradients": True}), tmp_path)


@pytest.mark.nccl_like
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_offload_on_another_number_of_ranks(precision: Any, source: Sources, ranks: Ranks, tmp_path: Path) -> None:
    """'The checkpoint being loaded used a DP world size of …': what DeepSpeed says to another number of ranks."""
    saved = source(f"plain_{precision}", replace(PLAIN, precision=precision), 4)
    folder = saved.folder
    for setting, world_size in (("zero-3, both offloaded", 2), ("zero-1, offloaded", 4), ("zero-3, offloaded", 2)):
        again = tmp_path / setting.replace(", ", "_")
        run = run_with(setting, precision=precision)
        found = ranks(world_size).run(reload, run, str(folder), str(again))[0]
        folder = again
        assert differences(saved.folder, folder) == []
        assert abs(found.first - saved.losses[STEP + 1]) < {"fp32": 2e-6, "bf16": 2e-3}[precision]


def test_offload_with_an_optimizer_of_the_users(ranks: Ranks, source: Sources, tmp_path: Path) -> None:
    """``momentum_buffer`` is a KeyError in DeepSpeed's conversion and in its ZeRO-3 load (``stage3.py:3665``)."""
    client = {"zero_force_ds_cpu_optimizer": False}
    run = replace(PLAIN, optimizer=("SGD", {"lr": 0.05, "momentum": 0.9}), config=client)
    saved = source("sgd_bf16", replace(run, zero=SETTINGS["zero-2, offloaded"]), 4)
    check_reload(ranks, saved, replace(run, zero=SETTINGS["zero-3, both offloaded"]), tmp_path / "a")
    check_reload(ranks, saved, replace(run, zero={"stage": 3}), tmp_path / "b")


@pytest.mark.nccl_like
def test_accumulation_in_fp32(ranks: Ranks, source: Sources, tmp_path: Path) -> None:
    """``BF16_Optimizer`` to ZeRO-3 and stage 0 and back, which DeepSpeed can't; its buffers are padded in a way of their own."""
    run = replace(PLAIN, config={"data_types": {"grad_accum_dtype": "fp32"}}, groups="decay")
    saved = source("accumulated_bf16", run, 4)
    assert saved.outcomes[0].optimizer == "BF16_Optimizer"
    folder = saved.folder
    plain = replace(PLAIN, groups="decay")
    for name, target in {
        "3": replace(plain, zero={"stage": 3}),
        "0": replace(plain, zero={"stage": 0}),
        "accumulated": run,
    }.items():
        found = ranks(4).run(reload, target, str(folder), str(tmp_path / name))[0]
        folder = tmp_path / name
        assert differences(saved.folder, folder) == [] and found.first == saved.losses[STEP + 1]
    assert found.losses == {step: saved.losses[step] for step in found.losses}


def train_on_nvme(run: Run, save: str | None = None) -> None:
    """On a rank: `train`, with `nvme_as_files`."""
    with nvme_as_files():
        train(run, STEP, save=save)


def test_nvme_is_refused_by_name_where_more_is_asked_for_than_deepspeed_does(ranks: Ranks, tmp_path: Path) -> None:
    for block in ({"load": "always"}, {"optimizer_states": "reset"}, {"save": {"async": True}}):
        with pytest.raises(RankError) as caught:
            ranks(1).run(train_on_nvme, nvme_run(tmp_path / "nvme", universal={"enabled": True, **block}))
        message = str(caught.value.original)
        assert isinstance(caught.value.original, UnsupportedError)
        assert "zero_optimization.offload_optimizer.device: nvme is not supported" in message
        assert '"load": "auto", without policies' in message.splitlines()[-1]


def load_on_nvme(run: Run, folder: str) -> list[str]:
    """On a rank: what is told of an engine whose states are on NVMe, when it is built and when it loads."""
    with nvme_as_files():
        told = warnings_of_building(run)
        engine = build_engine(run)
        with pytest.raises(UnsupportedError) as caught:
            engine.load_checkpoint(folder)
        engine.destroy()
    return [*told, str(caught.value)]


def test_nvme_loads_no_universal_checkpoint_and_no_other_topology(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed would say that no universal checkpoint is there. The advice in the message works."""
    plain, run = Run("mlp", size={"ffn": 30001}, zero={"stage": 1}), nvme_run(tmp_path / "nvme")
    ranks(1).run(train, plain, 1, save=str(tmp_path / "a"))
    convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "u")
    for folder, why in (("u", f"{tmp_path / 'u'} is a universal checkpoint"), ("a", "was saved on")):
        for warning, error in ranks(1).run(load_on_nvme, run, str(tmp_path / folder)):
            assert "offload_optimizer.device: nvme" in warning and "left to DeepSpeed alone (no manifest" in warning
            assert (
                why in error
                and "offload_optimizer.device: nvme" in error
                and error.splitlines()[-1].startswith("change that")
            )
    changed = replace(run, zero={"stage": 3})
    for folder in "ua":
        ranks(1).run(train, changed, 1, load=str(tmp_path / folder), save=str(tmp_path / f"{folder}3"))
        assert differences(tmp_path / "a", tmp_path / f"{folder}3") == []


def test_a_checkpoint_from_nvme_is_refused_by_name(ranks: Ranks, tmp_path: Path) -> None:
    """Its masters are empty tensors; what they were is in files that no tool of DeepSpeed's converts."""
    ranks(2).run(train_on_nvme, nvme_run(tmp_path / "nvme", universal=None), str(tmp_path / "a"))
    assert (tmp_path / "a" / f"global_step{STEP}" / "offloaded_tensors").is_dir()
    with pytest.raises(
        UnsupportedError, match=r"no master weights: they were on NVMe \(offload_optimizer.device: nvme\)"
    ):
        open_checkpoint(tmp_path / "a")


def test_nvme_that_a_run_was_too_small_for(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed leaves sub-groups below 1 MiB in memory: then the files hold everything."""
    small = replace(nvme_run(tmp_path / "nvme", universal=None), size={})
    ranks(2).run(train_on_nvme, small, str(tmp_path / "a"))
    target = Run("mlp", zero={"stage": 2})
    ranks(4).run(train, target, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"))
    assert differences(tmp_path / "a", tmp_path / "b") == []


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"params_in_nvme_and_cpu": True}, "offload_param.device: nvme"),
        ({"offload_optimizer": True, "partial_offload": 0.5}, "offload_optimizer.ratio below 1"),
        ({"zenflow": True}, "zenflow"),
        ({"zero_quantized_nontrainable_weights": True}, "zero_quantized_nontrainable_weights"),
    ],
)
def test_settings_are_refused_by_name(settings: Mapping[str, Any], name: str) -> None:
    """The last needs CUDA kernels; engines with the others are built in ``test_never_worse.py``."""
    zero = SimpleNamespace(
        **{
            "swap_optimizer": False,
            "params_in_nvme_and_cpu": False,
            "offload_optimizer": False,
            "partial_offload": 1.0,
            "zero_quantized_nontrainable_weights": False,
            "optimizer": None,
            **settings,
        }
    )
    with pytest.raises(UnsupportedError, match=f"zero_optimization.{name} is not supported"):
        Zero3Optimizer(SimpleNamespace(optimizer=zero, param_names={}))


class MiCS_Optimizer(DeepSpeedZeroOptimizer_Stage3):  # noqa: N801
    """A stand-in: DeepSpeed has removed it (0.19.8 refuses ``mics_shard_size`` itself)."""


@pytest.mark.parametrize("kind", [MiCS_Optimizer, ZenFlowZeroOptimizerParallel, SuperOffloadOptimizer_Stage3])
def test_classes_that_keep_their_state_elsewhere_are_refused_by_name(kind: type) -> None:
    """They derive from classes that are supported, and need CUDA or compiled code to be built."""
    with pytest.raises(UnsupportedError, match=f"optimizer class {kind.__name__} is not supported"):
        engine_optimizer(SimpleNamespace(optimizer=object.__new__(kind)))


@pytest.mark.parametrize("stage", [2, 3])
def test_states_of_another_type_than_the_masters(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's Adam for CPUs keeps fp32 states of bf16 masters, also on an engine that hasn't stepped."""
    precise = {"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}
    run = replace(PLAIN, zero={"stage": stage, "offload_optimizer": CPU}, config=precise, fused=True)
    ranks(2).run(train, run, STEP, save=str(tmp_path / "a"))
    states = open_checkpoint(tmp_path / "a").parameters["gain"].states
    assert states == {"fp32": "BF16", "exp_avg": "F32", "exp_avg_sq": "F32"}
    ranks(1).run(train, run, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def load_when_offloaded(run: Run, folder: str, save: str, failing: bool = False) -> tuple[str, dict[int, float]]:
    """Offload all states after a step, load, save; return what the load raised, and the later losses. With ``failing`` rank 1
    finds no memory to reload them."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    engine.offload_states(pin_memory=False)
    if failing and dist.get_rank() == 1:

        def reload_states(non_blocking: bool = False) -> None:
            raise torch.OutOfMemoryError

        engine.optimizer.reload_states = reload_states
    try:
        engine.load_checkpoint(folder)
    except Exception as error:
        return f"{type(error).__name__}: {error}", {}
    engine.save_checkpoint(save)
    engine.reload_states()
    return "", {step: train_step(engine, run, step) for step in range(STEP + 1, LAST_STEP + 1)}


def save_when_offloaded(run: Run, folder: str, back: bool) -> None:
    """Save after `STEP` steps, before which all states were offloaded, and are reloaded or not."""
    engine = build_engine(run)
    for step in range(1, STEP + 1):
        if step == STEP and back:
            engine.offload_states(pin_memory=False)
            engine.reload_states()
        train_step(engine, run, step)
    if not back:
        engine.offload_states(pin_memory=False)
    engine.save_checkpoint(folder)


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("load", ["auto", "always"])
def test_an_engine_whose_states_are_offloaded(stage: int, load: str, ranks: Ranks, tmp_path: Path) -> None:
    """By ``engine.offload_states``: they are reloaded. DeepSpeed's load at ZeRO-3 ends in an IndexError."""
    run = Run("mlp", zero={"stage": stage}, precision="bf16", fused=True, universal={"enabled": True, "load": load})
    whole = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "a"), save_at=STEP)[0].losses
    said, losses = ranks(2).run(load_when_offloaded, run, str(tmp_path / "a"), str(tmp_path / "b"))[0]
    assert (said, losses) == ("", {step: loss for step, loss in whole.items() if step > STEP})
    assert differences(tmp_path / "a", tmp_path / "b") == []
    if (stage, load) == (3, "auto"):
        for said, _ in ranks(2).run(load_when_offloaded, run, str(tmp_path / "a"), "", failing=True):
            assert "OutOfMemoryError" in said


@pytest.mark.parametrize("back", [False, True])
def test_a_checkpoint_of_an_engine_whose_states_were_offloaded(back: bool, ranks: Ranks, tmp_path: Path) -> None:
    """ZeRO-3 keeps copies of the states beside them, which are in the files too and out of date."""
    run = Run("mlp", zero={"stage": 3}, precision="bf16", fused=True)
    whole = ranks(2).run(train, run, LAST_STEP, save=str(tmp_path / "a"), save_at=STEP)[0].losses
    ranks(2).run(save_when_offloaded, run, str(tmp_path / "b"), back)
    assert differences(tmp_path / "a", tmp_path / "b") == []
    for world_size, stage in ((2, 3), (1, 1)):
        target = replace(run, zero={"stage": stage})
        losses = ranks(world_size).run(train, target, LAST_STEP, load=str(tmp_path / "b"))[0].losses
        assert max(abs(losses[step] - whole[step]) for step in losses) < (1e-2 if stage == 1 else 1e-12)
