"""A snapshot writes the bytes that ``torch.save`` writes, whatever an object holds."""

from __future__ import annotations

import errno
import gc
import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.checkpoint.utils import clone_tensors_for_torch_save

from ucp_deepspeed import tunables
from ucp_deepspeed.engine.saving.snapshot import FileSnapshot, HostBuffers, snapshot


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
        buffers.reuse()
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


def test_buffers_that_nobody_takes_are_freed() -> None:
    buffers = HostBuffers()
    for sizes, held in (((100, 100, 50), 250), ((100,), 250), ((100, 7), 107)):
        buffers.reuse()
        for size in sizes:
            assert buffers.take(size).numel() == size
        assert buffers.bytes_held == held


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
