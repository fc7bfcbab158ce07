"""Ranks that see or want different things, and files that change while ranks load: all ranks load the same, or all refuse."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from shutil import copyfile, copytree
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine
from refusals import Ranks, check_refused, fingerprint

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint, opening
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.engine.loading.filling import Filling, _Filler
from ucp_deepspeed.engine.saving.kept_errors import PARTS
from ucp_deepspeed.errors import (
    ConfigError,
    DamagedCheckpointError,
    SaveError,
    UniversalCheckpointError,
)
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step
from ucp_deepspeed.transfer.commit import _exchange

MLP = Run("mlp", zero={"stage": 1})


def load_each(run: Run, folders: list[str], tags: list[str | None]) -> tuple[str, str | None, int]:
    """On a rank: load this rank's tag of this rank's folder, while each sees another tag in ``latest``.

    Returns the error, the tag that was loaded, and the step that the engine is at.
    """
    engine, rank = build_engine(run), dist.get_rank()
    error, loaded = "", None
    try:
        with mock.patch.object(opening, "read_latest", lambda _: f"global_step{rank + 1}"):
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


@pytest.mark.parametrize("load", ["auto", "always"])
def test_files_of_two_saves(load: str, two_steps: Path, ranks: Ranks, tmp_path: Path) -> None:
    """On the same topology each rank of DeepSpeed's would go on from its own file's step. A manifest tells each file."""
    copytree(two_steps, tmp_path / "copy")
    name = "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    copyfile(two_steps / "global_step1" / name, tmp_path / "copy" / "global_step2" / name)
    run = replace(MLP, universal={"enabled": True, "load": load, "fallback": "none"})
    check_refused(ranks, run, tmp_path / "copy", DamagedCheckpointError, name, "isn't the file that ucp_manifest.json")
    (tmp_path / "copy" / "global_step2" / MANIFEST_NAME).unlink()
    check_refused(ranks, run, tmp_path / "copy", DamagedCheckpointError, name, "is at step 1", "files of two saves")


def load_and_hear(run: Run, folder: str, tag: str) -> list[str]:
    """On a rank: load, and return what is told of files of two saves, in warnings or in an error."""
    lines, handler = list[str](), logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ucp_deepspeed").addHandler(handler)
    engine = build_engine(run)
    try:
        engine.load_checkpoint(folder, tag=tag)
    except DamagedCheckpointError as error:
        lines.append(f"error: {error}")
    finally:
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
        engine.destroy()
    return [line for line in lines if "another run" in line or "another save" in line or "two saves" in line]


@pytest.mark.parametrize("load", ["auto", "always"])
@pytest.mark.parametrize(
    ("run", "told"),
    [
        (Run("mlp", zero={"stage": 1}, precision="bf16"), "error: "),
        (Run("mlp", zero={"stage": 2}, config={"gradient_clipping": 0.1}, groups="decay"), "error: "),
        (Run("tied", pp=2, zero={"stage": 1}, config={"gradient_clipping": 0.0}), "error: "),
        (Run("gpt", pp=2, zero={"stage": 0}, precision="bf16"), "error: "),
        (Run("moe", zero={"stage": 1}, precision="bf16"), "error: "),
        (Run("mlp", zero={"stage": 3}, precision="bf16"), "begun anew, it is of another save"),
    ],
    ids=["bf16", "fp32", "tied pipeline", "bf16 pipeline", "experts", "zero-3"],
)
def test_optimizer_files_of_another_step_without_a_manifest(
    run: Run, told: str, load: str, ranks: Ranks, tmp_path: Path
) -> None:
    """DeepSpeed alone saved both steps; nothing is told of what it saved together."""
    for step in (2, 4):
        ranks(2).run(train, replace(run, universal=None), step, save=str(tmp_path))
    loading = replace(run, universal={"enabled": True, "load": load})
    for step in (2, 4):
        assert not any(ranks(2).run(load_and_hear, loading, str(tmp_path), f"global_step{step}", timeout=60.0))
    for path in (tmp_path / "global_step2").glob("*optim_states.pt"):
        copyfile(path, tmp_path / "global_step4" / path.name)
    found = ranks(2).run(load_and_hear, loading, str(tmp_path), "global_step4", timeout=60.0)
    assert any(told in line for lines in found for line in lines), found


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
                copies = [copy for slot in self.planned.slots for plan in slot.buffers.values() for copy in plan.copies]
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
    told = changed_load(stage, moment, "gone", two_steps, ranks, tmp_path)
    assert late or all(untouched for _, untouched in told)
    for error, _ in told:
        assert "optim_states.pt" in error
        assert ("is missing; the engine may be filled in part" if late else "can't be read: No such file") in error


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_tag_that_is_saved_again_while_ranks_load(
    stage: int, moment: str, two_steps: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Counters, steps and rates used to come from one save and the tensors from the other."""
    for error, untouched in changed_load(stage, moment, "saved again", two_steps, ranks, tmp_path):
        assert "was changed while it was read" in error
        assert ("the engine may be filled in part" not in error) == (moment == "planned")
        assert untouched or moment != "planned"


