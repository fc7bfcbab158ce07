"""Position in the data and curriculum, over changes of the topology.

DeepSpeed saves neither but the curriculum, whose random stream it loses. Users of Accelerate and NeMo ask for them in vain
when the number of GPUs changes (accelerate #3938, Automodel #533).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import resumed
from deepspeed.utils import RepeatingLoader
from torch.utils.data import DataLoader, Dataset

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.data import DataPositionError, ResumableSampler, SampleStream
from ucp_deepspeed.testing.ranks import RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import SEQUENCE, VOCABULARY, Run, build_engine
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

SAMPLES = 50

SEED = 5


class Tokens(Dataset[tuple[int, torch.Tensor]]):
    """Samples that tell their index; ``read`` lists what was asked for in this process."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[int, torch.Tensor]:
        self.read.append(index)
        generator = torch.Generator().manual_seed(int(index))
        return index, torch.randint(0, VOCABULARY, (SEQUENCE + 1,), generator=generator)


def pipeline_inputs(samples: Sequence[tuple[int, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Collate as the pipelines of the tests take it."""
    tokens = torch.stack([sample for _, sample in samples])
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@dataclass(frozen=True)
class Leg:
    """Part of a run: its engine, batch sizes in samples, steps, and how many micro-batches its loader fetches ahead."""

    run: Run
    micro: int
    accumulation: int
    steps: int
    ahead: int = 0

    def engine(self, ranks: int) -> Any:
        """Collective."""
        sizes = {
            "train_micro_batch_size_per_gpu": self.micro,
            "gradient_accumulation_steps": self.accumulation,
            "train_batch_size": self.micro * self.accumulation * ranks,
        }
        return build_engine(replace(self.run, config=sizes | dict(self.run.config)))


@dataclass(frozen=True)
class Read:
    """The data that one rank trained on: indices of each micro-batch, and the engine's counters at the end."""

    micro_batches: list[list[int]]
    global_samples: int
    skipped_steps: int
    losses: list[float] = field(default_factory=list)


def prefetched(loader: Iterable[Any], ahead: int) -> Iterator[Any]:
    """As with worker processes, which the ranks of a pool can't start: the loader is always some micro-batches ahead."""
    feed = iter(loader)
    held = deque(islice(feed, ahead))
    for batch in feed:
        held.append(batch)
        yield held.popleft()
    yield from held


def loss_of(engine: Any, tokens: torch.Tensor) -> Any:
    """Return the loss of predicting each token from those before it."""
    tokens = tokens.to(engine.device)
    return engine(tokens[:, :-1], tokens[:, 1:])


def train_on_samples(leg: Leg, load: str | None, save: str) -> Read:
    """On a rank: an ordinary training loop over whatever epochs there are, saved after the leg's last step."""
    with fp16_on_cpu():
        engine = leg.engine(torch.distributed.get_world_size())
    dataset = Tokens()
    sampler = ResumableSampler(dataset, seed=SEED).follow(engine)
    loader = DataLoader(dataset, leg.micro, sampler=sampler)
    micro_batches: list[list[int]] = []
    with resumed(engine, load):
        while len(micro_batches) < leg.steps * leg.accumulation:
            for indices, tokens in islice(
                prefetched(loader, leg.ahead), leg.steps * leg.accumulation - len(micro_batches)
            ):
                micro_batches.append(indices.tolist())
                engine.backward(loss_of(engine, tokens))
                engine.step()
        engine.save_checkpoint(save, client_state={"sampler": sampler.state_dict()})
        return Read(micro_batches, engine.global_samples, engine.skipped_steps)


def in_turn(reads: Sequence[Read]) -> list[int]:
    """The indices of all ranks in the order of the stream."""
    shares = [[index for batch in read.micro_batches for index in batch] for read in reads]
    return [index for turn in zip(*shares, strict=True) for index in turn]


def test_an_epoch_over_three_data_parallel_sizes(ranks: Ranks, tmp_path: Path) -> None:
    """DP2 → DP4 → DP1, through two epochs of 50 samples: in each every index exactly once, where DeepSpeed begins the epoch anew,
    in another order, and pads it with repeated samples."""
    legs = [
        (2, Leg(Run("mlp", zero={"stage": 1}), micro=2, accumulation=2, steps=4, ahead=3)),
        (4, Leg(Run("mlp", zero={"stage": 2}), micro=3, accumulation=1, steps=3)),
        (1, Leg(Run("mlp", zero={"stage": 0}), micro=1, accumulation=6, steps=6)),
    ]
    read: list[int] = []
    load: str | None = None
    for number, (world_size, leg) in enumerate(legs):
        save = str(tmp_path / str(number))
        reads = ranks(world_size).run(train_on_samples, leg, load, save)
        read += in_turn(reads)
        load = save
        assert {rank.global_samples for rank in reads} == {len(read)}
    assert len(read) == 104
    for epoch in (read[:SAMPLES], read[SAMPLES : 2 * SAMPLES]):
        assert sorted(epoch) == list(range(SAMPLES))
    assert read == SampleStream(SAMPLES, SEED).at(np.arange(104)).tolist()


def test_steps_skipped_on_overflow_have_consumed_their_samples(ranks: Ranks, tmp_path: Path) -> None:
    """Megatron-LM's and DeepSpeed's counters agree here; a position taken from the scheduler's or optimizer's step would lag."""
    scaling = {"fp16": {"enabled": True, "initial_scale_power": 40, "hysteresis": 1}}
    run = Run("mlp", zero={"stage": 2}, precision="fp16", config=scaling)
    first = ranks(2).run(train_on_samples, Leg(run, 2, 2, steps=4), None, str(tmp_path / "a"))
    assert first[0].skipped_steps > 0
    then = ranks(1).run(train_on_samples, Leg(run, 4, 1, steps=5), str(tmp_path / "a"), str(tmp_path / "b"))
    assert in_turn(first) + in_turn(then) == SampleStream(SAMPLES, SEED).at(np.arange(52)).tolist()


@pytest.mark.parametrize("run", [Run("llama", tp=2), Run("llama", sp=2)], ids=["tensor", "sequence"])
def test_ranks_of_one_model_copy_read_the_same(run: Run, ranks: Ranks) -> None:
    """DeepSpeed's loader takes global ranks for data-parallel ones unless an ``mpu`` says otherwise, and fails with Ulysses'."""
    shares = ranks(4).run(shares_of_a_batch, Leg(run, 2, 1, 1), 2)
    assert shares[0] == shares[1] and shares[2] == shares[3]
    assert sorted(shares[0] + shares[2]) == sorted(SampleStream(SAMPLES, SEED).at(np.arange(4)).tolist())
    assert ranks(2).run(shares_of_a_batch, Leg(Run("mlp"), 2, 1, 1), 2) == [shares[0], shares[2]]


def shares_of_a_batch(leg: Leg, copies: int) -> list[int]:
    """On a rank: what it would read first."""
    with resumed(leg.engine(copies), None) as engine:
        return list(islice(ResumableSampler(SAMPLES, seed=SEED).follow(engine), leg.micro))


def train_pipeline(leg: Leg, load: str | None, save: str) -> list[int]:
    """On a rank: train by ``train_batch`` from DeepSpeed's own loader; returns the indices that this rank read."""
    engine = leg.engine(1)
    dataset = Tokens()
    with resumed(engine, load):
        loader = engine.deepspeed_io(
            dataset,
            data_sampler=ResumableSampler(dataset, seed=SEED).follow(engine),
            collate_fn=pipeline_inputs,
            num_local_io_workers=0,
        )
        engine.set_dataloader(RepeatingLoader(loader))
        for _ in range(leg.steps):
            engine.train_batch()
        engine.save_checkpoint(save)
    return dataset.read


def test_pipelines(ranks: Ranks, tmp_path: Path) -> None:
    """Through the end of an epoch, with DeepSpeed's ``deepspeed_io`` and ``RepeatingLoader``, from two stages to one."""
    two = Leg(Run("llama", pp=2), micro=2, accumulation=4, steps=3)
    reads = ranks(2).run(train_pipeline, two, None, str(tmp_path / "a"))
    assert reads[0] == reads[1]
    one = Leg(Run("llama", pp=1), micro=4, accumulation=2, steps=4)
    [then] = ranks(1).run(train_pipeline, one, str(tmp_path / "a"), str(tmp_path / "b"))
    assert reads[0] + then == SampleStream(SAMPLES, SEED).at(np.arange(56)).tolist()


def interrupted(leg: Leg, folder: str) -> dict[str, Any]:
    """On a rank: breaks and loads at places where a loader has more prefetched than the engine has taken."""
    with resumed(leg.engine(1), None) as engine:
        dataset = Tokens()
        sampler = ResumableSampler(dataset, seed=SEED).follow(engine)
        loader = DataLoader(dataset, leg.micro, sampler=sampler)
        found: dict[str, Any] = {"read": [], "lengths": [len(loader)]}

        def take(micro_batches: int) -> Iterator[Any]:
            feed = iter(loader)
            for indices, tokens in islice(feed, micro_batches):
                found["read"] += indices.tolist()
                engine.backward(loss_of(engine, tokens))
                engine.step()
            return feed

        take(3)
        found["accumulating"] = sampler.position
        take(1)
        engine.save_checkpoint(folder)
        found["state"] = sampler.state_dict()
        found["lengths"].append(len(loader))
        feed = take(2)
        engine.load_checkpoint(folder)
        try:
            next(feed)
        except DataPositionError as error:
            found["stale"] = str(error)
        found["position"] = sampler.position
        sampler.load_state_dict(found["state"])
        try:
            sampler.load_state_dict(found["state"] | {"position": 9})
        except DataPositionError as error:
            found["elsewhere"] = str(error)
        try:
            ResumableSampler(dataset, begins_at=100).follow(engine).position  # noqa: B018
        except DataPositionError as error:
            found["before"] = str(error)
        found["second dataset"] = list(islice(ResumableSampler(dataset, seed=SEED, begins_at=8).follow(engine), 3))
    return found


def test_breaks_and_loads_within_a_process(ranks: Ranks, tmp_path: Path) -> None:
    """An iterator that a load has overtaken is an error, where every other sampler silently repeats or skips samples."""
    [found] = ranks(1).run(interrupted, Leg(Run("mlp"), 2, 2, 0), str(tmp_path))
    stream = SampleStream(SAMPLES, SEED).at(np.arange(12)).tolist()
    assert found["read"] == stream and found["accumulating"] == 6
    assert found["lengths"] == [26, 22]  # 52 samples, of which 8 are read
    assert found["state"]["position"] == found["position"] == 8
    assert "went from sample 10 to 8" in found["stale"] and "iterate over the loader anew" in found["stale"]
    assert "stood at sample 9, the engine stands at 8" in found["elsewhere"]
    assert "stands at sample 8; this dataset begins at sample 100" in found["before"]
    assert found["second dataset"] == stream[:3]


CURRICULUM = {
    "curriculum_metrics": {
        "length": {
            "difficulty_type": "value",
            "clustering_type": "single_cluster",
            "min_difficulty": 2,
            "max_difficulty": 10,
            "schedule_type": "fixed_linear",
            "schedule_config": {"total_curriculum_step": 8, "difficulty_step": 2},
        }
    }
}

DROPPING = {
    "total_layer_num": 2,
    "random_ltd_layer_num": 1,
    "random_ltd_layer_id": [0],
    "model_mask_name": None,
    "model_type": "decoder",
    "hidden_state_order": "batch_seq_dim",
    "random_ltd_schedule": {
        "min_value": 4,
        "max_value": 12,
        "schedule_type": "fixed_linear",
        "schedule_config": {"require_steps": 8, "seq_per_step": 2},
    },
}


def with_curriculum(leg: Leg, clusters: Path) -> Leg:
    """Add DeepSpeed's curriculum sampler and random layer-token dropping to a leg. Both draw on rank 0 and count for all."""
    learning = {"enabled": True, "data_cluster_path": str(clusters), **CURRICULUM}
    efficiency = {
        "enabled": True,
        "seed": 7,
        "data_sampling": {"enabled": True, "num_workers": 0, "curriculum_learning": learning},
        "data_routing": {"enabled": True, "random_ltd": {"enabled": True, **DROPPING}},
    }
    return replace(leg, run=replace(leg.run, config={"data_efficiency": efficiency}))


def train_by_curriculum(leg: Leg, load: str | None, save: str | None) -> dict[str, Any]:
    """On a rank: returns the indices of each micro-batch, and the schedules' states at the end, where it saves."""
    engine = leg.engine(torch.distributed.get_world_size())
    engine.training_dataloader = engine.deepspeed_io(Tokens())  # as with training_data
    micro_batches: list[list[int]] = []
    with resumed(engine, load):
        for indices, tokens in islice(engine.training_dataloader, leg.steps * leg.accumulation):
            micro_batches.append(indices.tolist())
            engine.backward(loss_of(engine, tokens))
            engine.step()
        if save is not None:
            engine.save_checkpoint(save)
        state = engine.training_dataloader.data_sampler.state_dict()
        kept = {key: state[key] for key in ("curriculum_step", "current_difficulties")}
        return {"read": micro_batches, "dropping": engine.random_ltd_scheduler.state_dict(), **kept}


def step_by_step(ranks: Sequence[Mapping[str, Any]], accumulation: int) -> list[list[int]]:
    """Indices that all ranks together read in each optimizer step."""
    micro = [sorted(chain(*batches)) for batches in zip(*(rank["read"] for rank in ranks), strict=True)]
    return [sorted(chain(*micro[start : start + accumulation])) for start in range(0, len(micro), accumulation)]


@pytest.mark.parametrize(("world_size", "converted"), [(2, False), (4, False), (1, True)])
def test_curriculum(world_size: int, converted: bool, ranks: Ranks, tmp_path: Path) -> None:
    """The samples of every later step are those of a run that was never interrupted, through the end of an epoch, where DeepSpeed
    draws a new order. It restores the sampler's counters on the same topology alone, and begins its random stream anew."""
    source = Leg(Run("mlp", zero={"stage": 1}), 2, 2, steps=9)
    whole = ranks(2).run(train_by_curriculum, with_curriculum(source, tmp_path / "x"), None, None)
    stopped = with_curriculum(replace(source, steps=3), tmp_path / "y")
    ranks(2).run(train_by_curriculum, stopped, None, str(tmp_path / "a"))
    load = tmp_path / "a"
    if converted:
        load = tmp_path / "b" / "step"
        convert(UniversalView.of(open_checkpoint(tmp_path / "a")), load)
    target = Leg(Run("mlp", zero={"stage": 1 if world_size == 2 else 2}), 8 // world_size, 1, steps=6)
    then = ranks(world_size).run(train_by_curriculum, with_curriculum(target, tmp_path / "y"), str(load), None)
    assert step_by_step(then, 1) == step_by_step(whole, 2)[3:]
    for key in ("dropping", "curriculum_step", "current_difficulties"):
        assert [rank[key] for rank in then] == [whole[0][key]] * world_size


def train_with_dropout(leg: Leg, load: str | None, save: str | None, save_at: int = 0) -> list[float]:
    """On a rank: losses of a model with dropout on resumable data, where the loader leaves the default stream alone."""
    engine = leg.engine(torch.distributed.get_world_size())
    engine.module.norm.register_forward_hook(lambda module, args, output: torch.nn.functional.dropout(output, 0.4))
    dataset = Tokens()
    sampler = ResumableSampler(dataset, seed=SEED).follow(engine)
    loader = DataLoader(dataset, leg.micro, sampler=sampler, generator=torch.Generator())
    losses: list[float] = []
    torch.manual_seed(3 + torch.distributed.get_rank())
    with resumed(engine, load):
        for _, tokens in islice(loader, leg.steps):
            loss = loss_of(engine, tokens)
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
            if len(losses) == save_at:
                engine.save_checkpoint(str(save))
    return losses


@pytest.mark.parametrize("load", ["auto", "always"])
def test_a_resumed_run_equals_an_uninterrupted_one(load: str, ranks: Ranks, tmp_path: Path) -> None:
    """Bit for bit on each rank, with dropout and shuffled data in the middle of an epoch."""
    run = Run("mlp", zero={"stage": 2}, universal={"enabled": True, "load": load})
    whole = ranks(2).run(train_with_dropout, Leg(run, 4, 1, steps=6), None, str(tmp_path), 3)
    then = ranks(2).run(train_with_dropout, Leg(run, 4, 1, steps=3), str(tmp_path), None)
    assert then == [losses[3:] for losses in whole]
