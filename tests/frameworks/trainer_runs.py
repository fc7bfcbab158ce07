"""A real ``transformers.Trainer`` on tiny models: what it trained on, its rates and losses, and what it left on disk."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.data import Dataset, IterableDataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from ucp_deepspeed.testing.ranks import reset_parallel_state

ON = {"enabled": True}
ASYNC = {"enabled": True, "save": {"async": True}}
WORDS = 32
"""Size of the vocabulary; a sample is four of its words, by its number."""


@dataclass(frozen=True)
class Job:
    """One training.

    Attributes:
        samples: of the dataset.
        universal: the block of the DeepSpeed config; None for none.
        config: more of the DeepSpeed config.
        arguments: more of the ``TrainingArguments``.
        stop: steps after which the run ends, as if it had been interrupted.
        peft: more of what makes an adapted model; with ``bare`` it is one without PEFT's wrapper.
        sums: take `Sums` for the model.
        again: save into a folder ``again`` before the first step.
    """

    folder: Path
    samples: int = 40
    universal: Mapping[str, Any] | None = field(default_factory=lambda: ON)
    zero: int = 2
    config: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    dropout: float = 0.0
    stop: int | None = None
    resume: str | bool | None = None
    stream: bool = False
    peft: Mapping[str, Any] | None = None
    config_file: bool = False
    sums: bool = False
    again: bool = False


@dataclass(frozen=True)
class Result:
    """Everything that a rank saw of a training.

    Attributes:
        samples: for each optimizer step, the samples of each rank's micro-batches.
        messages: warnings of the package.
    """

    samples: dict[int, list[list[int]]]
    rates: dict[int, float]
    losses: dict[int, float]
    epochs: dict[int, float]
    messages: list[str]
    weights: dict[str, torch.Tensor]
    report: str | None = None


class Numbers(Dataset[dict[str, Any]]):
    """Samples that hold their own number."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < self.count:
            raise IndexError(index)
        words = [index % WORDS, (index * 7 + 3) % WORDS, (index * 5 + 1) % WORDS, (index // WORDS + 11) % WORDS]
        return {"input_ids": words, "labels": words, "number": index}


class Stream(IterableDataset[dict[str, Any]]):
    """Samples of `Numbers`, without a length."""

    def __init__(self, count: int) -> None:
        self.numbers = Numbers(count)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self.numbers[index] for index in range(self.numbers.count))


class Collator:
    """Makes batches, and notes whose they are when the model takes them."""

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        numbers = torch.tensor([item["number"] for item in items])
        words = torch.tensor([item["input_ids"] for item in items])
        return {"input_ids": words, "labels": words.clone(), "number": numbers}


class Recorded(Trainer):
    """Notes the samples that each step takes."""

    taken: list[int]

    def training_step(self, model: Any, inputs: Any, *rest: Any) -> Any:
        """Note the numbers, which the model doesn't take."""
        self.taken += inputs.pop("number").tolist()
        return super().training_step(model, inputs, *rest)

    def prediction_step(self, model: Any, inputs: Any, *rest: Any, **more: Any) -> Any:
        """Leave the numbers out."""
        inputs.pop("number")
        return super().prediction_step(model, inputs, *rest, **more)


class Sums(torch.nn.Module):
    """A model whose sums are exact in any order, as long as rates are: the losses are the same to the last bit on any ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.config = LlamaConfig(hidden_size=16, num_attention_heads=2)
        self.linear = torch.nn.Linear(8, 4, bias=False)
        self.linear.weight.data = (torch.arange(32).reshape(4, 8) * 7 % 5 - 2) / 4

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return a loss that is linear in the weights."""
        digits = torch.stack([input_ids % 3, input_ids // 3 % 3], dim=-1).flatten(1) - 1
        return {"loss": self.linear(digits.float()).sum(dim=1).mean()}


class Watch(TrainerCallback):
    """Gathers what each step did, and ends the run where the job says."""

    def __init__(self, job: Job) -> None:
        self.job, self.trainer = job, None
        self.samples: dict[int, list[list[int]]] = {}
        self.rates: dict[int, float] = {}
        self.losses: dict[int, float] = {}
        self.epochs: dict[int, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Save what was loaded."""
        if self.job.again:
            frozen_left_out = self.job.peft is not None and "bare" not in self.job.peft
            folder = str(self.job.folder / "again")
            self.trainer.deepspeed.save_checkpoint(folder, exclude_frozen_parameters=frozen_left_out)

    def on_step_end(self, args: Any, state: Any, control: Any, **rest: Any) -> None:
        """Note the samples of all ranks."""
        trainer = self.trainer
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, trainer.taken)
        trainer.taken = []
        self.samples[state.global_step] = everyone
        self.epochs[state.global_step] = state.epoch
        if state.global_step == self.job.stop:
            control.should_training_stop = True

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **rest: Any) -> None:
        """Note rates and losses."""
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]
            self.rates[state.global_step] = logs["learning_rate"]


def model_of(job: Job) -> Any:
    """Make the model, the same each time."""
    torch.manual_seed(7)
    if job.sums:
        return Sums()
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=16,
        attention_dropout=job.dropout,
    )
    model = LlamaForCausalLM(config)
    if job.peft is not None:
        from peft import LoraConfig, get_peft_model, inject_adapter_in_model

        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj", "v_proj"])
        if "bare" in job.peft:
            return inject_adapter_in_model(adapter, model)
        model = get_peft_model(model, adapter, **job.peft)
    return model


def deepspeed_config(job: Job) -> dict[str, Any] | str:
    """Return the DeepSpeed config of a job, or the path of a file with it."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": job.zero, "reduce_bucket_size": "auto"},
        "zero_allow_untested_optimizer": True,
        **job.config,
    }
    if job.universal is not None:
        config["universal_checkpoint"] = dict(job.universal)
    if not job.config_file:
        return config
    job.folder.mkdir(parents=True, exist_ok=True)
    path = job.folder.parent / f"{job.folder.name}.{dist.get_rank()}.json"
    path.write_text(json.dumps(config))
    return str(path)


def arguments_of(job: Job) -> dict[str, Any]:
    """Return what the ``TrainingArguments`` of a job are made of."""
    return {
        "output_dir": str(job.folder),
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1000,
        "report_to": [],
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "seed": 11,
        **job.arguments,
        "deepspeed": deepspeed_config(job),
    }


def trainer_of(job: Job, kind: type[Recorded] = Recorded) -> tuple[Recorded, Watch]:
    """Make the trainer of a job."""
    args = TrainingArguments(**arguments_of(job))
    watch = Watch(job)
    data = Stream(job.samples) if job.stream else Numbers(job.samples)
    trainer = kind(
        model=model_of(job),
        args=args,
        train_dataset=data,
        eval_dataset=Numbers(8),
        data_collator=Collator(),
        callbacks=[watch],
    )
    watch.trainer, trainer.taken = trainer, []
    return trainer, watch


@contextmanager
def heard() -> Iterator[list[str]]:
    """Collect the package's warnings and what it says of checkpoints."""
    messages: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    logger, keep = logging.getLogger("ucp_deepspeed"), Keep(logging.INFO)
    level = logger.level
    logger.addHandler(keep)
    logger.setLevel(logging.INFO)
    try:
        yield messages
    finally:
        logger.removeHandler(keep)
        logger.setLevel(level)


def weights_of(engine: Any) -> dict[str, torch.Tensor]:
    """Return the engine's weights, whole."""
    import deepspeed

    weights = {}
    for name, param in engine.module.named_parameters():
        with deepspeed.zero.GatheredParameters([param], enabled=hasattr(param, "ds_id")):
            weights[name] = param.detach().clone()
    return weights


def train(job: Job, then: Callable[[Recorded], Any] | None = None) -> Result:
    """Train, on every rank of a pool."""
    reset_parallel_state()
    with heard() as messages:
        trainer, watch = trainer_of(job)
        trainer.train(resume_from_checkpoint=job.resume)
        if then is not None:
            then(trainer)
        report = getattr(trainer.deepspeed, "universal_checkpoint_report", None)
        result = Result(
            watch.samples, watch.rates, watch.losses, watch.epochs, messages, weights_of(trainer.deepspeed), str(report)
        )
        import ucp_deepspeed

        ucp_deepspeed.wait_for_save()
        trainer.deepspeed.destroy()
    return result


def train_or_error(job: Job) -> Result | str:
    """Train, or return the error."""
    try:
        return train(job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def differences(job: Job, spec: str | None = None) -> list[str]:
    """In what a job's state after its load differs from the checkpoint that it resumed from: weights, optimizer, schedule."""
    from ucp_deepspeed.checkpoint import open_checkpoint
    from ucp_deepspeed.checkpoint.view import UniversalView
    from ucp_deepspeed.language import load_spec
    from ucp_deepspeed.transfer.compare import compare

    named = load_spec(spec) if spec else None
    views = [UniversalView.of(open_checkpoint(path), named) for path in (Path(str(job.resume)), job.folder / "again")]
    return [f"{found.name} {found.state or ''} {found.detail}" for found in compare(*views)]


def in_order(result: Result, ranks: int, micro: int) -> dict[int, list[int]]:
    """Return the samples of each step in the order of the sampler: a micro-batch of each rank in turn."""
    ordered = {}
    for step, shares in result.samples.items():
        rounds = max(len(share) for share in shares) // micro + 1
        ordered[step] = [
            number for turn in range(rounds) for share in shares for number in share[turn * micro : (turn + 1) * micro]
        ]
    return ordered
