"""Trainer, PEFT and TRL: another number of ranks, stage, accumulation and tensor-parallel size, from real runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import (
    ASYNC,
    WORDS,
    Job,
    Numbers,
    Result,
    Watch,
    arguments_of,
    differences,
    heard,
    in_order,
    model_of,
    train,
    train_or_error,
)

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


def check_same(
    found: Result, whole: Result, step: int, ranks: int, micro: int, accumulation: int = 1, exact: bool = False
) -> None:
    """Samples and rates of each step are those of the uninterrupted run. Losses are too, to the last bit where sums are exact;
    elsewhere other ranks add up the same numbers in another order."""
    after = {at: sorted(taken) for at, taken in in_order(whole, 2, 2).items() if at > step}
    assert {at: sorted(taken) for at, taken in in_order(found, ranks, micro).items()} == after
    assert found.rates == {at: rate for at, rate in whole.rates.items() if at > step}
    losses = {at: loss for at, loss in whole.losses.items() if at > step}
    assert found.losses == (losses if exact else pytest.approx(losses, abs=1e-4))


EXACT = {
    "optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.5}},
    "scheduler": {"type": "WarmupDecayLR", "params": AUTO["scheduler"]["params"] | {"warmup_type": "linear"}},
}
"""Rates and states are fractions of a power of two."""


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_two_four_one(zero: int, ranks: Ranks, tmp_path: Path) -> None:
    """Optimizer and schedule of the DeepSpeed config with "auto", from a file; in the background; another stage and
    accumulation at the end. At stages 2 and 3 all sums are exact."""
    exact, more = zero > 1, {"learning_rate": 0.25, "max_grad_norm": 0.0} if zero > 1 else {}
    config = EXACT if exact else AUTO
    job = Job(tmp_path / "two", zero=zero, universal=ASYNC, config=config, config_file=zero == 2, sums=exact)
    job = replace(job, arguments=share(2) | more)
    whole = ranks(2).run(train, job)[0]
    assert len(set(whole.losses.values())) == 10 and len(set(whole.rates.values())) > 6
    two = replace(job, folder=tmp_path / "four", arguments=share(4) | more, stop=6, again=True)
    two = replace(two, resume=str(job.folder / "checkpoint-3"))
    four = ranks(4).run(train, two)[0]
    check_same(four, cut(whole, 6), 3, 4, 1, exact=exact)
    one = replace(two, folder=tmp_path / "one", zero=zero % 3 + 1, arguments=share(1, 2) | more, stop=None)
    one = replace(one, resume=str(two.folder / "checkpoint-6"))
    found = ranks(1).run(train, one)[0]
    check_same(found, whole, 6, 1, 2, 2, exact)
    assert differences(two) == differences(one) == []


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
    plain = replace(job, folder=tmp_path / "one", config={}, resume=str(job.folder / "checkpoint-4"), again=True)
    found = ranks(1).run(train, plain)[0]
    assert {at: taken[0] for at, taken in found.samples.items()} == {
        at: taken[0] for at, taken in whole[0].samples.items() if at > 4
    }
    assert found.rates == {at: rate for at, rate in whole[0].rates.items() if at > 4}
    assert found.losses == pytest.approx({at: loss for at, loss in whole[0].losses.items() if at > 4}, abs=1e-4)
    assert differences(plain) == []


@pytest.mark.parametrize("zero", [2, 3])
def test_lora(zero: int, ranks: Ranks, tmp_path: Path) -> None:
    """From two ranks to one at another stage, where the adapter has another name, and back to two."""
    job = Job(tmp_path / "two", zero=zero, universal=ASYNC, arguments=share(2), peft={})
    whole = ranks(2).run(train, job)[0]
    assert "adapter_model.safetensors" in [path.name for path in (job.folder / "checkpoint-10").iterdir()]
    renamed = replace(job, folder=tmp_path / "one", zero=5 - zero, arguments=share(1), peft={"adapter_name": "other"})
    renamed = replace(renamed, resume=str(job.folder / "checkpoint-4"), again=True, stop=7)
    problem = ranks(1).run(train_or_error, renamed)[0]
    assert problem.startswith("MismatchError") and "lora_A.other.weight: missing" in problem
    spec = tmp_path / "names.yaml"
    spec.write_text(problem[problem.index("family:") :])
    renamed = replace(renamed, universal={**ASYNC, "spec": str(spec)})
    check_same(ranks(1).run(train, renamed)[0], cut(whole, 7), 4, 1, 4)
    assert differences(renamed, str(spec)) == []
    back = replace(renamed, folder=tmp_path / "back", zero=zero, arguments=share(2), universal=ASYNC, stop=None)
    back = replace(back, resume=str(renamed.folder / "checkpoint-7"))
    check_same(ranks(2).run(train, back)[0], whole, 7, 2, 2)
    assert differences(back) == []


def test_lora_in_a_wrapper_and_without(ranks: Ranks, tmp_path: Path) -> None:
    """PEFT's wrapper changes all names. Trainer leaves out frozen weights only of models in it, so that a model without it has to
    keep its own."""
    bare = Job(tmp_path / "bare", zero=2, arguments=share(2), peft={"bare": True})
    whole = ranks(2).run(train, bare)[0]
    wrapped = replace(bare, folder=tmp_path / "wrapped", arguments=share(1), peft={}, again=True, stop=7)
    wrapped = replace(wrapped, resume=str(bare.folder / "checkpoint-4"))
    check_same(ranks(1).run(train, wrapped)[0], cut(whole, 7), 4, 1, 4)
    back = replace(bare, folder=tmp_path / "back", zero=3, resume=str(wrapped.folder / "checkpoint-7"), again=True)
    problem = ranks(2).run(train_or_error, back)[0]
    assert "lm_head.weight: missing" in problem and problem.endswith(
        '"on_missing": "init" lets what is missing keep the model\'s values'
    )
    found = ranks(2).run(train, replace(back, universal={"enabled": True, "on_missing": "init"}))[0]
    check_same(found, whole, 7, 2, 2)


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
    later = replace(
        job, folder=tmp_path / "one", arguments=share(1), resume=str(job.folder / "checkpoint-4"), again=True
    )
    found = ranks(1).run(finetune, later)[0]
    assert found.rates == {at: rate for at, rate in whole.rates.items() if at > 4}
    assert found.losses == pytest.approx({at: loss for at, loss in whole.losses.items() if at > 4}, abs=1e-4)
    assert differences(later) == []
