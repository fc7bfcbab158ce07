"""The experts of each rank, against the groups that DeepSpeed makes, and the meaning of its files' numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
from deepspeed.utils.groups import _get_expert_parallel_ranks

from ucp_deepspeed.checkpoint.expert_names import (
    ExpertRanks,
    expert_of,
    missing_expert,
    names_on,
    names_on_all,
    optimizer_file,
    recognise_experts,
    renumbered,
    weight_file,
)
from ucp_deepspeed.errors import UnsupportedError

PREFIX = "layers.3.moe.deepspeed_moe.experts.deepspeed_experts."


def test_names() -> None:
    name = f"{PREFIX}5.mlp.4.weight"
    assert expert_of(name) == (PREFIX, 5)
    assert expert_of("deepspeed_moe.experts.deepspeed_experts.0.w") == ("deepspeed_moe.experts.deepspeed_experts.", 0)
    assert expert_of("layers.3.moe.deepspeed_moe.gate.wg.weight") is expert_of("experts.0.weight") is None
    assert renumbered(name, 8) == f"{PREFIX}13.mlp.4.weight"
    assert renumbered("head.weight", 8) == "head.weight"


def test_names_of_other_ranks() -> None:
    """Three local experts in one layer, one in another: the second rank's begin at 3 and at 1."""
    other = "deepspeed_moe.experts.deepspeed_experts."
    local = ["head.weight", *(f"{PREFIX}{expert}.w" for expert in range(3)), f"{other}0.w"]
    assert names_on(local, 0) == tuple(local)
    assert names_on(local, 1) == ("head.weight", f"{PREFIX}3.w", f"{PREFIX}4.w", f"{PREFIX}5.w", f"{other}1.w")
    assert names_on_all(local, 2) == [*local, f"{PREFIX}3.w", f"{PREFIX}4.w", f"{PREFIX}5.w", f"{other}1.w"]


def test_files() -> None:
    assert weight_file("layer_2_expert_13_mp_rank_01_model_states.pt") == (2, 13, 1)
    assert weight_file("layer_02-model_01-model_states.pt") is weight_file("mp_rank_00_model_states.pt") is None
    assert optimizer_file("expp_rank_3_mp_rank_00_optim_states.pt") == (3, 0)
    assert optimizer_file("zero_pp_rank_3_mp_rank_00_optim_states.pt") is None


@pytest.mark.parametrize(("dp", "ep"), [(4, 2), (4, 1), (4, 4), (6, 3)])
@pytest.mark.parametrize("data_first", [False, True])
def test_holders_without_tensor_parallelism(dp: int, ep: int, data_first: bool) -> None:
    ranks = ExpertRanks(ep, dp, 1, tensor_parallel=True, data_first=data_first)
    found = [[ranks.holder(e, partition, 0) for partition in range(ranks.partitions)] for e in range(ep)]
    assert [[data for _, data in group] for group in found] == _flat(dp, ep, data_first)


@pytest.mark.parametrize(("tp", "dp", "ep"), [(2, 4, 2), (2, 8, 4), (4, 6, 3), (2, 2, 1)])
def test_holders_with_experts_cut_over_tensor_parallel_ranks(tp: int, dp: int, ep: int) -> None:
    """DeepSpeed's own function lists the groups of ranks that hold the same experts, by their numbers in the world."""
    ranks = ExpertRanks(ep, dp, tp, tensor_parallel=True)
    _, expected = _get_expert_parallel_ranks(tp * dp, tp, ep)
    holders = {
        (rank, e): [ranks.holder(e, partition, rank) for partition in range(ranks.partitions)]
        for rank in range(tp)
        for e in range(ep)
    }
    assert all(model == rank for (rank, _), group in holders.items() for model, _ in group)
    found = [[data * tp + model for model, data in group] for group in holders.values()]
    assert sorted(found) == sorted(map(list, expected))


def _flat(world: int, ep: int, data_first: bool) -> list[list[int]]:
    """``_create_expert_and_data_parallel`` in a few words."""
    stride = world // ep
    if data_first:
        return [list(range(first * stride, (first + 1) * stride)) for first in range(ep)]
    return [list(range(first, world, ep)) for first in range(ep)]


@pytest.mark.parametrize(("tp", "dp", "ep"), [(2, 2, 2), (2, 2, 4), (2, 3, 1), (4, 1, 2)])
def test_holders_with_experts_spread_over_tensor_parallel_ranks_too(tp: int, dp: int, ep: int) -> None:
    ranks = ExpertRanks(ep, dp, tp, tensor_parallel=False)
    expected = _flat(tp * dp, ep, False)
    for rank in range(tp):  # any rank of the stage
        holders = [[ranks.holder(e, partition, rank) for partition in range(ranks.partitions)] for e in range(ep)]
        assert [[data * tp + model for model, data in group] for group in holders] == expected
    later = ExpertRanks(ep, dp, tp, tensor_parallel=False).holder(0, 0, rank=tp + 1)
    assert later[0] // tp == 1  # the second pipeline stage's ranks


def test_how_experts_are_spread_is_told_by_their_numbers() -> None:
    local = [f"{PREFIX}{expert}.w" for expert in range(2)]

    def recognised(total: int, cut: int, dp: int, tp: int) -> ExpertRanks:
        return recognise_experts(local, [total], cut, dp, tp, False, Path("file"))

    assert recognised(8, 1, 4, 1) == ExpertRanks(4, 4, 1, True)
    assert recognised(4, 2, 4, 1) == ExpertRanks(2, 4, 1, True)
    assert recognised(4, 2, 4, 2) == ExpertRanks(2, 4, 2, True)
    assert recognised(8, 2, 4, 2) == ExpertRanks(4, 4, 2, False)
    with pytest.raises(
        UnsupportedError, match=r"file has \[2\] experts of layers with \[6\], cut over 2 ranks of TP1·DP4"
    ):
        recognised(6, 2, 4, 1)
    with pytest.raises(UnsupportedError, match="can't be told"):
        recognise_experts(local, [4, 8], 2, 4, 2, False, Path("file"))  # either of the two above


def test_an_expert_without_a_file_is_named() -> None:
    places = {(layer, number) for layer in (0, 1) for number in range(4)}
    assert missing_expert([4, 4], places) is None and missing_expert(4, places) is None
    assert missing_expert([4, 6], places) == (1, 4)
    assert missing_expert([4, 4, 4], places) == (2, 0)
    assert missing_expert([4, 4], places - {(0, 2)}) == missing_expert(4, places - {(0, 2)}) == (0, 2)
    assert missing_expert([2**60], places) == (0, 4)
