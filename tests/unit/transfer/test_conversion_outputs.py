"""Conversion to other outputs than the universal format: other files, names, types, shares of ranks, and padding."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from safetensors.torch import load_file

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import MASTER
from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.dcp.output import DcpOutput
from ucp_deepspeed.checkpoint.export.torch_file import TorchOutput
from ucp_deepspeed.checkpoint.export.weights import Choice
from ucp_deepspeed.checkpoint.output import Literal, Output, OutputFile, OutputPlan, Region, StoredTensor
from ucp_deepspeed.checkpoint.safetensors_files import safetensors_file
from ucp_deepspeed.checkpoint.torch_files.structure import structure_of
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Box, Layout
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.processes import Ranks, taking_part

View = Callable[[Path], UniversalView]
Values = dict[tuple[str, str], torch.Tensor]
GAP = 11


@dataclass(frozen=True)
class OneFileEach(Output):
    """The weights, each in a file and folder of its own, in bf16 and under other names; an index says where."""

    prefix: str = "model."

    def plan(self, view: UniversalView) -> OutputPlan:
        names = {name: self.prefix + name for name, entry in view.parameters.items() if entry.kind == "trainable"}
        if taken := names.keys() & set(names.values()):
            raise UnsupportedError(f"{taken} stand for two parameters")
        regions = {other: Region.whole(view, name, MASTER, "BF16") for name, other in names.items()}
        files = {
            other: safetensors_file(f"{other}/weight.safetensors", {other: StoredTensor.of(held)})
            for other, held in regions.items()
        }

        def finish(folder: Path, sums: Sequence[FileSums]) -> None:
            for each, file in zip(sums, files.values(), strict=True):
                assert each.differences(folder / file.file_name) == []
            assert all((folder / file.file_name).stat().st_size == file.numbytes for file in files.values())
            index = {other: file.file_name for other, file in files.items()}
            (folder / "index.json").write_text(json.dumps(index))

        return OutputPlan(tuple(files.values()), finish)


@dataclass(frozen=True)
class Shares(Output):
    """The share of each of three ranks of a plain model, with other bytes before, between and behind, and a gap."""

    def plan(self, view: UniversalView) -> OutputPlan:
        files = []
        for rank in range(3):
            parts: list[Region | Literal] = [Literal(b"before::")]
            for name, layout in view.layouts_on(3).items():
                if view.parameters[name].kind != "trainable":
                    continue
                numel = layout.locals[rank].shape[0] * (layout.locals[rank].shape[1] if name != "first" else 1)
                for part in (Region(name, MASTER, "F32", layout, rank, 0, numel), Literal(b"between.")):
                    parts.append(replace(part, file_offset=parts[-1].file_offset + parts[-1].numbytes))
            whole = view.logical_shape("same")
            box = Region("same", "exp_avg", "F64", Layout.around(whole, Box((1, 2), (3, 5))), 0, 2, 4)
            end = parts[-1].file_offset + parts[-1].numbytes
            parts.append(replace(box, file_offset=end + GAP + -(end + GAP) % 8))
            files.append(OutputFile(f"rank{rank}.bin", parts[-1].file_offset + box.numbytes + 3, tuple(parts)))
        return OutputPlan(tuple(files))


@dataclass(frozen=True)
class Transposes(Output):
    """The transposes of all matrices, of the whole and of the local tensors of three ranks."""

    def plan(self, view: UniversalView) -> OutputPlan:
        tensors = {}
        for name, layout in view.layouts_on(3).items():
            for rank, local in enumerate(layout.locals):
                if view.parameters[name].kind == "trainable" and len(local.shape) == 2:
                    part = Region(name, MASTER, "F32", layout, rank, 0, prod(local.shape), transposed=True)
                    tensors[f"{name}.{rank}"] = StoredTensor.of(part)
        return OutputPlan((safetensors_file("transposes.safetensors", tensors),))


def together(count: int, view: UniversalView, destination: Path, output: Output, **options: Any) -> None:
    """Convert on ranks that are threads, or on this process alone."""
    store = dist.HashStore()

    def one(rank: int) -> None:
        with taking_part(store, rank, count) as ranks:
            convert(view, destination, output, ranks=ranks if count > 1 else Ranks(), **options)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))


@pytest.fixture
def written(native: Callable[..., Path]) -> tuple[Path, Values]:
    values: Values = {}
    return native("a", values.update, tp=2, dp=2, stage=1), values


@pytest.mark.parametrize("chunk_numbytes", [8, 56, 1 << 20])
def test_matrices_are_transposed(
    chunk_numbytes: int, written: tuple[Path, Values], view_of: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks begin and end within columns, and blocks of few rows are read."""
    monkeypatch.setattr(tunables, "PART_NUMBYTES", 64)
    folder, values = written
    view = view_of(folder)
    convert(view, tmp_path / "out", Transposes(), workers=2, chunk_numbytes=chunk_numbytes)
    found = load_file(tmp_path / "out" / "transposes.safetensors")
    assert found
    for title, tensor in found.items():
        name, rank = title.rsplit(".", 1)
        local = view.layouts_on(3)[name].locals[int(rank)]
        expected = torch.zeros(local.shape)
        for piece in local.pieces:
            there, here = (tuple(map(slice, box.start, box.stop)) for box in (piece.logical_box, piece.local_box))
            expected[here] = values[name, MASTER][there]
        assert torch.equal(tensor, expected.t()), title


