"""Trainer, PEFT and TRL: another number of ranks, stage, accumulation and tensor-parallel size, from real runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import ASYNC, WORDS, Job, Numbers, Result, Watch, arguments_of, heard, in_order, model_of, train

from ucp_deepspeed.testing.ranks import RankPool

Ranks = Callable[[int], RankPool]

FOUR = {"save_steps": 1, "num_train_epochs": 1, "warmup_steps": 2}
"""Steps of four samples, in any way."""

AUTO = {
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}},
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": "auto",
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "total_num_steps": "auto",
        },
    },
}


def share(ranks: int, accumulation: int = 1) -> dict[str, Any]:
    return FOUR | {
        "per_device_train_batch_size": 4 // ranks // accumulation,
        "gradient_accumulation_steps": accumulation,
    }


def check_same(found: Result, whole: Result, step: int, ranks: int, micro: int, accumulation: int = 1) -> None:
    """The samples and rates of each step are those of the uninterrupted run, and so are its losses but for their rounding."""
    after = {at: sorted(taken) for at, taken in in_order(whole, 2, 2).items() if at > step}
    assert {at: sorted(taken) for at, taken in in_order(found, ranks, micro).items()} == after
    assert found.rates == {at: rate for at, rate in whole.rates.items() if at > step}
    for at, loss in found.losses.items():
        assert abs(loss - whole.losses[at]) < 1e-4


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_four_one(zero: int, ranks: Ranks, tmp_path: Path) -> None:
    """Optimizer and schedule of the DeepSpeed config with "auto", from a file; in the background; another stage and
    accumulation at the end."""
    job = Job(tmp_path / "two", zero=zero, universal=ASYNC, config=AUTO, arguments=share(2), config_file=zero == 2)
    whole = ranks(2).run(train, job)[0]
    two = replace(job, folder=tmp_path / "four", arguments=share(4), resume=str(job.folder / "checkpoint-3"), stop=6)
    four = ranks(4).run(train, two)[0]
    check_same(four, cut(whole, 6), 3, 4, 1)
    one = replace(two, folder=tmp_path / "one", zero=zero % 3 + 1, arguments=share(1, 2), stop=None)
    found = ranks(1).run(train, replace(one, resume=str(two.folder / "checkpoint-6")))[0]
    check_same(found, whole, 6, 1, 2, 2)


def cut(whole: Result, step: int) -> Result:
    """An uninterrupted run up to a step."""
    upto = {
        name: {at: it for at, it in getattr(whole, name).items() if at <= step}
        for name in ("samples", "rates", "losses")
    }
    return replace(whole, **upto)


def test_tensor_parallel_to_plain(ranks: Ranks, tmp_path: Path) -> None:
    config = {"tensor_parallel": {"autotp_size": 2}}
    arguments = FOUR | {"per_device_train_batch_size": 4}
    job = Job(tmp_path / "tp", zero=1, config=config, arguments=arguments)
    pool = RankPool(2)  # DeepSpeed and accelerate remember tensor parallelism as long as a process lives
    whole = pool.run(train, job)
    pool.close()
    assert whole[0].samples[1][0] == whole[0].samples[1][1]
    plain = replace(job, folder=tmp_path / "one", config={}, resume=str(job.folder / "checkpoint-4"))
    found = ranks(1).run(train, plain)[0]
    assert {at: taken[0] for at, taken in found.samples.items()} == {
        at: taken[0] for at, taken in whole[0].samples.items() if at > 4
    }
    assert found.rates == {at: rate for at, rate in whole[0].rates.items() if at > 4}
    for at, loss in found.losses.items():
        assert abs(loss - whole[0].losses[at]) < 1e-4


@pytest.mark.parametrize("zero", [2, 3])
def test_lora(zero: int, ranks: Ranks, tmp_path: Path) -> None:
    job = Job(tmp_path / "two", zero=zero, universal=ASYNC, arguments=share(2), peft={})
    whole = ranks(2).run(train, job)[0]
    later = replace(job, folder=tmp_path / "one", arguments=share(1), resume=str(job.folder / "checkpoint-4"))
    check_same(ranks(1).run(train, later)[0], whole, 4, 1, 4)
    names = [path.name for path in (job.folder / "checkpoint-10").iterdir()]
    assert "adapter_model.safetensors" in names


def finetune(job: Job) -> Result:
    """Train with TRL's trainer, on samples that are made of words already."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast
    from trl import SFTConfig, SFTTrainer

    words = {f"w{number}": number for number in range(WORDS - 1)} | {"<pad>": WORDS - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w0")), pad_token="<pad>", eos_token="<pad>"
    )
    numbers = Numbers(job.samples)
    data = Dataset.from_dict({"input_ids": [numbers[index]["input_ids"] for index in range(job.samples)]})
    arguments = arguments_of(job) | {"use_cpu": True, "bf16": False, "max_length": None}
    watch = Watch(job)
    trainer = SFTTrainer(
        model_of(job), SFTConfig(**arguments), train_dataset=data, processing_class=tokenizer, callbacks=[watch]
    )
    watch.trainer, trainer.taken = trainer, []
    with heard() as messages:
        trainer.train(resume_from_checkpoint=job.resume)
    trainer.deepspeed.destroy()
    return Result({}, watch.rates, watch.losses, watch.epochs, messages, {})


def test_trl(ranks: Ranks, tmp_path: Path) -> None:
    """Two ranks, then one: the same rates, and the losses of the same samples."""
    job = Job(tmp_path / "two", arguments=share(2))
    whole = ranks(2).run(finetune, job)[0]
    later = replace(job, folder=tmp_path / "one", arguments=share(1), resume=str(job.folder / "checkpoint-4"))
    found = ranks(1).run(finetune, later)[0]
    assert found.rates == {at: rate for at, rate in whole.rates.items() if at > 4}
    assert len(found.losses) == 6 and all(abs(loss - whole.losses[at]) < 1e-4 for at, loss in found.losses.items())
