"""An engine's construction names what a version of DeepSpeed lacks. This holds for each accepted version:
``scripts/test_versions.sh`` runs this on older ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import deepspeed
import pytest
from checkpoints import differences, warnings_of_building
from packaging.version import Version

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, train

Ranks = Callable[[int], RankPool]


@pytest.mark.parametrize("accumulated", ["bf16", "fp32"])
def test_the_state_of_bf16_is_saved_or_its_lack_is_told(accumulated: str, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed before 0.18.5 leaves it out at stage 0, and at stage 1 where gradients are accumulated in fp32."""
    stage = 0 if accumulated == "bf16" else 1
    run = Run(zero={"stage": stage}, precision="bf16", config={"data_types": {"grad_accum_dtype": accumulated}})
    told = "\n".join(ranks(1).run(warnings_of_building, run)[0])
    ranks(1).run(train, run, 1, save=str(tmp_path))
    optimizer = open_checkpoint(tmp_path / "global_step1").parameters["norm.weight"].states.keys() - {"weight", "fp32"}
    assert bool(optimizer) != ("saves no optimizer state in bf16" in told), (optimizer, told)


@pytest.mark.parametrize(
    ("kind", "oldest"),
    [("experts of DeepSpeed ", "0.19.3"), ("layers of AutoEP in DeepSpeed ", "0.19.8")],
)
def test_experts_are_known_or_refused(kind: str, oldest: str, ranks: Ranks) -> None:
    """Before these versions files of DeepSpeed's own layers name no parameters, and AutoEP's tensors don't tell their experts."""
    automatic = {"expert_parallel": {"enabled": True, "autoep_size": 1}}
    run = Run("huggingface", {"family": "mixtral"}, config=automatic) if "AutoEP" in kind else Run("moe")
    run = replace(run, zero={"stage": 0}, universal={"enabled": True, "load": "always"})
    try:
        ranks(2).run(warnings_of_building, run)
    except RankError as error:
        assert f"universal checkpoints of {kind}" in str(error) and oldest in str(error)
        assert Version(deepspeed.__version__) < Version(oldest)


def test_automatic_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    """Before 0.19.7 AutoTP records nothing, and before 0.19.2 it leaves the head whole, which the family doesn't know."""
    run = Run("huggingface", {"family": "llama"}, tp=2, universal={"enabled": True, "load": "always"})
    ranks(2).run(train, run, 1, save=str(tmp_path), save_tag="two")
    whole = replace(run, tp=1, seed=1)
    ranks(1).run(train, whole, 1, load=str(tmp_path), tag="two", save=str(tmp_path), save_tag="one")
    again = replace(run, seed=2)
    ranks(2).run(train, again, 1, load=str(tmp_path), tag="one", save=str(tmp_path), save_tag="two again")
    assert differences(tmp_path / "two", tmp_path / "one") == []
    assert differences(tmp_path / "one", tmp_path / "two again") == []
