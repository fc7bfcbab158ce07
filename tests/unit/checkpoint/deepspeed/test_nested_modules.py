"""Modules' states in nested dictionaries, as Megatron-DeepSpeed's plain models save them."""

from __future__ import annotations

from typing import Any

import torch

from ucp_deepspeed.checkpoint.deepspeed.contents import in_flat


def test_names_are_joined_in_order() -> None:
    one, two, state = torch.ones(1), torch.zeros(2), {"scale": 3}
    nested = {
        "language_model": {
            "embedding": {"word_embeddings": {"weight": one}},
            "encoder": {"layers.0.norm.weight": two, "layers.0._extra_state": state},
        },
        "_extra_state": state,
        "moe_state_dict": {},
    }
    found = in_flat(nested)
    assert list(found) == [
        "language_model.embedding.word_embeddings.weight",
        "language_model.encoder.layers.0.norm.weight",
        "language_model.encoder.layers.0._extra_state",
        "_extra_state",
    ]
    assert found["language_model.encoder.layers.0.norm.weight"] is two
    assert found["_extra_state"] is state


def test_what_is_flat_stays() -> None:
    flat = {"a.weight": torch.ones(1), "b._extra_state": {"scale": 3}, 7: {"strange": 1}}
    assert in_flat(flat) is flat
    assert in_flat(None) is None and in_flat([1]) == [1]


def test_a_dictionary_in_itself() -> None:
    """A damaged file may hold one."""
    held: dict[str, Any] = {"weight": torch.ones(1)}
    held["again"] = held["more"] = held
    assert "model.weight" in in_flat({"model": held})
