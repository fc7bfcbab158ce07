"""Bad input: a clear message that names the thing, on every rank, and an engine as it was before."""

from __future__ import annotations

import json
import pickle
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from checkpoints import STEP, Source
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine

from ucp_deepspeed.checkpoint import open_checkpoint, opening
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.loading.filling import Filling, _Filler
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DamagedCheckpointError,
    MismatchError,
    SaveError,
    SpecError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.testing.ranks import RankError, RankPool, fp16_on_cpu, get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.commit import _exchange, write_atomically
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]
GetSource = Callable[[str, Run, int], Source]

SAVED = Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay")
TARGET = Run("llama", tp=1, zero={"stage": 3}, precision="bf16", groups="decay")


def fingerprint(engine: Any) -> dict[str, bytes]:
    """Everything that a load could have touched, as bytes."""
    optimizer = engine_optimizer(engine)
    slots = optimizer.slots()
    held: dict[str, Any] = {f"master {index}": slot.master for index, slot in enumerate(slots)}
    held |= {
        f"{key} {index}": value for index, slot in enumerate(slots) for key, value in optimizer.state_of(slot).items()
    }
    held |= {f"weight {name}": getattr(param, "ds_tensor", param) for param, name in engine.param_names.items()}
    held |= {f"buffer {name}": buffer for name, buffer in engine.module.named_buffers()}
    scale = optimizer.loss_scale()
    rest = {
        "counters": (engine.global_steps, engine.global_samples, engine.skipped_steps),
        "groups": [
            {key: value for key, value in group.items() if key != "params"} for group in optimizer.base.param_groups
        ],
        "scheduler": engine.lr_scheduler.state_dict(),
        "scale": None if scale is None else dict(scale.values),
    }
    raw = {
        key: value.detach().float().numpy().tobytes() if isinstance(value, torch.Tensor) else pickle.dumps(value)
        for key, value in held.items()
    }
    return raw | {key: pickle.dumps(value) for key, value in rest.items()}


def failed_load(run: Run, load: str, tag: str | None) -> tuple[str, str, bool]:
    """On a rank: try to load; returns the error's class and text, and whether the engine is as it was."""
    with fp16_on_cpu():
        engine = build_engine(run)
        train_step(engine, run, 1)  # so that there are states to lose
        before = fingerprint(engine)
        try:
            engine.load_checkpoint(load, tag=tag)
        except UniversalCheckpointError as error:
            return type(error).__name__, str(error), fingerprint(engine) == before
    raise AssertionError("the load went through")


def check_refused(
    ranks: Ranks, run: Run, load: Path, error: type[UniversalCheckpointError], *parts: str, tag: str | None = None
) -> None:
    for name, message, untouched in ranks(2).run(failed_load, run, str(load), tag):
        assert name == error.__name__, message
        assert untouched
        for part in parts:
            assert part in message


@pytest.fixture
def copy(source: GetSource, tmp_path: Path) -> Path:
    """A copy of a TP2·DP2 ZeRO-1 checkpoint, to be damaged."""
    saved = source("zero1-bf16", SAVED, 4)
    copytree(saved.folder, tmp_path / "copy")
    return tmp_path / "copy"


def test_no_such_tag(copy: Path, ranks: Ranks) -> None:
    check_refused(
        ranks, TARGET, copy, CheckpointNotFoundError, "no tag 'step7'", f"tags there: global_step{STEP}", tag="step7"
    )


MLP = Run("mlp", zero={"stage": 1})


