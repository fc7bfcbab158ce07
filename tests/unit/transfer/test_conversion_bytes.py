"""A conversion writes every byte right, and once, whatever the number of workers, files and chunks."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.universal.index import UniversalCheckpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.transfer.conversion import convert


def _pieces(flat: torch.Tensor, shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """Cut a flat buffer into the tensors of these shapes, end to end."""
    found, start = {}, 0
    for name, shape in shapes.items():
        found[name] = flat[start : start + shape.numel()].view(shape)
        start += shape.numel()
    return found


def _expected(folder: Path) -> dict[str, torch.Tensor]:
    """Atoms by name, straight from ``torch.load`` of the files that one rank wrote."""
    prefix = "zero_pp_rank_0_" if (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").exists() else ""
    saved = torch.load(folder / f"{prefix}mp_rank_00_model_states.pt", weights_only=False)
    atoms = {f"{name}/weight": saved["module"][name] for name in saved["buffer_names"]}
    if saved["param_shapes"] is None:
        names = [name for name in saved["module"] if name not in saved["buffer_names"]]
        for name, entry in zip(names, saved["optimizer"]["state"].values(), strict=True):
            atoms[f"{name}/fp32"] = saved["module"][name]
            atoms |= {f"{name}/{state}": entry[state] for state in ("exp_avg", "exp_avg_sq")}
        return atoms
    [path] = folder.glob("*_optim_states.pt")
    state = torch.load(path, weights_only=False)["optimizer_state_dict"]
    masters = state.get("single_partition_of_fp32_groups") or state["fp32_flat_groups"]
    entries = (state.get("base_optimizer_state") or state["optimizer_state_dict"])["state"]
    for group, (master, shapes) in enumerate(zip(masters, saved["param_shapes"], strict=True)):
        for key, flat in {"fp32": master, **entries[group]}.items():
            if key != "step":
                atoms |= {f"{name}/{key}": tensor for name, tensor in _pieces(flat, shapes).items()}
    return atoms


def _atoms(folder: Path) -> dict[str, torch.Tensor]:
    """Atoms as the safetensors library reads them."""
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("atoms-*.safetensors"):
        with safetensors.safe_open(path, framework="pt") as file:
            found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return found


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    raw = [side.contiguous().flatten().view(torch.uint8) for side in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*raw)


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero3"])
def test_every_byte_of_an_engines_checkpoint(name: str, engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = engine_checkpoints[name]
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u", chunk_numbytes=1000)
    expected, found = _expected(folder), _atoms(tmp_path / "u")
    assert found.keys() == expected.keys()
    assert [key for key in expected if not _same(expected[key], found[key])] == []


@pytest.mark.parametrize("run", [{"tp": 2, "dp": 3, "stage": 1}, {"dp": 4, "stage": 3}, {"tp": 2, "dp": 1, "stage": 2}])
def test_every_byte_of_many_ranks(
    run: dict[str, int], native: Callable[..., Path], view_of: Callable[..., UniversalView], tmp_path: Path
) -> None:
    kept: dict[tuple[str, str], torch.Tensor] = {}
    convert(view_of(native("n", kept.update, **run)), tmp_path / "u", chunk_numbytes=16)
    kept.clear()
    native("again", lambda values: kept.update(values))
    found = _atoms(tmp_path / "u")
    assert found.pop("mask/weight").tolist() == [0, 1, 2, 3]
    assert found.keys() == {f"{name}/{state}" for name, state in kept}
    assert [key for key in kept if not _same(kept[key], found["/".join(key)])] == []


@pytest.mark.parametrize("options", [{"workers": 2}, {"workers": 2, "chunk_numbytes": 8}, {"chunk_numbytes": 100}])
def test_workers_and_chunks_change_no_byte(
    options: dict[str, int], engine_checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero1"]))
    convert(view, tmp_path / "one", UniversalOutput(file_numbytes=9000), workers=1)
    convert(view, tmp_path / "other", UniversalOutput(file_numbytes=9000), **{"workers": 1, **options})
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert len([name for name in names if name.startswith("atoms-")]) > 2
    assert names == sorted(path.name for path in (tmp_path / "other").iterdir())
    assert [n for n in names if (tmp_path / "one" / n).read_bytes() != (tmp_path / "other" / n).read_bytes()] == []


def test_files_are_filled_up_to_the_limit(engine_checkpoints: dict[str, Path]) -> None:
    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero0"]))
    files = UniversalOutput(file_numbytes=9000).plan(view).files
    assert all(sum(r.numbytes for r in file.regions) <= 9000 or len(file.regions) == 1 for file in files)
    assert [f.file_name for f in files] == [
        f"atoms-{n:05d}-of-{len(files):05d}.safetensors" for n in range(1, len(files) + 1)
    ]
    for file in files:
        assert file.parts[0].numbytes % tunables.BLOCK_NUMBYTES == 0 and not file.has_gaps
        assert all(region.file_offset % {"F32": 4, "I64": 8}[region.dtype] == 0 for region in file.regions)


def test_each_byte_is_written_once(
    engine_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: dict[str, list[tuple[int, int]]] = {}
    pwrite = os.pwrite

    def spy(descriptor: int, data: Any, offset: int) -> int:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        count = pwrite(descriptor, data[:300], offset)  # as a full pipe or a signal would: less than was asked for
        written.setdefault(name, []).append((offset, offset + count))
        return count

    monkeypatch.setattr(os, "pwrite", spy)
    convert(
        UniversalView.of(open_checkpoint(engine_checkpoints["zero3"])),
        tmp_path / "u",
        UniversalOutput(file_numbytes=9000),
        chunk_numbytes=1024,
    )
    files = list((tmp_path / "u").glob("atoms-*"))
    assert written.keys() == {path.name for path in files}
    for path in files:
        runs = sorted(written[path.name])
        assert runs[0][0] == 0 and runs[-1][1] == path.stat().st_size
        assert all(before[1] == after[0] for before, after in pairwise(runs))


def _open_files() -> list[str]:
    """Return the files that this process has open, while other threads open and close files."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):
            found.append(str(entry.readlink()))
    return found


