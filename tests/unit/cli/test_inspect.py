"""``ucp inspect``."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from shutil import copytree
from subprocess import Popen

import numpy as np
import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed.checkpoint.checksums import CHECKSUMS_NAME

Ucp = Callable[..., Result]

KEYS = """
    path form topology source_topology global_steps global_samples skipped_steps precision ds_version lr_scheduler loss_scale
    optimizer_steps layouts vocabulary_size numel state_bytes disk_bytes files written other_tags client_state groups
    differing_copies lacking unrecorded
    parameters
"""


def test_the_keys_of_the_object(saved: Path, ucp: Ucp) -> None:
    report = json.loads(ucp("inspect", saved, "--json").stdout)
    assert list(report) == KEYS.split()
    assert report["path"] == str(saved / "step3") and report["form"] == "deepspeed zero-1/2"
    assert (
        report["topology"] == {"tp": 1, "pp": 1, "dp": 1, "zero_stage": 1, "ep": 1}
        and report["source_topology"] is None
    )
    assert (report["global_steps"], report["global_samples"], report["skipped_steps"]) == (3, 24, 0)
    assert report["precision"] == "bf16" and report["optimizer_steps"] == [3]
    assert report["lr_scheduler"] == {"last_batch_iteration": 2}
    assert report["layouts"] == {"known": True, "reason": None} and report["vocabulary_size"] is None
    assert report["numel"] == {"trainable": 3252, "frozen": 33, "buffer": 21}
    assert report["state_bytes"] == {
        "fp32": 4 * 3252,
        "exp_avg": 4 * 3252,
        "exp_avg_sq": 4 * 3252,
        "weight": 2 * 33 + 4 * 20 + 8,
    }
    files = [path for path in (saved / "step3").iterdir() if path.is_file()]
    assert report["files"] == len(files) and report["disk_bytes"] == sum(path.stat().st_size for path in files)
    newest = max(path.stat().st_mtime for path in files)
    assert datetime.fromisoformat(report["written"]).timestamp() == int(newest)
    assert (report["other_tags"], report["client_state"]) == (["step2"], ["epoch"])
    assert [len(group["names"]) for group in report["groups"]] == [3, 4]
    assert [group["hyperparameters"]["weight_decay"] for group in report["groups"]] == [0.1, 0.0]
    assert report["parameters"]["linear_in.weight"] == {
        "kind": "trainable",
        "shape": [33, 20],
        "local_shapes": [[33, 20]],
        "pattern": "unique",
        "states": {"fp32": "F32", "exp_avg": "F32", "exp_avg_sq": "F32"},
        "scalars": {"step": 3.0},
        "refused": {},
        "differing": {},
    }
    assert report["parameters"]["linear_in.bias"]["kind"] == "frozen"
    assert report["parameters"]["calls"]["states"] == {"weight": "I64"}


def test_for_people(saved: Path, ucp: Ucp) -> None:
    shown = ucp("inspect", saved).stdout
    for expected in (
        "deepspeed zero-1/2",
        "TP1·PP1·DP1 ZeRO-1",
        "3, 0 skipped, 24 samples",
        "3,252 trainable, 33 frozen, 21 buffer",
        "fp32 12.7 KiB",
        "last_batch_iteration=2",
        "group 1: 4 parameters, weight_decay=0.0",
        "client state     epoch",
        "other tags       step2",
    ):
        assert expected in shown
    [row] = [line for line in shown.splitlines() if line.startswith("linear_in.weight")]
    assert (
        " ".join(row.split())
        == "linear_in.weight trainable [33, 20] unique fp32 F32, exp_avg F32, exp_avg_sq F32 step=3.0"
    )


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """A checkpoint of three layers, the second of which is wider, with client state that can't all be read."""
    shapes = {f"layers.{number}.{name}": (4 + number % 2, 2) for number in range(3) for name in ("up", "down")}
    parameters = tuple(NativeParameter(name, torch.ones(shape)) for name, shape in {"embed": (9, 2), **shapes}.items())
    state = {"epoch": 1, "sampler": Popen}
    return write_native(tmp_path / "layered", NativeModel(parameters), NativeRun(stage=1), client_state=state)


