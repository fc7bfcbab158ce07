"""The spec files that come with the package, against the parameters of real Megatron-Core models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import families, find_family, load_spec
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout import Replicate, Shape, Shard, Unique
from ucp_deepspeed.testing.ranks import get_pool, reset_parallel_state


def parameters_of(flavour: str, changes: Mapping[str, Any]) -> dict[str, tuple[bool, int, int, Shape]]:
    """On a rank: names of a Megatron-Core model's parameters, whether and along which dimension they are cut, in how many parts
    side by side, and their shapes."""
    reset_parallel_state()
    from megatron.core import parallel_state

    from ucp_deepspeed.testing import megatron_models
    from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu

    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    size = getattr(megatron_models, f"{flavour}_flavour")(**changes)
    return {
        name: (
            bool(getattr(parameter, "tensor_model_parallel", False)),
            int(getattr(parameter, "partition_dim", -1)),
            int(getattr(parameter, "partition_stride", 1)),
            tuple(parameter.shape),
        )
        for name, parameter in megatron_models.build_megatron_gpt(size).named_parameters()
    }


CASES = [
    ("llama", {}),
    ("llama", {"tied": True}),
    ("gpt", {}),
    ("gpt", {"tied": False}),
]


@pytest.mark.parametrize(("flavour", "changes"), CASES, ids=str)
def test_real_models_match_their_family(flavour: str, changes: Mapping[str, Any]) -> None:
    """Each parameter matches exactly one rule, and the pattern agrees with Megatron-Core's own attributes."""
    [found] = get_pool(1).run(parameters_of, flavour, changes)
    spec = load_spec(f"megatron_core_{flavour}")
    for name, pattern in spec.patterns(found).items():
        split, dim, stride, _ = found[name]
        if split:
            assert isinstance(pattern, Shard) and (pattern.dim, len(pattern.parts)) == (dim, stride), name
        else:
            assert pattern == Replicate(), name
    by_names = find_family(list(found))
    if flavour == "gpt":
        assert by_names.spec == spec and by_names.confidence == "names"
        assert "decoder.layers.0.mlp.linear_fc1.weight" in by_names.unconfirmed
    else:
        # An ungated model without biases has the same names: only attributes, shapes or a spec can tell.
        assert by_names.confidence == "ambiguous"
        with pytest.raises(SpecError, match=r"disagree on decoder\.layers\.0\.mlp\.linear_fc1\.weight; ") as caught:
            _ = by_names.spec
        assert caught.value.problems == tuple(f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (0, 1))
    by_shapes = find_family(list(found), {name: [shape] for name, (*_, shape) in found.items()})
    assert by_shapes.spec == spec and by_shapes.confidence == "shapes"
    assert str(by_shapes.candidates[0]).startswith(f"megatron_core_{flavour}: all names match, ")
    assert not [name for name in by_shapes.unconfirmed if "linear_qkv.bias" not in name]


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"qkv_bias": True, "qk_norm": True}),
        ("mixtral", {"experts": 3}),
        ("mixtral", {"experts": 3, "qk_norm": True}),
        ("deepseek", {"experts": 3, "latent": True, "query_groups": 8}),
    ],
    ids=str,
)
def test_real_models_that_are_told_by_their_names(family: str, changes: Mapping[str, Any]) -> None:
    """Families that build on the Llama flavour; what shapes say agrees, and Megatron-Core's attributes do."""
    [found] = get_pool(1).run(parameters_of, "llama", changes)
    shapes = {name: [shape] for name, (*_, shape) in found.items()}
    detected = find_family(list(found), shapes)
    assert detected.confidence == "shapes" and detected.spec is not None
    assert detected.spec.family == f"megatron_core_{family}"
    for name, pattern in detected.spec.patterns(found).items():
        split, dim, stride, _ = found[name]
        expected = (dim, stride) if split else None
        assert expected == ((pattern.dim, len(pattern.parts)) if isinstance(pattern, Shard) else None), name


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("degree", [1, 2])
def test_shapes_tell_a_gated_model_from_an_ungated_one(gated: bool, degree: int) -> None:
    """The names are the same; the first layer of a gated MLP has twice the rows that the second has columns."""
    layer = "decoder.layers.0.mlp.linear_"
    rows = 48 if gated else 24
    shapes: dict[str, list[Shape]] = {
        f"{layer}fc1.weight": [(rows // degree, 8)] * degree,
        f"{layer}fc2.weight": [(8, 24 // degree)] * degree,
        "decoder.layers.0.self_attention.linear_qkv.weight": [(24 // degree, 8)] * degree,
        "decoder.final_layernorm.weight": [(8,)] * degree,
    }
    found = find_family(list(shapes), shapes)
    assert found.spec is not None and found.spec.family == f"megatron_core_{'llama' if gated else 'gpt'}"
    assert found.confidence == "shapes" and found.unconfirmed == ()
    assert f"{layer}fc" in str(found.candidates[1]) and "all names match, " in str(found.candidates[1])


def test_a_gated_model_with_biases_is_no_family_of_ours() -> None:
    """All its names are those of the ungated family: cut plainly, its gate and up would be mixed. Shapes refuse that."""
    layer = "decoder.layers.0.mlp.linear_"
    shapes: dict[str, list[Shape]] = {
        f"{layer}fc1.weight": [(24, 8)] * 2,
        f"{layer}fc1.bias": [(24,)] * 2,
        f"{layer}fc2.weight": [(8, 12)] * 2,
    }
    assert find_family(list(shapes)).confidence == "names"
    found = find_family(list(shapes), shapes)
    assert found.spec is None and found.confidence == "none"
    assert str(found.candidates[0]).startswith("megatron_core_gpt: all names match, ")
    assert "logical shape [8, 24]; the rule states [hidden_size, ffn_hidden_size], which is [8, 48]" in str(found)


def test_shapes_that_a_family_cant_have() -> None:
    shapes: dict[str, list[Shape]] = {"decoder.final_layernorm.weight": [(8,), (7,)]}
    found = find_family(list(shapes), shapes)
    assert found.spec is None and "different shapes on its ranks" in str(found)


def test_no_family() -> None:
    found = find_family(["embedding.word_embeddings.weight", "mystery.weight"])
    assert found.spec is None and found.confidence == "none"
    assert "50% of the names match one rule; mystery.weight doesn't" in str(found)
    assert find_family([]).spec is None


def test_both_families_that_agree_fit() -> None:
    """Names that mean the same in both: the first serves."""
    assert find_family(["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"]).spec is not None


def test_families_that_disagree_are_refused() -> None:
    """The first layer of a feed-forward network is one part in one family and two in the other."""
    names = ["decoder.layers.3.self_attention.linear_qkv.weight", "decoder.layers.3.mlp.linear_fc1.weight"]
    with pytest.raises(SpecError) as caught:
        _ = find_family(names).spec
    for part in ("megatron_core_gpt", "megatron_core_llama", "--spec"):
        assert part in str(caught.value)
    assert caught.value.problems == (names[1],)


@pytest.mark.parametrize("name", families.spec_names())
def test_no_rule_overlaps_another(name: str) -> None:
    """A name made from any glob matches its own rule only."""
    spec: Spec = load_spec(name)
    samples = [glob.replace("**", "x.y").replace("*", "7") for rule in spec.rules for glob in rule.match]
    assert set(spec.patterns(samples)) == set(samples)
    assert Unique() not in spec.patterns(samples).values()


def gated_layers_without_a_stride() -> dict[str, object]:
    """On a rank: what is inferred of a gated model whose parameters don't tell how many parts they have."""
    reset_parallel_state()
    from megatron.core import parallel_state

    from ucp_deepspeed.megatron.layouts import inferred_patterns
    from ucp_deepspeed.testing import megatron_models
    from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu
    from ucp_deepspeed.testing.megatron_deepspeed import MegatronDeepSpeedModel

    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(1)
    model = megatron_models.build_megatron_gpt(megatron_models.llama_flavour(layers=1))
    for param in model.parameters():
        param.partition_stride = 1  # type: ignore[attr-defined]
    renamed = MegatronDeepSpeedModel(model, embedding_norm=False)
    found = {**inferred_patterns(model), **inferred_patterns(renamed)}
    for param in model.parameters():  # as ZeRO-3 does
        param.ds_shape, param.data = param.shape, torch.empty(0)  # type: ignore[attr-defined]
    assert inferred_patterns(renamed).items() <= found.items()
    return {name: pattern for name, pattern in found.items() if "fc1.weight" in name or "h_to_4h.weight" in name}


def test_gated_layers_are_told_by_their_module_too() -> None:
    """Megatron-Core before 0.16 leaves the stride of a gated layer at 1; joined plainly, the model would be ruined."""
    [found] = get_pool(1).run(gated_layers_without_a_stride)
    names = ("decoder.layers.0.mlp.linear_fc1.weight", "language_model.encoder.layers.0.mlp.dense_h_to_4h.weight")
    assert found == dict.fromkeys(names, Shard(0, parts=(1, 1)))
