"""``ucp convert --to deepspeed``: stock engines of the topology resume the files, without this package, as their own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import fsdp_runs
import pytest
import torch
from checkpoints import LAST_STEP, STEP, differences

from ucp_deepspeed.cli import main
from ucp_deepspeed.testing import runs
from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import RankPool, get_pool, reset_parallel_state
from ucp_deepspeed.testing.runs import Outcome, Run, train

Ranks = Callable[[int], RankPool]

PLAIN = Run("mlp", {"remembers": True}, zero={"stage": 1}, precision="bf16", groups="decay", frozen=("norm.bias",))
"""Two groups, a frozen parameter, a buffer."""


def converted(source: Path, folder: Path, *options: str) -> Path:
    """Run the command; return the folder."""
    with pytest.raises(SystemExit) as left:
        main(["convert", str(source), str(folder), "--to", "deepspeed", *options, "--quiet"])
    assert left.value.code == 0
    return folder


def files_of(folder: Path) -> dict[str, Any]:
    """The content of DeepSpeed's files in the newest tag's folder, read by torch with DeepSpeed's classes."""
    tag = folder / (folder / "latest").read_text()
    return {path.name: torch.load(path, map_location="cpu", weights_only=False) for path in sorted(tag.glob("*.pt"))}


def unlike(found: Any, expected: Any, place: str = "") -> Iterator[str]:
    """Yield the places at which two values aren't the same, tensors bit by bit."""
    if type(found) is not type(expected):
        yield f"{place}: {type(found)} for {type(expected)}"
    elif isinstance(found, torch.Tensor):
        same = (found.dtype, found.shape) == (expected.dtype, expected.shape)
        if not (
            same
            and torch.equal(
                found.contiguous().view(-1).view(torch.uint8), expected.contiguous().view(-1).view(torch.uint8)
            )
        ):
            yield f"{place}: {found} for {expected}"
    elif isinstance(found, Mapping):
        if found.keys() != expected.keys():
            yield f"{place}: keys {found.keys() ^ expected.keys()} on one side"
        for key in found.keys() & expected.keys() - {"ds_config"}:
            yield from unlike(found[key], expected[key], f"{place}/{key}")
    elif isinstance(found, (list, tuple)):
        if len(found) != len(expected):
            yield f"{place}: {len(found)} for {len(expected)}"
        for number, pair in enumerate(zip(found, expected, strict=False)):
            yield from unlike(*pair, f"{place}/{number}")
    elif type(found).__module__.startswith("deepspeed") and hasattr(found, "__dict__") and not isinstance(found, int):
        yield from unlike(vars(found), vars(expected), place)
    elif found != expected:
        yield f"{place}: {found!r} for {expected!r}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Returns the checkpoint of a run on two ranks, made once."""
    made: dict[str, Path] = {}

    def of(run: Run, ranks: int = 2) -> Path:
        if (key := repr((run, ranks))) not in made:
            folder = made[key] = tmp_path_factory.mktemp("source")
            get_pool(ranks).run(train, run, STEP, save=str(folder), client_state={"epoch": 7})
        return made[key]

    return of


def go_on(folder: str, stage: int, universal: Mapping[str, Any] | None) -> tuple[list[torch.Tensor], Any]:
    """On a rank: resume with a client optimizer and scheduler, take a step; the weights, and where the run stands."""
    reset_parallel_state()
    model = build_mlp(vocabulary=runs.VOCABULARY, seed=4, dtype=torch.bfloat16)
    optimizer = fsdp_runs.optimizer_of(model)
    config = (
        MIXED
        | {"zero_optimization": {"stage": stage}}
        | ({} if universal is None else {"universal_checkpoint": universal})
    )
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=optimizer, lr_scheduler=fsdp_runs.schedule_of(optimizer), config=config
    )
    assert engine.load_checkpoint(folder)[0] is not None
    batch = fsdp_runs.batch_of(Run(), 5)
    engine.backward(engine(batch[:, :-1], batch[:, 1:]))
    engine.step()
    weights = [parameter.detach().clone() for parameter in engine.module.parameters()]
    stands = (
        engine.global_steps,
        [group["lr"] for group in engine.optimizer.param_groups],
        engine.lr_scheduler.last_epoch,
    )
    engine.destroy()
    return weights, stands


