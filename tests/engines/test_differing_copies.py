"""Parameters of which pipeline stages hold copies that differ: none is lost silently.

The bias of ``tied`` is trained on the last stage alone; the first stage's stays at zero.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import differences, warnings_of
from click.testing import CliRunner
from odd_optimizers import NormPerTensor

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.cli import main
from ucp_deepspeed.engine.differing_copies import sum_of_bits
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train, train_step

BIAS, WEIGHT = "tied_modules.words.bias", "tied_modules.words.weight"
UNCLIPPED = {"gradient_clipping": 0.0}
PIPELINE = Run("tied", pp=2, config=UNCLIPPED)
DRIFTING = replace(PIPELINE, optimizer=(NormPerTensor, {"lr": 1e-2}))
ALWAYS = {"enabled": True, "load": "always"}

Ranks = Callable[[int], RankPool]


def held(engine: Any) -> dict[str, torch.Tensor]:
    """Masters and states of this rank's stage; of the flat buffers, which hold a stage, all."""
    [group] = engine.optimizer.optimizer.param_groups
    found = {}
    for index, param in enumerate(group["params"]):
        state = engine.optimizer.optimizer.state[param].items()
        states = {key: value for key, value in state if isinstance(value, torch.Tensor) and value.shape == param.shape}
        found |= {f"{index} {key}": value.detach().clone() for key, value in {"fp32": param, **states}.items()}
    return found


def train_and_save(run: Run, folder: str) -> tuple[list[str], dict[str, torch.Tensor]]:
    """On a rank: three steps and two saves; the warnings, and what is held then."""
    engines = []

    def work() -> None:
        engine = build_engine(run)
        for step in (1, 2, 3):
            train_step(engine, run, step)
        engine.save_checkpoint(folder, tag="before")
        engine.save_checkpoint(folder, tag="step")
        engines.append(engine)

    warned = warnings_of(work)
    return warned, held(engines[0])


def load(run: Run, folder: str) -> tuple[dict[str, torch.Tensor], Any]:
    """On a rank: what is held after a load, and its report."""
    engine = build_engine(run)
    engine.load_checkpoint(folder)
    return held(engine), getattr(engine, "universal_checkpoint_report", None)


def ucp(*args: object) -> tuple[int, str]:
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    return result.exit_code, result.output


def of_bias(stage_states: dict[str, torch.Tensor], vocabulary: int = 48) -> dict[str, torch.Tensor]:
    """The first parameters of each stage's buffer are the tied module's: its weight, then its bias."""
    return {key: value.flatten()[vocabulary * 8 : vocabulary * 9] for key, value in stage_states.items()}


@pytest.mark.parametrize("stock", [False, True], ids=["manifest", "stock"])
def test_what_one_stage_trained_is_taken(stock: bool, ranks: Ranks, tmp_path: Path) -> None:
    run = replace(PIPELINE, universal=None) if stock else PIPELINE
    saved = ranks(2).run(train_and_save, run, str(tmp_path / "a"))
    bias = of_bias(saved[1][1])
    assert all(bool(value.any()) for value in bias.values())
    assert not of_bias(saved[0][1])["0 exp_avg"].any()
    manifest = tmp_path / "a" / "step" / MANIFEST_NAME
    assert stock or json.loads(manifest.read_text())["differing_copies"] == [BIAS]
    told = [line for line in saved[0][0] if "pipeline stages hold" in line]
    assert len(told) == (0 if stock else 1) and all(line.endswith(f": {BIAS}") for line in told)

    [(found, report)] = ranks(1).run(load, replace(PIPELINE, pp=1), str(tmp_path / "a"))
    assert {key: torch.equal(value, bias[key]) for key, value in of_bias(found).items()} == dict.fromkeys(bias, True)
    assert len(report.copies) == 1 and report.copies[0].endswith(
        "read is that of stage 1, which alone has states that aren't zero"
    )

    # On the topology that saved it each stage gets its own.
    for (_, expected), (mine, report) in zip(
        saved, ranks(2).run(load, replace(PIPELINE, universal=ALWAYS), str(tmp_path / "a")), strict=True
    ):
        assert all(torch.equal(mine[key], value) for key, value in expected.items()) and report.copies == ()

    assert ucp("convert", tmp_path / "a", tmp_path / "u", "--quiet")[0] == 0
    assert differences(tmp_path / "a" / "step", tmp_path / "u" / "step") == []
    saving = {"save": str(tmp_path / "b"), "save_tag": "step", "save_first": True}
    ranks(1).run(train, replace(PIPELINE, pp=1), 0, load=str(tmp_path / "u"), **saving)
    assert differences(tmp_path / "a" / "step", tmp_path / "b" / "step") == []


