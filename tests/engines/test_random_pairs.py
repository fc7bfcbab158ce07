"""A random search over models, optimizers, groups, stages, precisions, degrees and settings, in real engines.

A pair is a source and a target that differ in topology and settings. The source trains on, uninterrupted; the target takes over
its checkpoint and saves it again; the source's twin takes over that one. The states of all three are compared bit for bit, and
the twin's losses with the uninterrupted run's. More pairs by hand:

    bash scripts/test.sh tests/engines/test_random_pairs.py --pairs 500 --first-pair 1000
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import fused_optimizers
import odd_optimizers
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

ALWAYS = {"enabled": True, "load": "always"}

OPTIMIZERS: tuple[tuple[str | type, Mapping[str, Any]] | None, ...] = (
    None,
    None,
    ("SGD", {"lr": 0.02, "momentum": 0.9}),
    ("SGD", {"lr": 0.02}),
    ("Adagrad", {"lr": 0.01}),
    ("RMSprop", {"lr": 1e-3, "centered": True}),
    ("Adamax", {"lr": 1e-3}),
    ("AdamW", {"lr": 1e-3, "amsgrad": True}),
    ("AdamW", {"lr": 1e-3, "foreach": False, "maximize": True}),
    ("RAdam", {"lr": 1e-3}),
    ("NAdam", {"lr": 1e-3}),
    ("ASGD", {"lr": 0.01}),
    (fused_optimizers.apex_adam, {}),
    (odd_optimizers.ScheduleFree, {}),
    (odd_optimizers.LateAverage, {}),
    (odd_optimizers.SignDescent, {}),
)
"""DeepSpeed's choice from the config, and classes that step on each element alone."""

ZERO_SETTINGS: Mapping[int, tuple[Mapping[str, Any], ...]] = {
    0: ({},),
    1: ({}, {"round_robin_gradients": True}, {"offload_optimizer": {"device": "cpu"}}, {"reduce_bucket_size": 700}),
    2: ({}, {"round_robin_gradients": True}, {"overlap_comm": True}, {"contiguous_gradients": False}),
    3: (
        {},
        {"sub_group_size": 900},
        {"stage3_param_persistence_threshold": 0},
        {"sub_group_size": 2500, "stage3_param_persistence_threshold": 10**6},
        {"offload_optimizer": {"device": "cpu"}, "sub_group_size": 1500},
    ),
}

MLP_NAMES = ("embedding.weight", "norm.weight", "norm.bias", "linear_in.weight", "linear_in.bias", "gain", "odd_offset")
"""Parameters of which some are frozen; what is left is enough to train."""


@dataclass(frozen=True)
class Setup:
    """A run, and on how many ranks."""

    run: Run
    world_size: int


@dataclass(frozen=True)
class Pair:
    """Attributes:
    source, target: see `Setup`.
    recorded: whether the source's manifest stays; without it the files alone tell.
    converted: whether the target reads a universal checkpoint made of the source's.
    """

    source: Setup
    target: Setup
    recorded: bool
    converted: bool


def draw(seed: int) -> Pair:
    """The pair of a seed."""
    random = Random(seed)
    model = random.choice(("mlp", "mlp", "llama", "gpt", "moe", "pipeline"))
    common = _drawn_model(random, model)
    source, target = (_drawn_setup(random, model, common) for _ in range(2))
    named = source.run.zero["stage"] == 0 or model in ("moe", "pipeline")  # where names lie in the manifest alone
    return Pair(source, target, recorded=named or random.random() < 0.7, converted=random.random() < 0.3)


