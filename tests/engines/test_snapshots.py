"""A snapshot writes the bytes that ``torch.save`` writes, whatever an object holds."""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save

from ucp_deepspeed import tunables
from ucp_deepspeed.engine.saving import host_memory
from ucp_deepspeed.engine.saving.host_memory import Need, check_room
from ucp_deepspeed.engine.saving.snapshot import FileSnapshot, HostBuffers, describe
from ucp_deepspeed.errors import SaveError
from ucp_deepspeed.testing.ranks import get_pool


def everything() -> dict[str, Any]:
    """Views, shared storages, parameters, odd strides, empty and large tensors, and what isn't a tensor."""
    flat = torch.arange(60, dtype=torch.float32)
    ordered = OrderedDict(a=torch.ones(3))
    ordered._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    return {
        "views": [flat[:10], flat[50:], flat.view(6, 10).t()],
        "whole": flat,
        "expanded": torch.arange(3).expand(4, 3),
        "gaps": torch.arange(24).view(4, 6)[:, ::2],
        "conjugate": torch.tensor([1 + 2j, 3j]).conj(),
        "parameter": torch.nn.Parameter(torch.randn(2, 3)),
        "dtypes": (torch.tensor(True), torch.tensor(1 + 2j), torch.zeros(2, dtype=torch.bfloat16)),
        "empty": torch.empty(0),
        "number": torch.tensor(3.5),
        "large": torch.arange(tunables.LEAST_SHARED_NUMBYTES // 4 + 5),
        "ordered": ordered,
        "storage": torch.arange(4).untyped_storage(),
        "text": ["é", None, 1.5, {"x": (1, 2)}],
    }


def snapshot(state: Any, name: str, buffers: HostBuffers, apart: bool) -> FileSnapshot:
    """Copy what a file holds."""
    files = [describe(state, name, apart)]
    buffers.make_room(files)
    (found,) = buffers.copy(files)
    return found


def files(folder: Path, taken: FileSnapshot, expected: Any) -> list[bytes]:
    """Bytes of a file that is written from a snapshot, and by torch, under the same name."""
    for name in ("ours", "torch"):
        (folder / name).mkdir(exist_ok=True)
    taken.write(folder / "ours")
    torch.save(expected, folder / "torch" / taken.name)
    return [(folder / name / taken.name).read_bytes() for name in ("ours", "torch")]


@pytest.mark.parametrize(("name", "threads"), [("mp_rank_00_model_states.pt", 3), ("naïve.pt", 1)])
def test_as_torch_saves(name: str, threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    state = everything()
    found, expected = files(tmp_path, snapshot(state, name, HostBuffers(), apart=False), state)
    assert found == expected


def test_apart_as_deepspeed_clones(tmp_path: Path) -> None:
    """A small view of a large tensor takes little room, and tensors that shared a storage don't."""
    state = everything()
    del state["storage"]  # DeepSpeed clones tensors alone
    cloned = clone_tensors_for_torch_save(state)
    buffers = HostBuffers()
    found, expected = files(tmp_path, snapshot(state, "a.pt", buffers, apart=True), cloned)
    assert found == expected


def test_later_changes_are_not_in_it_and_buffers_are_used_again(tmp_path: Path) -> None:
    state, buffers = everything(), HostBuffers()
    held = []
    for value in (1.0, 2.0):
        state["whole"].fill_(value)
        state["text"][3]["x"] = value
        taken = snapshot(state, "a.pt", buffers, apart=False)
        held.append({buffer.data_ptr() for buffer in buffers.taken if buffer.numel()})
        state["whole"].zero_()
        state["text"][3]["x"] = None
        taken.write(tmp_path)
        loaded = torch.load(tmp_path / "a.pt", weights_only=False)
        assert loaded["views"][0].tolist() == [value] * 10
        assert loaded["text"][3]["x"] == value
    assert held[0] == held[1]


@pytest.mark.parametrize("apart", [False, True])
def test_buffers_are_the_hosts_whatever_the_default_device_is(apart: bool, tmp_path: Path) -> None:
    """And can be filled again outside of inference."""
    state, buffers = {"x": torch.arange(5.0)}, HostBuffers()
    with torch.device("meta"), torch.inference_mode():
        snapshot(state, "a.pt", buffers, apart).write(tmp_path)
    assert torch.load(tmp_path / "a.pt")["x"].tolist() == [0, 1, 2, 3, 4]
    assert [(buffer.device.type, buffer.is_inference()) for buffer in buffers.taken] == [("cpu", False)]


def test_memory_that_does_not_fit_any_more_is_freed_before_other_is_taken() -> None:
    buffers = HostBuffers()
    for numbers, missing, held in (((100, 50), 448 + 256, 704), ((100, 50), 0, 704), ((100,), 448, 448)):
        described = [describe({"x": [torch.zeros(number) for number in numbers]}, "a.pt", apart=False)]
        assert buffers.make_room(described) == (0, missing)
        assert buffers.bytes_held == held - missing
        buffers.copy(described)
        assert buffers.bytes_held == held


def test_too_little_memory_is_told_by_machine() -> None:
    """Ranks of one machine share its memory."""
    enough = [Need("a", 3 << 20, 1 << 20, 8 << 20), Need("a", 0, 4 << 20, 9 << 20), Need("b", 100 << 20, 0, None)]
    check_room(enough)
    with pytest.raises(
        SaveError, match=r"^a has 8.4 MB .* of 3 ranks take 3.1 MB .* accelerators, and 5.2 MB for others; .*async"
    ):
        check_room([*enough, Need("a", 0, 1, 8 << 20)])
    assert Need.here(0, 0).free, "known on Linux"


def test_what_an_accelerator_copies_to_is_not_swapped_out() -> None:
    check_room([Need("a", 2 << 20, 6 << 20, 3 << 20, 8 << 20)])
    with pytest.raises(SaveError, match=r"a has 3.1 MB "):
        check_room([Need("a", 4 << 20, 1 << 20, 3 << 20, 8 << 20)])


@pytest.mark.parametrize(
    ("line", "folder", "names", "swap", "prefix"),
    [
        ("0::/jobs/7", "jobs", ("memory.max", "memory.current"), ("swap.max", "1", "swap.current", "0"), ""),
        (
            "3:cpuset,memory:/jobs/7",
            "memory/jobs",
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
            ("memsw.limit_in_bytes", "1002", "memsw.usage_in_bytes", "401"),
            "total_",
        ),
    ],
    ids=["version 2", "version 1"],
)
def test_memory_that_a_control_group_has_left(
    line: str,
    folder: str,
    names: tuple[str, str],
    swap: tuple[str, str, str, str],
    prefix: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The files that Linux shows; the machine's own groups limit nothing."""
    monkeypatch.setattr(host_memory, "GROUPS", tmp_path)
    for path, limit in ((tmp_path / folder, "1000"), (tmp_path / folder / "7", "max" if not prefix else str(1 << 63))):
        path.mkdir(parents=True, exist_ok=True)
        for name, content in zip(names, (limit, "400"), strict=True):
            (path / name).write_text(f"{content}\n")
        (path / "memory.stat").write_text(f"{prefix}active_file 30\n{prefix}inactive_file 5\n")
    told = tmp_path / "told"
    told.write_text(f"9:pids:/\n{line}\n")
    assert [each for each in host_memory._left_in_groups(told) if each != (None, None)] == [(635, None)]
    for name, content in (swap[:2], swap[2:]):
        (tmp_path / folder / f"memory.{name}").write_text(f"{content}\n")
    assert (635, 1) in host_memory._left_in_groups(told)
    monkeypatch.setattr(host_memory, "Path", lambda path: told if path == "/proc/self/cgroup" else Path(path))
    free, left_to_swap = host_memory.free_numbytes()
    assert free == 635 and left_to_swap <= 1


def test_one_storage_seen_as_two_types_is_refused_as_by_torch() -> None:
    tensor = torch.zeros(4)
    with pytest.raises(RuntimeError, match="view the same data as different types"):
        snapshot([tensor, tensor.view(torch.int32)], "a.pt", HostBuffers(), apart=False)


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    taken = snapshot({"a": torch.ones(2)}, "a.pt", HostBuffers(), apart=False)
    with pytest.raises(FileNotFoundError, match="gone"):
        taken.write(tmp_path / "gone")


def test_a_full_disk_does_not_end_the_process(tmp_path: Path) -> None:
    """torch's writer does so when it is destroyed after a write that failed (``std::terminate``)."""
    taken = snapshot({"a": torch.ones(100_000)}, "a.pt", HostBuffers(), apart=False)
    child = os.fork()
    if child == 0:
        status = 1
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        try:
            taken.write(tmp_path)
        except OSError as error:  # and it doesn't tell the reason
            status = int(error.errno != errno.EFBIG)
        gc.collect()
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "a.pt").stat().st_size == 0


def of_an_accelerator() -> dict[str, Any]:
    """Tensors of a device, some of which share a storage, and others of the host."""
    flat = torch.arange(50_000.0, device="standin")
    return {
        "views": [flat[:10], flat[50:90].view(8, 5).t()],
        "gaps": torch.arange(24, device="standin").view(4, 6)[:, ::2],
        "small": [torch.full((3,), float(number), device="standin").bfloat16() for number in range(5)],
        "empty": torch.empty(0, device="standin"),
        "number": torch.tensor(3.5, device="standin"),
        "offloaded": torch.arange(7000.0),
    }


def snapshots_on_device(folder: Path, way: str, apart: bool) -> list[tuple[bool, int, int]]:
    """On a rank: for two saves whether the file is torch's, the bytes that were pinned, and those that were held; then the bytes
    that stay pinned."""
    from ucp_deepspeed.testing.device.stand_in import extension

    module: Any = torch.get_device_module("standin")
    runtime, most = module.cudart, tunables.PART_NUMBYTES
    before, tunables.PART_NUMBYTES = extension().pinned_bytes(), 1 << 14
    try:
        if way == "staged":
            module.cudart = None
        if way == "refused":
            module.cudart = lambda: SimpleNamespace(cudaHostRegister=lambda *_: 2)
        buffers, seen = HostBuffers(), []
        for value in (1.0, 2.0):
            state = of_an_accelerator()
            state["views"][0].fill_(value)
            state["offloaded"].fill_(value)
            expected = clone_tensors_for_torch_save(state) if apart else state
            (folder / "torch").mkdir(exist_ok=True)
            torch.save(expected, folder / "torch" / "a.pt")
            taken = snapshot(state, "a.pt", buffers, apart)
            taken.write(folder)  # before any operation that the device would wait for
            written = [(folder / "a.pt").read_bytes()]
            for tensor in (state["views"][0], state["offloaded"]):
                tensor.zero_()
            taken.write(folder)
            written.append((folder / "a.pt").read_bytes())
            same = written == 2 * [(folder / "torch" / "a.pt").read_bytes()]
            seen.append((same, extension().pinned_bytes() - before, buffers.bytes_held))
        del buffers, taken
        gc.collect()
        return [*seen, (True, extension().pinned_bytes() - before, 0)]
    finally:
        module.cudart, tunables.PART_NUMBYTES = runtime, most


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("way", ["registered", "staged", "refused"])
def test_an_accelerators_tensors_take_no_more_than_they_have(way: str, apart: bool, tmp_path: Path) -> None:
    """Memory of their size is pinned, or two buffers are; nothing is for what is on the host. All is given back."""
    ((first, second, end),) = get_pool(1, "standin").run(snapshots_on_device, tmp_path, way, apart)
    device, host = (4 * (10 + 40) + 60 + 6 * 5 if apart else 200_000) + 24 * 8, 28_000
    same, pinned, held = first
    assert first == second and same and end[1] == 0
    assert device + host <= held <= device + host + 64 * 14
    assert pinned == (held - -(-host // 64) * 64 if way == "registered" else 1 << 15)
