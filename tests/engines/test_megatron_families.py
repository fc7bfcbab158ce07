"""Families of Megatron-Core models, sharded by Megatron-Core itself and trained by real engines.

The oracle is the logits. A fused tensor that is split in the wrong way keeps every byte, so that states compare equal as long as
both sides are read in the same wrong way; but the model computes something else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import held_shapes
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.language import find_family, load_spec
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import SEQUENCE, VOCABULARY, Run, batch_of, build_engine, train, train_step

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


def logits_of(
    run: Run, *, load: str | None, save: str, steps: int, client_state: Mapping[str, Any] | None = None
) -> torch.Tensor:
    """On each rank: load, train, save, and what the engine then makes of a batch, for the whole vocabulary."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from ucp_deepspeed.testing.megatron_models import causal_mask

    engine = build_engine(run)
    if load is not None:
        engine.load_checkpoint(load)
    while engine.global_steps < steps:
        train_step(engine, run, engine.global_steps + 1)
    engine.save_checkpoint(save, client_state=dict(client_state or {}))
    tokens = batch_of(run, 0)[:, :-1]
    engine.eval()
    with torch.no_grad():
        positions = torch.arange(SEQUENCE, device=tokens.device).expand_as(tokens)
        logits = engine(tokens, positions, causal_mask(SEQUENCE, tokens.device))
        whole = gather_from_tensor_model_parallel_region(logits)[..., :VOCABULARY].clone()
    engine.destroy()
    del engine
    gc.collect()
    return whole


@pytest.mark.covers(
    "megatron_core_llama",
    "megatron_core_mixtral",
    "megatron_core_deepseek",
    shows="TP 2→1→2, ZeRO 1→3→2, state and logits",
)
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


INFOS = {"gpt": (False, False), "llama": (True, False), "bloom": (False, True)}
"""For each of Megatron-DeepSpeed's families: is the feed-forward layer gated, and does a norm follow the embedding?"""


@pytest.mark.covers(
    "megatron_deepspeed_gpt",
    "megatron_deepspeed_llama",
    "megatron_deepspeed_bloom",
    shows="plain names: TP 2→1→2 from `universal_checkpoint_info`, state and logits",
)
@pytest.mark.parametrize("flavour", INFOS)
def test_what_megatron_deepspeed_records(flavour: str, ranks: Ranks, tmp_path: Path) -> None:
    """Saved without the plugin at TP2, with the info of Megatron-DeepSpeed: that tells the layouts, and the family agrees."""
    from ucp_deepspeed.testing.megatron_deepspeed import universal_checkpoint_info

    info = universal_checkpoint_info(VOCABULARY, *INFOS[flavour])
    run = Run(f"megatron-deepspeed-{flavour}", {"layers": 1}, tp=2, universal=None)  # type: ignore[arg-type]
    saved = {"universal_checkpoint_info": info}
    paths = [tmp_path / str(number) for number in range(3)]
    first = ranks(2).run(logits_of, run, load=None, save=str(paths[0]), steps=STEP, client_state=saved)[0]
    checkpoint = open_checkpoint(paths[0])
    assert checkpoint.vocabulary_size == VOCABULARY
    family = load_spec(f"megatron_deepspeed_{flavour}")
    assert checkpoint.patterns == family.patterns(checkpoint.patterns)
    assert (
        find_family(list(checkpoint.patterns), held_shapes(checkpoint, {n: n for n in checkpoint.patterns})).spec
        == family
    )
    for number, (tp, stage) in enumerate([(1, 3), (2, 2)], start=1):
        target = replace(run, tp=tp, zero={"stage": stage}, universal=ALWAYS)
        load, save = str(paths[number - 1]), str(paths[number])
        logits = ranks(2).run(logits_of, target, load=load, save=save, steps=STEP)[0]
        assert differences(paths[0], paths[number]) == []
        torch.testing.assert_close(logits, first, rtol=0, atol=ROUNDING)


PIPELINES = {
    "gpt": ("gpt", {"layers": 2}),
    "gpt-older": ("gpt", {"layers": 2, "reordering": True}),
    "llama": ("llama", {"layers": 2}),
    "bloom": ("bloom", {"layers": 2, "reordering": True}),
}
"""Flavour and changes to the model; BLOOM was trained with the older numbers of layers."""


