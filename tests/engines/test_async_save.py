"""Saving in the background: what is written, in which order, what it costs, and who learns of a failure."""

from __future__ import annotations

import json
import resource
import shutil
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import LAST_STEP, STEP
from deepspeed import comm as dist
from deepspeed.runtime.checkpoint_engine import FastCheckpointEngine, TorchCheckpointEngine
from torch.utils._python_dispatch import TorchDispatchMode

import ucp_deepspeed
from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.config import SaveConfig
from ucp_deepspeed.engine.saving import background, save, snapshot
from ucp_deepspeed.errors import ConfigError, SaveError, UniversalCheckpointError
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import GLOBAL_BATCH, Run, build_engine, train, train_step

Ranks = Callable[[int], RankPool]

ASYNC = {"enabled": True, "save": {"async": True}}

RUNS = {
    "zero-0": (2, Run("mlp", zero={"stage": 0}, precision="bf16", universal=ASYNC)),
    "zero-1": (2, Run("llama", tp=2, zero={"stage": 1}, precision="bf16", groups="decay", universal=ASYNC)),
    "zero-2": (2, Run("mlp", zero={"stage": 2}, universal=ASYNC)),
    "zero-3": (2, Run("mlp", zero={"stage": 3}, precision="bf16", universal=ASYNC)),
    "pipeline": (2, Run("gpt", pp=2, zero={"stage": 1}, universal=ASYNC)),
    "experts, zero-0": (2, Run("moe", zero={"stage": 0}, universal=ASYNC)),
    "experts, zero-1": (2, Run("moe", zero={"stage": 1}, precision="bf16", universal=ASYNC)),
}

LARGE = Run("mlp", zero={"stage": 1}, size={"hidden": 120}, universal=ASYNC)
"""With files well above `FILE_LIMIT`, which those of the random state are below."""

FILE_LIMIT = 60_000
"""Bytes that a file may have where a full disk is simulated."""


def contents(folder: Path) -> dict[str, bytes]:
    """All files, by their path in the folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trained(run: Run, steps: int = STEP) -> Any:
    """An engine after so many steps."""
    engine = build_engine(run)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    return engine


@contextmanager
def held_back() -> Iterator[threading.Event]:
    """Let no file be written until the event is set."""
    gate, write = threading.Event(), snapshot.FileSnapshot.write

    def waiting(self: snapshot.FileSnapshot, folder: Path) -> None:
        assert gate.wait(60)
        write(self, folder)

    snapshot.FileSnapshot.write = waiting  # type: ignore[method-assign]
    try:
        yield gate
    finally:
        gate.set()
        snapshot.FileSnapshot.write = write  # type: ignore[method-assign]


def save_both_ways(run: Run, folder: str) -> None:
    """One state, synchronously into ``sync`` and in the background into ``async``, which training overtakes."""
    engine = trained(run)
    client_state = {"list": [1, 2], "tensor": torch.ones(3)}
    config = engine.universal_checkpoint_config
    engine.universal_checkpoint_config = config.model_copy(update={"save": SaveConfig()})
    assert engine.save_checkpoint(f"{folder}/sync", client_state=client_state) is True
    engine.universal_checkpoint_config = config
    with held_back():
        assert engine.save_checkpoint(f"{folder}/async", client_state=client_state) is True
        client_state["list"].append(3)
        client_state["tensor"] += 1
        train_step(engine, run, STEP + 1)
        torch.rand(1)
    ucp_deepspeed.wait_for_save()
    engine.destroy()


@pytest.mark.parametrize("name", RUNS)
def test_files_are_those_of_a_synchronous_save(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Byte for byte, sharing of storages included; nothing that happens after the call is in them."""
    world_size, run = RUNS[name]
    ranks(world_size).run(save_both_ways, run, str(tmp_path))
    expected, found = (contents(tmp_path / way) for way in ("sync", "async"))
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path] != found[path]] == []


def save_and_wait(run: Run, folder: str, tag: str | None = None) -> None:
    """One checkpoint at `STEP`."""
    engine = trained(run)
    engine.save_checkpoint(folder, tag=tag)
    ucp_deepspeed.wait_for_save()
    engine.destroy()


