"""Files of ``torch.distributed.checkpoint``, sound and damaged, that torch has written in one process."""

from __future__ import annotations

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from chunked import Grid, write_chunks
from torch.distributed.checkpoint.filesystem import SerializationFormat

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.dcp.output import DcpOutput
from ucp_deepspeed.checkpoint.deepspeed.consolidated_output import ConsolidatedOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.checkpoint.whole import checkpoints_in
from ucp_deepspeed.errors import (
    DamagedCheckpointError,
    MismatchError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.evidence.held_values import differing_ties
from ucp_deepspeed.transfer.native.output import NativeOutput
from ucp_deepspeed.transfer.verification import verify

WEIGHT = torch.arange(24.0).view(4, 6)


def state(**more: Any) -> dict[str, Any]:
    """A model with one parameter and Adam's states of it."""
    held = {"w": {"exp_avg": WEIGHT + 1, "exp_avg_sq": WEIGHT + 2, "step": torch.tensor(3.0)}}
    groups = [{"lr": 0.5, "params": ["w"]}]
    return {"model": {"w": WEIGHT}, "optim": {"state": held, "param_groups": groups}, **more}


def save(folder: Path, held: dict[str, Any], **options: Any) -> Path:
    """Have torch write it."""
    dcp.save(held, storage_writer=dcp.FileSystemWriter(folder, **options), no_dist=True)
    return folder


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Each state of the one parameter, from the places that the catalog tells."""
    checkpoint = open_checkpoint(folder)
    UniversalView.of(checkpoint)
    found = {}
    for name, parameter in checkpoint.parameters.items():
        for kind in parameter.states:
            numel = torch.Size(parameter.local_shapes[0] or ()).numel()
            values = torch.empty(numel)
            for part in checkpoint.local_fragments(name, kind, 0, 0, numel):
                extent = part.buffer
                raw = Path(extent.path).read_bytes()[extent.file_offset :][: 4 * extent.numel]
                held = torch.frombuffer(bytearray(raw), dtype=torch.float32)
                values[part.local_start :][: part.numel] = held[part.buffer_start :][: part.numel]
            found[f"{name}/{kind}"] = values
        assert dict(parameter.scalars).keys() <= {"step"}
    return found


def metadata(folder: Path, change: Callable[[Any], object]) -> None:
    """Change the metadata."""
    held = pickle.loads((folder / ".metadata").read_bytes())
    change(held)
    (folder / ".metadata").write_bytes(pickle.dumps(held))


def test_the_places_are_where_torch_put_the_elements(tmp_path: Path) -> None:
    found = read(save(tmp_path / "a", state()))
    assert torch.equal(found["w/fp32"], WEIGHT.flatten())
    assert torch.equal(found["w/exp_avg_sq"], WEIGHT.flatten() + 2)


def test_a_grid_of_chunks_without_recorded_paths(tmp_path: Path) -> None:
    tensors = {"model.w": WEIGHT, "optim.state.w.exp_avg": WEIGHT + 1}
    write_chunks(tmp_path / "a", {key: Grid(value, ((1,), (2, 5))) for key, value in tensors.items()})
    metadata(tmp_path / "a", lambda held: setattr(held, "planner_data", None))
    assert {key: value.tolist() for key, value in read(tmp_path / "a").items()} == {
        "w/fp32": WEIGHT.flatten().tolist(),
        "w/exp_avg": (WEIGHT + 1).flatten().tolist(),
    }


def test_values_beside_the_model_come_back_nested(tmp_path: Path) -> None:
    kept = {"loader": {"seen": [1, {"a": torch.arange(3)}], "name": "x"}, "lr_scheduler": {"last_epoch": 4}}
    checkpoint = open_checkpoint(save(tmp_path / "a", state(**kept, train_state={"step": torch.tensor(7)})))
    _, found = checkpoint.client_state()
    assert found["loader"]["seen"][1]["a"].tolist() == [0, 1, 2]
    assert (found["loader"]["name"], checkpoint.run.lr_scheduler) == ("x", {"last_epoch": 4})
    assert checkpoint.run.global_steps == 7
    assert checkpoint.groups[0].hyperparameters == {"lr": 0.5}


def test_half_precision_is_told_and_not_taken_for_more(tmp_path: Path) -> None:
    held = state()
    held["model"]["w"] = WEIGHT.bfloat16()
    checkpoint = open_checkpoint(save(tmp_path / "a", held))
    assert (checkpoint.parameters["w"].states["fp32"], checkpoint.run.precision) == ("BF16", "bf16")


def test_fp16_without_a_loss_scale_is_refused_where_deepspeed_needs_one(tmp_path: Path) -> None:
    """DeepSpeed's universal folder without one could be written, and not be read again."""
    held = state()
    held["model"]["w"] = WEIGHT.half()
    view = UniversalView.of(open_checkpoint(save(tmp_path / "a", held)))
    for output in (ConsolidatedOutput(), NativeOutput(Topology(dp=2, zero_stage=1))):
        with pytest.raises(UnsupportedError, match="has no loss scale"):
            convert(view, tmp_path / "b", output)
    convert(view, tmp_path / "b", DcpOutput())
    assert open_checkpoint(tmp_path / "b").run.precision == "fp16"


def test_an_average_of_the_weights_beside_the_model(tmp_path: Path) -> None:
    """It has the model's names, and it lies in several chunks where FSDP2 has cut it."""
    folder = save(tmp_path / "a", state(ema={"w": WEIGHT + 9}))
    checkpoint = open_checkpoint(folder)
    assert torch.equal(read(folder)["w/fp32"], WEIGHT.flatten())
    assert torch.equal(checkpoint.client_state()[1]["ema"]["w"], WEIGHT + 9)
    cut = state(ema={"w": Grid(WEIGHT + 9, ((1,), (2, 5)))})
    write_chunks(tmp_path / "b", cut)
    assert torch.equal(open_checkpoint(tmp_path / "b").client_state()[1]["ema"]["w"], WEIGHT + 9)
    metadata(tmp_path / "b", lambda held: held.state_dict_metadata["ema.w"].chunks.pop())
    with pytest.raises(DamagedCheckpointError, match=r"doesn't list the chunks of a whole tensor for 'ema.w'"):
        open_checkpoint(tmp_path / "b").client_state()


def test_a_tied_parameter_stands_under_both_names(tmp_path: Path) -> None:
    """torch saves its value twice and its states once; a model that ties the names takes it, if the values are equal."""
    for second, dtype in ((WEIGHT, torch.float32), (WEIGHT + 1, torch.float32), (WEIGHT, torch.bfloat16)):
        held = state()
        held["model"]["head"] = second.to(dtype)
        checkpoint = open_checkpoint(save(tmp_path / f"{second[0, 0]}-{dtype}", held))
        told = differing_ties(checkpoint, {"head": "w"})
        assert bool(told) != (torch.equal(second, WEIGHT) and dtype == torch.float32), told


def test_what_deepspeed_rounds_is_said(tmp_path: Path) -> None:
    output, held = NativeOutput(Topology(dp=2, zero_stage=1)), state()
    before = output.notes(UniversalView.of(open_checkpoint(save(tmp_path / "a", held))))
    held["model"]["w"] = WEIGHT.double()
    after = output.notes(UniversalView.of(open_checkpoint(save(tmp_path / "b", held))))
    assert not any("fp64" in note for note in before) and any("such as w, are in fp64" in note for note in after)


class Planted:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_code_in_the_metadata_is_refused_by_name(tmp_path: Path) -> None:
    save(tmp_path / "a", state())
    metadata(tmp_path / "a", lambda held: setattr(held, "planner_data", Planted(tmp_path / "made")))
    with pytest.raises(DamagedCheckpointError, match=r"\.metadata names posix.mkdir.*if you trust it"):
        read(tmp_path / "a")
    assert not (tmp_path / "made").exists()


class Odd:
    """A class that the package doesn't know."""


def test_code_in_an_entry_never_runs(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(save(tmp_path / "a", state(mine={"odd": Odd(), "plain": 3}, other=4)))
    assert checkpoint.unreadable() == {"mine": f"{__name__}.Odd"}
    assert checkpoint.client_state()[1] == {"other": 4}
    held = state()
    held["optim"]["param_groups"][0]["lr"] = Odd()
    with pytest.raises(DamagedCheckpointError, match=r"Odd as 'optim.param_groups.0.lr'.*save it as plain"):
        open_checkpoint(save(tmp_path / "b", held))
    held["optim"]["param_groups"][0]["lr"] = Planted(tmp_path / "made")
    with pytest.raises(DamagedCheckpointError, match=r"distcp holds an object of class posix\.mkdir"):
        open_checkpoint(save(tmp_path / "c", held))
    assert not (tmp_path / "made").exists()


def _chunk(held: Any, key: str) -> Any:
    return held.state_dict_metadata[key].chunks


def _place(held: Any, key: str) -> Any:
    return next(place for index, place in held.storage_data.items() if index.fqn == key)


KEY = "optim.state.w.exp_avg"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda held: _chunk(held, "model.w").clear(),
            "doesn't list the chunks of a whole tensor for 'model.w': pieces cover 0",
        ),
        (lambda held: _chunk(held, KEY).clear(), "whole tensor for 'optim.state.w.exp_avg'"),
        (lambda held: held.storage_data.clear(), "doesn't say in which file"),
        (
            lambda held: setattr(_place(held, KEY), "relative_path", "../b"),
            "can't be the name of a file in this folder",
        ),
        (lambda held: setattr(_place(held, KEY), "offset", -1), "at byte -1"),
        (lambda held: setattr(_place(held, KEY), "relative_path", "__9_0.distcp"), "__9_0.distcp is missing"),
        (lambda held: setattr(_place(held, KEY), "transform_descriptors", ["zstd"]), "extensions of torch's"),
        (lambda held: setattr(_place(held, KEY), "offset", _place(held, "optim.state.w.step").offset), "a.*distcp"),
        (
            lambda held: setattr(held.state_dict_metadata["model.w"], "size", torch.Size((4, 7))),
            "whole tensor for 'model.w'",
        ),
        (lambda held: setattr(held, "state_dict_metadata", 3), "isn't the metadata of a checkpoint"),
    ],
)
def test_metadata_that_contradicts_the_files(change: Callable[[Any], object], told: str, tmp_path: Path) -> None:
    save(tmp_path / "a", state())
    metadata(tmp_path / "a", change)
    with pytest.raises(UniversalCheckpointError, match=told) as caught:
        refuse_refused(tmp_path / "a")
    assert str(tmp_path / "a") in str(caught.value)