def _drawn_model(random: Random, model: str) -> Run:
    """Draw the settings that both sides have in common."""
    precision = random.choice(("fp32", "fp32", "bf16", "bf16", "fp16"))
    groups = random.choice(("one", "decay", "decay", "shuffled")) if model in ("mlp", "llama", "gpt") else "one"
    optimizer = random.choice(OPTIMIZERS) if model in ("mlp", "llama") else None
    if optimizer is not None and optimizer[0] == "Adagrad":
        groups = "one"  # DeepSpeed makes one group of all that Adagrad has under ZeRO, and then finds no second
    run = Run(precision=precision, groups=groups, optimizer=optimizer, seed=random.randrange(100), universal=ALWAYS)  # type: ignore[arg-type]
    if model == "mlp":
        size = {key: random.randrange(least, most) for key, least, most in (("hidden", 3, 30), ("ffn", 1, 50))}
        frozen = tuple(name for name in MLP_NAMES if random.random() < 0.15)
        return replace(run, size=size | {"odd": random.choice((1, 7, 13))}, frozen=frozen)
    if model == "moe":
        return replace(run, model="moe")
    if model == "pipeline":
        return replace(run, model=random.choice(("gpt", "llama")), size={"layers": 2})  # type: ignore[arg-type]
    return replace(run, model=model, size={"layers": random.choice((1, 2))})  # type: ignore[arg-type]


def _drawn_setup(random: Random, model: str, common: Run) -> Setup:
    world_size = random.choice((1, 2, 2, 3, 4)) if model == "mlp" else random.choice((1, 2, 4))
    if world_size == 3:
        common = replace(common, config={"train_batch_size": 24, **common.config})
    tp = random.choice([degree for degree in (1, 2, 4) if world_size % degree == 0]) if model in ("llama", "gpt") else 1
    stage = random.choice((0, 1, 2, 3))
    pp = None
    if model == "pipeline":
        pp, stage = random.choice([stages for stages in (1, 2) if world_size % stages == 0]), random.choice((0, 1))
        common = replace(common, config={**common.config, "gradient_clipping": 0.0})
    if model == "moe":
        ep, stage = random.choice([size for size in (1, 2, 4) if world_size % size == 0]), random.choice((0, 1, 2))
        common = replace(common, size={**common.size, "ep": (ep, ep)})
    if common.optimizer is not None and common.optimizer[0] == "Adagrad" and common.precision != "fp32":
        stage = max(stage, 1)  # DeepSpeed's 16-bit wrappers without ZeRO can't save what Adagrad's constructor has made
    zero = {"stage": stage, **(random.choice(ZERO_SETTINGS[stage]) if model not in ("moe", "pipeline") else {})}
    if "offload_optimizer" in zero:  # with optimizers of torch's too
        common = replace(common, config={**common.config, "zero_force_ds_cpu_optimizer": False})
    return Setup(replace(common, tp=tp, pp=pp, zero=zero), world_size)


def test_there_and_back(pair_seed: int, ranks: Ranks, tmp_path: Path) -> None:
    """From the source to the target and back: no bit of any state is another, and training goes on as if nothing had happened."""
    pair = draw(pair_seed)
    again = f"bash scripts/test.sh tests/engines/test_random_pairs.py --pairs 1 --first-pair {pair_seed}"
    try:
        _check(pair, ranks, tmp_path)
    except Exception as error:
        raise AssertionError(f"pair {pair_seed}: {pair}\nrun it again with: {again}\n{error}") from error


def _check(pair: Pair, ranks: Ranks, folder: Path) -> None:
    source, target = pair.source, pair.target
    first, middle, last = (folder / name for name in ("first", "middle", "last"))
    whole = ranks(source.world_size).run(train, source.run, LAST_STEP, save=str(first), save_at=STEP)
    if not pair.recorded:
        (first / f"global_step{STEP}" / MANIFEST_NAME).unlink()
    read = first
    if pair.converted:
        read = folder / "universal"
        convert(UniversalView.of(open_checkpoint(first)), read)
        assert differences(first, read) == []

    there = ranks(target.world_size).run(train, target.run, STEP, load=str(read), save=str(middle), save_first=True)
    assert all(outcome.report is not None for outcome in there)
    assert differences(first, middle) == []

    back = ranks(source.world_size).run(train, source.run, LAST_STEP, load=str(middle), save=str(last), save_first=True)
    assert differences(first, last) == []
    for found, expected in zip(back, whole, strict=True):
        assert found.losses == {step: loss for step, loss in expected.losses.items() if step > STEP}
        assert found.rates == expected.rates
