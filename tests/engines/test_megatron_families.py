"""Families of Megatron-Core models, sharded by Megatron-Core itself and trained by real engines.

The oracle is the logits. A fused tensor that is split in the wrong way keeps every byte, so that states compare equal as long as
both sides are read in the same wrong way; but the model computes something else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import STEP, differences

from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import SEQUENCE, VOCABULARY, Run, batch_of, build_engine, train_step

ROUNDING = 2e-5
"""Largest accepted difference of a logit: two tensor-parallel ranks add up each row in another order than one, in float32.
A part in the wrong place changes logits by more than a thousand times as much."""

ALWAYS = {"enabled": True, "load": "always"}

FAMILIES = {
    "qwen2": Run("llama", {"qkv_bias": True}, universal=ALWAYS),
    "qwen3": Run("llama", {"qk_norm": True}, universal=ALWAYS),
    "mixtral": Run("llama", {"experts": 3, "layers": 1}, universal=ALWAYS),
    "deepseek": Run("llama", {"experts": 3, "latent": True, "query_groups": 8}, universal=ALWAYS),
}

Ranks = Callable[[int], RankPool]


def logits_of(run: Run, *, load: str | None, save: str, steps: int) -> torch.Tensor:
    """On each rank: load, train, save, and what the engine then makes of a batch, for the whole vocabulary."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from ucp_deepspeed.testing.megatron_models import causal_mask

    engine = build_engine(run)
    if load is not None:
        engine.load_checkpoint(load)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    engine.save_checkpoint(save)
    tokens = batch_of(run, 0)[:, :-1]
    engine.eval()
    with torch.no_grad():
        logits = engine(tokens, torch.arange(SEQUENCE).expand_as(tokens), causal_mask(SEQUENCE))
        whole = gather_from_tensor_model_parallel_region(logits)[..., :VOCABULARY].clone()
    engine.destroy()
    del engine
    gc.collect()
    return whole


@pytest.mark.parametrize("family", FAMILIES)
def test_tensor_parallel_sizes_and_stages_change(family: str, ranks: Ranks, tmp_path: Path) -> None:
    """TP2 ZeRO-1, to TP1 ZeRO-3, to TP2 ZeRO-2: states bit for bit, logits as they were."""
    run = FAMILIES[family]
    steps = [(2, 1), (1, 3), (2, 2)]
    load, logits = None, []
    for number, (tp, stage) in enumerate(steps):
        topology = replace(run, tp=tp, zero={"stage": stage})
        save = str(tmp_path / str(number))
        logits.append(ranks(2).run(logits_of, topology, load=load, save=save, steps=STEP)[0])
        load = save
    for number in (1, 2):
        assert differences(tmp_path / "0", tmp_path / str(number)) == []
        torch.testing.assert_close(logits[number], logits[0], rtol=0, atol=ROUNDING)