MIXED = {"train_micro_batch_size_per_gpu": 8, "zero_allow_untested_optimizer": True, "bf16": {"enabled": True}}


def test_a_run_of_fsdp_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    """Its folder tells no config: the engine's says that the weights are in bf16."""
    ranks(2).run(fsdp_runs.save, str(tmp_path / "dcp"), "nested")
    (tmp_path / "config.json").write_text(json.dumps(MIXED | {"zero_optimization": {"stage": 2}}))
    options = ("--dp", "2", "--zero", "2", "--config", str(tmp_path / "config.json"))
    written = converted(tmp_path / "dcp", tmp_path / "written", *options)
    assert differences(tmp_path / "dcp", written) == []
    stock = ranks(2).run(go_on, str(written), 2, None)
    hooked = ranks(2).run(go_on, str(tmp_path / "dcp"), 2, {"enabled": True})
    for (found, place), (expected, wanted) in zip(stock, hooked, strict=True):
        assert place == wanted and place[0] == fsdp_runs.STEPS + 1
        assert all(map(torch.equal, found, expected))


def drop_mappings(*of_files: dict[str, Any]) -> None:
    """Leave out where DeepSpeed thinks that parameters lie."""
    for held in (each for files in of_files for each in files.values() if "optimizer_state_dict" in each):
        del held["optimizer_state_dict"]["param_slice_mappings"]


def check(
    saved: Path, written: Path, target: Run, ranks: int, again: Path, spec: str | None = None, universal: Any = None
) -> None:
    """Check that a stock engine resumes what was written: it holds the source's state, saves the same files again, and goes on
    as an engine that the hook resumed from the source."""
    assert differences(saved, written, spec) == []
    stock = replace(target, universal=None)
    resumed: list[Outcome] = get_pool(ranks).run(
        train, stock, LAST_STEP, load=str(written), save=str(again), save_first=True, client_state={"epoch": 7}
    )
    assert all(each.report is None and each.load_path is not None for each in resumed)
    assert resumed[0].client_state["epoch"] == 7
    found, expected = files_of(written), files_of(again)
    assert found.keys() == expected.keys()
    for file in expected.values():  # layouts that AutoTP records
        file.pop("universal_checkpoint_info", None)
    if target.zero.get("round_robin_gradients"):  # DeepSpeed's are of another order
        drop_mappings(found, expected)
    assert list(unlike(found, expected)) == []
    if target.zero["stage"] and not universal:  # its files tell neither names without ZeRO, nor rows of padding
        assert differences(saved, again, spec) == []
    hooked = replace(target, universal=universal or {"enabled": True, "load": "always"})
    straight = get_pool(ranks).run(train, hooked, LAST_STEP, load=str(saved))
    assert [each.losses for each in resumed] == [each.losses for each in straight]
    assert resumed[0].counters == straight[0].counters and resumed[0].rates == straight[0].rates


FP16 = Run("mlp", zero={"stage": 2}, precision="fp16", groups="shuffled")
FP32 = Run("mlp", zero={"stage": 3}, groups="decay", frozen=("norm.bias",))
FUSED = Run("mlp", zero={"stage": 0}, precision="bf16", fused=True, groups="decay")
SGD = Run("mlp", zero={"stage": 3}, precision="bf16", optimizer=("SGD", {"lr": 0.1, "momentum": 0.9}))
ACCUMULATED = {"data_types": {"grad_accum_dtype": "fp32"}}

