"""Trackers of named random streams, in the forms in which Megatron-LM's and its forks' modules have them.

``megatron/core/tensor_parallel/random.py`` of Megatron-DeepSpeed, and of Megatron-Core before 0.7, holds a tracker from the
start. Later releases make it when it is first asked for, keep generators where CUDA graphs use them, and nothing for inference.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoints import resumed
from deepspeed.runtime.activation_checkpointing import checkpointing

from ucp_deepspeed.engine import random_state
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, build_engine

Ranks = Callable[[int], RankPool]

MODULE = "megatron.core.tensor_parallel.random"
RUN = Run("mlp", zero={"stage": 1})


class Tracker:
    """Named states of the default generator, or generators of their own."""

    def __init__(self, graph_safe: bool = False) -> None:
        self.states_: dict[str, Any] = {}
        self._graph_safe = graph_safe

    def get_states(self) -> dict[str, Any]:
        return dict(self.states_)

    def set_states(self, states: dict[str, Any]) -> None:
        self.states_ = states

    def add(self, name: str, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.states_[name] = generator if self._graph_safe else generator.get_state()

    def draw(self, name: str = "model-parallel-rng") -> list[float]:
        """Draw from a stream, as dropout does in a fork of it."""
        held = self.states_[name]
        generator = held if self._graph_safe else torch.Generator().set_state(held)
        values: list[float] = torch.rand(3, generator=generator).tolist()
        if not self._graph_safe:
            self.states_[name] = generator.get_state()
        return values


class InferenceTracker(Tracker):
    """Keeps nothing and takes nothing."""

    def set_states(self, states: dict[str, Any]) -> None:
        raise AssertionError("nothing is to be set")

    def add(self, name: str, seed: int) -> None:
        pass


@contextmanager
def megatron(**held: Any) -> Iterator[None]:
    """Let a process have a Megatron whose module holds this, and whose feed-forward layer can't be imported."""
    names = (MODULE, "megatron.core.transformer.mlp", "ucp_deepspeed.megatron.layouts", "megatron.core")
    before = {name: sys.modules.get(name) for name in names}
    module = ModuleType(MODULE)
    vars(module).update(held)
    sys.modules.setdefault("megatron.core", ModuleType("megatron.core"))
    sys.modules.pop("ucp_deepspeed.megatron.layouts", None)
    sys.modules.update({MODULE: module, "megatron.core.transformer.mlp": None})  # type: ignore[dict-item]
    random_state._warn_of_unknown.cache_clear()
    try:
        yield
    finally:
        for name, found in before.items():
            sys.modules.pop(name, None)
            sys.modules.update({} if found is None else {name: found})


def saved_and_loaded(folder: str, form: str) -> tuple[list[float], list[float]]:
    """On a rank: save, draw, let another script seed the stream anew, load, and draw again."""
    tracker = {"inference": InferenceTracker}.get(form, Tracker)(graph_safe=form == "graph-safe")
    # Megatron-DeepSpeed's has no other attribute for it.
    held = {"_CUDA_RNG_STATE_TRACKER": tracker, "get_cuda_rng_tracker": lambda: tracker}
    with megatron(**held), resumed(build_engine(RUN), None) as engine:
        tracker.add("model-parallel-rng", 1 + torch.distributed.get_rank())
        generator = tracker.states_.get("model-parallel-rng")
        first = tracker.draw() if generator is not None else []
        engine.save_checkpoint(folder)
        first = tracker.draw() if generator is not None else []
        if form == "graph-safe":
            generator.manual_seed(50)
        else:
            tracker.states_.clear()
            tracker.add("model-parallel-rng", 50)
        engine.load_checkpoint(folder)
        if form == "graph-safe":
            assert tracker.states_["model-parallel-rng"] is generator
        return first, tracker.draw() if generator is not None else []


@pytest.mark.parametrize("form", ["megatron-deepspeed", "graph-safe", "inference"])
def test_streams_of_a_tracker_go_on(form: str, ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit, and each rank's own."""
    found = ranks(2).run(saved_and_loaded, str(tmp_path), form)
    assert all(before == after for before, after in found)
    assert (found[0] == found[1]) == (form == "inference")
    assert (tmp_path / "latest").is_file()


def warnings_of(form: str, folder: str) -> tuple[list[str], list[float]]:
    """On a rank: save twice and load, with a tracker of that form."""
    state = torch.Generator().manual_seed(3).get_state()
    odd = {
        "no states": SimpleNamespace(states={}),
        "no way to set": SimpleNamespace(get_states=lambda: {"a": state}),
        "numbers": SimpleNamespace(get_states=lambda: {"a": 1234}, set_states=None),
        "another generator's": SimpleNamespace(get_states=lambda: {"a": state[:100]}, set_states=None),
    }
    held = {"_CUDA_RNG_STATE_TRACKER": odd[form]} if form in odd else {}
    if form == "forwarded":
        held = {"get_cuda_rng_tracker": checkpointing.get_cuda_rng_tracker}
    elif form == "not asked for":
        held = {"_CUDA_RNG_STATE_TRACKER": None}
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ucp_deepspeed")
    logger.addHandler(handler)
    try:
        with megatron(**held), resumed(build_engine(RUN), None) as engine:
            torch.manual_seed(1)
            engine.save_checkpoint(folder)
            engine.save_checkpoint(folder)
            expected = torch.rand(3).tolist()
            torch.manual_seed(2)
            engine.load_checkpoint(folder)
            assert torch.rand(3).tolist() == expected
            return [line for line in lines if "random stream" in line]
    finally:
        logger.removeHandler(handler)


@pytest.mark.parametrize(
    ("form", "told"),
    [
        ("no states", "megatron's tracker"),
        ("no way to set", "megatron/a"),
        ("numbers", "megatron/a"),
        ("another generator's", "megatron/a"),
        ("nothing", "megatron's tracker"),
        ("forwarded", None),
        ("not asked for", None),
    ],
)
def test_a_tracker_of_an_unknown_form(form: str, told: str | None, ranks: Ranks, tmp_path: Path) -> None:
    """It is named once, neither save nor load fails, and the other streams go on."""
    [lines] = ranks(1).run(warnings_of, form, str(tmp_path))
    assert len(lines) == (told is not None), lines
    assert told is None or f"the random stream {told} has a form that isn't known" in lines[0]


def saved_with_sampler(folder: str) -> list[str]:
    """On a rank: save with a curriculum sampler of the script's own, whose generator is numpy's old kind."""
    import numpy as np

    lines: list[str] = []
    with resumed(build_engine(RUN), None) as engine:
        engine.training_dataloader = SimpleNamespace(data_sampler=SimpleNamespace(np_rng=np.random.RandomState(1)))
        random_state._warn_of_unknown.cache_clear()
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
        logging.getLogger("ucp_deepspeed").addHandler(handler)
        engine.save_checkpoint(folder)
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
        return lines


def test_a_sampler_of_another_form(ranks: Ranks, tmp_path: Path) -> None:
    """Its generator isn't saved, and all else is."""
    [lines] = ranks(1).run(saved_with_sampler, str(tmp_path))
    assert any("the random stream curriculum has a form" in line for line in lines)
    assert (tmp_path / "latest").is_file()