def cut_second_file(folder: Path) -> None:
    """Begin to write an optimizer file of a tag again, as a save in place does."""
    path = folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:1000])


def exchange_tags(folder: Path) -> None:
    _exchange(folder / "global_step1", folder / "global_step2")


def load_left_to_deepspeed(run: Run, load: str, change: Callable[[Path], None]) -> str:
    """On a rank: load, while the tag is changed when DeepSpeed has opened its first file."""
    engine, real, calls = build_engine(run), TorchCheckpointEngine.load, []

    def load_with_change(self: Any, path: str, *arguments: Any, **settings: Any) -> Any:
        calls.append(path)
        if len(calls) == 2:
            dist.barrier()
            if dist.get_rank() == 0:
                change(Path(load))
            dist.barrier()
        return real(self, path, *arguments, **settings)

    with (
        mock.patch.object(TorchCheckpointEngine, "load", load_with_change),
        pytest.raises(DamagedCheckpointError) as caught,
    ):
        engine.load_checkpoint(load)
    assert len(calls) >= 2
    return str(caught.value)


@pytest.mark.parametrize("change", [exchange_tags, cut_second_file])
def test_a_tag_that_is_saved_again_while_deepspeed_loads_by_itself(
    change: Callable[[Path], None], two_steps: Path, ranks: Ranks, tmp_path: Path
) -> None:
    """Its weights used to come from one save and its optimizer's state from the other, or torch told of an archive in pieces."""
    copytree(two_steps, tmp_path / "copy")
    run = replace(MLP, universal={"enabled": True, "fallback": "none"})
    for error in ranks(2).run(load_left_to_deepspeed, run, str(tmp_path / "copy"), change, timeout=60.0):
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


def load_where_rank_1_fails(run: Run, load: str, where: str) -> str:
    """On a rank: what it is told when the user's function, or the scheduler, raises on rank 1 after the engine was filled."""
    engine = build_engine(run)

    def fail(*_: Any, **__: Any) -> None:
        if dist.get_rank() == 1:
            raise KeyError("planted")

    if where == "scheduler":
        engine.lr_scheduler.load_state_dict = fail
    with pytest.raises((KeyError, UniversalCheckpointError)) as caught:
        engine.load_checkpoint(load, custom_load_fn=fail if where == "function" else None)
    return repr(caught.value)


@pytest.mark.parametrize("where", ["function", "scheduler"])
def test_a_users_error_on_one_rank_is_raised_on_all(where: str, two_steps: Path, ranks: Ranks) -> None:
    """The others used to wait for ever."""
    run = replace(MLP, universal={"enabled": True, "load": "always"})
    other, own = ranks(2).run(load_where_rank_1_fails, run, str(two_steps), where, timeout=60.0)
    assert own == "KeyError('planted')" and "rank 1: KeyError: 'planted'" in other


def load_with_a_fault(run: Run, folders: list[str | None], function: str) -> str:
    """On a rank: what it is told when rank 1 alone meets a bug in a function, or ranks name folders of their own."""
    engine, rank = build_engine(run), dist.get_rank()
    full = f"ucp_deepspeed.engine.{function}"
    planted = mock.patch(full, side_effect=KeyError("planted")) if function and rank == 1 else nullcontext()
    with planted, pytest.raises((KeyError, UniversalCheckpointError)) as caught:
        engine.load_checkpoint(folders[rank])
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("run", "function"),
    [
        (MLP, "loading.finding.only_evaluates"),
        (MLP, "loading.finding.files_missing"),
        (MLP, "loading.load.engine_optimizer"),
        (MLP, "random_state._live_streams"),
        (Run("llama", tp=2), "model.ModelNames"),
        (Run("llama", pp=2), "model._live_layouts"),
    ],
    ids=["before", "first round", "second round", "random streams", "tensor-parallel ranks", "stages"],
)
def test_a_bug_on_one_rank_is_raised_on_all(run: Run, function: str, two_steps: Path, ranks: Ranks) -> None:
    """The others used to wait for ever."""
    run = replace(run, universal={"enabled": True, "load": "always"})
    other, own = ranks(2).run(load_with_a_fault, run, [str(two_steps)] * 2, function, timeout=60.0)
    assert own == "KeyError: 'planted'"
    assert other == f"UniversalCheckpointError: {two_steps} can't be loaded: rank 1: KeyError: 'planted'"


