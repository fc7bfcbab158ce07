"""The newest whole tag in the place of a lost one, where the script names none."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from async_saves import Ranks

from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME
from ucp_deepspeed.checkpoint.tags import mark_of
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError
from ucp_deepspeed.testing.ranks import RankError, get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train

MLP = Run("mlp", zero={"stage": 1}, precision="bf16")


def save_three(run: Run, folder: str) -> None:
    """Tags ``b``, ``a`` and ``c`` of steps 1 to 3."""
    for step, tag in enumerate("bac", 1):
        train(run, step, save=folder, save_tag=tag)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("three")
    get_pool(2).run(save_three, MLP, str(folder))
    return folder


def load_it(run: Run, folder: str, tag: str | None = None) -> tuple[str | None, int, list[str]]:
    """On a rank: load; return the tag, the step, and what was warned of."""
    lines, handler = list[str](), logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("ucp_deepspeed").addHandler(handler)
    engine = build_engine(run)
    try:
        path, _ = engine.load_checkpoint(folder, tag=tag)
        return path and Path(path).parent.name, engine.global_steps, lines
    finally:
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
        engine.destroy()


def cut(folder: Path) -> None:
    file = folder / "c" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    file.write_bytes(file.read_bytes()[:-50])


def flip(folder: Path) -> None:
    """One bit of a master weight, which is found when parts of the engine are filled."""
    file = folder / "c" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def mark(folder: Path) -> None:
    (folder / "c" / "ucp_manifest.json").unlink()
    (folder / "c" / MARK_NAME).write_text(mark_of(folder / "c", "0123456789abcdef").model_dump_json())
    (folder / "c" / "mp_rank_00_model_states.pt").unlink()


LOSSES: dict[str, Callable[[Path], object]] = {
    "cut": cut,
    "flipped": flip,
    "unfinished": mark,
    "gone": lambda folder: shutil.rmtree(folder / "c"),
    "latest is empty": lambda folder: (folder / "latest").write_text(""),
    "latest is gone": lambda folder: (folder / "latest").unlink(),
}


@pytest.mark.parametrize("size", [2, 1])
@pytest.mark.parametrize("loss", LOSSES)
def test_the_newest_whole_tag_is_taken(loss: str, size: int, saved: Path, ranks: Ranks, tmp_path: Path) -> None:
    """All ranks take it, and rank 0 tells of it once."""
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    LOSSES[loss](folder)
    expected = ("c", 3) if loss.startswith("latest") else ("a", 2)
    found = ranks(size).run(load_it, MLP, str(folder))
    assert [each[:2] for each in found] == [expected] * size
    told = [line for line in found[0][2] if line.startswith(f"taking the tag {expected[0]} of {folder}")]
    assert len(told) == 1
    assert not any("taking the tag" in line for each in found[1:] for line in each[2])


@pytest.mark.parametrize(("tag", "changes"), [("c", {}), (None, {"fallback": "none"})], ids=["named", "not wanted"])
def test_no_other_tag_is_taken(
    tag: str | None, changes: dict[str, Any], saved: Path, ranks: Ranks, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    cut(folder)
    run = replace(MLP, universal={"enabled": True, **changes})
    with pytest.raises(RankError) as caught:
        ranks(2).run(load_it, run, str(folder), tag)
    assert isinstance(caught.value.original, DamagedCheckpointError) and "tag='a'" in str(caught.value.original)


@pytest.mark.parametrize("fallback", ["newest-whole", "none"])
def test_nothing_is_there_to_load(fallback: str, saved: Path, ranks: Ranks, tmp_path: Path) -> None:
    """A first start, as with DeepSpeed alone. So is one without ``latest`` if no other tag is wanted."""
    (tmp_path / "run").mkdir()
    if fallback == "none":
        shutil.copytree(saved / "c", tmp_path / "run" / "c")
    run = replace(MLP, universal={"enabled": True, "fallback": fallback})
    found = ranks(2).run(load_it, run, str(tmp_path / "run"))
    assert [each[:2] for each in found] == [(None, 0)] * 2 and not any(each[2] for each in found)


def test_none_is_whole(saved: Path, ranks: Ranks, tmp_path: Path) -> None:
    """The first error is raised, and not that of an older tag."""
    folder = tmp_path / "run"
    shutil.copytree(saved / "c", folder / "c")
    (folder / "latest").write_text("d")
    shutil.rmtree(folder / "c")
    with pytest.raises(RankError) as caught:
        ranks(2).run(load_it, MLP, str(folder))
    assert isinstance(caught.value.original, CheckpointNotFoundError) and "'d'" in str(caught.value.original)