CASES: dict[str, tuple[Run, int, dict[str, Any]]] = {
    "zero-1 to zero-2": (PLAIN, 2, {"zero": {"stage": 2}}),
    "zero-1 to zero-2 on one rank": (PLAIN, 1, {"zero": {"stage": 2}}),
    "zero-1 to zero-2 in another order": (
        PLAIN,
        2,
        {"zero": {"stage": 2, "round_robin_gradients": True, "parameter_alignment": True}},
    ),
    "out of another order": (
        replace(PLAIN, zero={"stage": 2, "round_robin_gradients": True}),
        2,
        {"zero": {"stage": 1}},
    ),
    "tied to zero-3": (Run("huggingface", {"family": "qwen2_tied"}), 2, {"zero": {"stage": 3}}),
    "zero-1 to zero-3 with sub-groups": (PLAIN, 2, {"zero": {"stage": 3, "sub_group_size": 700}}),
    "zero-1 to unfused": (PLAIN, 2, {"zero": {"stage": 0}}),
    "zero-1 to BF16_Optimizer": (PLAIN, 2, {"config": ACCUMULATED}),
    "fp16 zero-2 to zero-1": (FP16, 1, {"zero": {"stage": 1}}),
    "fp16 zero-2 to zero-3": (FP16, 2, {"zero": {"stage": 3}}),
    "fp32 zero-3 to plain": (FP32, 2, {"zero": {"stage": 0}}),
    "fp32 zero-3 to zero-1": (FP32, 1, {"zero": {"stage": 1}}),
    "fused to fused": (FUSED, 1, {}),
    "fused to zero-1": (FUSED, 2, {"zero": {"stage": 1}}),
    "SGD zero-3 to zero-2": (SGD, 1, {"zero": {"stage": 2}}),
}


@pytest.mark.parametrize("case", CASES)
def test_a_stock_engine_resumes(case: str, source: Callable[..., Path], tmp_path: Path) -> None:
    run, ranks, changes = CASES[case]
    target = replace(run, seed=3, **changes)
    saved, options = source(run), ["--dp", str(ranks), "--zero", str(target.zero["stage"])]
    if target.config or len(target.zero) > 1 or len(run.zero) > 1:
        config = runs._config(replace(target, universal=None))
        (tmp_path / "config.json").write_text(json.dumps(config))
        options += ["--config", str(tmp_path / "config.json")]
    written = converted(saved, tmp_path / "written", *options)
    check(saved, written, target, ranks, tmp_path / "again")


OPT = Run("huggingface", {"family": "opt"}, tp=2)
LLAMA = Run("llama", tp=2, precision="bf16")

CUT_CASES: dict[str, tuple[Run, Run, int, tuple[str, ...]]] = {
    "AutoTP on 2 to 1": (OPT, replace(OPT, tp=1, zero={"stage": 2}), 2, ()),
    "1 to AutoTP on 2": (replace(OPT, tp=1), replace(OPT, zero={"stage": 2}), 2, ("--spec", "hf_opt")),
    "Megatron-Core on 2 to 1": (LLAMA, replace(LLAMA, tp=1, zero={"stage": 3}), 2, ()),
    "Megatron-Core on 1 to 2": (
        replace(LLAMA, tp=1),
        replace(LLAMA, zero={"stage": 1}),
        2,
        ("--spec", "megatron_core_llama"),
    ),
}


PIPELINE = Run("gpt", pp=2, partition="uniform", precision="bf16")
UNTIED = Run("llama", pp=1, partition="uniform")

CUT_CASES |= {
    "tied pipeline of 2 to 1": (PIPELINE, replace(PIPELINE, pp=1), 2, ()),
    "pipeline of 1 to 2": (UNTIED, replace(UNTIED, pp=2, zero={"stage": 0}), 2, ("--layers", "3,3")),
}

PADDED = {"enabled": True, "load": "always", "vocabulary_size": 50}
VOCABULARY = Run("llama", {"vocabulary": 50, "vocabulary_multiple": 16, "layers": 1}, tp=2, universal=PADDED)