def refuse_refused(folder: Path) -> None:
    """Read all; raise what the catalog would refuse later."""
    for parameter in open_checkpoint(folder).parameters.values():
        if parameter.refused:
            raise UnsupportedError("; ".join(parameter.refused.values()))
    read(folder)


def test_overlapping_chunks(tmp_path: Path) -> None:
    write_chunks(tmp_path / "a", {"model.w": Grid(WEIGHT, ((2,), ()))})
    metadata(tmp_path / "a", lambda held: setattr(_chunk(held, "model.w")[0], "sizes", torch.Size((3, 6))))
    with pytest.raises(DamagedCheckpointError, match="overlap without being equal"):
        read(tmp_path / "a")


def test_truncated_and_missing_files(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", state())
    (shard,) = folder.glob("*.distcp")
    content = shard.read_bytes()
    shard.write_bytes(content[:-100])
    with pytest.raises(DamagedCheckpointError, match=r"\.distcp is truncated: .*take another checkpoint"):
        read(folder)
    shard.unlink()
    with pytest.raises(DamagedCheckpointError, match=r"\.distcp is missing"):
        read(folder)
    shard.write_bytes(content)
    for cut in (0, 10, 500):
        (tmp_path / "a" / ".metadata").write_bytes((folder / ".metadata").read_bytes()[:cut])
        with pytest.raises(DamagedCheckpointError, match=r"\.metadata"):
            read(folder)


def test_what_another_form_of_file_or_tensor_needs_is_said(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", {"model": {"w": WEIGHT}}, serialization_format=SerializationFormat.SAFETENSORS)
    with pytest.raises(UnsupportedError, match=r"SerializationFormat\.TORCH_SAVE"):
        read(folder)
    with pytest.raises(UnsupportedError, match="make the tensor contiguous"):
        read(save(tmp_path / "b", {"model": {"w": WEIGHT.t()}}))
    two = {"model": {"w": WEIGHT}, "a": state()["optim"], "b": state()["optim"]}
    with pytest.raises(UnsupportedError, match="holds 2 optimizers"):
        read(save(tmp_path / "c", two))
    with pytest.raises(UnsupportedError, match="doesn't tell which tensors are the model's"):
        read(save(tmp_path / "d", {"encoder": {"w": WEIGHT}, "decoder": {"w": WEIGHT}}))


def test_an_altered_byte_of_a_small_entry_is_found(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", state())
    (shard,) = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    place = content.index(WEIGHT.numpy().tobytes())
    content[place] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="CRC"):
        read(folder)


def test_a_metadata_of_an_older_torch(tmp_path: Path) -> None:
    """Torch 2.0 kept the properties of tensors elsewhere, under the same names."""
    save(tmp_path / "a", state())
    content = (tmp_path / "a" / ".metadata").read_bytes()
    held = pickle.loads(content)
    older = "torch.distributed._shard.sharded_tensor.metadata"
    out = io.BytesIO()

    class Older(pickle._Pickler):  # type: ignore[name-defined, misc]
        def save_global(self, obj: Any, name: str | None = None) -> None:
            renamed = {"TensorProperties": "TensorProperties", "_MEM_FORMAT_ENCODING": "MEM_FORMAT_ENCODING"}
            if getattr(obj, "__name__", "") in renamed:
                self.write(f"c{older}\n{renamed[obj.__name__]}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    Older(out, 4).dump(held)
    assert older.encode() in out.getvalue()
    (tmp_path / "a" / ".metadata").write_bytes(out.getvalue())
    assert torch.equal(read(tmp_path / "a")["w/fp32"], WEIGHT.flatten())


def test_verify_sees_every_altered_byte_of_a_chunk(tmp_path: Path) -> None:
    folder = save(tmp_path / "a", state())
    (shard,) = folder.glob("*.distcp")
    content = shard.read_bytes()
    sound = verify(folder)
    assert (sound.problems, sound.others, sound.global_steps) == ((), (), 3)
    assert sound.unchecked == (folder / ".metadata").stat().st_size  # which has no sum
    assert sound.verdict == "unproven"
    for place in range(0, len(content), 97):
        shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert verify(folder).verdict == "damaged", place
    shard.unlink()
    assert shard.name in [problem.file for problem in verify(folder).problems]


def test_a_conversion_compares_the_sums_of_chunks(tmp_path: Path) -> None:
    weight, groups = torch.arange(2.0**15), state()["optim"]["param_groups"]
    optim = {"state": {"w": {"momentum_buffer": weight + 1}}, "param_groups": groups}
    large = {"model": {"w": weight}, "optim": optim}
    folder = save(tmp_path / "a", large)
    view = UniversalView.of(open_checkpoint(folder))
    assert convert(view, tmp_path / "u").bytes_checked >= 2 * 4 * 2**15
    (shard,) = folder.glob("*.distcp")
    content = bytearray(shard.read_bytes())
    content[content.index(weight.numpy().tobytes()) + 1000] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match="CRC-32"):
        convert(UniversalView.of(open_checkpoint(folder)), tmp_path / "v")
    assert not (tmp_path / "v").exists()


def test_retention_leaves_it_alone(tmp_path: Path) -> None:
    save(tmp_path / "step-1", state())
    assert checkpoints_in(tmp_path) == []


def test_a_sequence_has_names_with_numbers_in_both_forms(tmp_path: Path) -> None:
    for number, forms in enumerate(({"params": ["0.w"], "lr": 0.5}, None)):
        held = {"0.w": {"exp_avg": WEIGHT + 1}}
        flat = {"state.0.w.exp_avg": WEIGHT + 1, "param_groups.0.w.lr": 0.5}
        optim = {"state": held, "param_groups": [forms]} if forms else flat
        checkpoint = open_checkpoint(save(tmp_path / str(number), {"model": {"0.w": WEIGHT}, "optim": optim}))
        assert checkpoint.groups[0].names == ("0.w",)
        assert checkpoint.groups[0].hyperparameters == {"lr": 0.5}
        assert checkpoint.parameters["0.w"].states == {"fp32": "F32", "exp_avg": "F32"}


def test_a_record_that_contradicts_the_folder_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", state())
    convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "b", DcpOutput())
    assert open_checkpoint(tmp_path / "b").groups == open_checkpoint(tmp_path / "a").groups
    metadata(tmp_path / "b", lambda held: held.state_dict_metadata.pop(KEY))
    with pytest.raises(DamagedCheckpointError, match="other parameters or states"):
        open_checkpoint(tmp_path / "b")
    torch_reads = {"model": {"w": torch.zeros(4, 6)}, "train_state": {"step": None}}
    dcp.load(torch_reads, checkpoint_id=tmp_path / "b", no_dist=True)
    assert torch.equal(torch_reads["model"]["w"], WEIGHT)
    assert torch_reads["train_state"]["step"] == 3


def test_a_conversion_of_weights_alone_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "a", {"model": {"w": WEIGHT}})
    with pytest.raises(MismatchError, match="holds no optimizer state"):
        convert(UniversalView.of(open_checkpoint(tmp_path / "a")), tmp_path / "b", DcpOutput())


def test_a_folder_of_megatron_core_is_told_from_others(tmp_path: Path) -> None:
    save(tmp_path / "a", state())
    torch.save({}, tmp_path / "a" / "common.pt")
    with pytest.raises(DamagedCheckpointError, match=r"metadata\.json is missing, which Megatron-Core writes last"):
        open_checkpoint(tmp_path / "a")
