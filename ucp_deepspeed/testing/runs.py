"""Short training runs in real engines, for tests: called on every rank of a `ucp_deepspeed.testing.ranks.RankPool`.

A run is described by numbers (`Run`), so that it can be sent to the ranks; the results are plain data too.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

import ucp_deepspeed  # noqa: F401  (its import sets the hooks)
from ucp_deepspeed.checkpoint.checkpoint import Precision
from ucp_deepspeed.testing.models import build_mlp, build_moe
from ucp_deepspeed.testing.ranks import fp16_on_cpu, gather_tokens_over_gloo, reset_parallel_state
from ucp_deepspeed.testing.tied_pipeline import build_tied_pipeline

VOCABULARY = 48
GLOBAL_BATCH = 8
SEQUENCE = 12
CHAINED = 0.8
"""Share of a chain's tokens that follow from the one before; the others are random."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

ModelName = Literal[
    "llama",
    "gpt",
    "mlp",
    "moe",
    "huggingface",
    "tied",
    "megatron-deepspeed-gpt",
    "megatron-deepspeed-llama",
    "megatron-deepspeed-bloom",
]


@dataclass(frozen=True)
class Run:
    """The model to train, and the topology; the data-parallel size is the number of ranks divided by the other sizes.

    Attributes:
        model: ``llama`` or ``gpt`` (Megatron-Core), flavours under the names of Megatron-DeepSpeed, ``mlp`` (plain torch; with
            tensor parallelism each rank has one of its own, and nothing tells how they belong together), ``moe`` (DeepSpeed's
            mixture of experts), ``tied`` (a pipeline with a tied module, see `ucp_deepspeed.testing.tied_pipeline`), or
            ``huggingface``, which AutoTP partitions, and AutoEP if ``config`` says so.
        size: changes to the model's shape; for ``huggingface`` with the ``family``; for a pipeline of Megatron-DeepSpeed with
            ``reordering``, see `ucp_deepspeed.testing.megatron_deepspeed_pipeline`.
        tp: tensor-parallel size.
        pp: pipeline-parallel size; None for a plain engine, 1 for a pipeline engine with one stage.
        sp: size of DeepSpeed's Ulysses sequence parallelism: Megatron-Core models on plain engines, without tensor parallelism.
        partition: ``partition_method`` of the pipeline.
        zero: settings of ``zero_optimization``, with ``stage``.
        precision: precision of the weights.
        config: further DeepSpeed settings, which win over the usual ones.
        universal: the ``universal_checkpoint`` block; None to leave it out.
        groups: ``one`` parameter group; ``decay``: matrices, and the rest without weight decay; ``shuffled``: the same in another
            order, and matrices split once more, with hyper-parameters of their own.
        frozen: names of parameters that aren't trained.
        outside: names of parameters that have gradients and aren't given to the optimizer.
        fused: use DeepSpeed's FusedAdam instead of torch's AdamW.
        optimizer: a class or function, or the name of a class in ``torch.optim``, and its arguments; the result is DeepSpeed's
            client optimizer.
        seed: seed of the initial weights.
        tokens: ``random`` ones, or those of a ``chain`` that can be learned, so that the loss falls.
    """

    model: ModelName = "mlp"
    size: Mapping[str, Any] = field(default_factory=dict)
    tp: int = 1
    pp: int | None = None
    sp: int = 1
    partition: str = "parameters"
    zero: Mapping[str, Any] = field(default_factory=lambda: {"stage": 1})
    precision: Precision = "fp32"
    config: Mapping[str, Any] = field(default_factory=dict)
    universal: Mapping[str, Any] | None = field(default_factory=lambda: {"enabled": True})
    groups: Literal["one", "decay", "shuffled"] = "one"
    frozen: tuple[str, ...] = ()
    outside: tuple[str, ...] = ()
    fused: bool = False
    optimizer: tuple[str | Callable[..., torch.optim.Optimizer], Mapping[str, Any]] | None = None
    seed: int = 0
    tokens: Literal["random", "chain"] = "random"

    def __post_init__(self) -> None:
        if self.sp > 1 and (self.model in ("mlp", "moe", "huggingface") or self.tp > 1 or self.pp is not None):
            raise ValueError(f"sequence parallelism with model {self.model}, tp {self.tp}, pp {self.pp}: see Run.sp")


@dataclass(frozen=True)
class Outcome:
    """The observations of one rank.

    Attributes:
        losses: mean loss over the global batch, by step (the first step is 1).
        load_path: first result of ``engine.load_checkpoint``; None when nothing was loaded.
        client_state: second result, without tensors.
        report: report of a universal load; None when DeepSpeed loaded by itself.
        counters: ``global_steps``, ``global_samples``, ``skipped_steps`` at the end.
        rates: learning rate of each parameter group at the end.
        optimizer: class of the engine's optimizer.
    """

    losses: dict[int, float]
    load_path: str | None
    client_state: dict[str, Any]
    report: Any
    counters: dict[str, int]
    rates: list[float]
    optimizer: str