def load_each(run: Run, folders: list[str], tags: list[str | None]) -> tuple[str, str | None, int]:
    """On a rank: load this rank's tag of this rank's folder, while each sees another tag in ``latest``.

    Returns the error, the tag that was loaded, and the step that the engine is at.
    """
    engine, rank = build_engine(run), dist.get_rank()
    error, loaded = "", None
    try:
        with mock.patch.object(opening, "_read_latest", lambda _: f"global_step{rank + 1}"):
            loaded, _ = engine.load_checkpoint(folders[rank], tag=tags[rank])
    except UniversalCheckpointError as caught:
        error = f"{type(caught).__name__}: {caught}"
    return error, loaded and Path(loaded).parent.name, engine.global_steps


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tags of two steps; ``latest`` is the second."""
    folder = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        get_pool(2).run(train, MLP, step, save=str(folder))
    return folder


@pytest.mark.parametrize("load", ["auto", "always"])
def test_all_ranks_load_what_the_first_one_finds(load: str, two_steps: Path, ranks: Ranks) -> None:
    """A run that still goes on may move ``latest`` while ranks of the next read it."""
    run = replace(MLP, universal={"enabled": True, "load": load})
    found = ranks(2).run(load_each, run, [str(two_steps)] * 2, [None, None])
    assert found == [("", "global_step1", 1)] * 2


def test_ranks_that_name_different_tags(two_steps: Path, ranks: Ranks) -> None:
    for error, _, step in ranks(2).run(load_each, MLP, [str(two_steps)] * 2, ["global_step1", "global_step2"]):
        assert "ConfigError: ranks load different tags" in error and step == 0
        assert "global_step1 on rank 0, global_step2 on rank 1" in error


def test_ranks_whose_folders_hold_different_steps(two_steps: Path, ranks: Ranks, tmp_path: Path) -> None:
    copytree(two_steps / "global_step2", tmp_path / "global_step1")
    for error, _, step in ranks(2).run(load_each, MLP, [str(two_steps), str(tmp_path)], [None, None]):
        assert "MismatchError: ranks opened different checkpoints: step 1 in " in error and step == 0
        assert f"step 2 in {tmp_path / 'global_step1'} on rank 1" in error


def test_missing_rank_file(copy: Path, ranks: Ranks) -> None:
    name = "bf16_zero_pp_rank_1_mp_rank_01_optim_states.pt"
    (copy / f"global_step{STEP}" / name).unlink()
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, name, "TP2·DP2 ZeRO-1", "lacks 1 of 6 files")


@pytest.mark.parametrize("load", ["auto", "always"])
def test_files_of_two_saves(load: str, two_steps: Path, ranks: Ranks, tmp_path: Path) -> None:
    """On the same topology each rank of DeepSpeed's would go on from its own file's step."""
    copytree(two_steps, tmp_path / "copy")
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    copyfile(two_steps / "global_step1" / name, tmp_path / "copy" / "global_step2" / name)
    run = replace(MLP, universal={"enabled": True, "load": load})
    check_refused(ranks, run, tmp_path / "copy", DamagedCheckpointError, name, "is at step 1", "files of two saves")


def differ(run: Run, folder: str, changes: list[dict[str, Any]], arguments: list[dict[str, Any]]) -> str:
    """On a rank: build an engine and load, with settings and arguments of its own; what is raised."""
    rank = dist.get_rank()
    universal = {"enabled": True, "load": "always", **changes[rank]}
    with pytest.raises(ConfigError) as caught:
        build_engine(replace(run, universal=universal)).load_checkpoint(folder, **arguments[rank])
    return str(caught.value)


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        (
            [{}, {"shared_read_bytes": 0}],
            [{}, {}],
            "'universal_checkpoint' must be the same on all ranks: shared_read_bytes is 67108864 on rank 0 and 0 on rank 1",
        ),
        (
            [{}, {"save": {"async": True}, "optimizer_states": "reset"}],
            [{}, {}],
            "optimizer_states is 'restore' on rank 0 and 'reset' on rank 1, and so on (2 differences)",
        ),
        ([{}, {"load": "never"}], [{}, {}], "load is 'always' on rank 0 and 'never' on rank 1"),
        (
            [{}, {}],
            [{"load_optimizer_states": False}, {}],
            "'load_checkpoint' must be the same on all ranks: load_optimizer_states is False on rank 0 and True on rank 1",
        ),
    ],
    ids=["what is shared", "two settings", "load", "arguments"],
)
def test_ranks_that_want_different_things(
    changes: list[dict[str, Any]],
    arguments: list[dict[str, Any]],
    message: str,
    two_steps: Path,
    ranks: Ranks,
) -> None:
    """They used to wait for one another, or replicas ended in different states."""
    run = replace(MLP, zero={"stage": 0})
    for found in ranks(2).run(differ, run, str(two_steps), changes, arguments, timeout=60.0):
        assert message in found


MOMENTS = {"planned": (Filling, "check_files"), "agreed": (Filling, "run"), "read": (_Filler, "wait")}
"""The function that a load calls next at each of these moments."""


def load_of_files_that_change(run: Run, load: str, moment: str, how: str) -> tuple[str, bool]:
    """On a rank: load, while a file goes that the last rank reads, or the tag is saved again in one step.

    Returns the error, and whether the engine is as it was.
    """
    engine = build_engine(run)
    train_step(engine, run, 1)
    before = fingerprint(engine)
    owner, name = MOMENTS[moment]
    real = getattr(owner, name)

    def run_with_change(self: Any, *arguments: Any) -> Any:
        dist.barrier()  # the others have come so far too
        if dist.get_rank() == dist.get_world_size() - 1:
            if how == "gone":
                copies = [copy for slot in self.slots for plan in slot.buffers.values() for copy in plan.copies]
                Path(copies[-1].sources[0].buffer.path).rename(Path(load) / "gone")
            else:
                _exchange(Path(load) / "global_step1", Path(load) / "global_step2")
        dist.barrier()
        return real(self, *arguments)

    with mock.patch.object(owner, name, run_with_change):
        try:
            engine.load_checkpoint(load)
        except DamagedCheckpointError as error:
            return str(error), fingerprint(engine) == before
    raise AssertionError("the load went through")


@pytest.mark.parametrize("moment", ["planned", "agreed"])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_file_that_goes_while_ranks_load(
    stage: int, moment: str, two_steps: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """On one rank; the others used to wait for what it would have read."""
    late = moment == "agreed"
    for error, untouched in changed_load(stage, moment, "gone", two_steps, ranks, tmp_path):
        assert "optim_states.pt" in error and untouched != late
        assert ("is missing; the engine is filled in part" if late else "can't be read: No such file") in error


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_tag_that_is_saved_again_while_ranks_load(
    stage: int, moment: str, two_steps: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Counters, steps and rates used to come from one save and the tensors from the other."""
    for error, untouched in changed_load(stage, moment, "saved again", two_steps, ranks, tmp_path):
        assert "was changed while it was read" in error
        assert untouched == ("the engine is filled in part" not in error) == (moment == "planned")


