"""``ucp plan``."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import click
import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed.cli import main

Ucp = Callable[..., Result]

KEYS = "path form source target possible reasons remarks restored initialised dropped reset total ranks"
RANK_KEYS = "model_parallel_rank data_parallel_rank bytes_read bytes_held bytes_of_weights copies files"


def cells(result: Result, place: int) -> list[str]:
    """The table's row at a position: 0 is the heading."""
    lines = result.stdout.splitlines()
    heading = next(number for number, line in enumerate(lines) if line.startswith("mp rank"))
    return lines[heading + place].split()


def test_options() -> None:
    options = {opt for param in main.commands["plan"].params if isinstance(param, click.Option) for opt in param.opts}
    topology = {"--tp", "--pp", "--dp", "--zero", "--ep"}
    changes = {"--model", "--on-missing", "--on-extra", "--on-differing", "--optimizer-states", "--hyperparameters"}
    assert options == {*topology, *changes, "--scheduler", "--tag", "--spec", "--vocabulary-size", "--json", "--plot"}


def test_the_keys_of_the_object(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    result = ucp("plan", sharded, "--dp", 2, "--zero", 1, "--spec", spec_file, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    report = json.loads(result.stdout)
    assert list(report) == KEYS.split()
    assert report["path"] == str(sharded) and report["form"] == "deepspeed zero-1/2"
    assert report["source"] == {"tp": 2, "pp": 1, "dp": 1, "zero_stage": 1, "ep": 1}
    assert report["target"] == {"tp": 1, "pp": 1, "dp": 2, "zero_stage": 1, "ep": 1}
    assert (report["possible"], report["reasons"], report["remarks"]) == (True, [], [])
    assert report["restored"] == ["block.rows", "block.same"]
    assert [list(rank) for rank in report["ranks"]] == [RANK_KEYS.split()] * 2
    # 48 and 5 elements, padded to 56; two states; both of the source's ranks hold a half of the rows
    first, second = report["ranks"]
    assert (first["bytes_read"], first["bytes_held"]) == (2 * 4 * 28, 2 * 4 * 28)
    assert (second["bytes_read"], second["bytes_held"]) == (2 * 4 * 25, 2 * 4 * 28)
    assert first["files"] == [f"zero_pp_rank_0_mp_rank_0{rank}_optim_states.pt" for rank in (0, 1)]
    assert report["total"] == {
        "bytes_read": 2 * 4 * 53,
        "bytes_held": 2 * 4 * 56,
        "bytes_of_weights": 2 * 4 * 53,
        "copies": first["copies"] + second["copies"],
        "files": 2,
    }


@pytest.fixture
def changed(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint, and one of the model that has taken its place: a head less, a row more, a layer more, one layer unfrozen."""
    generator = torch.Generator().manual_seed(3)

    def saved(name: str, shapes: dict[str, tuple[int, ...]], frozen: str) -> Path:
        parameters = tuple(
            NativeParameter(
                key,
                torch.randn(shape, generator=generator),
                {} if key == frozen else {"exp_avg": torch.zeros(shape), "exp_avg_sq": torch.zeros(shape)},
                frozen=key == frozen,
            )
            for key, shape in shapes.items()
        )
        return write_native(tmp_path / name, NativeModel(parameters), NativeRun(stage=1))

    old = {"rows": (6, 4), "head": (3, 4), "late": (5,)}
    return saved("old", old, "late"), saved("new", {"rows": (7, 4), "late": (5,), "more": (2,)}, "")


def test_a_model_that_changed(changed: tuple[Path, Path], ucp: Ucp) -> None:
    """Lists what an engine would restore, keep and drop, and every reason for which it would refuse."""
    source, model = changed
    plan = ("plan", source, "--dp", 2, "--zero", 3, "--model", model, "--json")
    refused = ucp(*plan)
    reasons = {entry["parameter"]: entry["reason"] for entry in json.loads(refused.stdout)["reasons"]}
    assert refused.exit_code == 1 and reasons.keys() == {"rows", "head", "late", "more"}
    assert reasons["rows"] == (
        'expected logical shape (7, 4), found (6, 4) in the checkpoint; "on_missing": "init" lets further rows keep the model\'s '
        "values"
    )
    assert reasons["more"].startswith("missing") and reasons["head"].startswith("extra")
    assert '"on_missing": "init"' in reasons["late"]
    allowed = json.loads(ucp(*plan, "--on-missing", "init", "--on-extra", "drop").stdout)
    assert allowed["possible"] and allowed["restored"] == ["rows", "late"] and allowed["dropped"] == ["head"]
    assert allowed["initialised"] == ["more", "late", "rows"] and not allowed["reset"]
    assert allowed["total"]["bytes_read"] == 4 * (3 * 6 * 4 + 5)
    policies = ("--on-missing", "init", "--on-extra", "drop", "--optimizer-states", "reset")
    reset = json.loads(ucp(*plan, *policies).stdout)
    assert reset["reset"] and reset["total"]["bytes_read"] == 4 * (6 * 4 + 5)
    shown = ucp(*plan[:-1], *policies).stdout
    for line in ("2 parameters and buffers, with all optimizer states reset", "more, rows", "dropped   head"):
        assert line in shown


def test_a_model_with_a_scheduler_and_no_saved_schedule(tmp_path: Path, ucp: Ucp) -> None:
    """A load refuses it too."""
    parameter = NativeParameter("a", torch.ones(4), {"exp_avg": torch.ones(4)})
    source, model = (
        write_native(
            tmp_path / name, NativeModel((parameter,)), NativeRun(stage=1), client_state={"lr_scheduler": state}
        )
        for name, state in (("old", None), ("new", {"last_epoch": 0}))
    )
    plan = ("plan", source, "--dp", 2, "--zero", 1)
    refused = ucp(*plan, "--model", model)
    assert refused.exit_code == 1 and "old/global_step" in refused.stdout
    assert 'let the live one begin anew: "scheduler": "keep" in "universal_checkpoint"' in refused.stdout
    assert ucp(*plan, "--model", model, "--scheduler", "keep").exit_code == 0
    assert ucp(*plan).exit_code == 0


def test_states_that_concern_all_of_a_buffer(tmp_path: Path, ucp: Ucp) -> None:
    """The reason stands once, and counts for each parameter that the buffer holds."""
    paths = []
    for name, state in (("old", "exp_avg"), ("new", "momentum_buffer")):
        parameters = tuple(NativeParameter(key, torch.ones(3, 4), {state: torch.ones(3, 4)}) for key in "abc")
        paths.append(write_native(tmp_path / name, NativeModel(parameters), NativeRun(stage=1)))
    plan = ("plan", paths[0], "--dp", 2, "--zero", 1, "--model", paths[1])
    report = json.loads(ucp(*plan, "--json").stdout)
    assert [reason["parameter"] for reason in report["reasons"]] == ["a", "b", "c"] and not report["restored"]
    shown = " ".join(ucp(*plan).stdout.split())
    assert "impossible, 1 reason (0 parameters and buffers could be restored)" in shown
    assert "a: the optimizer keeps ['exp_avg', 'momentum_buffer', 'step'], the checkpoint holds" in shown
    assert "and so for 2 more in its buffer; go on with" in shown


@pytest.mark.parametrize("kind", ["frozen", "buffer"])
def test_what_the_checkpoint_lacks_and_nobody_trains(kind: str, tmp_path: Path, ucp: Ucp) -> None:
    """It keeps the model's values, in the dtype that the model has."""
    run, weight = NativeRun(stage=1, precision="bf16"), NativeParameter("rows", torch.ones(6, 4))
    source = write_native(tmp_path / "source", NativeModel((weight,)), run)
    more = NativeParameter("more", torch.ones(3), frozen=True)
    model = NativeModel((weight, more)) if kind == "frozen" else NativeModel((weight,), {"more": torch.ones(3)})
    plan = ("plan", source, "--dp", 2, "--zero", 3, "--model", write_native(tmp_path / "model", model, run), "--json")
    assert ucp(*plan).exit_code == 1
    allowed = json.loads(ucp(*plan, "--on-missing", "init").stdout)
    assert allowed["possible"] and allowed["initialised"] == ["more"] and allowed["restored"] == ["rows"]


def test_for_people(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    result = ucp("plan", sharded, "--tp", 2, "--dp", 2, "--zero", 3, "--spec", spec_file)
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert lines[:5] == [
        f"path      {sharded}",
        "source    deepspeed zero-1/2, TP2·DP1 ZeRO-1",
        "target    TP2·DP2 ZeRO-3: possible",
        "restored  2 parameters and buffers",
        "read      464 B by 4 ranks from 2 files",
    ]
    assert lines[5] == "held      480 B of master weights and optimizer states"
    assert lines[6] == "weights   240 B beside these in the module, buffers included"
    assert cells(result, 1) == ["0", "0", "120", "B", "1", "4", "120", "B"]
    assert cells(result, 4) == ["1", "1", "112", "B", "1", "4", "120", "B"]
    assert cells(result, 5) == ["all", "464", "B", "2", "16", "480", "B"]
    assert len(lines) == 13


def test_in_a_narrow_window(sharded: Path, spec_file: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch) -> None:
    """A heading or a size that breaks would make a row of two lines."""
    monkeypatch.setattr("ucp_deepspeed.cli.printing.PLAIN_WIDTH", 60)
    lines = ucp("plan", sharded, "--dp", 20, "--zero", 1, "--spec", spec_file).stdout.splitlines()
    assert lines[7].split() == ["mp", "rank", "dp", "rank", "reads", "files", "copies", "holds"]
    assert len(lines) == 8 + 16 + 2 and all(len(line) <= 60 for line in lines[7:])


def test_of_many_ranks_both_ends(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    args = ("plan", sharded, "--dp", 20, "--zero", 1, "--spec", spec_file)
    result = ucp(*args)
    assert cells(result, 1)[:4] == ["0", "14", "0", "B"] and cells(result, 16)[2:4] == ["32", "B"]
    assert cells(result, 17) == ["…", "4", "more"]
    assert cells(result, 18)[:3] == ["all", "424", "B"]
    assert len(json.loads(ucp(*args, "--json").stdout)["ranks"]) == 20


def test_of_many_ranks_it_shows_how_far_it_is(
    sharded: Path, spec_file: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ucp_deepspeed.tunables.TOLD_SECONDS", 0.0)
    args = ("plan", sharded, "--dp", 20, "--zero", 1, "--spec", spec_file)
    assert re.match(r"ranks planned: 1 of 20 \(5%\), [\d,]+/s, \d:\d\d left\n", ucp(*args).stderr)
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "20/20 ranks planned" in re.sub(r"\x1b\[[\d;?]*\w", "", ucp(*args).stderr)


def test_impossible_by_parameter(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    spec_file.write_text(spec_file.read_text().replace("dim: 0}", "dim: 0, widths: [3, 3]}"))
    args = ("plan", sharded, "--tp", 3, "--pp", 2, "--dp", 1, "--zero", 2, "--spec", spec_file)
    result = ucp(*args)
    assert (result.exit_code, result.stderr) == (1, "")
    lines = result.stdout.splitlines()
    assert lines[2].startswith("target    TP3·PP2·DP1 ZeRO-2: impossible, 3 reasons")
    assert "  DeepSpeed refuses ZeRO-2 with pipeline parallelism; use stage 0 or 1" in lines
    assert "  block.rows: widths (3, 3) don't split 6 over 3 ranks" in lines
    assert any("layers that the names tell" in line and "partition_method" in line for line in lines)

    result = ucp(*args, "--json")
    assert result.exit_code == 1
    report = json.loads(result.stdout)
    assert (report["possible"], report["restored"], report["ranks"]) == (False, ["block.same"], [])
    assert [reason["parameter"] for reason in report["reasons"]] == [None, None, "block.rows"]


def test_impossible_without_layouts(sharded: Path, ucp: Ucp) -> None:
    """On another tensor-parallel size; on the same one each rank goes on with what it has."""
    for tp in (1, 4):
        result = ucp("plan", sharded, "--tp", tp, "--dp", 1, "--zero", 1)
        assert result.exit_code == 1 and "no layout is known for 2 parameters" in result.stdout
        assert "--spec on the command line" in result.stdout
    result = ucp("plan", sharded, "--tp", 2, "--dp", 2, "--zero", 3, "--json")
    report = json.loads(result.stdout)
    assert (result.exit_code, report["possible"], report["restored"]) == (0, True, ["block.rows", "block.same"])
    assert report["remarks"][0].startswith(
        "no layout is known of block.rows, block.same: each rank takes its own, which"
    )
    # 24 and 5 elements on each of two ranks, in two states
    assert report["total"]["bytes_read"] == 2 * 2 * 4 * (24 + 5)


def test_impossible_without_the_size_of_the_vocabulary(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    spec_file.write_text(spec_file.read_text().replace("dim: 0}", "dim: 0, vocabulary: true}"))
    args = ("plan", sharded, "--tp", 4, "--dp", 1, "--zero", 0, "--spec", spec_file)
    result = ucp(*args)
    assert result.exit_code == 1
    assert "  block.rows: the checkpoint has 6 rows, and the target pads them to 8; say with" in result.stdout
    result = ucp(*args, "--vocabulary-size", 6)
    assert result.exit_code == 0
    assert "note: the 6 rows of block.rows are padded to 8; the engine may pad them in another way" in result.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--zero", "1"], "Missing option '--dp'"),
        (["--dp", "1"], "Missing option '--zero'"),
        (["--dp", "1", "--zero", "4"], "4 is not in the range 0<=x<=3"),
        (["--dp", "0", "--zero", "1"], "0 is not in the range x>=1"),
        (["--dp", "1000000000", "--zero", "3"], "1,000,000,000 ranks; at most 1,048,576 are planned"),
        (["--dp", "1", "--zero", "1", "--tag", "step9"], "no tag 'step9' in"),
        (["--dp", "1", "--zero", "1", "--spec", "unknown"], "no family or spec file 'unknown'"),
        (
            ["--dp", "1", "--zero", "1", "--spec", "megatron_core_gpt"],
            "doesn't give exactly one rule for each parameter (2)",
        ),
    ],
)
def test_wrong_usage_is_status_2(args: list[str], message: str, sharded: Path, ucp: Ucp) -> None:
    result = ucp("plan", sharded.parent, *args)
    assert result.exit_code == 2 and result.stdout == "" and message in result.stderr


def test_unreadable_checkpoints_are_status_2(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    args = ("--dp", 1, "--zero", 1, "--spec", spec_file)
    result = ucp("plan", sharded / "nowhere", *args)
    assert result.exit_code == 2 and "no checkpoint folder at" in result.stderr
    (sharded / "zero_pp_rank_0_mp_rank_01_optim_states.pt").write_bytes(b"PK")
    result = ucp("plan", sharded, *args)
    assert result.exit_code == 2 and result.stdout == "" and "mp_rank_01_optim_states.pt" in result.stderr