class PaperTopology(NamedTuple):
    """A topology of the paper's resume experiments (Fig. 7): parallel sizes, and the ZeRO stage."""

    tp: int
    pp: int
    dp: int
    zero: int
    sp: int = 1

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp * self.sp

    def __str__(self) -> str:
        shared = f"·SP{self.sp}" if self.sp > 1 else ""
        return f"TP{self.tp}·PP{self.pp}·DP{self.dp}{shared} ZeRO-{self.zero}"

    def run(self, **changes: Any) -> Run:
        """Return the paper's experiment in small: a GPT with tied embedding; ``changes`` are further fields of `Run`.

        Loads are universal, also where DeepSpeed could load by itself. With one pipeline stage it is a plain engine, as ZeRO-2
        and 3 need it.
        """
        settings: dict[str, Any] = {"universal": {"enabled": True, "load": "always"}, "tokens": "chain"}
        pp = self.pp if self.pp > 1 else None
        return Run("gpt", tp=self.tp, pp=pp, sp=self.sp, zero={"stage": self.zero}, **(settings | changes))


PAPER_SOURCE = PaperTopology(2, 2, 2, 1)
"""Topology on which the runs of Fig. 7a begin."""

PAPER_TOPOLOGIES = (
    PAPER_SOURCE,
    PaperTopology(1, 1, 1, 1),
    PaperTopology(1, 1, 2, 3),
    PaperTopology(1, 1, 2, 1, sp=2),
    PaperTopology(1, 1, 4, 2),
    PaperTopology(1, 1, 4, 3),
    PaperTopology(1, 2, 2, 1),
    PaperTopology(2, 1, 1, 1),
    PaperTopology(2, 1, 2, 1),
    PaperTopology(2, 1, 2, 2),
    PaperTopology(2, 2, 1, 1),
)
"""Topologies on which they resume. The one with most ranks is first, since its pool of ranks leaves no room for others."""

PAPER_TARGET = PaperTopology(2, 2, 1, 1)
"""Topology on which the runs of Fig. 7b resume."""


def train(
    run: Run,
    steps: int,
    *,
    load: str | None = None,
    tag: str | None = None,
    save: str | None = None,
    save_tag: str | None = None,
    client_state: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    save_options: Mapping[str, Any] | None = None,
    save_at: int | None = None,
    save_first: bool = False,
) -> Outcome:
    """Build an engine, load if asked to, train up to a step, save if asked to. Collective.

    Args:
        steps: number of the last step, counted over all runs.
        load: folder to load from, with ``tag`` and further ``options`` of ``engine.load_checkpoint``.
        save: folder to save in at the end, with further ``save_options`` of ``engine.save_checkpoint``. With ``save_at`` it saves
            after that step instead, and with ``save_first`` before any step.
    """
    with fp16_on_cpu():
        engine = build_engine(run)
        load_path, returned = None, {}
        saving = {"tag": save_tag, "client_state": dict(client_state or {}), **(save_options or {})}
        if load is not None:
            load_path, returned = engine.load_checkpoint(load, tag=tag, **(options or {}))
        if save and save_first:
            engine.save_checkpoint(save, **saving)
        losses: dict[int, float] = {}
        while engine.global_steps < steps:
            step = engine.global_steps + 1
            losses[step] = train_step(engine, run, step)
            if save and step == save_at:
                engine.save_checkpoint(save, **saving)
        if save and save_at is None and not save_first:
            engine.save_checkpoint(save, **saving)
        outcome = _outcome(engine, losses, load_path, returned or {})
        engine.destroy()
        del engine
        gc.collect()
        return outcome


def build_engine(run: Run) -> Any:
    """Build the engine of a run, after removing the parallel state that an earlier run of this process left."""
    reset_parallel_state()
    return start_engine(run, *_build_model(run))


def start_engine(run: Run, model: torch.nn.Module, mpu: Any = None) -> Any:
    """Build the engine of a run around an existing model; whoever built that has called `reset_parallel_state`."""
    for name, param in model.named_parameters():
        param.requires_grad_(name not in run.frozen)
    if run.optimizer is not None:  # some of them make their states at once, beside the weights
        model.to(get_accelerator().current_device_name())
    groups, config = _parameter_groups(model, run), _config(run)
    arguments: dict[str, Any] = {"model_parameters": groups}
    if run.optimizer is not None:
        kind, options = run.optimizer
        arguments["optimizer"] = (getattr(torch.optim, kind) if isinstance(kind, str) else kind)(groups, **options)
        del config["optimizer"]
        config["zero_allow_untested_optimizer"] = True
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu, **arguments)
    if run.model == "huggingface":
        from ucp_deepspeed.testing.huggingface_models import count_heads_here

        count_heads_here(engine.module)
    return engine