@pytest.mark.parametrize("direct", ["whole blocks", "none"])
def test_few_files_are_open_and_blocks_go_straight_to_the_disk(
    direct: str, engine_checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All goes through the kernel's pages if the file system refuses direct writes."""
    open_at_once, straight, pwrite = [0], [0], os.pwrite

    def spy(descriptor: int, data: memoryview, offset: int) -> int:
        open_at_once[0] = max(open_at_once[0], sum("atoms-" in target for target in _open_files()))
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            if direct == "none":
                raise OSError(errno.EINVAL, "Invalid argument")
            assert len(data) % tunables.BLOCK_NUMBYTES == offset % tunables.BLOCK_NUMBYTES == 0
            straight[0] += len(data)
        return pwrite(descriptor, data, offset)

    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero1"]))
    convert(view, tmp_path / "plain", workers=1)
    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", spy)
        count = convert(view, tmp_path / "u", UniversalOutput(file_numbytes=9000), workers=2, chunk_numbytes=4096)
    assert len(list((tmp_path / "u").glob("atoms-*"))) > 5
    assert open_at_once[0] <= 2 * 2  # one for each worker, twice
    assert straight[0] == 0 if direct == "none" else straight[0] > count.bytes_read / 2
    before, after = _atoms(tmp_path / "plain"), _atoms(tmp_path / "u")
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)