@pytest.mark.parametrize("count", [1, 2])
def test_a_file_each_in_another_type_under_other_names(
    count: int, written: tuple[Path, Values], view_of: View, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tunables, "PAGE_NUMBYTES", 512)  # so that small files are shared
    folder, values = written
    together(count, view_of(folder), tmp_path / "out", OneFileEach(), chunk_numbytes=32)
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert index.keys() == {f"model.{name}" for name, state in values if state == MASTER}
    for other, file in index.items():
        ((key, found),) = load_file(tmp_path / "out" / file).items()
        expected = values[other.removeprefix("model."), MASTER].to(torch.bfloat16)
        assert key == other and found.dtype == torch.bfloat16 and torch.equal(found, expected)
    assert len(list((tmp_path / "out").rglob("*.*"))) == len(index) * 2 + 1  # nothing else: folders have dots too


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("chunk_numbytes", [8, 64, 1 << 20])
def test_shares_of_ranks_with_bytes_around_them(
    count: int,
    chunk_numbytes: int,
    written: tuple[Path, Values],
    view_of: View,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tunables, "PAGE_NUMBYTES", 64)
    folder, values = written
    together(count, view_of(folder), tmp_path / "out", Shares(), chunk_numbytes=chunk_numbytes)
    tensors = {name: values[name, MASTER] for name in ("first", "rows", "columns", "same")}
    for rank in range(3):
        columns = tensors["columns"].tensor_split(3, dim=1)[rank]
        shares = [tensors["first"], tensors["rows"].chunk(3)[rank], columns, tensors["same"]]
        expected = b"before::" + b"".join(share.contiguous().numpy().tobytes() + b"between." for share in shares)
        box = values["same", "exp_avg"][1:3, 2:5].flatten()[2:].double()
        expected += bytes(GAP + -(len(expected) + GAP) % 8) + box.numpy().tobytes() + bytes(3)
        assert (tmp_path / "out" / f"rank{rank}.bin").read_bytes() == expected


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("chunk_numbytes", [8, 200, 1 << 20])
def test_records_have_their_sums_from_several_ranks(
    count: int,
    chunk_numbytes: int,
    written: tuple[Path, Values],
    view_of: View,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As torch's own writer lays an archive out, and with its sums."""
    monkeypatch.setattr(tunables, "PAGE_NUMBYTES", 64)
    folder, values = written
    together(count, view_of(folder), tmp_path / "out", TorchOutput(Choice()), chunk_numbytes=chunk_numbytes)
    path = tmp_path / "out" / "pytorch_model.bin"
    found = torch.load(path, weights_only=True)
    expected = {name: value for (name, state), value in values.items() if state == MASTER}
    assert found.keys() == expected.keys() | {"mask"}  # a buffer
    assert all(torch.equal(found[name], held) for name, held in expected.items())
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
    torch.save(found, tmp_path / "pytorch_model.bin")
    sizes = [(each.filename, each.file_size, each.CRC, each.header_offset) for each in archive.infolist()[:-1]]
    with zipfile.ZipFile(tmp_path / "pytorch_model.bin") as theirs:
        assert sizes == [
            (each.filename, each.file_size, each.CRC, each.header_offset) for each in theirs.infolist()[:-1]
        ]
    assert structure_of(path).altered == []


def test_padding_of_a_rank_becomes_zero(tmp_path: Path, native: Callable[..., Path]) -> None:
    values: Values = {}
    rules = [{"match": ["first", "same", "columns"], "pattern": "replicate"}]
    rules.append({"match": "rows", "pattern": "shard", "dim": 0, "vocabulary": True, "pad_to_multiple": 4})
    spec = Spec.parse({"family": "tests", "rules": rules}, "tests")
    view = UniversalView.of(open_checkpoint(native("a", values.update, stage=1)), spec, vocabulary_size=6)

    class Last(Output):
        def plan(self, view: UniversalView) -> OutputPlan:
            layout = view.layouts_on(2)["rows"]
            region = Region("rows", MASTER, "F32", layout, 1, 0, 4 * 8)
            return OutputPlan((OutputFile("last.bin", region.numbytes, (region,)),))

    convert(view, tmp_path / "out", Last(), chunk_numbytes=40)
    found = torch.frombuffer(bytearray((tmp_path / "out" / "last.bin").read_bytes()), dtype=torch.float32).view(4, 8)
    assert torch.equal(found[:2], values["rows", MASTER][4:]) and not found[2:].any()


def test_what_an_output_refuses_leaves_nothing(written: tuple[Path, Values], view_of: View, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="stand for two parameters"):
        convert(view_of(written[0]), tmp_path / "out", OneFileEach(prefix=""))
    assert not (tmp_path / "out").exists()


def test_ranks_that_would_write_other_things_are_refused(
    written: tuple[Path, Values], view_of: View, tmp_path: Path
) -> None:
    view, store = view_of(written[0]), dist.HashStore()

    def one(rank: int) -> None:
        with taking_part(store, rank, 2) as ranks:
            convert(view, tmp_path / "out", OneFileEach(prefix="ab"[rank]), ranks=ranks)

    with ThreadPoolExecutor(2) as pool, pytest.raises(ConfigError, match="isn't what rank 1 sees"):
        list(pool.map(one, range(2)))
    assert not (tmp_path / "out").exists()


def test_dcp_has_names_without_those_of_wrappers(tmp_path: Path) -> None:
    values = {state: torch.randn(4, 3) for state in ("fp32", "exp_avg", "exp_avg_sq")}
    parameter = NativeParameter("_orig_mod.w", values.pop("fp32"), values)
    folder = write_native(tmp_path / "a", NativeModel((parameter,)), NativeRun(stage=1))
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "dcp", DcpOutput())
    found = {"model.w": torch.empty(4, 3), "optim.state.w.exp_avg": torch.empty(4, 3)}
    dcp.load(found, checkpoint_id=tmp_path / "dcp", no_dist=True)
    assert torch.equal(found["model.w"], parameter.fp32) and torch.equal(
        found["optim.state.w.exp_avg"], values["exp_avg"]
    )
