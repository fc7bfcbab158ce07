"""Pictures: what they name and how much they draw."""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed.cli.plots import COLOURS

Ucp = Callable[..., Result]


@pytest.fixture
def layered(tmp_path: Path) -> Path:
    """Two layers on two tensor-parallel ranks, one of its tensors fused of two."""
    names = [f"layers.{number}.{name}" for number in range(2) for name in ("gate_up", "norm")]
    parameters = [
        NativeParameter(
            name,
            torch.ones(shape),
            {"exp_avg": torch.ones(shape)},
            cut="gate_up" if name.endswith("gate_up") else "replicated",
        )
        for name in names
        for shape in [(12, 4) if name.endswith("gate_up") else (4,)]
    ]
    return write_native(tmp_path / "layered", NativeModel(tuple(parameters)), NativeRun(tp=2, dp=2, stage=1))


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "spec.yaml"
    path.write_text(
        "family: mine\nrules:\n"
        "  - {match: layers.*.gate_up, pattern: shard, dim: 0, parts: [1, 1]}\n"
        "  - {match: layers.*.norm, pattern: replicate}\n"
    )
    return path


def drawn(path: Path) -> tuple[Counter[str], Counter[str]]:
    """Texts of a picture, and how many shapes are filled with each colour."""
    svg = path.read_text(encoding="utf-8")
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    return Counter(texts), Counter(re.findall(r"fill: (#[0-9a-f]{6})", svg))


def test_sizes_of_layers_and_states(layered: Path, spec: Path, tmp_path: Path, ucp: Ucp) -> None:
    path = tmp_path / "sizes.svg"
    result = ucp("inspect", layered, "--spec", spec, "--plot", path)
    assert (result.exit_code, result.stderr) == (0, f"wrote {path}\n") and "layers.{0..1}.norm" in result.stdout
    texts, fills = drawn(path)
    assert {"layers.0", "layers.1", "fp32", "exp_avg", "0 B"} <= texts.keys()
    assert [fills[colour] for colour in COLOURS[:3]] == [3, 3, 0]  # a bar of each layer, and one in the legend


def test_what_ranks_read_and_hold(layered: Path, spec: Path, tmp_path: Path, ucp: Ucp) -> None:
    path = tmp_path / "plan.svg"
    plan = ("plan", layered, "--zero", 1, "--spec", spec)
    assert ucp(*plan, "--dp", 3, "--plot", path).exit_code == 0
    texts, _ = drawn(path)
    files = {f"zero_pp_rank_{dp}_mp_rank_0{tp}_optim_states.pt" for dp in range(2) for tp in range(2)}
    assert {*files, "reads", "holds", "0·0", "0·2"} <= texts.keys() and "0·3" not in texts
    assert ucp(*plan, "--dp", 1500, "--plot", tmp_path / "many.png").exit_code == 0
    impossible = ucp(
        "plan", layered, "--dp", 1, "--pp", 2, "--zero", 2, "--spec", spec, "--plot", tmp_path / "none.svg"
    )
    assert impossible.exit_code == 1 and not (tmp_path / "none.svg").exists()
    assert impossible.stderr == f"{tmp_path / 'none.svg'} isn't written: the topology is impossible\n"


def test_boxes_of_ranks(layered: Path, spec: Path, tmp_path: Path, ucp: Ucp) -> None:
    path = tmp_path / "boxes.svg"
    explain = ("spec", "explain", "--spec", spec, "--plot", path)
    assert ucp(*explain, "layers.0.gate_up", "--against", layered).exit_code == 0
    texts, fills = drawn(path)
    assert (texts["rank 0"], texts["rank 1"], texts["rank 1: [6, 4]"]) == (2, 2, 1)
    assert {"[3:6, 0:4]", "[9:12, 0:4]", "layers.0.gate_up [12, 4]"} <= texts.keys()
    assert [fills[colour] for colour in COLOURS[:3]] == [4, 4, 0]
    assert ucp(*explain, "layers.0.norm", "--against", layered).exit_code == 0
    assert drawn(path)[0]["all ranks"] == 1


@pytest.mark.parametrize(
    "command", [("inspect",), ("plan", "--dp", 1, "--zero", 1), ("spec", "explain", "a", "--spec", "b", "--against")]
)
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("a.gif", "a.gif needs a name and an ending of .svg, .png, .pdf: picture.svg"),
        (".svg", ".svg needs a name and"),
        ("none/a.svg", "there is no folder"),
        ("a.SVG", "pip install 'ucp-deepspeed[plots]'"),
    ],
)
def test_what_hinders_a_picture_is_told_before_any_work(
    command: tuple[object, ...], name: str, told: str, tmp_path: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = ucp(*command, tmp_path / "no checkpoint", "--plot", tmp_path / name)
    assert (result.exit_code, result.stdout) == (2, "") and told in result.stderr


def test_boxes_that_nobody_can_tell(layered: Path, spec: Path, tmp_path: Path, ucp: Ucp) -> None:
    explain = ("spec", "explain", "--spec", spec, "--plot", tmp_path / "a.svg")
    nothing = ucp(*explain, "layers.0.norm")
    assert nothing.exit_code == 2 and "name a checkpoint that the spec fits with --against" in nothing.stderr
    spec.write_text("family: mine\nrules: [{match: a, pattern: replicate}]\n")
    unmatched = ucp(*explain, "layers.0.norm", "--against", layered)
    assert unmatched.exit_code == 1 and "a.svg isn't written: nobody can tell what the ranks hold" in unmatched.stderr
