"""Patterns of affine maps, held against the tensors that DeepSpeed itself cuts by the same maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.checkpoint.affine import (
    ParamAffineMap,
    block_gather_map,
    contiguous_split_map,
    replicated_map,
    segmented_map,
    sub_param_map,
)

from ucp_deepspeed.layout.affine import pattern_of_map
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Scale, Shard


def fused(*widths: list[int], dim: int = 0) -> ParamAffineMap:
    """A map of parts side by side along ``dim``; of each the extents on the ranks."""
    sizes = [sum(found) for found in widths]
    shape = (sum(sizes), 3) if dim == 0 else (3, sum(sizes))
    return sub_param_map(shape, sizes, widths, dim)


KNOWN: dict[str, tuple[ParamAffineMap, Pattern]] = {
    "replicated": (replicated_map((4, 3), 2), Replicate()),
    "vector": (replicated_map((5,), 4), Replicate()),
    "columns": (contiguous_split_map((4, 3), [2, 2], 0), Shard(0)),
    "uneven": (contiguous_split_map((25, 3), [13, 12], 0), Shard(0)),
    "rows": (contiguous_split_map((4, 25), [13, 12], 1), Shard(1)),
    "empty shares": (contiguous_split_map((4, 3), [4, 0, 0], 0), Shard(0)),
    "empty rows": (contiguous_split_map((3, 4), [4, 0], 1), Shard(1)),
    "tail on the last rank": (contiguous_split_map((7, 3), [3, 4], 0), Shard(0)),
    "gate and up": (fused([5, 5], [5, 5]), Shard(0, parts=(1, 1))),
    "gate and up along rows": (fused([5, 5], [5, 5], dim=1), Shard(1, parts=(1, 1))),
    "uneven gate and up": (fused([3, 2], [3, 2]), Shard(0, parts=(1, 1))),
    "q, k and v": (fused([8, 8], [2, 2], [2, 2]), Shard(0, parts=(4, 1, 1))),
    "three kv heads": (fused([8, 4], [4, 2], [4, 2]), Shard(0, parts=(2, 1, 1), heads=(3, 3, 3))),
    "one part": (fused([8, 4]), Shard(0)),
    "heads in two runs": (block_gather_map((8, 3), {0: [0, 2], 1: [1, 3]}, 2, 0), Shard(0, parts=(1, 1))),
}

UNKNOWN: dict[str, ParamAffineMap] = {
    "one rank": contiguous_split_map((4, 3), [4], 0),
    "k and v whole beside a cut q": segmented_map((12, 3), [(8, False), (4, True)], 0, 2, [[4, 4]]),
    "heads in two runs, crosswise": block_gather_map((8, 3), {0: [0, 3], 1: [1, 2]}, 2, 0),
    "parts of which a rank has nothing": fused([8, 0], [4, 0]),
    "shares of parts without a common head": fused([8, 4], [3, 1]),
    "another scale": replicated_map((4,), 2, scale=0.25),
}


@pytest.mark.parametrize("case", KNOWN)
def test_the_layout_is_what_deepspeed_cuts(case: str) -> None:
    cut, expected = KNOWN[case]
    pattern = pattern_of_map(cut.to_dict())
    assert pattern == expected
    whole = torch.arange(cut.numel).view(cut.logical_shape)
    shapes = [cut.shard_shapes[rank] for rank in sorted(cut.shard_shapes)]
    assert pattern.logical_shape(shapes) == cut.logical_shape
    for rank, held in enumerate(pattern.layout(cut.logical_shape, shapes).locals):
        local = torch.full(held.shape, -1)
        for piece in held.pieces:
            place, source = ((box.start, box.stop) for box in (piece.local_box, piece.logical_box))
            local[tuple(map(slice, *place))] = whole[tuple(map(slice, *source))]
        assert torch.equal(local, cut.extract(whole, rank))


def test_a_bias_stored_divided_by_the_number_of_ranks() -> None:
    """The map says nothing about moments. Between different numbers of ranks they are refused by name, as DeepSpeed does."""
    assert pattern_of_map(replicated_map((4,), 2, scale=0.5).to_dict()) == Replicate(scale=Scale())


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_no_pattern_has_is_refused(case: str) -> None:
    with pytest.raises(ValueError, match="its affine map"):
        pattern_of_map(UNKNOWN[case].to_dict())


@pytest.mark.parametrize(
    "damage",
    [
        {"logical_shape": None},
        {"ranks": {}},
        {"ranks": {"0": {}, "1": {}}},
        {
            "ranks": {
                0: {"shard_shape": [2, 3], "pieces": [{"shape": [2, 3], "source": [0, [1, 2]], "dest": [0, [3, 1]]}]}
            }
        },
    ],
)
def test_damaged_maps(damage: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="its affine map"):
        pattern_of_map(contiguous_split_map((4, 3), [2, 2], 0).to_dict() | damage)
