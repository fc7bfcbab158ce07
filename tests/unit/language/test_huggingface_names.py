"""Cuts of fused parameters for Hugging Face models, against reshapes of torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.language.huggingface import Cut

CONFIG = {"num_attention_heads": 6, "num_key_value_heads": 2}


def spec_of(**tensors: Any) -> Spec:
    entry = {
        "models": ["some"],
        "dimensions": {"heads": {"config": "num_attention_heads"}, "kv_heads": {"config": "num_key_value_heads"}},
        "tensors": [{"from": "a.{n}.qkv", "to": ["{n}.q", "{n}.k", "{n}.v"], **tensors}],
    }
    rules = [{"match": "**", "pattern": "unique"}]
    return Spec.parse({"family": "f", "rules": rules, "huggingface": [entry]}, "test")


@pytest.mark.parametrize("rest", [(), (5,)])
def test_groups_are_taken_apart(rest: tuple[int, ...]) -> None:
    (entry,) = spec_of(parts=["heads // kv_heads", 1, 1], groups="kv_heads").huggingface
    whole = torch.arange(2 * 5 * 4 * (rest[0] if rest else 1)).view(40, *rest)
    cut = entry.cuts("a.7.qkv", tuple(whole.shape), CONFIG)
    assert cut is not None and cut.names == ("7.q", "7.k", "7.v") and not cut.transposed
    groups = whole.view(2, 5, 4, *rest)
    for found, expected in zip(filled(cut, whole), (groups[:, :3], groups[:, 3:4], groups[:, 4:]), strict=True):
        assert torch.equal(found, expected.reshape(-1, *rest))
    assert entry.cuts("b.7.qkv", (40,), CONFIG) is None


def filled(cut: Cut, whole: torch.Tensor) -> list[torch.Tensor]:
    """Return the local tensors of a cut, element by element."""
    assert cut.layout is not None
    tensors = [torch.full(local.shape, -1) for local in cut.layout.locals]
    for found, local in zip(tensors, cut.layout.locals, strict=True):
        for piece in local.pieces:
            there, here = (tuple(map(slice, box.start, box.stop)) for box in (piece.logical_box, piece.local_box))
            found[here] = whole[there]
    return tensors


def test_parts_come_together_in_one_tensor() -> None:
    (entry,) = spec_of(to="{n}.qkv", parts=["heads // kv_heads", 1, 1], groups="kv_heads", transpose=True).huggingface
    whole = torch.arange(40 * 3).view(40, 3)
    cut = entry.cuts("a.7.qkv", (40, 3), CONFIG)
    assert cut is not None and cut.names == ("7.qkv",) and cut.transposed
    (found,) = filled(cut, whole)
    q, k, v = whole.view(2, 5, 4, 3).split((3, 1, 1), 1)
    assert torch.equal(found, torch.cat([part.reshape(-1, 3) for part in (q, k, v)]))
    with pytest.raises(ValueError, match=r"shape \[40\] is no matrix"):
        entry.cuts("a.7.qkv", (40,), CONFIG)


@pytest.mark.parametrize(
    ("shape", "config", "told"),
    [
        ((42, 5), CONFIG, r"shape \[42, 5\] can't be cut into 2 groups of 3:1:1"),
        ((), CONFIG, "can't be cut"),
        ((40,), {"num_attention_heads": 6}, "kv_heads: 'num_key_value_heads' in the model's configuration is missing"),
        ((40,), {**CONFIG, "num_attention_heads": 1}, "can't be cut into 2 groups of 0:1:1"),
    ],
)
def test_what_cannot_be_cut(shape: tuple[int, ...], config: dict[str, int], told: str) -> None:
    (entry,) = spec_of(parts=["heads // kv_heads", 1, 1], groups="kv_heads").huggingface
    with pytest.raises(ValueError, match=told):
        entry.cuts("a.7.qkv", shape, config)


@pytest.mark.parametrize(
    ("tensors", "told"),
    [
        ({"parts": [1, 1]}, "3 names and 2 parts"),
        ({"parts": [1, 1, 0]}, "expected a number above 0"),
        ({"to": ["{m}.q", "k", "v"], "parts": [1, 1, 1]}, "doesn't stand in"),
        ({"parts": [1, 1, 1], "dim": 0}, "unknown key"),
    ],
)
def test_mistakes(tensors: dict[str, Any], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        spec_of(**tensors)
