"""The ``mpu`` object that tells DeepSpeed which ranks share a model. It is made from sizes, or by code that has the groups.

Needs torch alone. The methods that DeepSpeed calls are taken from 0.19.8: ``runtime/engine.py``, ``runtime/utils.py``,
``runtime/zero``, ``utils/groups.py`` and ``utils/bwc.py``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch.distributed as dist

from ucp_deepspeed.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Groups:
    """This rank's process groups; see `ModelParallelUnit`."""

    model: dist.ProcessGroup
    tensor: dist.ProcessGroup
    pipeline: dist.ProcessGroup
    data: dist.ProcessGroup


class ModelParallelUnit(ABC):
    """The methods that DeepSpeed calls on an ``mpu``: groups, and in each group its size and this rank's place. See `Mpu`.

    * *data parallel*: ZeRO partitions and averages gradients over these ranks.
    * *tensor model parallel* and *pipeline model parallel*: DeepSpeed records their sizes in the ``model_states`` files.
    * *model parallel*: tensor and pipeline together, since DeepSpeed names files ``mp_rank_XX`` by it and sums gradient norms
      over it. The rank in this group is ``pp_rank * tp + tp_rank``.

    The class deliberately has no ``get_sequence_…`` and no ``initialize_sequence_parallel``. If the first exists, DeepSpeed
    assumes that the ranks share sequences in its own (Ulysses) way; if the second exists, it also assumes no model parallelism.
    """

    @abstractmethod
    def _groups(self) -> Groups: ...

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model together: tensor and pipeline parallel."""
        return self._groups().model

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that split each layer's tensors."""
        return self._groups().tensor

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold consecutive stages."""
        return self._groups().pipeline

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights."""
        return self._groups().data

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This rank among those that hold one copy of the model: the number in ``mp_rank_XX``."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_world_size(self) -> int:
        """Tensor parallel degree."""
        return dist.get_world_size(self.get_tensor_model_parallel_group())

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank among those that split each layer's tensors."""
        return dist.get_rank(self.get_tensor_model_parallel_group())

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first rank of the tensor parallel group."""
        return dist.get_process_group_ranks(self.get_tensor_model_parallel_group())[0]

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline parallel degree."""
        return dist.get_world_size(self.get_pipeline_model_parallel_group())

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's pipeline stage."""
        return dist.get_rank(self.get_pipeline_model_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """Data parallel degree."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_rank(self) -> int:
        """This rank among those that hold the same weights."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of those that hold the same weights, in group order (for DeepSpeed's parallel writer)."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())


class Mpu(ModelParallelUnit):
    """An ``mpu`` from sizes, for models with tensor-parallel layers of their own: ``docs/python.md`` shows how to use it.

    Consecutive ranks share tensors, and ranks that are ``world_size / pp`` apart are neighbouring stages, as in Megatron-Core's
    usual order. Make it on all ranks, in the same order as other groups.

    Args:
        tp: tensor-parallel size.
        pp: pipeline-parallel size. DeepSpeed's own ``PipelineModule`` needs no ``mpu``, and accepts none.

    Raises:
        ConfigError: the sizes don't divide the number of ranks, or there is no process group yet.
    """

    def __init__(self, tp: int, pp: int = 1) -> None:
        if not dist.is_initialized():
            raise ConfigError("there is no process group yet: call deepspeed.init_distributed() before Mpu(…)")
        world_size = dist.get_world_size()
        if min(tp, pp) < 1 or world_size % (tp * pp):
            raise ConfigError(
                f"Mpu(tp={tp}, pp={pp}): {world_size} ranks can't be divided; tp * pp must divide their number"
            )
        stages = [list(range(start, start + world_size // pp)) for start in range(0, world_size, world_size // pp)]
        rows = [stage[start : start + tp] for stage in stages for start in range(0, len(stage), tp)]
        copies = range(len(stages[0]) // tp)
        pieces = [[rank for stage in stages for rank in stage[copy * tp : (copy + 1) * tp]] for copy in copies]
        self._made = Groups(
            tensor=_own_group(rows),
            data=_own_group([stage[place::tp] for stage in stages for place in range(tp)]),
            pipeline=_own_group([list(ranks) for ranks in zip(*stages, strict=True)]),
            model=_own_group(pieces),
        )

    def _groups(self) -> Groups:
        return self._made


def _own_group(groups: list[list[int]]) -> dist.ProcessGroup:
    """Make groups of ranks, all of them on each rank. Return the group that this rank is in."""
    made = [dist.new_group(ranks) for ranks in groups]
    return next(group for group, ranks in zip(made, groups, strict=True) if dist.get_rank() in ranks)
