"""The ``mpu`` object that DeepSpeed expects, answered by ``megatron.core.parallel_state``."""

from __future__ import annotations

from megatron.core import parallel_state

from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.parallel import Groups, ModelParallelUnit


class DeepSpeedMpu(ModelParallelUnit):
    """Tells DeepSpeed which ranks Megatron-Core put into which group: ``deepspeed.initialize(mpu=DeepSpeedMpu(), …)``.

    Megatron-Core's own ``parallel_state`` can't be passed: since the core was split off, it has no
    ``get_model_parallel_rank`` and ``get_model_parallel_world_size``, which DeepSpeed calls when it builds an engine.

    Its groups are Megatron-Core's own at the time of a call; see `ModelParallelUnit` for what DeepSpeed does with them. Make it
    on every rank, after ``parallel_state.initialize_model_parallel``.

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

    def _groups(self) -> Groups:
        return Groups(
            parallel_state.get_model_parallel_group(),
            parallel_state.get_tensor_model_parallel_group(),
            parallel_state.get_pipeline_model_parallel_group(),
            parallel_state.get_data_parallel_group(),
        )
