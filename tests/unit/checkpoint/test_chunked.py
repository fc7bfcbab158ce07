"""A form that tells boxes: folders of ``torch.distributed.checkpoint`` are read, converted and planned as others are."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest
import torch
from chunked import ChunkedCheckpoint, Grid, write_chunks
from click.testing import CliRunner

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.derived import Regrouped, RegroupedCheckpoint, RetiedCheckpoint, Run
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import inspect as inspect_module
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Box, Layout, LocalTensor, Topology
from ucp_deepspeed.layout.layout import pieces_of
from ucp_deepspeed.plan import Fragment, Target, plan_tensor
from ucp_deepspeed.reading import OpenCheckpoint
from ucp_deepspeed.transfer import FileReader, gather, run_copies
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.evidence.held_values import differing_ties
from ucp_deepspeed.transfer.planning.targeting import plan_target

CUTS = {"embedding": ((3, 4), ()), "up": ((1, 6), (2,)), "down": ((), (1, 2)), "norm": ((),), "scale": ()}
"""Uneven: by rows, in a grid, by columns; then whole, and without a dimension."""

SHAPES = {"embedding": (10, 3), "up": (8, 5), "down": (5, 4), "norm": (5,), "scale": ()}
RULES = [
    {"match": "embedding", "pattern": "shard", "dim": 0, "vocabulary": True},
    {"match": "up", "pattern": "shard", "dim": 0, "parts": [1, 1]},
    {"match": "down", "pattern": "shard", "dim": 1},
    {"match": ["norm", "scale"], "pattern": "replicate"},
]
SPEC = Spec.parse({"family": "tests", "rules": RULES}, "tests")
STATES = ("fp32", "exp_avg", "exp_avg_sq")


@pytest.fixture(scope="module")
def values() -> dict[tuple[str, str], torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        (name, state): torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for state in STATES
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, values: dict[tuple[str, str], torch.Tensor]) -> Path:
    path = tmp_path_factory.mktemp("chunks") / "step3"
    write_chunks(path, {f"{name}/{state}": Grid(value, CUTS[name]) for (name, state), value in values.items()})
    return path


@pytest.fixture
def checkpoint(folder: Path) -> ChunkedCheckpoint:
    return ChunkedCheckpoint(folder, copies=["norm", "up"])


def read(view: UniversalView, name: str, state: str = "fp32") -> torch.Tensor:
    shape = view.logical_shape(name)
    flat = torch.full((prod(shape),), float("nan"))
    gather(view, name, state, 0, flat, FileReader())
    return flat.view(shape)


def test_each_tensor_is_read_whole(checkpoint: ChunkedCheckpoint, values: dict[tuple[str, str], torch.Tensor]) -> None:
    view = UniversalView.of(checkpoint, SPEC)
    assert [layout.degree for layout in view.layouts.values()] == [3, 12, 3, 2, 1]
    for (name, state), value in values.items():
        assert torch.equal(read(view, name, state), value), (name, state)
    held = OpenCheckpoint(checkpoint, SPEC, None)
    assert torch.equal(held.read("up", "exp_avg", (slice(1, 7), slice(1, 4))), values["up", "exp_avg"][1:7, 1:4])
    assert held.parameters["up"].shape == (8, 5) and held.parameters["up"].local_shapes == ((8, 5),)


def test_padding_of_a_vocabulary_is_cut_off(
    checkpoint: ChunkedCheckpoint, values: dict[tuple[str, str], torch.Tensor]
) -> None:
    view = UniversalView.of(checkpoint, SPEC, vocabulary_size=7)
    assert torch.equal(read(view, "embedding"), values["embedding", "fp32"][:7])


def test_converted_compared_and_inspected(
    checkpoint: ChunkedCheckpoint,
    values: dict[tuple[str, str], torch.Tensor],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    view = UniversalView.of(checkpoint, SPEC)
    convert(view, tmp_path / "u" / "step3", chunk_numbytes=24)
    whole = UniversalView.of(open_checkpoint(tmp_path / "u" / "step3"))
    for (name, state), value in values.items():
        assert torch.equal(read(whole, name, state), value), (name, state)
    assert compare(view, whole) == []
    monkeypatch.setattr(inspect_module, "open_checkpoint", lambda *_: checkpoint)
    shown = CliRunner().invoke(main, ["inspect", str(checkpoint.path), "--all"])
    assert shown.exit_code == 0 and "[8, 5]" in shown.output, shown.output


def test_planned_for_two_ranks(checkpoint: ChunkedCheckpoint, values: dict[tuple[str, str], torch.Tensor]) -> None:
    plan = plan_target(checkpoint, Topology(tp=2, dp=2, zero_stage=1), SPEC)
    assert plan.possible
    view = UniversalView.of(checkpoint, SPEC, degree=2)
    up, down = values["up", "fp32"], values["down", "fp32"]
    cut = {
        "embedding": values["embedding", "fp32"].chunk(2),
        "up": (torch.cat((up[:2], up[4:6])), torch.cat((up[2:4], up[6:]))),
        "down": down.chunk(2, dim=1),
        "norm": [values["norm", "fp32"]] * 2,
        "scale": [values["scale", "fp32"]] * 2,
    }
    for name, layout in view.layouts_on(2).items():
        for rank in range(2):
            found = torch.full(layout.locals[rank].shape, float("nan"))
            wanted = (Fragment(0, found.numel(), None, 0),)
            copies = plan_tensor(view.source(name, "fp32"), Target(layout, rank, wanted), "fp32")
            run_copies(copies, FileReader(), lambda _, found=found: found.view(-1))
            assert torch.equal(found, cut[name][rank]), (name, rank)


def test_behind_other_names_and_other_tensors(
    checkpoint: ChunkedCheckpoint, values: dict[tuple[str, str], torch.Tensor]
) -> None:
    tied = UniversalView.of(RetiedCheckpoint(checkpoint, {"other": "up"}))
    assert torch.equal(read(tied, "other"), values["up", "fp32"])
    runs = (Run("up", 3, 20), Run("down", 0, 20))
    made = UniversalView.of(RegroupedCheckpoint(checkpoint, {"made": Regrouped((8, 5), runs)}, {"norm": "renamed"}))
    expected = torch.cat((values["up", "fp32"].view(-1)[3:23], values["down", "fp32"].view(-1))).view(8, 5)
    assert torch.equal(read(made, "made"), expected)
    assert torch.equal(read(made, "renamed"), values["norm", "fp32"])


def test_ties_are_compared_by_elements(folder: Path, tmp_path: Path) -> None:
    value = torch.arange(12.0).view(3, 4)
    for last in (0.0, 1.0):
        other = value.clone()
        other[-1, -1] += last
        grids = {"a/fp32": Grid(value, ((1,), ())), "b/fp32": Grid(other, ((), (1, 3)))}
        write_chunks(tmp_path / str(last), grids)
        problems = differing_ties(ChunkedCheckpoint(tmp_path / str(last)), {"a": "b"})
        assert len(problems) == int(last), problems


def test_boxes_that_leave_a_hole_are_refused(checkpoint: ChunkedCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    def holed(name: str) -> Layout:
        box = Box((0, 0), (7, 5))
        return Layout((8, 5), (LocalTensor((7, 5), pieces_of(box, (0, 0))),))

    monkeypatch.setattr(checkpoint, "layout", holed)
    with pytest.raises(
        DamagedCheckpointError, match=r"doesn't hold all of embedding: pieces cover 35 of the 40 elements"
    ):
        UniversalView.of(checkpoint, SPEC)
