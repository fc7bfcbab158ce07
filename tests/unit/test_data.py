"""The sampler against the plain definition of its stream: any topology on either side of any number of stops.

Megatron-LM and DeepSpeed drop the rest of an epoch that fills no global batch; torch's ``DistributedSampler`` repeats samples
there and has no position at all, so that a resumed epoch begins anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from ucp_deepspeed import tunables
from ucp_deepspeed.data import DataPositionError, ResumableSampler, SampleStream, permuted
from ucp_deepspeed.errors import MismatchError


def stream_of(samples: int, seed: int, start: int, stop: int, shuffle: bool = True) -> list[int]:
    """The definition: one whole order after another."""
    found: list[int] = []
    for epoch in range(stop // samples + 1):
        order = np.arange(samples)
        found += (permuted(order, samples, seed, epoch) if shuffle else order).tolist()
    return found[start:stop]


legs = st.lists(
    st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.integers(0, 7), st.integers(0, 9)),
    min_size=1,
    max_size=5,
)


@given(samples=st.integers(1, 60), seed=st.integers(0, 2**40), shuffle=st.booleans(), legs=legs)
def test_each_sample_once_per_epoch_whatever_the_topologies(
    samples: int, seed: int, shuffle: bool, legs: list[tuple[int, int, int, int, int]]
) -> None:
    """Each leg has another data-parallel size, micro-batch and accumulation, and stops after any step with samples prefetched."""
    read: list[int] = []
    for ranks, micro, accumulation, steps, prefetched in legs:
        batch = ranks * micro * accumulation
        samplers = [
            ResumableSampler(samples, ranks, rank, shuffle, seed, global_batch_size=batch) for rank in range(ranks)
        ]
        for sampler in samplers:
            sampler.set_position(len(read))
        feeds = [repeated(sampler) for sampler in samplers]
        for _ in range(steps):
            shares = [list(islice(feed, batch // ranks)) for feed in feeds]
            read += [index for turn in zip(*shares, strict=True) for index in turn]
        for feed in feeds:
            list(islice(feed, prefetched))
    assert read == stream_of(samples, seed, 0, len(read), shuffle)
    for epoch in range(len(read) // samples):
        assert sorted(read[epoch * samples : (epoch + 1) * samples]) == list(range(samples))


def repeated(sampler: ResumableSampler) -> Iterator[int]:
    """One iteration after another."""
    while True:
        yield from sampler


@given(
    samples=st.integers(1, 40),
    ranks=st.integers(1, 4),
    per_rank=st.integers(1, 12),
    start=st.integers(0, 200),
)
def test_an_iteration_ends_with_the_batch_in_which_its_epoch_ends(
    samples: int, ranks: int, per_rank: int, start: int
) -> None:
    batch = ranks * per_rank
    sampler = ResumableSampler(samples, ranks, ranks - 1, global_batch_size=batch)
    sampler.set_position(start)
    epoch = sampler.epoch
    announced, read = len(sampler), len(list(sampler))
    assert read == announced and read % per_rank == 0
    assert sampler.position == start + read * ranks
    assert sampler.position - batch < (epoch + 1) * samples <= sampler.position


@given(samples=st.integers(1, 3000), seed=st.integers(0, 2**70), epoch=st.integers(0, 2**40))
def test_every_order_is_a_permutation(samples: int, seed: int, epoch: int) -> None:
    assert sorted(permuted(np.arange(samples), samples, seed, epoch).tolist()) == list(range(samples))


@pytest.mark.parametrize("samples", [2, 3, 6, 10, 16])
def test_orders_are_as_good_as_random(samples: int) -> None:
    """Over many epochs every index comes as often at each place, and after each other index, as chance would have it."""
    epochs = 3000
    orders = np.stack([permuted(np.arange(samples), samples, 11, epoch) for epoch in range(epochs)])
    for counts, choices in (
        (Counter((place, index) for order in orders for place, index in enumerate(order.tolist())), samples**2),
        (Counter((order[0], order[1]) for order in orders.tolist()), samples * (samples - 1)),
    ):
        expected = sum(counts.values()) / choices
        chi_square = sum((count - expected) ** 2 / expected for count in counts.values()) + expected * (
            choices - len(counts)
        )
        assert chi_square < choices + 6 * (2 * choices) ** 0.5


def test_orders_never_change() -> None:
    """A run may resume with a later release in the middle of an epoch: these values are part of the format."""
    assert SampleStream(10, seed=1234).at(np.arange(20)).tolist() == ORDERS_OF_TEN
    assert SampleStream(10**12, seed=7).at(np.array([0, 1, 10**12 - 1, 10**12])).tolist() == PLACES_OF_MANY


ORDERS_OF_TEN = [1, 3, 6, 4, 0, 9, 7, 8, 5, 2, 5, 9, 4, 8, 1, 2, 3, 6, 0, 7]
PLACES_OF_MANY = [399841039793, 880475901550, 32464962879, 376034766919]


def test_seeds_and_epochs_differ() -> None:
    orders = {
        tuple(SampleStream(30, seed).at(np.arange(60)).tolist()[half:][:30]) for seed in range(20) for half in (0, 30)
    }
    assert len(orders) == 40


def test_many_samples_take_no_memory() -> None:
    """A stored order of a billion samples would take 8 GB on every rank, and minutes to make."""
    sampler = ResumableSampler(10**9, 8, 3, global_batch_size=1024)
    sampler.set_position(5 * 10**9 + 512)
    first = list(islice(sampler, tunables.INDICES + 5))
    expected = SampleStream(10**9).at(5 * 10**9 + 512 + 3 + 8 * np.arange(tunables.INDICES + 5))
    assert first == expected.tolist() and sampler.epoch == 5


@pytest.mark.parametrize("workers", [0, 2])
def test_torchs_loader(workers: int) -> None:
    """Whole epochs through real loaders, with and without prefetching, stopped in the middle and resumed on other ranks."""
    dataset = list(range(100, 145))
    read: list[int] = []
    for ranks, micro, micro_batches in ((2, 4, 3), (3, 2, 2), (1, 6, 2)):
        shares: list[list[list[int]]] = []
        for rank in range(ranks):
            sampler = ResumableSampler(dataset, ranks, rank, global_batch_size=ranks * micro)
            sampler.set_position(len(read))
            loader = DataLoader(dataset, micro, sampler=sampler, num_workers=workers)
            batches = [batch.tolist() for batch in (islice(loader, micro_batches) if ranks > 1 else loader)]
            shares.append(batches)
        for step in zip(*shares, strict=True):
            read += [value for turn in zip(*step, strict=True) for value in turn]
    assert len(read) == 48 and sorted(read[:45]) == dataset


def test_state_goes_through_the_client_state() -> None:
    sampler = ResumableSampler(50, 2, 0, seed=3, global_batch_size=8)
    sampler.set_position(24)
    resumed = ResumableSampler(50, 5, 1, seed=3, global_batch_size=20)
    resumed.load_state_dict(sampler.state_dict())
    assert resumed.position == 24 and next(iter(resumed)) == stream_of(50, 3, 25, 26)[0]


def test_another_dataset_or_seed_is_an_error() -> None:
    """torch's StatefulDataLoader and Megatron-LM go on with whatever order the new settings give."""
    state = ResumableSampler(50, seed=3).state_dict()
    with pytest.raises(MismatchError) as caught:
        ResumableSampler(60, seed=4).load_state_dict(state)
    assert caught.value.problems == ("samples: 50 when saved, 60 now", "seed: 3 when saved, 4 now")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": []}, "a dataset of 0 samples"),
        ({"dataset": 10, "num_replicas": 2, "rank": 2}, "rank 2 of 2"),
        ({"dataset": 10, "num_replicas": 4, "global_batch_size": 6}, "6 samples can't be shared by 4"),
    ],
)
def test_impossible_shares(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DataPositionError, match=message):
        ResumableSampler(**arguments)  # type: ignore[arg-type]


def test_positions_before_the_first_sample() -> None:
    with pytest.raises(DataPositionError, match="before the first sample"):
        ResumableSampler(10).set_position(-1)