def load_left_to_deepspeed(run: Run, load: str) -> str:
    """On a rank: load, while the tag is saved again when DeepSpeed has opened its first file."""
    engine, real, calls = build_engine(run), TorchCheckpointEngine.load, []

    def load_with_change(self: Any, path: str, *arguments: Any, **settings: Any) -> Any:
        calls.append(path)
        if len(calls) == 2:
            dist.barrier()
            if dist.get_rank() == 0:
                _exchange(Path(load) / "global_step1", Path(load) / "global_step2")
            dist.barrier()
        return real(self, path, *arguments, **settings)

    with (
        mock.patch.object(TorchCheckpointEngine, "load", load_with_change),
        pytest.raises(DamagedCheckpointError) as caught,
    ):
        engine.load_checkpoint(load)
    assert len(calls) >= 2
    return str(caught.value)


def test_a_tag_that_is_saved_again_while_deepspeed_loads_by_itself(
    two_steps: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Its weights used to come from one save and its optimizer's state from the other."""
    copytree(two_steps, tmp_path / "copy")
    for error in ranks(2).run(load_left_to_deepspeed, MLP, str(tmp_path / "copy"), timeout=60.0):
        assert "was changed while it was read" in error and "the engine may hold two saves' state" in error


class Keeper:
    """Holds what can't be copied, as trainers do."""

    def __init__(self) -> None:
        self.lock, self.names = threading.Lock(), list[str]()

    def keep(self, src: dict[str, torch.Tensor], dst: torch.nn.Module) -> None:
        """As ``custom_load_fn``; loads nothing."""
        self.names += src


def load_with_a_method(run: Run, load: str) -> int:
    """On a rank: how many names a method's object has been given, by a load of either kind."""
    engine, keeper = build_engine(run), Keeper()
    engine.load_checkpoint(load, custom_load_fn=keeper.keep)
    return len(keeper.names)


@pytest.mark.parametrize("load", ["always", "never"])
def test_a_method_as_custom_load_function_is_called_on_its_own_object(load: str, two_steps: Path, ranks: Ranks) -> None:
    run = replace(MLP, universal={"enabled": True, "load": load})
    assert all(ranks(2).run(load_with_a_method, run, str(two_steps)))


def changed_load(
    stage: int, moment: str, how: str, two_steps: Path, ranks: Ranks, tmp_path: Path
) -> list[tuple[str, bool]]:
    copytree(two_steps, tmp_path / "copy")
    universal = {"enabled": True, "load": "always", "shared_read_bytes": 0}
    run = replace(MLP, zero={"stage": stage}, universal=universal)
    return ranks(2).run(load_of_files_that_change, run, str(tmp_path / "copy"), moment, how, timeout=60.0)


@pytest.mark.parametrize("manifest", [True, False])
def test_truncated_rank_file(manifest: bool, copy: Path, ranks: Ranks) -> None:
    path = copy / f"global_step{STEP}" / "bf16_zero_pp_rank_0_mp_rank_01_optim_states.pt"
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    if not manifest:
        (path.parent / "ucp_manifest.json").unlink()
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, path.name, "truncated")


