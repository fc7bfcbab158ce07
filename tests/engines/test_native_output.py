"""``ucp convert --to deepspeed``: stock engines of the topology resume the files, without this package, as if they had saved them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.ranks import RankPool, get_pool
from ucp_deepspeed.testing.runs import Outcome, Run, train

Ranks = Callable[[int], RankPool]

PLAIN = Run("mlp", {"remembers": True}, zero={"stage": 1}, precision="bf16", groups="decay", frozen=("norm.bias",))
"""Two groups, a frozen parameter, a buffer."""


def converted(source: Path, folder: Path, *options: str) -> Path:
    """Run the command; return the folder."""
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(folder), "--to", "deepspeed", *options, "--quiet"])
    assert left.value.code == 0
    return folder


def files_of(folder: Path) -> dict[str, Any]:
    """The content of DeepSpeed's files in the newest tag's folder, read by torch with DeepSpeed's classes."""
    tag = folder / (folder / "latest").read_text()
    return {path.name: torch.load(path, map_location="cpu", weights_only=False) for path in sorted(tag.glob("*.pt"))}


def unlike(found: Any, expected: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which two values aren't the same, tensors bit by bit."""
    if type(found) is not type(expected):
        yield f"{place}: {type(found)} for {type(expected)}"
    elif isinstance(found, torch.Tensor):
        same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if not (
            same
            and torch.equal(
                found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)
            )
        ):
            yield f"{place}: {found} for {expected}"
    elif isinstance(found, Mapping):
        if found.keys() != expected.keys():
            yield f"{place}: keys {found.keys() ^ expected.keys()} on one side"
        for key in found.keys() & expected.keys() - {"ds_config"}:
            yield from unlike(found[key], expected[key], f"{place}/{key}")
    elif isinstance(found, (list, tuple)):
        if len(found) != len(expected):
            yield f"{place}: {len(found)} for {len(expected)}"
        for number, pair in enumerate(zip(found, expected, strict=False)):
            yield from unlike(*pair, f"{place}/{number}")
    elif type(found).__module__.startswith("deepspeed") and hasattr(found, "__dict__") and not isinstance(found, int):
        yield from unlike(vars(found), vars(expected), place)
    elif found != expected:
        yield f"{place}: {found!r} for {expected!r}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the checkpoint of a run on two ranks, made once."""
    made: dict[str, Path] = {}

    def of(run: Run, ranks: int = 2) -> Path:
        if (key := repr((run, ranks))) not in made:
            folder = made[key] = tmp_path_factory.mktemp("source")
            get_pool(ranks).run(train, run, STEP, save=str(folder), client_state={"epoch": 7})
        return made[key]

    return of


def check(saved: Path, written: Path, target: Run, ranks: int, again: Path, spec: str | None = None) -> None:
    """Check that a stock engine resumes what was written: it holds the source's state, saves the same files again, and goes on as an
    engine that the hook resumed from the source."""
    assert differences(saved, written, spec) == []
    stock = replace(target, universal=None)
    resumed: list[Outcome] = get_pool(ranks).run(
        train, stock, LAST_STEP, load=str(written), save=str(again), save_first=True, client_state={"epoch": 7}
    )
    assert all(each.report is None and each.load_path is not None for each in resumed)
    assert resumed[0].client_state["epoch"] == 7
    found, expected = files_of(written), files_of(again)
    assert found.keys() == expected.keys()
    assert list(unlike(found, expected)) == []
    assert differences(saved, again, spec) == []
    hooked = replace(target, universal={"enabled": True, "load": "always"})
    straight = get_pool(ranks).run(train, hooked, LAST_STEP, load=str(saved))
    assert [each.losses for each in resumed] == [each.losses for each in straight]
    assert resumed[0].counters == straight[0].counters and resumed[0].rates == straight[0].rates


def test_zero(source: Callable[..., Path], tmp_path: Path) -> None:
    saved = source(PLAIN)
    written = converted(saved, tmp_path / "written", "--dp", "2", "--zero", "2")
    check(saved, written, replace(PLAIN, zero={"stage": 2}, seed=3), 2, tmp_path / "again")
