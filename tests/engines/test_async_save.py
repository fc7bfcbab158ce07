"""Saving in the background: what is written, in which order, and what it costs."""

from __future__ import annotations

import json
import threading
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from async_saves import ASYNC, RUNS, Ranks, contents, held_back, save_and_wait, trained
from checkpoints import LAST_STEP, STEP
from deepspeed.accelerator import get_accelerator
from torch.utils._python_dispatch import TorchDispatchMode

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.config import SaveConfig
from ucp_deepspeed.engine.saving import background, save
from ucp_deepspeed.testing.ranks import RankError
from ucp_deepspeed.testing.runs import Run, train, train_step


def save_both_ways(run: Run, folder: str) -> None:
    """One state, synchronously into ``sync`` and in the background into ``async``, which training overtakes."""
    engine = trained(run)
    client_state = {"list": [1, 2], "tensor": torch.ones(3)}
    config = engine.universal_checkpoint_config
    engine.universal_checkpoint_config = config.model_copy(update={"save": SaveConfig()})
    save.secrets.token_hex = lambda _: "0123456789abcdef"  # the only thing that is random
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


@pytest.mark.nccl_like
@pytest.mark.parametrize("name", RUNS)
def test_files_are_those_of_a_synchronous_save(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """Byte for byte, sharing of storages and checksums included; nothing that happens after the call is in them."""
    world_size, run = RUNS[name]
    ranks(world_size).run(save_both_ways, run, str(tmp_path))
    expected, found = (contents(tmp_path / way) for way in ("sync", "async"))
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path] != found[path]] == []


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


class Copied(TorchDispatchMode):
    """Counts the bytes of all tensors of the ranks' device that torch copies."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten._to_copy, torch.ops.aten.copy_):
            source = args[1] if func.overloadpacket is torch.ops.aten.copy_ else args[0]
            self.bytes += found.numel() * found.element_size() * (source.device.type == get_accelerator().device_name())
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
def test_each_byte_is_copied_once_into_buffers_that_are_used_again(
    name: str, ranks: Ranks, tmp_path: Path, device: str
) -> None:
    world_size, run = RUNS[name]
    outcomes = ranks(world_size).run(count_copies, run, str(tmp_path))
    stored = sum(_stored(path) for path in (tmp_path / "b").glob("*.pt"))
    assert sum(into[1] for _, into, _ in outcomes) == stored > 0
    for total, into, same in outcomes:
        assert same
        by_torch = 0 if device == "cpu" else into[1]  # on the host the C library copies into buffers
        rest = 0.25 * into[1] + 2000  # random states, sums for the pipeline's tied weights
        assert by_torch <= total[1] < by_torch + rest


def _stored(path: Path) -> int:
    """Bytes of the tensors in a file."""
    with zipfile.ZipFile(path) as file:
        return sum(entry.file_size for entry in file.infolist() if "/data/" in entry.filename)


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
