"""Trainer goes on at the next sample, whatever the batch and the number of ranks; against a run that was never interrupted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import Job, Result, in_order, train

from ucp_deepspeed.testing.ranks import RankPool, get_pool

Ranks = Callable[[int], RankPool]

SAMPLES = 42
"""Samples of an epoch, of which the last step takes fewer."""

EIGHT = {"gradient_accumulation_steps": 2, "save_steps": 1}
"""Steps of eight samples on two ranks."""


@dataclass(frozen=True)
class Uninterrupted:
    job: Job
    result: Result

    def checkpoint(self, step: int) -> str:
        return str(self.job.folder / f"checkpoint-{step}")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Uninterrupted:
    job = Job(tmp_path_factory.mktemp("whole") / "run", SAMPLES, arguments=EIGHT)
    return Uninterrupted(job, get_pool(2).run(train, job)[0])


def by_epoch(result: Result, ranks: int, micro: int, samples: int = SAMPLES) -> dict[int, list[int]]:
    """All samples of each epoch in order, without those that fill up its last micro-batch."""
    found: dict[int, list[int]] = {}
    for step, taken in in_order(result, ranks, micro).items():
        found.setdefault(int(result.epochs[step] - 1e-9), []).extend(taken)
    return found


def check_goes_on(found: Result, ranks: int, micro: int, whole: Uninterrupted, step: int) -> None:
    """Every sample after a step comes once, in the order of the uninterrupted run."""
    expected, done = by_epoch(whole.result, 2, 2), by_epoch(whole.result, 2, 2)
    before = {epoch: 0 for epoch in expected}
    for at, taken in in_order(whole.result, 2, 2).items():
        if at <= step:
            before[int(whole.result.epochs[at] - 1e-9)] += len(taken)
    assert done[0][:SAMPLES] != done[1][:SAMPLES] and sorted(done[1][:SAMPLES]) == list(range(SAMPLES))
    seen = by_epoch(found, ranks, micro)
    for epoch, order in expected.items():
        left = order[min(before[epoch], SAMPLES) : SAMPLES]
        taken = seen.get(epoch, [])
        assert taken[: len(left)] == left
        filled = taken[len(left) :]
        assert filled == order[: len(filled)] and len(filled) < ranks * micro


CASES = {
    "fewer ranks, the same batch of each": (1, 2, 2, 3),
    "fewer ranks, the same step": (1, 4, 2, 9),
    "more ranks": (4, 1, 2, 3),
    "more samples a step": (4, 2, 2, 8),
    "steps that no longer fit": (1, 3, 2, 4),
    "the end of an epoch": (1, 3, 1, 6),
    "nothing changed, later epoch": (2, 2, 2, 8),
}
"""Ranks, the batch of each, accumulation, and the step from which the run goes on."""


@pytest.mark.parametrize("case", CASES)
def test_the_next_sample(case: str, whole: Uninterrupted, ranks: Ranks, tmp_path: Path) -> None:
    size, micro, accumulation, step = CASES[case]
    arguments = {"per_device_train_batch_size": micro, "gradient_accumulation_steps": accumulation}
    job = replace(whole.job, folder=tmp_path / "run", arguments=arguments, resume=whole.checkpoint(step))
    found = ranks(size).run(train, job)[0]
    check_goes_on(found, size, micro, whole, step)
    same_steps = size * micro * accumulation == 8
    assert min(found.samples) == step + 1
    if same_steps:
        assert max(found.samples) == 12
        assert found.rates == {at: rate for at, rate in whole.result.rates.items() if at > step}
    else:
        end = max(found.samples)
        scheduled = {at: 1e-2 * (float(end - at + 1) / float(end)) for at in found.rates}
        assert found.rates == scheduled | {step + 1: whole.result.rates[step + 1]}  # that of the checkpoint
        [told] = [text for text in found.messages if f"and ends at step {end};" in text]
        assert f"a step takes {size * micro * accumulation} samples and not 8" in told
    if (size, micro) == (2, 2):
        assert found.losses == {at: loss for at, loss in whole.result.losses.items() if at > step}
    assert [text for text in found.messages if "come twice" in text] == []


def test_from_one_change_to_the_next(whole: Uninterrupted, ranks: Ranks, tmp_path: Path) -> None:
    """The second checkpoint lies where no step of the third run's size ends."""
    first = replace(
        whole.job,
        folder=tmp_path / "one",
        arguments={"per_device_train_batch_size": 3, "save_steps": 1},
        resume=whole.checkpoint(2),
        stop=5,
    )
    one = ranks(1).run(train, first)[0]
    then = {"gradient_accumulation_steps": 2}
    second = replace(
        first, folder=tmp_path / "two", arguments=then, resume=str(first.folder / "checkpoint-5"), stop=None
    )
    two = ranks(2).run(train, second)[0]
    order = by_epoch(whole.result, 2, 2)[0][:SAMPLES]
    taken = by_epoch(one, 1, 3)[0] + by_epoch(two, 2, 2)[0]
    assert taken[: SAMPLES - 16] == order[16:] and by_epoch(two, 2, 2)[1] == by_epoch(whole.result, 2, 2)[1]


