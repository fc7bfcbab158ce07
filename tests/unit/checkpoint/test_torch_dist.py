"""Parameter groups of Megatron-Core's folders, which list no names, and keys that stack layers."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp_deepspeed.checkpoint.dcp.metadata import Metadata, Part, StoredTensor
from ucp_deepspeed.checkpoint.torch_dist.groups import assigned, stored_groups
from ucp_deepspeed.checkpoint.torch_dist.keys import sort_keys, unstacked
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Box

HERE = Path("common.pt")
TRAINED = {
    "embedding.word_embeddings.weight": (4, 2),
    "decoder.layers.0.mlp.linear_fc1.bias": (8,),
    "decoder.layers.0.mlp.experts.local_experts.0.linear_fc1.weight": (8, 2),
}
WORDS, BIAS, EXPERT = TRAINED


def group(**settings: Any) -> dict[str, Any]:
    return {"lr": 0.1, "wd_mult": 1.0, "is_expert_parallel": False, **settings}


def test_groups_get_their_parameters_by_the_rule() -> None:
    optimizers = {
        1: {"optimizer": {"param_groups": [group(is_expert_parallel=True, lr=0.3, step=2)]}},
        0: {"optimizer": {"param_groups": [group(step=2), group(wd_mult=0.0, lr=0.2, step=2)]}},
    }
    found, steps = assigned(stored_groups(optimizers, HERE), TRAINED, HERE)
    assert {each.names: each.hyperparameters["lr"] for each in found} == {(WORDS,): 0.1, (BIAS,): 0.2, (EXPERT,): 0.3}
    assert steps == dict.fromkeys(TRAINED, 2) and all("step" not in each.hyperparameters for each in found)


def test_what_the_rule_does_not_tell_stays_as_configured(caplog: pytest.LogCaptureFixture) -> None:
    groups = [group(), group(lr=0.2, is_decoupled_lr=True), group(wd_mult=0.0)]
    with caplog.at_level(logging.WARNING):
        stored = stored_groups({"param_groups": groups, "state": {"common_step": 3}}, HERE)
        found, steps = assigned(stored, TRAINED, HERE)
    assert steps == dict.fromkeys(TRAINED, 3)
    by_names = {each.names: each.hyperparameters for each in found}
    assert by_names[WORDS, EXPERT].keys() == {"wd_mult", "is_expert_parallel"} and by_names[BIAS,]["lr"] == 0.1
    assert "their is_decoupled_lr, lr stay as configured" in caplog.text


@pytest.mark.parametrize(
    ("optimizer", "told"),
    [
        ([], "without parameter groups"),
        ({"param_groups": [group(step="two")]}, "counts steps in a str"),
        ({"param_groups": [group(wd_mult=0.0)]}, f"has no parameter group for {WORDS}"),
        ({"param_groups": [group(step=1), group(step=2), group(wd_mult=0.0)]}, "counts different steps"),
    ],
)
def test_groups_of_another_form_are_damage(optimizer: Any, told: str) -> None:
    with pytest.raises(DamagedCheckpointError, match=told):
        assigned(stored_groups(optimizer, HERE), TRAINED, HERE)


def tensor(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> StoredTensor:
    return StoredTensor(torch.float32, shape, {Box(*box): Part("a", n, 1) for n, box in enumerate(boxes)})


def metadata(**tensors: StoredTensor) -> Metadata:
    return Metadata(HERE, {key.replace("__", "."): held for key, held in tensors.items()}, {}, {}, False)


def test_layers_and_experts_have_tensors_of_their_own() -> None:
    boxes = [((i, j, 0), (i + 1, j + 1, 3)) for i in range(2) for j in range(2)]
    held = unstacked(metadata(decoder__layers__mlp__experts__experts__linear_fc2__weight=tensor((2, 2, 3), *boxes)))
    names = sort_keys(held).weights
    assert list(names) == [
        f"decoder.layers.{i}.mlp.experts.local_experts.{j}.linear_fc2.weight" for i in (0, 1) for j in (0, 1)
    ]
    parts = [next(iter(held.tensors[key].chunks.items())) for key in names.values()]
    assert parts == [(Box((0,), (3,)), Part("a", n, 1)) for n in range(4)]


def test_gate_and_up_become_one() -> None:
    half = tensor((2, 3), ((0, 0), (2, 3)))
    held = unstacked(
        metadata(decoder__layers__0__mlp__linear_fc1__weight_w=half, decoder__layers__0__mlp__linear_fc1__weight_v=half)
    )
    (whole,) = held.tensors.values()
    assert whole.shape == (4, 3) and list(whole.chunks) == [Box((0, 0), (2, 3)), Box((2, 0), (4, 3))]


def test_what_is_stacked_in_another_way_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="has 2 layers of"):
        unstacked(metadata(decoder__layers__mlp__weight=tensor((2, 3), ((0, 0), (2, 3)))))
    with pytest.raises(DamagedCheckpointError, match="without the dimension of its layers"):
        unstacked(metadata(decoder__layers__mlp__weight=tensor((), ((), ()))))
    with pytest.raises(DamagedCheckpointError, match="in halves of different shapes"):
        unstacked(metadata(a__weight_w=tensor((2,), ((0,), (2,))), a__weight_v=tensor((3,), ((0,), (3,)))))
