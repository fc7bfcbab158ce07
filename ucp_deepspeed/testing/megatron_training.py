"""Megatron-Core's own training on CPU ranks: its data parallelism, its optimizers, and its distributed checkpoints.

The models are those of `ucp_deepspeed.testing.megatron_models`. Gradients, steps and files are Megatron-Core's.
"""

from __future__ import annotations

import multiprocessing
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from torch.overrides import TorchFunctionMode

from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu
from ucp_deepspeed.testing.ranks import reset_parallel_state
from ucp_deepspeed.testing.runs import DTYPES, GLOBAL_BATCH, Run, batch_of

STEPS_AT_SAVE = 3


class _CudaIsTheCpu(TorchFunctionMode):
    """Let Megatron-Core's optimizers run on the CPU.

    They make small tensors on ``"cuda"``, and know their parameters by the name of the type, ``torch.cuda.FloatTensor``: both
    mean the CPU here. Nothing else differs.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        found = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(found, str):
            return found.replace("torch.", "torch.cuda.", 1)
        return found


@contextmanager
def cuda_is_the_cpu() -> Iterator[None]:
    """Let Megatron-Core's optimizers run on the CPU inside the block; do nothing where CUDA is available."""
    if not run_megatron_on_cpu():
        yield
        return
    held, torch.cuda.synchronize = torch.cuda.synchronize, _nothing
    try:
        with _CudaIsTheCpu():
            yield
    finally:
        torch.cuda.synchronize = held


def _nothing(device: Any = None) -> None:
    """Wait for nothing: the CPU has done its work."""