@pytest.mark.parametrize("stage", [1, 3])
def test_deepspeed_alone_loads_it(stage: int, ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": stage}, precision="bf16", universal=ASYNC)
    ranks(2).run(save_and_wait, run, str(tmp_path))
    alone = Run("mlp", zero={"stage": stage}, precision="bf16", universal=None)
    whole = ranks(2).run(train, alone, LAST_STEP)
    resumed = ranks(2).run(train, alone, LAST_STEP, load=str(tmp_path))
    for found, expected in zip(resumed, whole, strict=True):
        assert found.losses == {step: loss for step, loss in expected.losses.items() if step > STEP}


def save_three_times(run: Run, folder: str) -> list[Any]:
    """Return what a reader sees while a save is held back, and after the next one has begun."""
    engine, root, seen = trained(run, 1), Path(folder), list[Any]()
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    with held_back() as gate:
        engine.save_checkpoint(folder, tag="b")
        train_step(engine, run, 2)
        seen.append(((root / "latest").read_text(), list((root / "b").iterdir())))
        threading.Timer(0.2, gate.set).start()
        engine.save_checkpoint(folder, tag="c")
    seen.append((root / "b" / MANIFEST_NAME).is_file())
    path, _ = engine.load_checkpoint(folder)
    seen.append((Path(path).parent.name, engine.global_steps))
    engine.destroy()
    return seen


def test_latest_moves_last_and_saves_and_loads_wait(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, universal=ASYNC)
    for seen in ranks(2).run(save_three_times, run, str(tmp_path)):
        assert seen == [("a", []), True, ("c", 2)]
    assert (tmp_path / "latest").read_text() == "c"
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_tag_saved_again_replaces_the_old_and_keeps_what_is_not_of_it(ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(save_and_wait, Run("mlp", zero={"stage": 3}, universal=ASYNC), str(tmp_path), "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    ranks(2).run(save_and_wait, Run("mlp", zero={"stage": 1}, universal=ASYNC), str(tmp_path), "a")
    assert open_checkpoint(tmp_path).topology.zero_stage == 1
    names = {path.name for path in (tmp_path / "a").iterdir()}
    assert not [name for name in names if "zero_pp_rank_0" in name and "model_states" in name]
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"
    assert set(json.loads((tmp_path / "a" / MANIFEST_NAME).read_text())["files"]) == names - {
        MANIFEST_NAME,
        "notes.txt",
    }
    assert {path.name for path in tmp_path.iterdir()} == {"a", "latest", "zero_to_fp32.py", "zero_to_torch.py"}


OWN = ("ema_states.pt", "ucp_notes.txt", ".meta", "plain.txt", "layer_names.json")
"""Files that users may put beside the checkpoint; some of their names look like its own."""


def save_among_own_files(run: Run, folder: str) -> list[str]:
    """On a rank: save a tag twice, with files put into its folder while each save is under way."""
    engine = trained(run)
    for _ in range(2):
        with held_back() as go_on:
            engine.save_checkpoint(folder, tag="a")
            for name in OWN:
                (Path(folder) / "a" / name).write_text("mine")
            go_on.set()
        ucp_deepspeed.wait_for_save()
    engine.destroy()
    return sorted(path.name for path in (Path(folder) / "a").iterdir())


def test_files_of_the_users_are_kept(ranks: Ranks, tmp_path: Path) -> None:
    (found,) = ranks(1).run(save_among_own_files, RUNS["zero-2"][1], str(tmp_path))
    assert set(OWN) <= set(found)
    assert MANIFEST_NAME in found and open_checkpoint(tmp_path).run.global_steps == STEP


@pytest.mark.parametrize("tag", ["", ".", "..", "a/../.."])
def test_a_tag_that_names_no_folder_of_its_own(tag: str, ranks: Ranks, tmp_path: Path) -> None:
    with pytest.raises(RankError, match="names no folder of its own"):
        ranks(1).run(save_and_wait, RUNS["zero-2"][1], str(tmp_path / "runs"), tag)


def fail_once(run: Run, folder: str, failing: int, then: str) -> tuple[Any, str]:
    """A save that fails on one rank for want of space; what the next call raises, and what ``latest`` says then."""
    engine = trained(run, 1)
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    with held_back():
        engine.save_checkpoint(folder, tag="b")
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if dist.get_rank() == failing:
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, unlimited[1]))
    found, calls = (
        None,
        {
            "save": lambda: engine.save_checkpoint(folder, tag="c"),
            "load": lambda: engine.load_checkpoint(folder),
            "wait": ucp_deepspeed.wait_for_save,
        },
    )
    try:
        calls[then]()
    except SaveError as error:
        found = error
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    latest = (Path(folder) / "latest").read_text()
    ucp_deepspeed.wait_for_save()  # told once
    engine.save_checkpoint(folder, tag="d")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return found, latest


@pytest.mark.parametrize(("failing", "then"), [(0, "save"), (1, "save"), (1, "load"), (0, "wait")])
def test_a_failure_surfaces_on_all_ranks_at_the_next_call(
    failing: int, then: str, ranks: Ranks, tmp_path: Path
) -> None:
    """As on a full disk: torch's writer would end the process (``std::terminate``)."""
    outcomes = ranks(2).run(fail_once, LARGE, str(tmp_path), failing, then)
    for rank, (error, latest) in enumerate(outcomes):
        assert "b could not be saved, and 'latest' was not moved: OSError: [Errno 27] File too large" in str(error)
        assert ("rank" in str(error).split(":")[0]) == (rank != failing)
        assert latest == "a"
    assert (tmp_path / "latest").read_text() == "d"
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a", "d"}


def save_what_cant_be_pickled(run: Run, folder: str) -> str:
    """On one rank only; DeepSpeed's barriers come after."""
    engine = trained(run, 1)
    with pytest.raises(Exception) as caught:
        engine.save_checkpoint(
            folder, client_state={"function": lambda: dist.get_rank()} if dist.get_rank() == 0 else {}
        )
    engine.save_checkpoint(folder)
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


def test_what_cant_be_pickled_is_refused_at_once_on_all_ranks(ranks: Ranks, tmp_path: Path) -> None:
    run = Run("mlp", zero={"stage": 1}, universal=ASYNC)
    for message in ranks(2).run(save_what_cant_be_pickled, run, str(tmp_path)):
        assert "lambda" in message
    assert open_checkpoint(tmp_path).run.global_steps == 1
    assert not [path for path in tmp_path.rglob(".*")]


def save_where_nothing_can_be(run: Run, folder: str) -> str:
    """Into a folder whose name a file has."""
    engine = trained(run, 0)
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(f"{folder}/file/run")
    assert type(engine.checkpoint_engine) is TorchCheckpointEngine
    engine.destroy()
    return str(caught.value)


def test_a_folder_that_cant_be_made(ranks: Ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for message in ranks(2).run(save_where_nothing_can_be, Run("mlp", universal=ASYNC), str(tmp_path)):
        assert "can't be saved, and 'latest' was not moved" in message


def save_in_vain(run: Run, folder: str, tags: list[str]) -> str:
    """On a rank: a save that fails while DeepSpeed's own ``save_checkpoint`` runs, or before; then one that doesn't."""
    engine = trained(run, 1)
    with pytest.raises(SaveError) as caught:
        engine.save_checkpoint(folder, tag=tags[dist.get_rank()])
    assert "_copy_recovery_script" not in vars(engine)
    if dist.get_rank() == 0:
        (Path(folder) / "zero_to_fp32.py").rmdir()
    engine.save_checkpoint(folder, tag="a")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["b", "b"], "can't be saved, and 'latest' was not moved: IsADirectoryError"),
        (["b", "c"], "ranks save different tags into"),
        (["file", "file"], "file is a file; save under another tag"),
    ],
    ids=["what DeepSpeed writes itself", "different tags", "tag that is a file"],
)
def test_what_fails_between_barriers_is_told_on_all_ranks(
    tags: list[str], message: str, ranks: Ranks, tmp_path: Path
) -> None:
    """Rank 0 copies DeepSpeed's recovery scripts, which a full disk doesn't let it; the others used to wait for it."""
    (tmp_path / "zero_to_fp32.py").mkdir()
    (tmp_path / "file").write_text("")
    for found in ranks(2).run(save_in_vain, Run("mlp", universal=ASYNC), str(tmp_path), tags, timeout=60.0):
        assert message in found
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"a"}