def names_of(result: Result) -> list[str]:
    return [line.split()[0] for line in result.stdout.splitlines() if " trainable  [" in line]


def test_a_tag_whose_exchange_was_interrupted(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    """Its folder has a name that no command may take for the tag's."""
    root = tmp_path / "aside"
    aside = copytree(saved / "step3", root / ".step3.partial-host-1-replaced")
    (root / "latest").write_text("step3")
    shown = ucp("inspect", root).stdout
    assert f"path             {aside}: the tag step3, since a save of it was interrupted\n" in shown
    assert "other tags       none\n" in shown
    for number, source in enumerate((root, aside)):
        assert ucp("convert", source, tmp_path / f"{number}").exit_code == 0
        assert (tmp_path / f"{number}" / "latest").read_text() == "step3"


def test_like_layers_are_one_line(layered: Path, ucp: Ucp) -> None:
    shown = ucp("inspect", layered)
    assert names_of(shown) == ["embed", "layers.{0,2}.up", "layers.{0,2}.down", "layers.1.up", "layers.1.down"]
    assert "{0,2} stands for the numbers 0, 2; --all lists each parameter\n" in shown.stdout
    every = ucp("inspect", layered, "--all")
    assert names_of(every) == ["embed", *(f"layers.{n}.{name}" for n in range(3) for name in ("up", "down"))]
    assert "--all" not in every.stdout


def test_parameters_that_a_glob_fits(layered: Path, ucp: Ucp) -> None:
    assert names_of(ucp("inspect", layered, "--match", "layers.*.up")) == ["layers.{0,2}.up", "layers.1.up"]
    report = json.loads(ucp("inspect", layered, "--match", "**down", "--json").stdout)
    assert list(report["parameters"]) == [f"layers.{number}.down" for number in range(3)]
    assert report["numel"]["trainable"] == 2 * (9 + 2 * (4 + 5 + 4))
    none = ucp("inspect", layered, "--match", "*down")
    assert (none.exit_code, none.stdout) == (2, "")
    assert (
        none.stderr
        == f"error: no parameter of {layered} fits '*down'; * stays between two dots: try --match '**down**'\n"
    )
    assert len(names_of(ucp("inspect", layered, "--match", "**down**"))) == 2
    assert "try --match '**'\n" in ucp("inspect", layered, "--match", "").stderr
    assert ucp("inspect", layered, "--match", "[a").stderr.endswith("fits '[a'; without --match all are listed\n")
    copied = ucp("inspect", layered, "--match", "layers.{0,2}.up")
    assert copied.exit_code == 2 and "try --match 'layers.*.up'" in copied.stderr
    shells = ucp("inspect", layered, "--match", "layers.?.up")
    assert shells.exit_code == 2 and shells.stderr.startswith("error: --match: ? in 'layers.?.up' is no wildcard: ")


def test_of_many_tags_the_first(layered: Path, ucp: Ucp) -> None:
    for number in range(10, 20):
        copytree(layered, layered.parent / f"step{number}")
    [line] = [line for line in ucp("inspect", layered).stdout.splitlines() if line.startswith("other tags")]
    assert line.endswith("step15, step16, step17 and 2 more")


def test_client_state_that_cant_be_read_is_listed_too(layered: Path, ucp: Ucp) -> None:
    assert json.loads(ucp("inspect", layered, "--json").stdout)["client_state"] == ["epoch", "sampler"]


def test_a_tag(saved: Path, ucp: Ucp) -> None:
    for args in ([saved, "--tag", "step2"], [saved / "step2"]):
        assert json.loads(ucp("inspect", *args, "--json").stdout)["global_steps"] == 2


def test_a_universal_checkpoint(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    assert ucp("convert", saved, tmp_path / "u").exit_code == 0
    report = json.loads(ucp("inspect", tmp_path / "u", "--json").stdout)
    native = json.loads(ucp("inspect", saved, "--json").stdout)
    assert report["form"] == "universal 2" and report["source_topology"] == native["topology"]
    for key in ("parameters", "numel", "state_bytes", "optimizer_steps", "lr_scheduler", "global_steps"):
        assert report[key] == native[key]
    assert "(saved by TP1·PP1·DP1 ZeRO-1)" in ucp("inspect", tmp_path / "u").stdout


def test_local_shapes_where_no_layout_is_known(sharded: Path, ucp: Ucp) -> None:
    report = json.loads(ucp("inspect", sharded, "--json").stdout)
    assert report["layouts"]["known"] is False and "--spec" in report["layouts"]["reason"]
    rows = report["parameters"]["block.rows"]
    assert (rows["shape"], rows["pattern"], rows["local_shapes"]) == (None, None, [[3, 8], [3, 8]])
    assert report["numel"]["trainable"] == 48 + 2 * 5
    shown = ucp("inspect", sharded)
    assert shown.exit_code == 0 and "Local shapes only: no layout is known for 2 parameters" in shown.stdout
    assert "2 × [3, 8]" in shown.stdout and "sum over the ranks' local tensors" in shown.stdout


def test_layouts_of_a_spec(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    report = json.loads(ucp("inspect", sharded, "--spec", spec_file, "--json").stdout)
    assert report["layouts"]["known"] and report["numel"]["trainable"] == 48 + 5
    assert report["parameters"]["block.rows"]["shape"] == [6, 8]
    assert report["parameters"]["block.rows"]["pattern"] == "shard on dimension 0"


def test_the_unpadded_vocabulary(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    spec_file.write_text(spec_file.read_text().replace("dim: 0}", "dim: 0, vocabulary: true}"))
    report = json.loads(ucp("inspect", sharded, "--spec", spec_file, "--vocabulary-size", 5, "--json").stdout)
    assert report["parameters"]["block.rows"]["shape"] == [5, 8] and report["vocabulary_size"] == 5
    assert report["parameters"]["block.rows"]["pattern"] == "shard on dimension 0 (vocabulary)"


def test_a_spec_that_does_not_fit_is_an_error(sharded: Path, spec_file: Path, ucp: Ucp) -> None:
    spec_file.write_text("family: mine\nrules:\n  - {match: block.*, pattern: shard, dim: 1}\n")
    result = ucp("inspect", sharded, "--spec", spec_file)
    assert result.exit_code == 2 and "block.same: dimension 1" in result.stderr


@pytest.mark.parametrize("schedule", [[{"last_epoch": 1}], "text", {0: {"last_epoch": 1}, "a": np.arange(3)}])
def test_any_scheduler_is_shown_or_refused_and_compared(schedule: object, tmp_path: Path, ucp: Ucp) -> None:
    parameter = NativeParameter("weight", torch.ones(4), {"exp_avg": torch.ones(4)})
    for name, kept in (("a", schedule), ("b", {"a": 1})):
        write_native(
            tmp_path / name, NativeModel((parameter,)), NativeRun(stage=1), client_state={"lr_scheduler": kept}
        )
    shown = ucp("inspect", tmp_path / "a")
    assert shown.exit_code == 0 or (isinstance(schedule, dict) and "numpy.ndarray" in shown.stderr)
    assert ucp("diff", tmp_path / "a", tmp_path / "a").exit_code == 0
    differing = ucp("diff", tmp_path / "a", tmp_path / "b")
    assert differing.exit_code == 1 and "lr_scheduler" in differing.stdout


@pytest.mark.parametrize("command", [["inspect"], ["plan", "--dp", 2, "--zero", 1]], ids=lambda command: command[0])
def test_checksums_that_nothing_vouches_for(
    command: list[object], one: Path, ucp: Ucp, caplog: pytest.LogCaptureFixture
) -> None:
    ucp(command[0], one, *command[1:])
    assert "nothing is compared" not in caplog.text
    (one / CHECKSUMS_NAME).write_text("{}")
    ucp(command[0], one, *command[1:])
    assert f"{one / CHECKSUMS_NAME} is there, and no ucp_manifest.json" in caplog.text