@pytest.mark.parametrize("micro", [1, 4, 16])
def test_a_given_number_of_steps_is_kept(micro: int, whole: Uninterrupted, ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"per_device_train_batch_size": micro, "max_steps": 14}
    job = replace(whole.job, folder=tmp_path / "run", arguments=arguments, resume=whole.checkpoint(8))
    found = ranks(1).run(train, job)[0]
    assert sorted(found.samples) == list(range(9, 15))
    taken = by_epoch(found, 1, micro)[1]
    assert taken == by_epoch(whole.result, 2, 2)[1][16:SAMPLES][: len(taken)]
    assert micro == 16 or len(taken) == 6 * micro


def test_a_finished_run_trains_no_more(whole: Uninterrupted, ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"per_device_train_batch_size": 3}
    job = replace(whole.job, folder=tmp_path / "run", arguments=arguments, resume=whole.checkpoint(12))
    assert ranks(1).run(train, job)[0].samples == {}
    longer = replace(job, arguments=arguments | {"num_train_epochs": 3})
    found = ranks(1).run(train, longer)[0]
    assert set(by_epoch(found, 1, 3)) == {2} and len(by_epoch(found, 1, 3)[2]) == SAMPLES


def test_data_skip_is_ignored_if_asked(whole: Uninterrupted, ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ignore_data_skip": True}
    job = replace(whole.job, folder=tmp_path / "run", arguments=arguments, resume=whole.checkpoint(8))
    found = ranks(1).run(train, job)[0]
    assert by_epoch(found, 1, 4)[1][:32] == by_epoch(whole.result, 2, 2)[1][:32] and max(found.samples) == 12


def test_a_checkpoint_that_tells_no_position(ranks: Ranks, tmp_path: Path) -> None:
    """The block was off when it was saved."""
    job = Job(tmp_path / "run", SAMPLES, universal=None, arguments=EIGHT)
    whole = Uninterrupted(job, ranks(2).run(train, job)[0])
    arguments = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    later = Job(tmp_path / "on", SAMPLES, arguments=arguments, resume=whole.checkpoint(8))
    found = ranks(1).run(train, later)[0]
    check_goes_on(found, 1, 2, whole, 8)
    [told] = [text for text in found.messages if "doesn't tell its position" in text]
    assert "by 8 steps of 8 samples it is sample 16 of epoch 1" in told


LOSSES: Mapping[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another length": ({}, {"samples": 40}, "24 samples of epoch 0 were done, of 42"),
    "another seed": ({}, {"arguments": {"seed": 5}}, "up to 24 samples come twice in this epoch"),
    "by length": ({"train_sampling_strategy": "group_by_length"}, {}, "up to 24 samples come twice in this epoch"),
}


@pytest.mark.parametrize("what", LOSSES)
def test_what_can_not_be_kept_is_told(what: str, ranks: Ranks, tmp_path: Path) -> None:
    always, changed, expected = LOSSES[what]
    job = Job(tmp_path / "run", SAMPLES, arguments=EIGHT | always, stop=3)
    ranks(2).run(train, job)
    fewer = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, **always}
    later = replace(job, folder=tmp_path / "later", resume=str(job.folder / "checkpoint-3"), stop=5)
    later = replace(later, samples=changed.get("samples", SAMPLES), arguments=fewer | changed.get("arguments", {}))
    [told] = [text for text in ranks(1).run(train, later)[0].messages if "come twice" in text]
    assert expected in told


@pytest.mark.parametrize("micro", [4, 5])
def test_a_stream(micro: int, ranks: Ranks, tmp_path: Path) -> None:
    """Its samples are skipped too, a step at a time; what comes twice is told."""
    job = Job(tmp_path / "run", 200, stream=True, arguments=EIGHT | {"max_steps": 10}, stop=3)
    ranks(2).run(train, job)
    arguments = {"per_device_train_batch_size": micro, "max_steps": 10}
    later = replace(
        job, folder=tmp_path / "on", resume=str(job.folder / "checkpoint-3"), arguments=arguments, stop=None
    )
    found = ranks(1).run(train, later)[0]
    begin = 24 // micro * micro
    assert [n for taken in in_order(found, 1, micro).values() for n in taken] == list(range(begin, begin + 7 * micro))
    told = [text for text in found.messages if "come twice" in text]
    assert len(told) == (micro == 5) and all("the last 4 of them come twice" in text for text in told)


@pytest.mark.parametrize("size", [1, 2])
def test_batches_that_one_process_reads_for_all(size: int, ranks: Ranks, tmp_path: Path) -> None:
    """Trainer alone skips those of one process on two ranks, without a word."""
    more = {"accelerator_config": {"dispatch_batches": True}, "num_train_epochs": 1}
    job = Job(tmp_path / "run", 40, arguments=EIGHT | more)
    whole = ranks(2).run(train, job)[0]
    arguments = EIGHT | more | {"per_device_train_batch_size": 4 // size}
    later = replace(job, folder=tmp_path / "on", resume=str(job.folder / "checkpoint-2"), arguments=arguments)
    found = in_order(ranks(size).run(train, later)[0], size, 4 // size)
    after = {step: sorted(taken) for step, taken in in_order(whole, 2, 2).items() if step > 2}
    assert {step: sorted(taken) for step, taken in found.items()} == after and len(after) == 3