@pytest.mark.parametrize("tp", [1, 2])
def test_rows_of_padding_are_kept(tp: int, source: Callable[..., Path], tmp_path: Path) -> None:
    """Megatron-Core's softmax counts their logits: 14 rows more than the vocabulary has."""
    saved, target = source(VOCABULARY), replace(VOCABULARY, tp=tp, zero={"stage": 2}, seed=3)
    written = converted(saved, tmp_path / "written", "--tp", str(tp), "--dp", str(2 // tp), "--zero", "2")
    check(saved, written, target, 2, tmp_path / "again", None if tp == 1 else "megatron_core_llama", PADDED)


@pytest.mark.parametrize("case", CUT_CASES)
def test_under_model_parallelism(case: str, source: Callable[..., Path], tmp_path: Path) -> None:
    run, target, ranks, options = CUT_CASES[case]
    pp = target.pp or 1
    sizes = ["--tp", str(target.tp), "--pp", str(pp), "--dp", str(ranks // target.tp // pp)]
    sizes += ["--zero", str(target.zero["stage"])]
    saved = source(run)
    written = converted(saved, tmp_path / "written", *sizes, *options)
    check(
        saved, written, replace(target, seed=3), ranks, tmp_path / "again", options[1] if "--spec" in options else None
    )


@pytest.mark.parametrize(("stage", "ep"), [(2, 1), (1, 2)])
def test_experts(stage: int, ep: int, source: Callable[..., Path], tmp_path: Path) -> None:
    """DeepSpeed's own layers, on as many expert-parallel ranks as before, and on fewer."""
    run = Run("moe", {"ep": (2, 2)}, zero={"stage": 1}, precision="bf16", groups="decay")
    saved, sizes = source(run), ("--dp", "2", "--ep", str(ep), "--zero", str(stage))
    written = converted(saved, tmp_path / "written", *sizes)
    check(saved, written, replace(run, size={"ep": (ep, ep)}, zero={"stage": stage}, seed=3), 2, tmp_path / "again")


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        (("--ep", "3"), "--ep 3 doesn't divide"),
        (("--ep", "2", "--zero", "0"), "written in DeepSpeed's own files for ZeRO-1 and 2 alone"),
    ],
)
def test_experts_that_are_refused(
    sizes: tuple[str, ...], told: str, source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved = source(Run("moe", {"ep": (2, 2)}, zero={"stage": 1}, precision="bf16", groups="decay"))
    with pytest.raises(SystemExit) as left:
        main(["convert", str(saved), str(tmp_path / "out"), "--to", "deepspeed", "--dp", "2", "--zero", "1", *sizes])
    assert left.value.code == 2 and told in capsys.readouterr().err


def test_experts_in_a_group_with_others(
    source: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without ZeRO they may be; with it the stock engine has groups of their own."""
    saved = source(Run("moe", {"ep": (1, 1)}, zero={"stage": 0}, optimizer=("AdamW", {"lr": 1e-3})), 1)
    for options, told in (
        (("deepspeed", "--dp", "2", "--zero", "1"), "experts and other parameters in one group"),
        (("deepspeed-universal",), "parameter group 0 has experts and others"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["convert", str(saved), str(tmp_path / "out"), "--to", *options])
        assert left.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("form", ["universal", "dcp"])
def test_from_other_forms(form: str, source: Callable[..., Path], tmp_path: Path) -> None:
    """The config, the order of the groups and the numbers' types lie in them too."""
    saved = source(PLAIN)
    assert main(["convert", str(saved), str(tmp_path / form), "--to", form, "--quiet"], standalone_mode=False) in (
        None,
        0,
    )
    written = converted(tmp_path / form, tmp_path / "written", "--dp", "2", "--zero", "2")
    check(saved, written, replace(PLAIN, zero={"stage": 2}, seed=3), 2, tmp_path / "again")