class Foreign:
    """Not on the allow-list."""


def test_pickle_with_a_foreign_class(copy: Path, ranks: Ranks) -> None:
    path = copy / f"global_step{STEP}" / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"client": Foreign()}, path)
    (path.parent / "ucp_manifest.json").unlink()
    hint = '"on_unreadable": "drop"'
    check_refused(ranks, TARGET, copy, UnsupportedError, f"client: {__name__}.Foreign", hint, "DeepSpeed reads them")
    run = replace(TARGET, universal={**(TARGET.universal or {}), "on_unreadable": "drop"})
    outcome = ranks(2).run(train, run, STEP, load=str(copy))[0]
    assert outcome.report is not None and outcome.report.unread == ("client",)
    assert "client" not in outcome.client_state and outcome.counters["global_steps"] == STEP
    saved["lr_scheduler"] = Foreign()
    torch.save(saved, path)
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, path.name, "Foreign", "refused")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ({"hidden": 64}, ["output_layer.weight: expected logical shape (48, 64), found (48, 48) in the checkpoint"]),
        ({"layers": 1}, ["decoder.layers.1.mlp.linear_fc2.weight: extra in the checkpoint"]),
        ({"layers": 3}, ["decoder.layers.2.mlp.linear_fc2.weight: missing in the checkpoint", "(48, 40)"]),
    ],
    ids=["hidden-size", "extra-layer", "missing-layer"],
)
def test_another_model(size: dict[str, int], expected: list[str], copy: Path, ranks: Ranks) -> None:
    check_refused(ranks, replace(TARGET, size=size), copy, MismatchError, *expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_engines_of_every_class_stay_as_they_were(stage: int, precision: Any, ranks: Ranks, copy: Path) -> None:
    target = replace(TARGET, tp=2, zero={"stage": stage}, precision=precision, size={"layers": 1})
    check_refused(ranks, target, copy, MismatchError, "extra in the checkpoint")


def test_all_problems_are_listed_at_once(copy: Path, ranks: Ranks) -> None:
    run = replace(TARGET, size={"hidden": 64})
    _, message, _ = ranks(2).run(failed_load, run, str(copy), None)[0]
    assert message.count("expected logical shape") == 15  # every parameter of two layers, the norms and both embeddings


SPECS = {
    "unknown-pattern": ("rules:\n  - {match: '**', pattern: shrad}\n", SpecError, "'shrad'"),
    "unmatched": (
        "rules:\n  - {match: 'decoder.**', pattern: replicate}\n",
        SpecError,
        "output_layer.weight: matches no rule",
    ),
    "ambiguous": (
        "rules:\n  - {match: '**', pattern: replicate}\n  - {match: 'output_*.weight', pattern: shard}\n",
        SpecError,
        "output_layer.weight: matches 2 rules",
    ),
}


@pytest.mark.parametrize("kind", SPECS)
def test_bad_spec(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """Found when the engine is built, and not when the first checkpoint is saved."""
    text, error, message = SPECS[kind]
    spec = tmp_path / "spec.yaml"
    spec.write_text(f"family: mine\n{text}")
    run = replace(TARGET, universal={"enabled": True, "spec": str(spec)})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, 0)
    assert isinstance(caught.value.original, error) and message in str(caught.value.original)


def test_a_spec_that_contradicts_what_was_recorded(copy: Path, tmp_path: Path) -> None:
    """The GPT flavour's spec fits a Llama's names, and would join its gate and up projections in another order."""
    with pytest.raises(MismatchError) as caught:
        UniversalView.of(open_checkpoint(copy), load_spec("megatron_core_gpt"))
    expected = "mlp.linear_fc1.weight: shard on dimension 0; recorded was shard on dimension 0 in parts 1:1"
    assert [problem.partition(".mlp")[0] for problem in caught.value.problems] == [
        "decoder.layers.0",
        "decoder.layers.1",
    ]
    assert all(expected in problem for problem in caught.value.problems)


def test_a_manifest_of_other_shapes(copy: Path) -> None:
    path = copy / f"global_step{STEP}" / "ucp_manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parameters"]["decoder.final_layernorm.weight"]["logical_shape"] = [96]
    path.write_text(json.dumps(manifest))
    with pytest.raises(
        MismatchError, match=r"decoder\.final_layernorm\.weight: logical shape \(48,\); recorded was \(96,\)"
    ):
        UniversalView.of(open_checkpoint(copy))


