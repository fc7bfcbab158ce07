"""The ``mpu`` object that DeepSpeed expects, answered by ``megatron.core.parallel_state``."""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state

from ucp_deepspeed.errors import UnsupportedError


class DeepSpeedMpu:
    """Tells DeepSpeed which ranks Megatron-Core put into which group: ``deepspeed.initialize(mpu=DeepSpeedMpu(), …)``.

    Megatron-Core's own ``parallel_state`` can't be passed: since the core was split off, it has no
    ``get_model_parallel_rank`` and ``get_model_parallel_world_size``, which DeepSpeed calls when it builds an engine.

    Three kinds of groups, all of them taken from Megatron-Core as they are:

    * *data parallel*: ranks that hold the same weights; ZeRO partitions and averages gradients over them.
    * *tensor model parallel* and *pipeline model parallel*: DeepSpeed records their sizes in the ``model_states``
      files as ``checkpoint_parallel_dimensions`` (``tp_degree``, ``pp_degree``).
    * *model parallel*: the full group, tensor and pipeline. DeepSpeed names files ``mp_rank_XX`` by it and sums
      gradient norms over it. The tensor group would do while there is one pipeline stage, and would let the stages
      overwrite each other's files when there are several. In Megatron-Core's usual order of ranks, the rank in this
      group is ``pp_rank * tp_degree + tp_rank``.

    There is deliberately no ``get_sequence_…`` and no ``initialize_sequence_parallel``: DeepSpeed takes their mere
    presence as a sign that the ranks share sequences in its own (Ulysses) way, and of the second, that there is no
    model parallelism.

    DeepSpeed calls the object in every rank, from the construction of the engine on; it must be made after
    ``parallel_state.initialize_model_parallel``. It keeps no state: it answers for whatever groups exist at the time.

    Raises:
        UnsupportedError: Megatron-Core's groups don't exist yet, or they split sequences or experts, for which
            DeepSpeed would average gradients over the wrong ranks.
    """

    def __init__(self) -> None:
        if not parallel_state.model_parallel_is_initialized():
            raise UnsupportedError(
                "Megatron-Core has no process groups yet: call "
                "megatron.core.parallel_state.initialize_model_parallel(…) before DeepSpeedMpu()"
            )
        context_parallel = parallel_state.get_context_parallel_world_size()
        if context_parallel > 1:
            raise UnsupportedError(
                f"context parallel size {context_parallel}: DeepSpeed would not average gradients over the "
                "context-parallel ranks; use context_parallel_size=1"
            )
        expert_parallel = parallel_state.get_expert_model_parallel_world_size()
        if expert_parallel > 1:
            raise UnsupportedError(
                f"expert parallel size {expert_parallel}: Megatron-Core marks such experts with allreduce=False, which "
                "DeepSpeed takes for experts of its own layers and can't find the group of (parameters without "
                "group_name), and it would average others over ranks with other experts; use expert_model_parallel_size=1"
            )

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold one copy of the model together: tensor and pipeline parallel."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_world_size(self) -> int:
        """Number of ranks that hold one copy of the model together."""
        return dist.get_world_size(self.get_model_parallel_group())

    def get_model_parallel_rank(self) -> int:
        """This rank among those that hold one copy of the model: the number in ``mp_rank_XX``."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that split each layer's tensors."""
        return parallel_state.get_tensor_model_parallel_group()

    def get_tensor_model_parallel_world_size(self) -> int:
        """Tensor parallel degree."""
        return parallel_state.get_tensor_model_parallel_world_size()

    def get_tensor_model_parallel_rank(self) -> int:
        """This rank among those that split each layer's tensors."""
        return parallel_state.get_tensor_model_parallel_rank()

    def get_tensor_model_parallel_src_rank(self) -> int:
        """Global rank of the first rank of the tensor parallel group."""
        return parallel_state.get_tensor_model_parallel_src_rank()

    def get_pipeline_model_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold consecutive stages."""
        return parallel_state.get_pipeline_model_parallel_group()

    def get_pipeline_model_parallel_world_size(self) -> int:
        """Pipeline parallel degree."""
        return parallel_state.get_pipeline_model_parallel_world_size()

    def get_pipeline_model_parallel_rank(self) -> int:
        """This rank's pipeline stage."""
        return parallel_state.get_pipeline_model_parallel_rank()

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """The ranks that hold the same weights."""
        return parallel_state.get_data_parallel_group()

    def get_data_parallel_world_size(self) -> int:
        """Data parallel degree."""
        return parallel_state.get_data_parallel_world_size()

    def get_data_parallel_rank(self) -> int:
        """This rank among those that hold the same weights."""
        return parallel_state.get_data_parallel_rank()

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of those that hold the same weights, in group order (for DeepSpeed's parallel writer)."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())