def save_into_what_goes(run: Run, root: str, what: str, how: str, late: int) -> tuple[str, float]:
    """Rename or remove the save's folder, or the tag's in it, while a rank still has its files to write; returns what was told,
    and the seconds until then."""
    engine, folder = trained(run, 0), Path(root) / "tmp-1"
    begun = time.monotonic()
    with held_back() as gate:
        engine.save_checkpoint(str(folder), tag="a")
        if dist.get_rank() != late:
            gate.set()
            vars(engine)[background.OWN].written.wait()
        dist.barrier()
        if dist.get_rank() == 0:
            gone = folder / "a" if what == "tag" else folder
            shutil.rmtree(gone) if how == "removed" else gone.rename(gone.with_name("final"))
        dist.barrier()
        gate.set()
        with pytest.raises(SaveError) as caught:
            engine.save_checkpoint(f"{root}/next")
    engine.save_checkpoint(f"{root}/next")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value), time.monotonic() - begun


@pytest.mark.parametrize(
    ("what", "how", "late"),
    [("folder", "renamed", 0), ("folder", "renamed", 1), ("folder", "removed", 1), ("tag", "removed", 1)],
)
def test_a_folder_that_goes_while_it_is_written(what: str, how: str, late: int, ranks: Ranks, tmp_path: Path) -> None:
    """As Hugging Face's Trainer renamed ``tmp-checkpoint``: told at once on all ranks, and nothing is left, wherever it is."""
    told = ranks(2).run(save_into_what_goes, Run("mlp", universal=ASYNC), str(tmp_path), what, how, late)
    gone = tmp_path / "tmp-1" / ("a" if what == "tag" else "")
    for message, seconds in told:
        assert (
            f"{tmp_path}/tmp-1/a could not be saved, and 'latest' was not moved: {gone} was renamed or removed"
            in message
        )
        assert "call ucp_deepspeed.wait_for_save() before" in message and seconds < 20
    assert not [path for path in tmp_path.rglob("*") if path.name == "a" or path.name.startswith(".")]
    assert open_checkpoint(tmp_path / "next").run.global_steps == 0


