"""Files that aren't those of the save: told on every rank, before anything of the engine changes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STEP

import ucp_deepspeed
from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME, SavedSums, sums_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import read_manifest
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.testing.ranks import RankPool, get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train_step

Ranks = Callable[[int], RankPool]

THREE = Run("mlp", zero={"stage": 1}, config={"train_batch_size": 6})


def save(run: Run, folder: str, tags: tuple[str, ...], steps: int = STEP) -> None:
    """One save after each further step."""
    engine = build_engine(run)
    for step in range(1, steps):
        train_step(engine, run, step)
    for number, tag in enumerate(tags):
        train_step(engine, run, steps + number)
        engine.save_checkpoint(folder, tag=tag)
    ucp_deepspeed.wait_for_save()
    engine.destroy()


def load_errors(run: Run, folders: list[str], tag: str, unchanged: bool = True) -> list[str]:
    """The error of each load on this rank; ``unchanged``: nothing of the engine has changed."""
    engine, errors = build_engine(run), list[str]()
    before = [param.detach().clone() for param in engine.module.parameters()]
    for folder in folders:
        try:
            engine.load_checkpoint(folder, tag=tag)
            errors.append("none")
        except DamagedCheckpointError as error:
            errors.append(str(error))
    if unchanged:
        assert engine.global_steps == 0
        assert all(torch.equal(*each) for each in zip(before, engine.module.parameters(), strict=True))
    engine.destroy()
    return errors


@pytest.fixture(scope="module")
def of_three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    get_pool(3).run(save, THREE, str(folder), ("a", "b"))
    return folder


OPTIM = "zero_pp_rank_{}_mp_rank_00_optim_states.pt"


def swapped(folder: Path) -> None:
    one, two = (folder / OPTIM.format(rank) for rank in (1, 2))
    aside = one.rename(folder / "aside")
    two.rename(one)
    aside.rename(two)


def of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "b" / OPTIM.format(1), folder)


def weights_of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "b" / "mp_rank_00_model_states.pt", folder)


def random_states_of_another_step(folder: Path) -> None:
    shutil.copy(folder.parent / "b" / "ucp_random_states.jsonl", folder)


CHANGES = (swapped, of_another_step, weights_of_another_step, random_states_of_another_step)


@pytest.mark.parametrize("target", ["the same", "another"])
def test_files_of_another_rank_or_save(target: str, of_three: Path, ranks: Ranks, tmp_path: Path) -> None:
    folders = [tmp_path / change.__name__ for change in CHANGES]
    for folder, change in zip(folders, CHANGES, strict=True):
        for tag in "ab":
            shutil.copytree(of_three / tag, folder / tag)
        change(folder / "a")
    world_size, run = (3, THREE) if target == "the same" else (2, Run("mlp", zero={"stage": 3}))
    found = ranks(world_size).run(load_errors, run, list(map(str, folders)), "a")
    for errors in found:
        assert all("isn't the file that ucp_manifest.json describes" in error for error in errors[:-1]), errors
        assert "ucp_random_states.jsonl is of another save than the manifest" in errors[-1]


def test_all_files_of_a_save_have_sums(of_three: Path) -> None:
    ids = set()
    for tag in "ab":
        folder = of_three / tag
        manifest = read_manifest(folder)
        assert manifest is not None and manifest.checksums is not None
        files = {path.name for path in folder.glob("*.pt")}
        assert len(files) == 4 and manifest.contents.keys() == files
        held = SavedSums(folder, manifest.checksums, manifest.save_id)
        assert set(held.names) == files | {"ucp_random_states.jsonl"}
        assert all(held.of(name) == sums_of(folder / name) for name in held.names)
        header = json.loads((folder / "ucp_random_states.jsonl").read_text().splitlines()[0])
        assert header["save_id"] == manifest.save_id
        ids.add(manifest.save_id)
    assert len(ids) == 2


@pytest.mark.parametrize("in_background", [False, True])
def test_saves_without_sums(in_background: bool, ranks: Ranks, tmp_path: Path) -> None:
    """A tag that had sums has none that are of other files."""
    saving: dict[str, Any] = {"async": in_background}
    for checksums in (True, False):
        block = {"enabled": True, "save": {**saving, "checksums": checksums}}
        ranks(2).run(save, Run("mlp", zero={"stage": 3}, universal=block), str(tmp_path), ("a",), 1)
        manifest = read_manifest(tmp_path / "a")
        assert manifest is not None and manifest.save_id is not None and len(manifest.contents) == 4
        assert (manifest.checksums is not None) == checksums == (tmp_path / "a" / CHECKSUMS_NAME).is_file()


def flip(path: Path, at: int) -> None:
    held = path.read_bytes()
    path.write_bytes(held[:at] + bytes([held[at] ^ 32]) + held[at + 1 :])


FLIPPED = {
    "stage 0": (Run("mlp", zero={"stage": 0}), Run("mlp", zero={"stage": 2}), "mp_rank_00_model_states.pt"),
    "stage 1": (Run("mlp", zero={"stage": 1}), Run("mlp", zero={"stage": 3}), OPTIM.format(1)),
    "stage 3": (Run("mlp", zero={"stage": 3}), Run("mlp", zero={"stage": 1}), OPTIM.format(1)),
    "pipeline": (
        Run("gpt", pp=2, zero={"stage": 0}),
        Run("gpt", zero={"stage": 1}),
        "layer_01-model_00-model_states.pt",
    ),
}


@pytest.mark.parametrize("name", FLIPPED)
def test_a_flipped_bit_is_told_on_all_ranks(name: str, ranks: Ranks, tmp_path: Path) -> None:
    """On the same topology, where DeepSpeed loads, and on another; with checks switched off nothing is told."""
    run, other, file = FLIPPED[name]
    ranks(2).run(save, run, str(tmp_path), ("a", "b"))
    path = tmp_path / "a" / file
    largest = max(sums_of(path).ranges, key=lambda place: place[1])
    flip(path, largest[0] + largest[1] // 2)
    for target, kept in ((run, True), (other, False)):
        always = replace(target, universal={"enabled": True, "load": "always"})
        for way in (target, always):
            found = ranks(2).run(load_errors, way, [str(tmp_path)], "a", unchanged=kept and way is run)
            assert all(f"{file} is damaged: bytes " in error for [error] in found), found
            assert all("load another tag of" in error and "tag='b'" in error for [error] in found), found
        off = replace(target, universal={"enabled": True, "verify": "off"})
        assert ranks(2).run(load_errors, off, [str(tmp_path)], "a", unchanged=False) == [["none"], ["none"]]


def load_whole(run: Run, folder: str) -> tuple[int, int]:
    """Bytes that a load has read and checked on this rank."""
    engine = build_engine(run)
    engine.load_checkpoint(folder, tag="a")
    report = engine.universal_checkpoint_report
    engine.destroy()
    return report.bytes_read, report.bytes_checked


def test_all_that_is_read_is_checked(of_three: Path, ranks: Ranks) -> None:
    for read, checked in ranks(2).run(load_whole, Run("mlp", zero={"stage": 3}), str(of_three)):
        assert read == checked > 0
    off = Run("mlp", zero={"stage": 3}, universal={"enabled": True, "verify": "off"})
    assert all(checked == 0 for _, checked in ranks(2).run(load_whole, off, str(of_three)))


def test_promised_sums_must_be_there(of_three: Path, ranks: Ranks, tmp_path: Path) -> None:
    shutil.copytree(of_three / "a", tmp_path / "a")
    (tmp_path / "a" / CHECKSUMS_NAME).unlink()
    for world_size, run in ((3, THREE), (2, Run("mlp", zero={"stage": 3}))):
        found = ranks(world_size).run(load_errors, run, [str(tmp_path)], "a")
        assert all("ucp_checksums.jsonl is missing" in error for [error] in found), found