def pipeline_info(vocabulary: int, tied: bool, gated: bool) -> dict[str, Any]:
    """Return what Megatron-DeepSpeed's pipelines save about their layouts (``megatron/model/gpt_model.py``)."""
    embeddings = (
        ["tied_modules.embed.word_embeddings.weight"] if tied else [r"1.word_embeddings.weight", r"\d+.lm_head.weight"]
    )
    layers = ["input_layernorm.weight", "input_layernorm.bias", "post_attention_layernorm.weight"]
    layers += ["post_attention_layernorm.bias", "self_attention.dense.bias", "mlp.dense_4h_to_h.bias", "weight", "bias"]
    others = [
        r"tied_modules.embed.word_embeddings.norm.(weight|bias)",
        r"(tied_modules.embed|1).position_embeddings.weight",
    ]
    return {
        "universal_checkpoint_version": 0.2,
        "original_vocab_size": vocabulary,
        "vocabulary_parameter_patterns": embeddings,
        "tp_replicated_parameter_patterns": [*others, *(rf"\d+.{name}" for name in layers)],
        "parameter_with_row_parallelism_patterns": [
            r"\d+.mlp.dense_4h_to_h.weight",
            r"\d+.self_attention.dense.weight",
        ],
        "parameter_with_2_sub_params_cat_dim_0": [r"\d+.mlp.dense_h_to_4h.weight"] if gated else [],
    }


def trained_pipeline(run: Run, save: str, info: Mapping[str, Any]) -> list[float]:
    """On each rank: train, save with what Megatron-DeepSpeed records, and train on; the losses of the further steps."""
    engine = build_engine(run)
    for step in range(1, STEP + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(save, client_state={"universal_checkpoint_info": dict(info)})
    losses = [train_step(engine, run, step) for step in range(STEP + 1, LAST_STEP + 1)]
    engine.destroy()
    return losses


@pytest.mark.covers(
    "megatron_deepspeed_gpt",
    "megatron_deepspeed_llama",
    "megatron_deepspeed_bloom",
    shows="TP2·PP2 saved without the plugin, as a plain model, as a pipeline again, state and losses",
)
@pytest.mark.parametrize("name", PIPELINES)
def test_pipelines_of_megatron_deepspeed(name: str, ranks: Ranks, tmp_path: Path) -> None:
    flavour, size = PIPELINES[name]
    plain = {key: value for key, value in size.items() if key != "reordering"}
    unclipped = {"gradient_clipping": 0.0}
    model: Any = f"megatron-deepspeed-{flavour}"
    source = Run(model, size, tp=2, pp=2, universal=None, config=unclipped)
    info = pipeline_info(VOCABULARY, tied=flavour != "llama", gated=flavour == "llama")
    losses = ranks(4).run(trained_pipeline, source, str(tmp_path / "0"), info)[0]
    assert open_checkpoint(tmp_path / "0").vocabulary_size == VOCABULARY
    targets = [
        (2, replace(source, size=plain, tp=1, pp=None, zero={"stage": 3}, universal=ALWAYS)),
        (4, replace(source, size=plain, tp=1, pp=2, universal=ALWAYS)),
        (2, replace(source, tp=1, pp=1, universal=ALWAYS)),
    ]
    for number, (world, target) in enumerate(targets, start=1):
        load, save = str(tmp_path / str(number - 1)), str(tmp_path / str(number))
        tag = f"global_step{STEP}"
        outcome = ranks(world).run(train, target, LAST_STEP, load=load, save=save, save_tag=tag, save_first=True)[0]
        assert differences(tmp_path / "0" / f"global_step{STEP}", tmp_path / str(number) / f"global_step{STEP}") == []
        gaps = [abs(outcome.losses[STEP + 1 + at] - loss) for at, loss in enumerate(losses)]
        assert max(gaps) <= ROUNDING, gaps


def test_a_record_that_contradicts_the_model_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """An info that doesn't know of the gate: joined plainly, every byte would be there, and the model ruined."""
    from ucp_deepspeed.testing.megatron_deepspeed import universal_checkpoint_info

    info = universal_checkpoint_info(VOCABULARY, gated=False, embedding_norm=False)
    run = Run("megatron-deepspeed-llama", {"layers": 1}, tp=2, universal=None)
    saved = {"universal_checkpoint_info": info}
    ranks(2).run(logits_of, run, load=None, save=str(tmp_path / "0"), steps=0, client_state=saved)
    target = replace(run, zero={"stage": 2}, universal=ALWAYS)
    with pytest.raises(
        RankError, match=r"dense_h_to_4h\.weight: the checkpoint says shard on dimension 0, .* in parts 1:1"
    ):
        ranks(2).run(logits_of, target, load=str(tmp_path / "0"), save=str(tmp_path / "1"), steps=0)


def mpu_of_expert_parallel_ranks() -> str:
    """On a rank: why experts of Megatron-Core that are spread over ranks can't be trained by DeepSpeed."""
    from megatron.core import parallel_state

    from ucp_deepspeed.megatron import DeepSpeedMpu

    reset_parallel_state()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    try:
        DeepSpeedMpu()
    except UnsupportedError as error:
        return str(error)
    finally:
        reset_parallel_state()
    return ""


def test_experts_spread_over_ranks_are_refused(ranks: Ranks) -> None:
    message, _ = ranks(2).run(mpu_of_expert_parallel_ranks)
    assert message.startswith("expert parallel size 2: ") and "expert_model_parallel_size=1" in message