def build_evaluator(run: Run) -> Any:
    """Build an engine without an optimizer."""
    reset_parallel_state()
    model, mpu = _build_model(run)
    config = {key: value for key, value in _config(run).items() if key not in ("optimizer", "scheduler")}
    engine, *_ = deepspeed.initialize(model=model, config=config, mpu=mpu)
    return engine


def _build_model(run: Run) -> tuple[torch.nn.Module, Any]:
    plain: dict[str, Any] = {"vocabulary": VOCABULARY, "dtype": DTYPES[run.precision], "seed": run.seed, **run.size}
    if run.model == "mlp" and run.tp == 1:
        return build_mlp(**plain), None
    if run.model == "huggingface":
        from ucp_deepspeed.testing.huggingface_models import build_huggingface

        return build_huggingface(**plain), None
    if run.model == "tied":
        return build_tied_pipeline(run.pp or 1, VOCABULARY, run.seed), None
    if run.model == "moe" and run.tp == 1:
        return build_moe(**plain), None
    from megatron.core import parallel_state

    from ucp_deepspeed.megatron import DeepSpeedMpu
    from ucp_deepspeed.testing.megatron_cpu import run_megatron_on_cpu

    run_megatron_on_cpu()
    parallel_state.initialize_model_parallel(run.tp, pipeline_model_parallel_size=run.pp or 1)
    if run.model == "mlp":
        seed = run.seed + parallel_state.get_tensor_model_parallel_rank()
        return build_mlp(**plain | {"seed": seed}), DeepSpeedMpu()
    if run.model == "moe":
        gather_tokens_over_gloo()
        return build_moe(**plain), DeepSpeedMpu()
    return _build_megatron(run)


def _build_megatron(run: Run) -> tuple[torch.nn.Module, Any]:
    """Build a model of Megatron-Core's, or one with Megatron-DeepSpeed's names around it, once Megatron runs."""
    from ucp_deepspeed.megatron import DeepSpeedMpu
    from ucp_deepspeed.testing.megatron_models import build_megatron_gpt, gpt_flavour, llama_flavour

    dtype = DTYPES[run.precision]
    small: dict[str, Any] = {
        "layers": 2,
        "hidden": 48,
        "heads": 8,
        "ffn": 40,
        "vocabulary": VOCABULARY,
        "sequence": SEQUENCE,
    }
    if run.model.endswith("bloom"):
        small["positions"] = False
    flavour = llama_flavour if run.model.endswith("llama") else gpt_flavour
    changes = dict(run.size)
    reordering = changes.pop("reordering", False)
    size = flavour(**{**small, **changes})
    if run.pp is not None and run.model.startswith("megatron-deepspeed"):
        from ucp_deepspeed.testing.megatron_deepspeed_pipeline import build_megatron_deepspeed_pipeline

        kind = {"embedding_norm": run.model.endswith("bloom"), "reordering": reordering}
        return build_megatron_deepspeed_pipeline(
            size, run.pp, dtype, run.seed, partition_method=run.partition, **kind
        ), None
    if run.pp is not None:
        from ucp_deepspeed.testing.megatron_pipeline import build_megatron_pipeline

        return build_megatron_pipeline(size, run.pp, dtype, run.seed, partition_method=run.partition), None
    model = build_megatron_gpt(size, dtype, run.seed)
    if run.model.startswith("megatron-deepspeed"):
        from ucp_deepspeed.testing.megatron_deepspeed import MegatronDeepSpeedModel

        return MegatronDeepSpeedModel(model, embedding_norm=run.model.endswith("bloom")), DeepSpeedMpu()
    if run.sp == 1:
        return model, DeepSpeedMpu()
    from ucp_deepspeed.testing.ulysses import share_sequences, start_sequence_parallel

    mpu = start_sequence_parallel(run.sp)
    share_sequences(model)
    return model, mpu


def _parameter_groups(model: torch.nn.Module, run: Run) -> Any:
    trained = [param for name, param in model.named_parameters() if param.requires_grad and name not in run.outside]
    if run.groups == "one":
        return trained
    matrices = [param for param in trained if param.ndim > 1]
    rest = [param for param in trained if param.ndim <= 1]
    if run.groups == "shuffled":
        return [{"params": rest, "lr": 0.5}, {"params": matrices[1:], "weight_decay": 0.3}, {"params": matrices[:1]}]
    matrix_group: dict[str, Any] = {"params": matrices, "weight_decay": 0.1}
    rest_group: dict[str, Any] = {"params": rest, "weight_decay": 0.0, "lr": 2e-3}
    # DeepSpeed splits off the experts of each group by its name.
    if run.model == "moe" or "expert_parallel" in run.config:
        return [matrix_group | {"name": "matrices"}, rest_group | {"name": "rest"}]
    return [matrix_group, rest_group]