def save_two_engines(run: Run, root: str, failing: int) -> dict[str, Any]:
    """The first engine's save fails on one rank, while the second saves and loads; then both into one folder."""
    first, found = trained(run, 0), dict[str, Any]()
    config = {
        "train_batch_size": GLOBAL_BATCH,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "zero_optimization": {"stage": 1},
        "universal_checkpoint": ASYNC,
    }
    second, *_ = deepspeed.initialize(model=build_mlp(), config=config)
    train_step(second, run, 1)
    with held_back():
        first.save_checkpoint(f"{root}/first", tag="t")
        second.save_checkpoint(f"{root}/second", tag="t")
        found["waiting"] = [vars(each)[background.OWN].is_alive() for each in (first, second)]
        if dist.get_rank() == failing:
            shutil.rmtree(next(Path(f"{root}/first").glob(".t.partial*")))
        dist.barrier()
    second.save_checkpoint(f"{root}/second", tag="u")
    second.load_checkpoint(f"{root}/second")
    found["steps"] = second.global_steps
    try:
        first.save_checkpoint(f"{root}/first", tag="u")
    except SaveError as error:
        found["first"] = str(error)
    for number, engine in enumerate((first, second)):
        engine.save_checkpoint(f"{root}/both", tag=str(number))
    ucp_deepspeed.wait_for_save()
    found["both"] = (Path(root) / "both" / "latest").read_text()
    for engine in (first, second):
        engine.destroy()
    return found


@pytest.mark.parametrize("failing", [0, 1])
def test_each_engine_has_a_save_of_its_own(failing: int, ranks: Ranks, tmp_path: Path) -> None:
    """One engine's failure is told to it, with its folder, and neither keeps the other from saving."""
    run = Run("mlp", universal=ASYNC)
    for found in ranks(2).run(save_two_engines, run, str(tmp_path), failing):
        assert found["waiting"] == [True, True] and found["steps"] == 1
        assert f"{tmp_path}/first/t could not be saved" in found["first"]
        assert found["both"] == "1"
    assert open_checkpoint(tmp_path / "second").path.name == "u"
    assert not (tmp_path / "first" / "latest").exists()
    assert not [path for path in tmp_path.rglob(".*")]


