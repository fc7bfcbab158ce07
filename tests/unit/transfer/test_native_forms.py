"""DeepSpeed's own files of many topologies, against files that the oracle writes by brute force; and what isn't written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
from native_files import Cut, NativeModel, NativeParameter, NativeRun, write_native
from spec_models import model_of

Ucp = Callable[..., Result]

KEPT_APART = {"ds_config", "param_slice_mappings", "step", "cur_iter", "checkpoint_parallel_dimensions"}
"""Keys whose values the oracle doesn't have as the source's run, or has in DeepSpeed's wrong order."""

SOURCE = NativeRun(dp=2, stage=1, precision="bf16")

TARGETS = [
    NativeRun(dp=1, stage=1, precision="bf16"),
    NativeRun(dp=5, stage=1, precision="bf16"),
    NativeRun(dp=3, stage=2, precision="bf16"),
    NativeRun(dp=4, stage=2, precision="bf16", round_robin=True, parameter_alignment=True),
    NativeRun(dp=3, stage=3, precision="bf16"),
    NativeRun(dp=2, stage=3, precision="bf16", sub_group_size=40),
    NativeRun(dp=2, stage=0, precision="bf16"),
    NativeRun(dp=3, stage=1, precision="bf16", optimizer="bf16"),
    NativeRun(tp=2, dp=2, stage=0, precision="bf16"),
    NativeRun(tp=2, dp=3, stage=1, precision="bf16"),
    NativeRun(tp=2, dp=4, stage=2, precision="bf16"),
    NativeRun(tp=2, dp=2, stage=3, precision="bf16"),
]