def _config(run: Run) -> dict[str, Any]:
    optimizer: dict[str, Any] = {"lr": 4e-3, "betas": [0.9, 0.95], "weight_decay": 0.1}
    config: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "steps_per_print": 2**31,
        "gradient_clipping": 1.0,
        "zero_optimization": dict(run.zero),
        "optimizer": {"type": "AdamW", "params": optimizer | ({} if run.fused else {"torch_adam": True})},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 4e-3, "warmup_num_steps": 10}},
    }
    if run.zero["stage"] == 3:
        config["zero_optimization"].setdefault("memory_efficient_linear", False)
        config["zero_optimization"].setdefault("stage3_param_persistence_threshold", 100)
    if run.model == "huggingface" and run.tp > 1:
        from ucp_deepspeed.testing.huggingface_models import tensor_parallel_settings

        config["tensor_parallel"] = {"autotp_size": run.tp, **tensor_parallel_settings(**run.size)}
    if run.precision != "fp32":
        config[run.precision] = {"enabled": True}
    if run.precision == "fp16":
        config["fp16"]["initial_scale_power"] = 8
    if run.universal is not None:
        config["universal_checkpoint"] = dict(run.universal)
    return config | dict(run.config)


def train_step(engine: Any, run: Run, step: int) -> float:
    """Take one optimizer step on this rank's share of a batch that depends only on the step; return the mean loss."""
    batch = batch_of(run, step)
    group = engine.seq_data_parallel_group
    copies = dist.get_world_size(group=group) // run.sp
    share = batch.chunk(copies)[dist.get_rank(group=group) // run.sp]
    if run.pp is not None:
        micro = share.split(engine.train_micro_batch_size_per_gpu())
        return float(engine.train_batch(iter([(part[:, :-1], part[:, 1:]) for part in micro])))
    loss = _loss(engine, run, share)
    engine.backward(loss)
    engine.step()
    total = loss.detach().float().clone()
    dist.all_reduce(total, group=group)
    return float(total) / copies


def loss_of(engine: Any, run: Run) -> float:
    """Return the loss of one batch, the same on every rank; no step is taken with it."""
    batch = batch_of(run, 0)
    engine.eval()
    with torch.no_grad():
        if run.pp is not None:
            micro = batch.split(engine.train_micro_batch_size_per_gpu())
            return float(engine.eval_batch(iter([(part[:, :-1], part[:, 1:]) for part in micro])))
        return float(_loss(engine, run, batch))


def batch_of(run: Run, step: int) -> torch.Tensor:
    """Return the tokens of all ranks, int64 of shape ``[GLOBAL_BATCH, SEQUENCE + 1]``."""
    generator = torch.Generator().manual_seed(1000 + step)
    batch = torch.randint(0, VOCABULARY, (GLOBAL_BATCH, SEQUENCE + 1), generator=generator)
    if run.tokens == "chain":
        followed = torch.rand(batch.shape, generator=generator) < CHAINED
        for position in range(1, batch.shape[1]):
            successor = (5 * batch[:, position - 1] + 7) % VOCABULARY
            batch[:, position] = torch.where(followed[:, position], successor, batch[:, position])
    return batch.to(get_accelerator().current_device_name())


def _loss(engine: Any, run: Run, share: torch.Tensor) -> torch.Tensor:
    """Return what this rank differentiates: the mean loss of its sequences or, where ranks share sequences, its part of that."""
    if run.model in ("mlp", "moe"):
        loss: torch.Tensor = engine(share[:, :-1], share[:, 1:])
        return loss
    if run.model == "huggingface":
        from ucp_deepspeed.testing.huggingface_models import mean_loss as huggingface_loss

        return huggingface_loss(engine, share)
    if run.sp > 1:
        from ucp_deepspeed.testing.ulysses import share_of_mean_loss

        return share_of_mean_loss(engine, share)
    from ucp_deepspeed.testing.megatron_models import mean_loss

    return mean_loss(engine, share)


def _outcome(engine: Any, losses: dict[int, float], load_path: str | None, returned: dict[str, Any]) -> Outcome:
    plain = {
        key: value for key, value in returned.items() if isinstance(value, (int, float, str, list, tuple, type(None)))
    }
    return Outcome(
        losses=losses,
        load_path=load_path,
        client_state=plain,
        report=getattr(engine, "universal_checkpoint_report", None),
        counters={key: getattr(engine, key) for key in ("global_steps", "global_samples", "skipped_steps")},
        rates=[group["lr"] for group in engine.optimizer.param_groups],
        optimizer=type(engine.optimizer).__name__,
    )


@contextmanager
def warnings_of() -> Iterator[list[str]]:
    """Collect the package's warnings in the block."""
    found: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ucp_deepspeed")
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)