@contextmanager
def _children_allowed() -> Iterator[None]:
    """Let Megatron-Core write files in processes of its own, which the pool's ranks, being daemons, may not start."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    held, config["daemon"] = config.get("daemon"), False
    try:
        yield
    finally:
        config["daemon"] = held
        if filesystem_async._results_queue is not None:
            filesystem_async._results_queue._manager.shutdown()
            filesystem_async._results_queue = None


@dataclass(frozen=True)
class MegatronRun:
    """A run of Megatron-Core's own; the data-parallel size is the number of ranks divided by the other sizes.

    Attributes:
        model: ``llama`` or ``gpt``.
        size: changes to the model's shape.
        tp: tensor-parallel size.
        precision: precision of the weights.
        optimizer: ``distributed``, or ``plain`` for the optimizer that each rank has whole.
        sharding: ``distrib_optim_sharding_type`` of Megatron-Core's distributed optimizer.
        metadata: further entries of the metadata with which states are sharded.
    """

    model: str = "llama"
    size: Mapping[str, Any] = field(default_factory=dict)
    tp: int = 1
    precision: str = "bf16"
    optimizer: str = "distributed"
    sharding: str = "fully_reshardable"
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def as_run(self) -> Run:
        """Return the run of the same model in DeepSpeed."""
        return Run(self.model, self.size, tp=self.tp, precision=self.precision)  # type: ignore[arg-type]


class Training:
    """Model, optimizer and schedule of a run, on one rank."""

    def __init__(self, run: MegatronRun) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

        from ucp_deepspeed.testing.runs import _build_megatron

        reset_parallel_state()
        run_megatron_on_cpu()
        parallel_state.initialize_model_parallel(run.tp)
        self.run, self.iteration = run, 0
        model, _ = _build_megatron(run.as_run)
        distributed = run.optimizer == "distributed"
        settings = DistributedDataParallelConfig(use_distributed_optimizer=distributed, grad_reduce_in_fp32=True)
        self.model = DistributedDataParallel(model.config, settings, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam",
                lr=4e-3,
                min_lr=0.0,
                weight_decay=0.1,
                bf16=run.precision == "bf16",
                params_dtype=DTYPES[run.precision],
                use_distributed_optimizer=distributed,
                clip_grad=0.0,
            ),
            [self.model],
        )
        self.schedule = OptimizerParamScheduler(
            self.optimizer, 0.0, 4e-3, 0.0, 10, 100, "linear", 0.1, 0.1, 100, "constant"
        )

    def step(self) -> float:
        """Take a step; return the loss of this rank's share."""
        from megatron.core import parallel_state

        from ucp_deepspeed.testing.megatron_models import mean_loss

        copies, copy = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        loss = mean_loss(self.model, batch_of(self.run.as_run, self.iteration + 1).chunk(copies)[copy])
        loss.backward()
        self.model.finish_grad_sync()
        self.optimizer.step()
        self.schedule.step(increment=GLOBAL_BATCH)
        self.iteration += 1
        return float(loss)

    def state(self, is_loading: bool = False) -> dict[str, Any]:
        """Return what Megatron-LM saves of a run (``megatron/training/checkpointing.py``)."""
        from megatron.core import parallel_state
        from megatron.core.dist_checkpointing import ShardedObject

        metadata = self.metadata
        state: dict[str, Any] = {"model": self.model.module.sharded_state_dict(metadata=metadata)}
        state["optimizer"] = self.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
        state["opt_param_scheduler"] = self.schedule.state_dict()
        if is_loading:
            return state
        samples = self.iteration * GLOBAL_BATCH
        state["args"] = Namespace(
            consumed_train_samples=samples, params_dtype=DTYPES[self.run.precision], tp=self.run.tp
        )
        state |= {"checkpoint_version": 3.0, "iteration": self.iteration, "num_floating_point_operations_so_far": 12.5}
        random = [{"torch_rng_state": torch.get_rng_state(), "rng_tracker_states": {}}]
        copies = parallel_state.get_data_parallel_rank(), parallel_state.get_tensor_model_parallel_rank()
        state["rng_state"] = ShardedObject("rng_state", random, (1, self.run.tp), (0, copies[1]), replica_id=copies[0])
        return state

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata that say how states are sharded, as Megatron-LM makes them."""
        from megatron.core import parallel_state

        found = {"chained_optim_avoid_prefix": True, "singleton_local_shards": False, **self.run.metadata}
        if self.run.optimizer == "distributed":
            found["distrib_optim_sharding_type"] = self.run.sharding
        return found | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def save(self, folder: str) -> None:
        """Save as Megatron-LM does: all ranks call it, and the folder is there."""
        from megatron.core import dist_checkpointing

        content = {key: value for key, value in self.metadata.items() if key != "dp_cp_group"}
        with _children_allowed():
            dist_checkpointing.save(self.state(), folder, content_metadata=content)

    def load(self, folder: str, with_schedule: bool = True) -> None:
        """Load by Megatron-Core's own functions."""
        from megatron.core import dist_checkpointing

        with self._steps_in_states():
            held = dist_checkpointing.load(self.state(is_loading=True), folder)
            self.model.module.load_state_dict(held["model"])
            self.optimizer.load_state_dict(held["optimizer"])
        if with_schedule:
            self.schedule.load_state_dict(held["opt_param_scheduler"])
        self.iteration = held["iteration"]

    def values(self) -> dict[tuple[str, str], torch.Tensor]:
        """Return masters (``fp32``) and states by name and state, on a rank that has them whole: without parallelism."""
        (optimizer,) = self.optimizer.chained_optimizers
        found: dict[tuple[str, str], torch.Tensor] = {}
        for name, parameter in self.model.module.named_parameters():
            if self.run.optimizer == "distributed":
                held = optimizer._get_main_param_and_optimizer_states(parameter)
            else:
                main = getattr(parameter, "main_param", parameter)
                held = {"param": main, **optimizer.optimizer.state[main]}
            found[name, "fp32"] = held["param"].detach().view_as(parameter).clone()
            found |= {(name, state): held[state].view_as(parameter).clone() for state in ("exp_avg", "exp_avg_sq")}
        return found

    @contextmanager
    def _steps_in_states(self) -> Iterator[None]:
        """Let the distributed optimizer load into torch's Adam, which counts in each parameter's state and not in the group.

        It expects steps before the first one, a step among the stored states, and gives all parameters one tensor to count in.
        """
        if self.run.optimizer != "distributed":
            yield
            return
        for each in self.optimizer.chained_optimizers:
            each._init_optimizer_states_with_dummy_values()
            setter = each._set_main_param_and_optimizer_states
            each._set_main_param_and_optimizer_states = partial(_set_with_step, each, setter)
        yield
        for each in self.optimizer.chained_optimizers:
            del each._set_main_param_and_optimizer_states
            for state in each.optimizer.state.values():
                state["step"] = state["step"].clone()


def _set_with_step(
    optimizer: Any, setter: Callable[..., None], parameter: torch.Tensor, tensors: dict[str, Any]
) -> None:
    group, order = optimizer.model_param_group_index_map[parameter]
    main = optimizer.optimizer.param_groups[group]["params"][order]
    setter(parameter, {**tensors, "step": optimizer.optimizer.state[main]["step"]})


def loaded(run: MegatronRun, folder: str) -> dict[tuple[str, str], torch.Tensor]:
    """On a rank: masters and states that Megatron-Core's own load has put into a run; see `Training.values`."""
    with cuda_is_the_cpu():
        training = Training(run)
        training.load(folder)
        return training.values()


def save(run: MegatronRun, folder: str, steps: int = STEPS_AT_SAVE) -> list[float]:
    """On each rank: train, save, and take two more steps; all losses."""
    with cuda_is_the_cpu():
        training = Training(run)
        losses = [training.step() for _ in range(steps)]
        if dist.get_rank() == 0:
            Path(folder).mkdir(parents=True)
        dist.barrier()
        training.save(folder)
        return [*losses, training.step(), training.step()]


def resumed(run: MegatronRun, folder: str) -> list[float]:
    """On each rank: load, and take two more steps; their losses."""
    with cuda_is_the_cpu():
        training = Training(run)
        training.load(folder)
        return [training.step(), training.step()]
