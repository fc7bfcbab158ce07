"""A tensor-parallel model without Megatron: layers of its own, an ``mpu`` from sizes, and a spec."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch.distributed as dist
from checkpoints import differences
from torch import nn

import ucp_deepspeed
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.parallel import Mpu
from ucp_deepspeed.testing.ranks import RankPool, reset_parallel_state

Ranks = Callable[[int], RankPool]

SPEC = """\
family: two_layers
rules:
  - {match: up.weight, pattern: shard, dim: 0}
  - {match: down.weight, pattern: shard, dim: 1}
  - {match: shift, pattern: replicate}
"""

WIDE, NARROW = 12, 6


class TwoLayers(nn.Module):
    """A layer that is cut by rows, and one by columns, whose results are added up over the ranks."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.group, degree, rank = group, dist.get_world_size(group), dist.get_rank(group)
        up, down = (whole_numbers(seed, *shape) for seed, shape in enumerate(((WIDE, NARROW), (NARROW, WIDE))))
        self.shift = nn.Parameter(torch.ones(NARROW))
        self.up = nn.Linear(NARROW, WIDE // degree, bias=False)
        self.down = nn.Linear(WIDE // degree, NARROW, bias=False)
        self.up.weight.data.copy_(up.chunk(degree, 0)[rank])
        self.down.weight.data.copy_(down.chunk(degree, 1)[rank])
        for layer in (self.up, self.down):
            layer.weight.tensor_model_parallel = True  # type: ignore[assignment]

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        """The result of both layers, the same on all tensor-parallel ranks."""
        value = SumGradients.apply(value + self.shift, self.group)  # type: ignore[no-untyped-call]
        result: torch.Tensor = SumResults.apply(self.down(torch.relu(self.up(value))), self.group)  # type: ignore[no-untyped-call]
        return result


class SumGradients(torch.autograd.Function):
    """Before a layer that is cut by rows: each rank has a share of the gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        context.group = group
        return value.clone()

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return summed(gradients[0], context.group), None


class SumResults(torch.autograd.Function):
    """After a layer that is cut by columns: each rank has a share of the result."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        return summed(value, group)

    @staticmethod
    def backward(context: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradients[0], None


def summed(value: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    total = value.clone()
    dist.all_reduce(total, group=group)
    return total


def whole_numbers(seed: int, *shape: int) -> torch.Tensor:
    """Small ones: sums of their products are exact, in whatever order they are added."""
    return torch.randint(-1, 2, shape, generator=torch.Generator().manual_seed(seed)).float()


def engine_of(tp: int, stage: int, spec: str) -> Any:
    reset_parallel_state()
    mpu = Mpu(tp)
    model = TwoLayers(mpu.get_tensor_model_parallel_group())
    config = {
        "train_batch_size": 4,
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": True}},
        "universal_checkpoint": {"enabled": True, "spec": spec},
    }
    engine, *_ = deepspeed.initialize(model=model, mpu=mpu, config=config, model_parameters=model.parameters())
    return engine


def trained(tp: int, stage: int, spec: str, folder: str) -> dict[str, torch.Tensor]:
    """On a rank: a step, saved; returns this rank's masters, which in fp32 are the weights."""
    engine = engine_of(tp, stage, spec)
    share = whole_numbers(3, 4, NARROW).chunk(dist.get_world_size() // tp)[dist.get_rank() // tp]
    engine.backward(engine(share.to(engine.device)).square().sum() / 4)
    engine.step()
    engine.save_checkpoint(folder)
    return {name: param.detach().clone() for name, param in engine.module.named_parameters()}


def moved(tp: int, stage: int, spec: str, source: str, target: str) -> int:
    """On a rank: load, and save again."""
    engine = engine_of(tp, stage, spec)
    engine.load_checkpoint(source)
    engine.save_checkpoint(target)
    return int(engine.global_steps)


def test_a_model_with_layers_of_its_own_goes_on_without_tensor_parallelism(ranks: Ranks, tmp_path: Path) -> None:
    spec = tmp_path / "two_layers.yaml"
    spec.write_text(SPEC)
    first, second, third, _ = ranks(4).run(trained, 2, 1, str(spec), str(tmp_path / "a"))
    assert torch.equal(first["shift"], second["shift"])
    assert torch.equal(first["up.weight"], third["up.weight"])
    opened = ucp_deepspeed.open_checkpoint(tmp_path / "a", spec=spec)
    assert torch.equal(opened.read("up.weight"), torch.cat([first["up.weight"], second["up.weight"]], 0))
    assert torch.equal(opened.read("down.weight"), torch.cat([first["down.weight"], second["down.weight"]], 1))
    assert ranks(2).run(moved, 1, 3, str(spec), str(tmp_path / "a"), str(tmp_path / "b")) == [1, 1]
    assert differences(tmp_path / "a", tmp_path / "b", str(spec)) == []
    ranks(2).run(trained, 1, 1, str(spec), str(tmp_path / "whole"))  # whose step is the same, clipping included
    assert differences(tmp_path / "a", tmp_path / "whole", str(spec)) == []


def answers(tp: int, pp: int) -> list[dict[str, Any]]:
    """On a rank: what ``Mpu`` and Megatron-Core's groups answer; of a group its ranks."""
    from megatron.core import parallel_state

    from ucp_deepspeed.megatron import DeepSpeedMpu

    reset_parallel_state()
    parallel_state.initialize_model_parallel(tp, pipeline_model_parallel_size=pp)
    found = []
    for mpu in (Mpu(tp, pp), DeepSpeedMpu()):
        asked = {name: getattr(mpu, name)() for name in dir(mpu) if name.startswith("get_")}
        found.append(
            {
                name: dist.get_process_group_ranks(answer) if name.endswith("_group") else answer
                for name, answer in asked.items()
            }
        )
    return found


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (4, 1), (2, 2), (1, 2), (1, 4)])
def test_groups_are_those_of_megatron(tp: int, pp: int, ranks: Ranks) -> None:
    for own, megatrons in ranks(4).run(answers, tp, pp):
        assert len(own) == 14
        assert own == megatrons


def refused(tp: int, pp: int) -> str:
    with pytest.raises(ConfigError) as caught:
        Mpu(tp, pp)
    return str(caught.value)


def test_sizes_that_do_not_divide_the_ranks(ranks: Ranks) -> None:
    expected = "Mpu(tp=3, pp=1): 2 ranks can't be divided; tp * pp must divide their number"
    assert ranks(2).run(refused, 3, 1) == [expected] * 2


def test_without_process_groups() -> None:
    with pytest.raises(ConfigError, match=r"call deepspeed\.init_distributed\(\) before Mpu"):
        Mpu(2)