class Copied(TorchDispatchMode):
    """Counts the bytes of all tensors that torch copies; of those that go into buffers none does."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            self.bytes += found.numel() * found.element_size()
        return found


def count_copies(run: Run, folder: str) -> tuple[list[int], list[int], bool]:
    """Return for two saves: bytes copied by torch, bytes copied into buffers, and whether the buffers were the same."""
    engine, copied, held = trained(run, 1), [], []
    for tag in "ab":
        with Copied() as counted:
            engine.save_checkpoint(folder, tag=tag)
        ucp_deepspeed.wait_for_save()
        buffers = getattr(engine, background.BUFFERS)
        copied.append((counted.bytes, buffers.bytes_copied))
        held.append((buffers.bytes_held, {buffer.data_ptr() for buffer in buffers.taken}))
    engine.destroy()
    return [total for total, _ in copied], [into for _, into in copied], held[0] == held[1]


@pytest.mark.parametrize("name", ["zero-0", "zero-1", "zero-3", "pipeline"])
def test_each_byte_is_copied_once_into_buffers_that_are_used_again(name: str, ranks: Ranks, tmp_path: Path) -> None:
    world_size, run = RUNS[name]
    outcomes = ranks(world_size).run(count_copies, run, str(tmp_path))
    stored = sum(_stored(path) for path in (tmp_path / "b").glob("*.pt"))
    assert sum(into[1] for _, into, _ in outcomes) == stored > 0
    for total, into, same in outcomes:
        assert same
        assert (
            total[1] - into[1] < 0.1 * into[1] + 2000
        )  # the rest: random states, sums for the pipeline's tied weights


def _stored(path: Path) -> int:
    """Bytes of the tensors in a file."""
    with zipfile.ZipFile(path) as file:
        return sum(entry.file_size for entry in file.infolist() if "/data/" in entry.filename)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"use_node_local_storage": True},
            "needs a folder that all ranks see, and 'checkpoint.use_node_local_storage'",
        ),
        ({"checkpoint_serialization": False}, "'checkpoint.checkpoint_serialization' turns it off"),
    ],
)
def test_settings_that_exclude_each_other(settings: dict[str, Any], message: str, ranks: Ranks) -> None:
    run = Run("mlp", universal=ASYNC, config={"checkpoint": settings})
    with pytest.raises(RankError, match=message) as caught:
        ranks(2).run(trained, run, 0)
    assert isinstance(caught.value.original, ConfigError)


def test_another_checkpoint_engine_is_refused() -> None:
    """DeepSpeed builds it only under its launcher."""
    native = FastCheckpointEngine.__new__(FastCheckpointEngine)
    with pytest.raises(ConfigError, match=r"FastCheckpointEngine.* are two ways to write in the background"):
        background.check_background(SimpleNamespace(checkpoint_engine=native))


def test_a_folder_that_another_node_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tunables, "VISIBLE_SECONDS", 0.0)
    monkeypatch.setattr(save.dist, "get_rank", lambda: 1)
    with pytest.raises(SaveError, match="isn't the same folder on all ranks: rank 1 doesn't see what rank 0 made"):
        save._await_folder(tmp_path / "made-by-rank-0")


def save_when_a_thread_cant_start(run: Run, folder: str) -> str:
    """On rank 1 the first save's can't; returns what that rank was told."""
    engine = trained(run, 1)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("no thread")))
        with pytest.raises(UniversalCheckpointError if dist.get_rank() == 0 else RuntimeError) as caught:
            engine.save_checkpoint(folder, tag="a")
    engine.save_checkpoint(folder, tag="b")
    ucp_deepspeed.wait_for_save()
    engine.destroy()
    return str(caught.value)


def test_all_ranks_write_or_none(ranks: Ranks, tmp_path: Path) -> None:
    told = ranks(2).run(save_when_a_thread_cant_start, Run("mlp", universal=ASYNC), str(tmp_path))
    assert all("no thread" in text for text in told)
    assert open_checkpoint(tmp_path).path.name == "b" and not (tmp_path / "a").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_tag_that_is_a_link(ranks: Ranks, tmp_path: Path) -> None:
    """The folder that the link names is replaced. What lies in it stays, also links to anywhere."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "a").symlink_to("elsewhere")
    for name, target in (("up", ".."), ("gone", "nowhere")):
        (tmp_path / "elsewhere" / name).symlink_to(target)
    for _ in range(2):
        ranks(1).run(save_and_wait, Run("mlp", universal=ASYNC), str(tmp_path), "a")
    assert (tmp_path / "a").readlink() == Path("elsewhere") and open_checkpoint(tmp_path).run.global_steps == STEP
    assert (tmp_path / "a" / "up").readlink() == Path("..") and (tmp_path / "a" / "gone").is_symlink()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_log_that_cant_be_written_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background.logger, "error", lambda *_: 1 / 0)
    job = background.Job(tmp_path / "gone", tmp_path / "a", (), {"x": ""}, lambda: None, 1, 2, timeout=1.0)
    writing = background.Writing(job)
    writing.start()
    assert writing.written.wait(10) and "renamed or removed" in str(writing.own_error)
    writing.join()


def test_rank_0_gives_up_on_a_rank_that_never_ends(tmp_path: Path) -> None:
    partial = tmp_path / "partial"
    partial.mkdir()
    writing = background.Writing(
        background.Job(partial, tmp_path / "a", (), {}, lambda: pytest.fail("committed"), 0, 2, timeout=0.05)
    )
    writing.start()
    writing.join()
    assert "ranks [1] didn't write their files" in str(writing.error)
