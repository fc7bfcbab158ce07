"""The spec files that come with the package, against the parameters of real Megatron-Core models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language import families, find_family, load_spec
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout import Replicate, Shard, Unique
from ucp_deepspeed.testing.ranks import get_pool, reset_parallel_state


def parameters_of(flavour: str, changes: Mapping[str, Any]) -> dict[str, tuple[bool, int, int]]:
    """On a rank: names of a Megatron-Core model's parameters, whether and along which dimension they are cut, and in how many
    parts side by side."""
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
        split, dim, stride = found[name]
        if split:
            assert isinstance(pattern, Shard) and (pattern.dim, len(pattern.parts)) == (dim, stride), name
        else:
            assert pattern == Replicate(), name
    if flavour == "gpt":
        family = find_family(list(found))
        assert family is not None and family.family == spec.family
    else:
        # An ungated model without biases has the same names: only attributes or a spec can tell.
        with pytest.raises(SpecError, match=r"disagree on decoder\.layers\.0\.mlp\.linear_fc1\.weight; ") as caught:
            find_family(list(found))
        assert caught.value.problems == tuple(f"decoder.layers.{layer}.mlp.linear_fc1.weight" for layer in (0, 1))


def test_no_family() -> None:
    assert find_family(["embedding.word_embeddings.weight", "mystery.weight"]) is None
    assert find_family([]) is None


def test_both_families_that_agree_fit() -> None:
    """Names that mean the same in both: the first serves."""
    family = find_family(["embedding.word_embeddings.weight", "decoder.final_layernorm.weight"])
    assert family is not None


def test_families_that_disagree_are_refused() -> None:
    """The first layer of a feed-forward network is one part in one family and two in the other."""
    names = ["embedding.word_embeddings.weight", "decoder.layers.3.mlp.linear_fc1.weight"]
    with pytest.raises(SpecError) as caught:
        find_family(names)
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