def save_with_a_fault(run: Run, folder: str, function: str) -> str:
    """On a rank: what it is told when rank 1 alone meets a bug in a function while it saves."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    full = f"ucp_deepspeed.engine.{function}"
    planted = mock.patch(full, side_effect=KeyError("planted")) if dist.get_rank() == 1 else nullcontext()
    with planted, pytest.raises((KeyError, UniversalCheckpointError)) as caught:
        engine.save_checkpoint(folder)
    engine.destroy()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize("in_background", [False, True])
@pytest.mark.parametrize(
    "function",
    [
        "saving.save.engine_optimizer",
        "saving.save.has_extra_states",
        "saving.save._parameters",
        "saving.save._settings",
        "differing_copies._own_copies",
        "differing_copies._numbers_of",
    ],
)
def test_a_bug_on_one_rank_ends_a_save_on_all(function: str, in_background: bool, ranks: Ranks, tmp_path: Path) -> None:
    """The others used to wait for ever: a pipeline's ranks tell one another several things."""
    universal = {"enabled": True, "save": {"async": in_background}}
    run = Run("tied", pp=2, config={"gradient_clipping": 0.0}, universal=universal)
    other, own = ranks(2).run(save_with_a_fault, run, str(tmp_path), function, timeout=60.0)
    assert own == "KeyError: 'planted'"
    assert other == f"SaveError: {tmp_path / 'global_step1'} can't be saved: rank 1: KeyError: 'planted'"
    assert not (tmp_path / "latest").exists()


def save_where_no_folder_can_be(run: Run, folder: str) -> str:
    """On a rank: what it is told when a file is where the first rank would make ``save_dir``."""
    engine = build_engine(run)
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(f"{folder}/file/saves", tag="b")
    return str(caught.value)


def test_a_folder_that_the_first_rank_cant_make_is_told_on_all(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    own, other = ranks(2).run(save_where_no_folder_can_be, MLP, str(tmp_path), timeout=60.0)
    assert "saves/b can't be saved, and 'latest' was not moved: [Errno 20] Not a directory" in own
    assert other == f"rank 0: {own}"


def save_what_deepspeed_cant(run: Run, folder: str, fault: str) -> str:
    """On a rank: what it is told when DeepSpeed's own save fails on rank 1; then a save that succeeds."""
    engine = build_engine(run)
    train_step(engine, run, 1)
    attributes = set(vars(engine.optimizer))
    blocked, faulty = Path(folder) / "b" / "zero_pp_rank_1_mp_rank_00_optim_states.pt", dist.get_rank() == 1
    if fault == "file":
        blocked.mkdir(parents=True, exist_ok=True)
    owner, name = {
        "weights": (type(engine.module), "state_dict"),
        "optimizer": (type(engine.optimizer), "state_dict"),
        "prologue": (type(engine.optimizer), "checkpoint_event_prologue"),
    }.get(fault, (None, ""))
    planted = owner and faulty and mock.patch.object(owner, name, side_effect=KeyError("planted"))
    engine.save_checkpoint(folder, tag="a")
    with planted or nullcontext(), pytest.raises(Exception) as caught:
        engine.save_checkpoint(folder, tag="b")
        ucp_deepspeed.wait_for_save()
    assert (Path(folder) / "latest").read_text() == "a" and not set(PARTS) & set(vars(engine))
    assert set(vars(engine.optimizer)) <= attributes
    dist.barrier()
    engine.save_checkpoint(folder, tag="c")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return f"{type(caught.value).__name__}: {caught.value}"


@pytest.mark.parametrize(
    ("fault", "in_background"),
    [
        *((fault, in_background) for fault in ("weights", "optimizer", "prologue") for in_background in (False, True)),
        ("file", False),
    ],
)
def test_what_fails_in_deepspeeds_save_on_one_rank_is_raised_on_all(
    fault: str, in_background: bool, ranks: Ranks, tmp_path: Path
) -> None:
    """The others used to wait for ever, at DeepSpeed's own barrier."""
    run = replace(MLP, universal={"enabled": True, "save": {"async": in_background}})
    run = replace(run, zero={"stage": 3}) if fault == "prologue" else run
    other, own = ranks(2).run(save_what_deepspeed_cant, run, str(tmp_path), fault, timeout=60.0)
    named = "Is a directory" if fault == "file" else "KeyError: 'planted'"
    assert f"{tmp_path / 'b'} can't be saved, and 'latest' was not moved: " in own or fault == "prologue"
    assert named in own and named in other and "rank 1: " in other and "rank 1: " not in own
    assert open_checkpoint(tmp_path).path.name == "c"


@pytest.mark.parametrize(("own", "kind"), [(None, "ConfigError"), ("nowhere", "CheckpointNotFoundError")])
def test_ranks_that_name_different_folders(own: str | None, kind: str, two_steps: Path, ranks: Ranks) -> None:
    for told in ranks(2).run(load_with_a_fault, MLP, [str(two_steps), own], "", timeout=60.0):
        assert told.startswith(f"{kind}: load_dir is {two_steps} on rank 0, and {own} on rank 1: ")
        assert told.endswith("name the same folder on all ranks, or one on each that holds the checkpoint")


def changed_load(
    stage: int, moment: str, how: str, two_steps: Path, ranks: Ranks, tmp_path: Path
) -> list[tuple[str, bool]]:
    copytree(two_steps, tmp_path / "copy")
    universal = {"enabled": True, "load": "always", "shared_read_bytes": 0}
    run = replace(MLP, zero={"stage": stage}, universal=universal)
    return ranks(2).run(load_of_files_that_change, run, str(tmp_path / "copy"), moment, how, timeout=60.0)
