"""Names of an adapter's tensors in its file: those that PEFT's own function gives."""

from __future__ import annotations

from typing import Any

import pytest
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model

from ucp_deepspeed.checkpoint.export.adapter import saved_name
from ucp_deepspeed.testing.huggingface_models import build_huggingface

ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"]},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "down_proj"]},
    "trained modules": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "biases of LoRA": {"target_modules": ["q_proj"], "lora_bias": True},
}


@pytest.mark.parametrize("adapter", ["default", "other"])
@pytest.mark.parametrize("title", ADAPTERS)
def test_the_names_are_pefts(title: str, adapter: str) -> None:
    config = LoraConfig(task_type="CAUSAL_LM", r=2, **ADAPTERS[title])
    model = get_peft_model(build_huggingface("llama", 48), config, adapter_name=adapter)
    expected = get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)
    found = {saved_name(name, adapter) for name in model.state_dict()} - {None}
    assert found == expected.keys()
    assert {saved_name(name, "third") for name in model.state_dict()} == {None}


def test_an_adapter_in_a_bare_model_gets_the_prefix() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"])
    wrapped = get_peft_model(build_huggingface("llama", 48), config)
    bare = inject_adapter_in_model(config, build_huggingface("llama", 48))
    assert {saved_name(name, "default") for name in bare.state_dict()} - {None} == get_peft_model_state_dict(
        wrapped
    ).keys()
