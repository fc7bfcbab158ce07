"""Rounds and runs, as they are counted in a store of torch's."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import wrapt
from torch.distributed import HashStore

from ucp_deepspeed.elastic.job import Job, Place
from ucp_deepspeed.elastic.rounds import MOST_FRUITLESS, Round, Stood, told
from ucp_deepspeed.elastic.sizes import Sizes
from ucp_deepspeed.elastic.store import end_run, number_of_run

JOB = Job("mine.0", "host0:29400", "a", Sizes())


def test_what_is_told_of_a_round() -> None:
    before = Stood(12, 100.0, ("a", "b"), 4, "TP1·PP1·DP4", 1)
    now = Stood(11, 113.9, ("b", "c"), 2, "TP1·PP1·DP2", 2)
    assert told(before, now) == (
        "round 2: a left and c joined; TP1·PP1·DP4 → TP1·PP1·DP2; goes on from step 10, 2 steps repeated; "
        "13.9 s from the last step to this"
    )
    idle = replace(before, nodes=("b",), standing=("a",))
    assert "round 2: a left and c joined; " in told(idle, now)
    assert "round 1: a stands by; " in told(before, idle) and "round 1: the same nodes; " in told(idle, before)
    many = replace(now, nodes=("d",), standing=("a", "b"))
    assert "round 2: d joined and a, b stand by; " in told(before, many)
    assert Stood.from_json(json.dumps(asdict(many))) == many
    same = Stood(13, 101.0, ("a", "b"), 4, "TP1·PP1·DP4", 2)
    assert "the same nodes; " in told(before, same) and " 0 steps repeated" in told(before, same)


def test_a_script_that_never_takes_a_step_ends_the_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, place = HashStore(), Place("host1:1", 0, 2, 0, 1, 0)
    monkeypatch.setattr(wrapt, "register_post_import_hook", lambda *_: None)
    for _ in range(MOST_FRUITLESS):
        Round(JOB, place, store).watch(2)
    assert not store.check([JOB.given_up])
    with pytest.raises(SystemExit):
        Round(JOB, place, store).watch(2)
    assert store.check([JOB.given_up])
    assert "5 rounds in a row came no further; the run ends" in capsys.readouterr().err


def test_a_script_that_fails_at_the_same_step_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new step counts, and so does another node: it may have ended the round before."""
    monkeypatch.setattr(wrapt, "register_post_import_hook", lambda *_: None)
    store, place = HashStore(), Place("host1:1", 0, 1, 0, 1, 0)

    def trains(step: int, job: Job = JOB) -> None:
        """A round that comes to a step, from the one before it."""
        current = Round(job, place, store)
        current.watch(1)
        current.come()
        for done in (step - 1, step):
            current._tell(SimpleNamespace(global_steps=done, world_size=1, dp_world_size=1))

    for step in (3, 3, 3, 3, 4, 4, 4, 4, 4):
        trains(step)
    trains(4, replace(JOB, node="b"))
    for _ in range(MOST_FRUITLESS):
        trains(4, replace(JOB, node="b"))
    assert not store.check([JOB.given_up])
    with pytest.raises(SystemExit):
        trains(4, replace(JOB, node="b"))


def test_a_run_that_has_ended_makes_room_for_one_of_the_same_name() -> None:
    """Torch's agents can't meet under a name again under which they have ended; each agent of a run may tell of its end."""
    store = HashStore()
    assert number_of_run(store, "mine") == 0
    for _ in range(2):
        end_run(store, "mine", 0)
    assert number_of_run(store, "mine") == 1 and number_of_run(store, "other") == 0
