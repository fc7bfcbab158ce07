"""Layouts in Megatron-DeepSpeed's info, as DeepSpeed's own converter understands it."""

from __future__ import annotations

from typing import Any

import pytest

from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import MegatronDeepSpeedInfo
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.language.schemes import best_scheme
from ucp_deepspeed.layout import Replicate, Shard
from ucp_deepspeed.layout.pattern import Partial

WHERE = "mp_rank_00_model_states.pt"

INFO: dict[str, Any] = {
    "universal_checkpoint_version": 0.3,
    "original_vocab_size": 48,
    "vocabulary_parameter_patterns": [r"tied_modules\.embed\.word_embeddings\.weight"],
    "tp_replicated_parameter_patterns": [r"\d+\.input_layernorm\.", r"\d+\.weight"],
    "parameter_to_average_patterns": [r".*word_embeddings\.norm\."],
    "parameter_with_row_parallelism_patterns": [r"\d+\.mlp\.dense_4h_to_h\.weight"],
    "parameter_with_2_sub_params_cat_dim_0": [r"\d+\.mlp\.dense_h_to_4h\.weight"],
    "parameter_with_sub_params": [
        {"patterns": [r"\d+\.self_attention\.query_key_value\.weight"], "shape": ((8, 4, 4), -1), "partition_dim": 0},
        {"patterns": [r"\d+\.other\.weight"], "shape": (3, -1), "partition_dim": 0},
    ],
}


def read(**changes: Any) -> MegatronDeepSpeedInfo | None:
    return MegatronDeepSpeedInfo.read({"universal_checkpoint_info": INFO | changes}, WHERE)


def test_each_kind() -> None:
    expected = {
        "tied_modules.embed.word_embeddings.weight": Shard(0, vocabulary=True),
        "tied_modules.embed.word_embeddings.norm.weight": Partial(),
        "3.input_layernorm.weight": Replicate(),
        "3.self_attention.query_key_value.weight": Shard(0, parts=(2, 1, 1)),
        "3.self_attention.query_key_value.bias": Shard(0),
        "3.mlp.dense_h_to_4h.weight": Shard(0, parts=(1, 1)),
        "3.mlp.dense_4h_to_h.weight": Shard(1),
        "3.other.weight": Shard(0, parts=(1, 1, 1)),
        "5.weight": Replicate(),
    }
    info = read()
    assert info is not None and info.vocabulary_size == 48
    assert info.patterns({name: (8, 8) for name in expected}, WHERE) == expected


@pytest.mark.parametrize("saved", [{}, {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}])
def test_nothing_recorded(saved: dict[str, Any]) -> None:
    assert MegatronDeepSpeedInfo.read(saved, WHERE) is None


def test_automatic_tensor_parallelism_tells_layouts_otherwise() -> None:
    assert read(affine_map={}) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"original_vocab_size": "48"}, "original_vocab_size in universal_checkpoint_info is '48'"),
        ({"tp_replicated_parameter_patterns": ["("]}, r"'\(' in tp_replicated_parameter_patterns .* is no expression"),
        ({"parameter_with_sub_params": [{"patterns": ["x"]}]}, "an entry that this release can't read"),
        (
            {"parameter_with_sub_params": [{"patterns": ["x"], "shape": ((2, 2), (2, 2)), "partition_dim": 0}]},
            "a shape that no pattern expresses",
        ),
        ({"sub_param_shard_widths": {"x": [[4, 4], [3, 1]]}}, r"cuts the sub-parameters of 'x' unevenly"),
    ],
)
def test_what_no_pattern_expresses_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        read(**changes)
    assert WHERE in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "shape", "problem"),
    [
        ({"parameter_with_row_parallelism_patterns": ["w"]}, (8,), "to be cut along dimension 1 of the shape [8]"),
        ({"tp_replicated_parameter_patterns": ["w", "wi"]}, (8,), "2 expressions of one list fit it: w, wi"),
        (
            {"vocabulary_parameter_patterns": ["w"], "parameter_to_average_patterns": ["w"]},
            (8, 8),
            "its rows are the vocabulary",
        ),
    ],
)
def test_contradictions_are_listed(changes: dict[str, Any], shape: tuple[int, ...], problem: str) -> None:
    info = read(**changes)
    assert info is not None
    with pytest.raises(MismatchError) as caught:
        info.patterns({"wide": shape}, WHERE)
    assert len(caught.value.problems) == 1
    assert caught.value.problems[0].startswith(f"wide: {problem}")


@pytest.mark.parametrize(("first", "scheme"), [(2, "pipeline"), (3, "pipeline_with_reordering")])
def test_names_of_a_pipeline(first: int, scheme: str) -> None:
    """The first transformer layer's number tells the version; its names alone would fit both schemes."""
    names = {
        "tied_modules.embed.word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
        "tied_modules.embed.word_embeddings.norm.bias": "language_model.embedding.word_embeddings.norm.bias",
        f"{first}.self_attention.query_key_value.weight": (
            "language_model.encoder.layers.0.self_attention.query_key_value.weight"
        ),
        f"{first + 1}.mlp.dense_4h_to_h.bias": "language_model.encoder.layers.1.mlp.dense_4h_to_h.bias",
        f"{first + 3}.bias": "language_model.encoder.final_layernorm.bias",
    }
    assert best_scheme(list(names), load_spec("megatron_deepspeed_bloom")) == (scheme, names)
    untied = {
        "1.word_embeddings.weight": "language_model.embedding.word_embeddings.weight",
        "5.weight": "language_model.encoder.final_layernorm.weight",
        "6.lm_head.weight": "language_model.output_layer.weight",
    }
    assert best_scheme(list(untied), load_spec("megatron_deepspeed_llama")) == ("pipeline", untied)