@pytest.mark.parametrize("way", ["first", "last"])
def test_what_several_stages_trained_in_different_ways(way: str, ranks: Ranks, tmp_path: Path) -> None:
    """Saved with a warning; on the same topology it goes on; on another it is refused, or the named copy is taken."""
    saved = ranks(2).run(train_and_save, DRIFTING, str(tmp_path / "a"))
    told = [line for line in saved[0][0] if "pipeline stages hold" in line]
    assert len(told) == 1 and WEIGHT in told[0] and BIAS in told[0]
    target = replace(DRIFTING, pp=1)
    with pytest.raises(RankError) as caught:
        ranks(1).run(load, target, str(tmp_path / "a"))
    assert isinstance(caught.value.original, MismatchError)
    message = str(caught.value.original)
    assert (
        f"{WEIGHT}: the copies of pipeline stages 0 and 1 differ in fp32, numbers; trained on stages 0 and 1" in message
    )
    assert '"on_differing": "first" or "last"' in message
    assert ucp("convert", tmp_path / "a", tmp_path / "u")[0] == 2
    chosen = replace(target, universal={"enabled": True, "on_differing": way})
    [(found, report)] = ranks(1).run(load, chosen, str(tmp_path / "a"))
    assert len(report.copies) == 2
    expected = saved[0 if way == "first" else 1][1]
    for key in ("0 fp32", "0 exp_avg"):
        assert torch.equal(found[key].flatten()[: 48 * 8], expected[key].flatten()[: 48 * 8])
    for (_, expected), (mine, _) in zip(
        saved, ranks(2).run(load, replace(DRIFTING, universal=ALWAYS), str(tmp_path / "a")), strict=True
    ):
        assert all(torch.equal(mine[key], value) for key, value in expected.items())
    assert ucp("convert", tmp_path / "a", tmp_path / "u", "--on-differing", way, "--quiet")[0] == 0
    code, output = ucp("diff", tmp_path / "a" / "step", tmp_path / "u" / "step")
    assert code == 1 and "pipeline stages 0 and 1" in output
    assert differences(tmp_path / "a" / "step", tmp_path / "a" / "before") == []


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_without_zero(precision: Any, ranks: Ranks, tmp_path: Path) -> None:
    """In fp32 DeepSpeed writes weights alone, and of the first stage: what the last one trained is in no file, which is told."""
    run = replace(PIPELINE, zero={"stage": 0}, precision=precision)
    ranks(2).run(train, run, 2, save=str(tmp_path / "a"), save_tag="step")
    target, saving = replace(run, pp=1), {"save": str(tmp_path / "b"), "save_tag": "step", "save_first": True}
    if precision == "bf16":
        [outcome] = ranks(1).run(train, target, 0, load=str(tmp_path / "a"), **saving)
        assert "read is that of stage 1" in outcome.report.copies[0]
        assert differences(tmp_path / "a" / "step", tmp_path / "b" / "step") == []
        return
    with pytest.raises(RankError, match="the weights are in the files for stage 0 alone"):
        ranks(1).run(train, target, 0, load=str(tmp_path / "a"))
    for way in ("first", "last"):
        chosen = replace(target, universal={"enabled": True, "on_differing": way})
        [outcome] = ranks(1).run(train, chosen, 3, load=str(tmp_path / "a"))
        assert list(outcome.losses) == [3] and f"on_differing {way!r}" in outcome.report.copies[0]
    for mode, told in (("auto", None), ("always", "the weights are in the files for stage 0 alone, and read for all")):
        same = replace(run, universal={"enabled": True, "load": mode})
        outcome = ranks(2).run(train, same, 3, load=str(tmp_path / "a"))[0]
        assert list(outcome.losses) == [3] and (told is None or outcome.report.copies[0].endswith(told))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_sums_of_parts_add_up(dtype: torch.dtype) -> None:
    values = (torch.randn(100, generator=torch.Generator().manual_seed(1)) * 4).to(dtype)
    whole = sum_of_bits(values, 0)
    assert (sum_of_bits(values[:37], 0) + sum_of_bits(values[37:], 37)) % (1 << 64) == whole
    seen = dict.fromkeys(
        sum_of_bits(torch.cat((values[:place], (values[place] == 0).to(dtype)[None], values[place + 1 :])), 0)
        for place in range(100)
    )
    assert len(seen) == 100 and whole not in seen
    assert sum_of_bits(values.roll(1), 0) != whole