def unlike(found: Any, expected: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which two values aren't the same; where the oracle has padding there must be zeros."""
    if isinstance(expected, torch.Tensor) and isinstance(found, torch.Tensor):
        same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if not same or not torch.equal(found, torch.where(expected.isnan(), 0.0, expected).to(expected.dtype)):
            yield f"{place}: {found} for {expected}"
    elif isinstance(expected, Mapping):
        yield from (f"{place}: {key!r} is on one side" for key in found.keys() ^ expected.keys())
        for key in found.keys() & expected.keys() - KEPT_APART:
            yield from unlike(found[key], expected[key], f"{place}/{key}")
    elif isinstance(expected, (list, tuple)):
        yield from [f"{place}: {len(found)} for {len(expected)}"] if len(found) != len(expected) else []
        for number, pair in enumerate(zip(found, expected, strict=False)):
            yield from unlike(*pair, f"{place}/{number}")
    elif type(expected).__module__ == "deepspeed.runtime.fp16.loss_scaler":
        yield from unlike(vars(found), vars(expected), place)
    elif type(found) is not type(expected) or found != expected:
        yield f"{place}: {found!r} for {expected!r}"


def contents(folder: Path) -> dict[str, Any]:
    return {path.name: torch.load(path, weights_only=False) for path in sorted(folder.glob("*.pt"))}


def config_of(run: NativeRun) -> dict[str, Any]:
    """The config of the engine that a run of the oracle describes."""
    zero = {"stage": run.stage, "round_robin_gradients": run.round_robin, "sub_group_size": run.sub_group_size}
    config: dict[str, Any] = {"zero_optimization": zero | {"parameter_alignment": run.parameter_alignment}}
    config |= {"gradient_clipping": 1.0, "data_types": {"grad_accum_dtype": "fp32" if run.kind == "bf16" else None}}
    return config | ({run.precision: {"enabled": True}} if run.precision != "fp32" else {})


def check(
    source: Path, model: NativeModel, run: NativeRun, folder: Path, ucp: Ucp, more: tuple[str, ...], *options: object
) -> None:
    (folder / "config.json").write_text(json.dumps(config_of(run)))
    sizes = (
        *more,
        "--tp",
        run.tp,
        "--pp",
        run.pp or 1,
        "--dp",
        run.dp,
        "--zero",
        run.stage,
        "--config",
        folder / "config.json",
    )
    result = ucp("convert", source, folder / "out", "--to", "deepspeed", *sizes, *options)
    assert result.exit_code == 0, result.stderr
    expected = write_native(folder / "expected", model, replace(run, steps=SOURCE.steps))
    found = contents(folder / "out" / expected.name)
    for file in found.values():
        file.pop("global_samples", None)
    oracle = contents(expected)
    for file in oracle.values():
        file.pop("global_samples", None)
    assert found.keys() == oracle.keys()
    assert list(unlike(found, oracle)) == []
    assert ucp("diff", source, folder / "out", *options).exit_code == 0
    assert ucp("verify", folder / "out").exit_code in (0, 2)


@pytest.mark.parametrize("run", TARGETS, ids=str)
def test_the_files_are_those_of_an_engine(run: NativeRun, right: Path, tmp_path: Path, ucp: Ucp) -> None:
    source = write_native(tmp_path / "source", model_of(), SOURCE)
    check(source, model_of(), run, tmp_path, ucp, (), "--spec", right)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--to", "deepspeed", "--dp", 2), "--to deepspeed needs the sizes of the engine that is to load: at least --dp and"),
        (("--to", "dcp", "--dp", 2), "are for --to deepspeed; the form dcp has no topology"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 2, "--config", "{}/other.json"), "the config has ZeRO stage 3, and --zero 2"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 3, "--config", "{}/nvme.json"), "an engine that offloads to NVMe keeps its"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 3, "--config", "{}/latest"), "latest isn't JSON"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 1, "--config", "{}/fp16.json"), "has no loss scale, with which fp16 resumes"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 1, "--config", "{}/auto.json"), "fills in when it starts; write true or"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 1, "--layers", "2,3"), "is of no pipeline, and its files have no stages"),
        (("--to", "deepspeed", "--dp", 2, "--zero", 1, "--tp", 2), "name a spec"),
    ],
    ids=str,
)  # fmt: skip
def test_what_is_refused(options: tuple[Any, ...], told: str, tmp_path: Path, ucp: Ucp) -> None:
    """Nothing is written, and the message says what to do."""
    source = write_native(tmp_path / "source", model_of(), SOURCE)
    offload = {"stage": 3, "offload_param": {"device": "nvme"}}
    (source.parent / "other.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    (source.parent / "nvme.json").write_text(json.dumps({"zero_optimization": offload}))
    (source.parent / "fp16.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": True}}))
    (source.parent / "auto.json").write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": "auto"}})
    )
    result = ucp("convert", source, tmp_path / "out", *(str(each).format(source.parent) for each in options))
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert told in result.stderr


def test_a_config_that_leaves_numbers_open(tmp_path: Path, ucp: Ucp) -> None:
    """The engine keeps its own clipping then; DeepSpeed takes sub-groups of no size for those of one parameter each."""
    source = write_native(tmp_path / "source", model_of(), SOURCE)
    for size, stage in (("auto", 1), (0, 3)):
        zero, config = {"stage": stage, "sub_group_size": size}, tmp_path / f"{size}.json"
        config.write_text(
            json.dumps({"bf16": {"enabled": True}, "gradient_clipping": "auto", "zero_optimization": zero})
        )
        made = tmp_path / f"made{stage}"
        options = ("--to", "deepspeed", "--dp", 2, "--zero", stage, "--config", config)
        assert ucp("convert", source, made, *options).exit_code == 0
        assert ucp("diff", source, made).stdout.startswith("equal: ")
        held = contents(made / (made / "latest").read_text())
        assert not any("clip_grad" in each["optimizer_state_dict"] for name, each in held.items() if "optim" in name)


