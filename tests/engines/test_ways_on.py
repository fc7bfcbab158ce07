"""Each refusal of a load ends with what gets the user on, and that works."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.opening import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.loading.ways_on import tells_a_way_on
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    DamagedCheckpointError,
    MismatchError,
    SpecError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.testing.ranks import RankError, RankPool, get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

PLAIN = Run("mlp", zero={"stage": 1})
FROZEN = ("linear_in.weight", "linear_in.bias")


@dataclass(frozen=True)
class Refusal:
    """A load that is refused, and the one that the message leads to.

    Attributes:
        error: its class.
        ends: what the message's last line says, as a regular expression.
        saved, live: changes to `PLAIN` on both sides.
        damage: done to the copy of the checkpoint.
        tag: that the load names.
        then: changes to the live run that the message names; None where what it says isn't a setting, or costs too much.
        options: of ``load_checkpoint`` that it names.
        mend: what it says to do to the files.
    """

    error: type[UniversalCheckpointError]
    ends: str
    saved: Mapping[str, Any] = field(default_factory=dict)
    live: Mapping[str, Any] = field(default_factory=dict)
    damage: Callable[[Path], None] = lambda folder: None
    tag: str | None = None
    then: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    mend: Callable[[Path], None] = lambda folder: None


def settings(**values: Any) -> dict[str, Any]:
    return {"universal": {"enabled": True, "load": "always", "fallback": "none", **values}}


def truncate(folder: Path) -> None:
    path = folder / "b" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    path.write_bytes(path.read_bytes()[:1000])


def forget_class(folder: Path) -> None:
    """Make the files those of an unknown optimizer."""
    (folder / "b" / MANIFEST_NAME).unlink()
    path = folder / "b" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    saved = torch.load(path, map_location="cpu", weights_only=False)
    state = saved["optimizer_state_dict"]
    saved["optimizer_state_dict"] = {"mystery": state["base_optimizer_state"]}
    torch.save(saved, path)


def edit_index(folder: Path) -> None:
    """As a later release would write it."""
    shutil.rmtree(folder / "b")
    convert(UniversalView.of(open_checkpoint(folder, "a")), folder / "b")
    path = folder / "b" / "ucp_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))


def save_again(folder: Path) -> None:
    """By somebody without the package: another file than the manifest describes."""
    path = folder / "b" / "mp_rank_00_model_states.pt"
    torch.save(torch.load(path, map_location="cpu", weights_only=False) | {"more": list(range(1000))}, path)


def keep_all(src: Any, dst: Any) -> None:
    """A function of the user's own, which makes nothing of what has another shape."""


REFUSALS = {
    "missing": Refusal(
        MismatchError, '"on_missing": "init"', live={"size": {"adapter": True}}, then=settings(on_missing="init")
    ),
    "extra": Refusal(
        MismatchError, '"on_extra": "drop"', saved={"size": {"adapter": True}}, then=settings(on_extra="drop")
    ),
    "unfrozen": Refusal(
        MismatchError, '"on_missing": "init"', saved={"frozen": FROZEN}, then=settings(on_missing="init")
    ),
    "frozen": Refusal(MismatchError, '"on_extra": "drop"', live={"frozen": FROZEN}, then=settings(on_extra="drop")),
    "further rows": Refusal(
        MismatchError, '"on_missing": "init"', live={"size": {"odd": 9}}, then=settings(on_missing="init")
    ),
    "another shape": Refusal(
        MismatchError, r"custom_load_fn=", live={"size": {"ffn": 32}}, then={}, options={"custom_load_fn": keep_all}
    ),
    "other hyper-parameters": Refusal(
        MismatchError, '"hyperparameters": "keep"', saved={"groups": "decay"}, then=settings(hyperparameters="keep")
    ),
    "another optimizer": Refusal(
        MismatchError,
        '"on_missing": "init" .* "on_extra": "drop"',
        live={"optimizer": ("SGD", {"lr": 0.1, "momentum": 0.9})},
        then=settings(on_missing="init", on_extra="drop"),
    ),
    "truncated": Refusal(DamagedCheckpointError, r"tag='a'", damage=truncate, then={}),
    "the first file is gone": Refusal(
        CheckpointNotFoundError,
        r"tag='a'",
        damage=lambda folder: (folder / "b" / "mp_rank_00_model_states.pt").unlink(),
        then={},
    ),
    "no such tag": Refusal(CheckpointNotFoundError, r"tag='\w'", tag="c", then={}),
    "saved again": Refusal(
        DamagedCheckpointError,
        f"remove {MANIFEST_NAME}",
        damage=save_again,
        then={},
        mend=lambda folder: (folder / "b" / MANIFEST_NAME).unlink(),
    ),
    "another class": Refusal(UnsupportedError, '"load": "never"', damage=forget_class),
    "a later release": Refusal(UnsupportedError, "install the release that wrote it", damage=edit_index),
    "no spec of that name": Refusal(SpecError, "families: ", live=settings(spec="nowhere")),
}


def save_two(run: Run, folder: str) -> None:
    train(run, 1, save=folder, save_tag="a")
    train(run, 2, load=folder, tag="a", save=folder, save_tag="b")


def attempt(run: Run, folder: str, tag: str | None, options: Mapping[str, Any]) -> str | None:
    """Build the engine and load; returns the path, or what was raised."""
    engine = build_engine(run)
    try:
        path: str | None = engine.load_checkpoint(folder, tag=tag, **options)[0]
        return path
    finally:
        engine.destroy()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mapping[str, Any]], Path]:
    """Two saves of a run, made once."""
    made: dict[str, Path] = {}

    def get(changes: Mapping[str, Any]) -> Path:
        if repr(changes) not in made:
            made[repr(changes)] = tmp_path_factory.mktemp("saved")
            get_pool(1).run(save_two, replace(PLAIN, **changes), str(made[repr(changes)]))
        return made[repr(changes)]

    return get


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_ends_with_a_way_on(
    name: str, ranks: Ranks, tmp_path: Path, saved: Callable[[Mapping[str, Any]], Path]
) -> None:
    case, folder = REFUSALS[name], tmp_path / "run"
    shutil.copytree(saved(case.saved), folder)
    case.damage(folder)
    run = replace(PLAIN, **{**settings(), **case.live})
    with pytest.raises(RankError) as caught:
        ranks(1).run(attempt, run, str(folder), case.tag, {})
    error = caught.value.original
    assert isinstance(error, case.error) and (tells_a_way_on(error) or "families" in str(error))
    last = str(error).splitlines()[-1]
    found = re.search(case.ends, last)
    assert found, str(error)
    if case.then is None:
        return
    case.mend(folder)
    tag = re.search(r"tag='(\w)'", last)
    path = ranks(1).run(attempt, replace(run, **case.then), str(folder), tag and tag[1], case.options)[0]
    assert path is not None