def test_remains_of_a_conversion_are_not_taken_for_nothing(copy: Path, ranks: Ranks) -> None:
    """DeepSpeed returns ``(None, None)`` where nothing was saved, and a script starts anew; here something was."""
    (copy / f"global_step{STEP}").rename(copy / ".global_step3.partial-here-1")
    (copy / "latest").write_text(".global_step3.partial-here-1")
    check_refused(ranks, TARGET, copy, DamagedCheckpointError, "interrupted conversion")


def test_never_opens_nothing(copy: Path, ranks: Ranks) -> None:
    """A file that our reader can't open is loaded where DeepSpeed can open it."""
    path = copy / f"global_step{STEP}" / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"client": Foreign()}, path)
    run = replace(SAVED, universal={"enabled": True, "load": "never"})
    outcome = ranks(4).run(train, run, STEP, load=str(copy))
    assert outcome[0].counters["global_steps"] == STEP and outcome[0].report is None


def test_universal_load_switched_off(copy: Path, ranks: Ranks) -> None:
    """``"load": "never"`` leaves even a hopeless load to DeepSpeed."""
    run = replace(TARGET, universal={"enabled": True, "load": "never"})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, STEP, load=str(copy))
    assert not isinstance(caught.value.original, UniversalCheckpointError)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enabled": True, "sepc": "auto"}, "universal_checkpoint.sepc: unknown key"),
        ({"enabled": "yes"}, "universal_checkpoint.enabled"),
        ({"enabled": True, "load": "sometimes"}, "universal_checkpoint.load"),
    ],
)
def test_bad_config_block(block: dict[str, Any], message: str, ranks: Ranks) -> None:
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, Run("mlp", universal=block), 0)
    assert isinstance(caught.value.original, ConfigError)
    assert message in str(caught.value.original)


def test_saving_over_a_universal_checkpoint(copy: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Its index would go before DeepSpeed's files at the next load, and what was trained since would be lost."""
    tag = f"global_step{STEP}"
    convert(UniversalView.of(open_checkpoint(copy)), tmp_path / "u" / tag)
    write_atomically(tmp_path / "u" / "latest", tag)
    before = sorted(path.name for path in (tmp_path / "u" / tag).iterdir())
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, TARGET, STEP, load=str(tmp_path / "u"), save=str(tmp_path / "u"))
    assert isinstance(caught.value.original, SaveError)
    assert f"{tmp_path / 'u' / tag} holds a universal checkpoint" in str(caught.value.original)
    assert sorted(path.name for path in (tmp_path / "u" / tag).iterdir()) == before
    stock = replace(TARGET, universal=None)  # which doesn't look
    ranks(2).run(train, stock, STEP, save=str(tmp_path / "u"))
    check_refused(ranks, TARGET, tmp_path / "u", DamagedCheckpointError, "holds two checkpoints", "ucp_index.json")


def test_two_universal_loads_at_once(ranks: Ranks) -> None:
    run = replace(TARGET, config={"checkpoint": {"load_universal": True}})
    with pytest.raises(RankError) as caught:
        ranks(2).run(train, run, 0)
    assert isinstance(caught.value.original, ConfigError)
    assert "'checkpoint.load_universal' and 'universal_checkpoint' are two ways to load" in str(caught.value.original)