def pipeline() -> NativeModel:
    """Five layers; the third is a function, the last uses the first's weight."""
    generator = torch.Generator().manual_seed(7)
    shapes = {
        "tied_modules.embed.weight": (10, 4),
        "1.up.weight": (8, 4),
        "1.up.bias": (8,),
        "3.down.weight": (4, 8),
        "4.norm": (4,),
    }
    cuts: dict[str, Cut] = {"1.up.weight": "rows", "1.up.bias": "rows", "3.down.weight": "columns"}
    held = []
    for name, shape in shapes.items():
        states = {key: torch.randn(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        value = torch.randn(shape, generator=generator)
        held.append(NativeParameter(name, value, states, cut=cuts.get(name, "replicated"), frozen=name == "4.norm"))
    return NativeModel(tuple(held), buffers={"3.seen": torch.arange(3)}, layers=5, tied={"embed": (0, 4)})


PIPELINES = [
    (NativeRun(dp=3, pp=2, stage=1), ()),
    (NativeRun(dp=2, pp=1, stage=1), ()),
    (NativeRun(dp=2, pp=3, stage=1, parts=(1, 2, 2)), ("--layers", "1,2,2")),
    (NativeRun(tp=2, dp=2, pp=2, stage=0), ()),
]


@pytest.mark.parametrize(("run", "options"), PIPELINES, ids=str)
def test_pipelines(run: NativeRun, options: tuple[str, ...], tmp_path: Path, ucp: Ucp) -> None:
    source = NativeRun(dp=2, pp=2, stage=1)
    folder = write_native(tmp_path / "source", pipeline(), source)
    (tmp_path / "spec.yaml").write_text(
        "family: mine\nrules:\n"
        "  - {match: ['1.up.*'], pattern: shard, dim: 0}\n"
        "  - {match: ['3.down.weight'], pattern: shard, dim: 1}\n"
        "  - {match: ['tied_modules.**', '4.norm'], pattern: replicate}\n"
    )
    check(folder, pipeline(), run, tmp_path, ucp, options, "--spec", tmp_path / "spec.yaml")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--pp", 3, "--zero", 1), "has 2 stages, and --pp 3: say how many layers each has"),
        (("--pp", 3, "--zero", 1, "--layers", "2,3"), "--layers gives 2 stages, and --pp 3"),
        (("--pp", 2, "--zero", 2), "DeepSpeed refuses ZeRO-2 with pipeline parallelism; take --zero 0 or 1"),
        (("--pp", 2, "--zero", 1, "--layers", "2,x"), "isn't a list of numbers from 1 on, such as 3,4"),
    ],
    ids=str,
)
def test_pipelines_that_are_refused(options: tuple[Any, ...], told: str, tmp_path: Path, ucp: Ucp) -> None:
    source = write_native(tmp_path / "source", pipeline(), NativeRun(dp=2, pp=2, stage=1))
    result = ucp("convert", source, tmp_path / "out", "--to", "deepspeed", "--dp", 2, *options)
    assert (result.exit_code, (tmp_path / "out").exists()) == (2, False)
    assert told in result.stderr


def test_a_plain_model_becomes_no_pipeline(tmp_path: Path, ucp: Ucp) -> None:
    """Nor a pipeline another one, unless DeepSpeed's own files tell its layers."""
    plain = write_native(tmp_path / "plain", model_of(), SOURCE)
    layered = write_native(tmp_path / "layered", pipeline(), NativeRun(dp=2, pp=2, stage=1))
    assert ucp("convert", layered, tmp_path / "u").exit_code == 0
    for source, pp in ((plain, 2), (tmp_path / "u", 2), (tmp_path / "u", 1)):
        sizes = ("--pp", pp, "--dp", 2, "--zero", 1)
        result = ucp("convert", source, tmp_path / "out", "--to", "deepspeed", *sizes)
        assert (
            result.exit_code == 2 and "doesn't tell the layers of a pipeline, of which each has a file" in result.stderr
        )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeeds_own_script_finds_the_masters(stage: int, tmp_path: Path, ucp: Ucp) -> None:
    source = write_native(tmp_path / "source", model_of(), SOURCE)
    assert ucp("convert", source, tmp_path / "out", "--to", "deepspeed", "--dp", 3, "--zero", stage).exit_code == 0
    found = get_fp32_state_dict_from_zero_checkpoint(str(tmp_path / "out"))
    expected = {parameter.name: parameter.fp32 for parameter in model_of().parameters}
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)