def test_count_and_progress(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    view = UniversalView.of(open_checkpoint(engine_checkpoints["zero1"]))
    count = convert(view, tmp_path / "u", progress=lambda *call: calls.append(call), chunk_numbytes=4096)
    total = (tmp_path / "u" / "atoms-00001-of-00001.safetensors").stat().st_size
    assert calls[-1] == (total, total) and calls == sorted(calls) and len(calls) == -(-total // 4096)
    assert count.bytes_read == sum(tensor.nbytes for tensor in _atoms(tmp_path / "u").values())
    assert {Path(path).name for path in count.files} == {path.name for path in engine_checkpoints["zero1"].glob("*.pt")}


def test_universal_to_universal_copies(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    convert(UniversalView.of(open_checkpoint(engine_checkpoints["zero3"])), tmp_path / "u")
    first = open_checkpoint(tmp_path / "u")
    convert(UniversalView.of(first), tmp_path / "again")
    again = open_checkpoint(tmp_path / "again")
    assert (tmp_path / "u" / "atoms-00001-of-00001.safetensors").read_bytes() == (
        tmp_path / "again" / "atoms-00001-of-00001.safetensors"
    ).read_bytes()
    assert isinstance(again, UniversalCheckpoint) and isinstance(first, UniversalCheckpoint)
    assert again.source == first.source and (again.source.form, again.source.zero_stage) == ("deepspeed zero-3", 3)
    assert (again.run, again.groups, again.parameters) == (first.run, first.groups, first.parameters)


def test_index_says_what_the_engine_knew(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    source = open_checkpoint(engine_checkpoints["zero1"])
    convert(UniversalView.of(source), tmp_path / "u")
    written = open_checkpoint(tmp_path / "u")
    assert written.run == source.run and written.groups == source.groups
    assert written.parameters == source.parameters
    assert {entry.scalars["step"] for entry in written.parameters.values() if entry.kind == "trainable"} == {3.0}
    _, state = written.client_state()
    assert state.keys() == {"epoch", "seen", "ds_config", "ds_version"} and state["seen"] == [1, 2, 3]
    sizes = json.loads((tmp_path / "u" / "ucp_index.json").read_text())["files"]
    assert sizes == {
        path.name: path.stat().st_size for path in (tmp_path / "u").iterdir() if path.name != "ucp_index.json"
    }


def test_parameters_without_elements(tmp_path: Path) -> None:
    empty = NativeParameter("empty", torch.empty(0, 3), {"exp_avg": torch.empty(0, 3)})
    full = NativeParameter("full", torch.arange(6.0), {"exp_avg": torch.ones(6)})
    folder = write_native(tmp_path, NativeModel((empty, full)), NativeRun(stage=1, dp=2))
    convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "u", chunk_numbytes=8)
    found = _atoms(tmp_path / "u")
    assert found["full/fp32"].tolist() == list(range(6)) and found["empty/weight"].shape == (0, 3)


MEASURE = """
import re, sys
from pathlib import Path
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.universal.index import UniversalCheckpoint
from ucp_deepspeed.checkpoint.universal.atoms_output import UniversalOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.transfer.conversion import convert
def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+) kB", Path("/proc/self/status").read_text()).group(1)) << 10
small, large, to = map(Path, sys.argv[1:])
convert(UniversalView.of(open_checkpoint(small)), to / "small")  # so that torch has started what it keeps
view = UniversalView.of(open_checkpoint(large))
before, peak = anonymous(), 0
def progress(written, total):
    global peak
    peak = max(peak, anonymous())
convert(view, to / "large", chunk_numbytes=4 << 20, workers=2, progress=progress)
print(peak - before)
"""


def test_memory_is_bounded_by_the_chunks(engine_checkpoints: dict[str, Path], tmp_path: Path) -> None:
    weight = torch.zeros(4096, 4096)
    parameter = NativeParameter("weight", weight, {"exp_avg": weight, "exp_avg_sq": weight})
    folder = write_native(tmp_path, NativeModel((parameter,)), NativeRun(stage=2, dp=3))
    command = [sys.executable, "-c", MEASURE, engine_checkpoints["zero1"], folder, tmp_path]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr
    assert sum(path.stat().st_size for path in (tmp_path / "large").iterdir()) > 200e6
    assert int(run.stdout) < 12 << 20  # two buffers of 4 MiB, and little else; one atom alone has 64 MiB
