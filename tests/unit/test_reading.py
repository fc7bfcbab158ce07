"""Looking into checkpoints from Python: metadata, whole tensors and slices, against the brute-force writer's whole tensors."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest, write_native

import ucp_deepspeed
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.config import parse_config
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DamagedCheckpointError,
    NotInCheckpointError,
    SpecError,
    UnsupportedError,
)
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Box, Layout, Topology
from ucp_deepspeed.reading import OpenCheckpoint
from ucp_deepspeed.transfer import FileReader
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.copying import gather

GOLDEN = Path(__file__).parents[1] / "golden"

PARAMETERS: dict[str, tuple[tuple[int, ...], Cut]] = {
    "0.embed.weight": ((12, 6), "rows"),
    "1.up.weight": ((8, 5), "gate_up"),
    "1.down.weight": ((5, 4), "columns"),
    "1.scale": ((), "replicated"),
    "2.norm.weight": ((7,), "replicated"),
    "2.cube": ((4, 3, 2), "rows"),
    "2.frozen": ((4, 3), "rows"),
}

SPEC = Spec.parse(
    {
        "family": "small",
        "rules": [
            {"match": "0.embed.weight", "pattern": "shard", "dim": 0},
            {"match": "1.up.weight", "pattern": "shard", "dim": 0, "parts": [1, 1]},
            {"match": "1.down.weight", "pattern": "shard", "dim": 1},
            {"match": "*.scale", "pattern": "replicate"},
            {"match": "2.norm.weight", "pattern": "replicate"},
            {"match": "2.cube", "pattern": "shard", "dim": 0},
            {"match": "2.frozen", "pattern": "shard", "dim": 0},
        ],
    },
    "test",
)

RUNS = [NativeRun(tp=2, dp=2, stage=stage, precision="bf16") for stage in range(4)] + [
    NativeRun(tp=2, dp=2, stage=1, pp=2),
    NativeRun(dp=2, stage=3, precision="fp16"),
]

INDICES: list[Any] = [
    (),
    ...,
    0,
    -1,
    slice(1, 3),
    slice(None, None, 2),
    slice(3, 1),
    slice(-2, None),
    (slice(1, 4), slice(2, 3)),
    (..., 1),
    (slice(None), slice(1, 4, 2)),
    (1, ..., slice(0, 1)),
]


def small_model() -> NativeModel:
    """`PARAMETERS`, each element of each state with a value of its own, and a buffer."""
    generator = torch.Generator().manual_seed(2)
    parameters = []
    for name, (shape, cut) in PARAMETERS.items():
        master, moment, square = (torch.randn(shape, generator=generator) for _ in range(3))
        frozen = name == "2.frozen"
        states = {} if frozen else {"exp_avg": moment, "exp_avg_sq": square}
        parameters.append(NativeParameter(name, master, states, cut, frozen))
    return NativeModel(tuple(parameters), {"2.calls": torch.tensor(17)}, layers=3)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A folder with two tags, of which ``latest`` names the second."""
    run = NativeRun(tp=2, dp=2, stage=2)
    write_native(tmp_path, small_model(), run, "step1")
    state = {"epoch": 7, "seen": torch.arange(3)}
    write_native(tmp_path, small_model(), replace(run, steps=9), "step2", client_state=state)
    return tmp_path


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_each_state_of_each_parameter_is_read_whole_and_in_slices(run: NativeRun, tmp_path: Path) -> None:
    model = small_model()
    folder = write_native(tmp_path, model, run)
    if run.pp is not None or run.stage == 0:  # files alone don't name what the optimizer keeps, or which stage has what
        add_manifest(folder, model, run)
    with ucp_deepspeed.open_checkpoint(tmp_path, spec=SPEC) as opened:
        assert list(opened.parameters) == [*PARAMETERS, "2.calls"]
        for parameter in model.parameters:
            expected = {"fp32": parameter.fp32, **parameter.states}
            if parameter.frozen:
                expected = {"weight": parameter.fp32.to(run.dtype)}
            info = opened.parameters[parameter.name]
            assert dict(info.states) == {state: tensor.dtype for state, tensor in expected.items()}
            assert info.shape == tuple(parameter.fp32.shape)
            for state, tensor in expected.items():
                for index in INDICES:
                    check_slice(opened, parameter.name, state, index, tensor)
            assert torch.equal(opened.read(parameter.name), expected["weight" if parameter.frozen else "fp32"])
        assert opened.read("2.calls").item() == 17


def check_slice(opened: OpenCheckpoint, name: str, state: str, index: Any, tensor: torch.Tensor) -> None:
    """Compare a slice with torch's, or expect an error where torch refuses the index."""
    try:
        expected = tensor[index]
    except IndexError:
        with pytest.raises(NotInCheckpointError, match=f"{re.escape(name)} has shape"):
            opened.read(name, state, index)
        return
    found = opened.read(name, state, index)
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape), (name, state, index)
    assert torch.equal(found, expected), (name, state, index)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "expected a number above 0 (found 0)"),
        (-1, "expected a number above 0 (found -1)"),
        (3.5, "expected a whole number (found 3.5)"),
        ("x", "expected a whole number (found 'x')"),
        (True, "expected a whole number (found True)"),
    ],
)
def test_a_vocabulary_size_that_is_none(size: Any, words: str) -> None:
    """The words are those of the config block."""
    with pytest.raises(ConfigError, match=re.escape(f"vocabulary_size: {words}")):
        ucp_deepspeed.open_checkpoint(GOLDEN / "0.9.5" / "z0fp16_frozen-Adam", vocabulary_size=size)
    with pytest.raises(ConfigError, match=re.escape(f"universal_checkpoint.vocabulary_size: {words}")):
        parse_config({"universal_checkpoint": {"vocabulary_size": size}})


def test_a_slice_reads_its_own_bytes_alone(tmp_path: Path) -> None:
    write_native(tmp_path, small_model(), NativeRun(tp=2, dp=2, stage=1))
    view = UniversalView.of(ucp_deepspeed.open_checkpoint(tmp_path, spec=SPEC)._checkpoint, SPEC)
    target = torch.empty(6)
    box = Layout.around(view.logical_shape("0.embed.weight"), Box((7, 2), (9, 5)))
    count = gather(view, "0.embed.weight", "fp32", 0, target, FileReader(), box)
    assert torch.equal(target.view(2, 3), small_model()["0.embed.weight"].fp32[7:9, 2:5])
    assert count.bytes_read == 6 * 4
    assert [Path(path).name for path in count.files] == ["zero_pp_rank_0_mp_rank_01_optim_states.pt"]


def test_metadata(sharded: Path) -> None:
    opened = ucp_deepspeed.open_checkpoint(sharded, spec=SPEC)
    assert (opened.path, opened.form) == (sharded / "step2", "deepspeed zero-1/2")
    assert opened.topology == opened.saved_by == Topology(2, 1, 2, 2)
    assert (opened.run.precision, opened.run.ds_version, opened.run.loss_scale) == ("fp32", "0.19.8", None)
    assert opened.parameters["0.embed.weight"].scalars["step"] == 9
    assert opened.parameters["1.down.weight"].local_shapes == ((5, 2), (5, 2))
    assert opened.parameters["1.down.weight"].pattern == "shard on dimension 1"
    assert opened.parameters["2.frozen"].kind == "frozen"
    assert [len(group.names) for group in opened.groups] == [len(PARAMETERS) - 1]
    assert opened.groups[0].hyperparameters["weight_decay"] >= 0
    assert opened.client_state.keys() == {"epoch", "seen"}
    assert torch.equal(opened.client_state["seen"], torch.arange(3))
    assert (opened.lacking, opened.layouts_unknown, dict(opened.unrecorded), dict(opened.unreadable)) == (
        None,
        None,
        {},
        {},
    )
    assert repr(opened) == (
        f"<OpenCheckpoint {sharded}/step2: deepspeed zero-1/2, TP2·DP2 ZeRO-2, step 9, 8 parameters and buffers>"
    )


def test_a_universal_checkpoint_tells_of_the_run_that_it_came_from(sharded: Path, tmp_path: Path) -> None:
    native = ucp_deepspeed.open_checkpoint(sharded, spec=SPEC)
    assert native._view is not None
    convert(native._view, tmp_path / "universal")
    opened = ucp_deepspeed.open_checkpoint(tmp_path / "universal")
    assert (opened.topology, opened.saved_by) == (Topology(), Topology(2, 1, 2, 2))
    for name in PARAMETERS:
        assert torch.equal(opened.read(name), native.read(name))
    assert opened.client_state["epoch"] == 7


def test_tags(sharded: Path, tmp_path: Path) -> None:
    assert ucp_deepspeed.tags(sharded) == ["step1", "step2"]
    opened = [ucp_deepspeed.open_checkpoint(sharded, tag, SPEC) for tag in ucp_deepspeed.tags(sharded)]
    assert [each.run.global_steps for each in opened] == [5, 9]
    with pytest.raises(CheckpointNotFoundError, match="no folder at"):
        ucp_deepspeed.tags(tmp_path / "nowhere")
    with pytest.raises(CheckpointNotFoundError, match=r"no tag '3' in .*; tags there: step1, step2"):
        ucp_deepspeed.open_checkpoint(sharded, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("0.embe.weight",), "has no parameter or buffer '0.embe.weight'; did you mean 0.embed.weight?"),
        ((3,), "has no parameter or buffer 3; the names are in 'parameters'"),
        (("zzz",), "has no parameter or buffer 'zzz'; the names are in 'parameters'"),
        (("0.embed.weight", "exp_av"), "has no state 'exp_av' in "),
        (("0.embed.weight", "exp_av"), "; it has fp32, exp_avg, exp_avg_sq"),
        (("0.embed.weight", "step"), "; 'step' is a number, in its scalars"),
        (("2.frozen", "fp32"), "2.frozen (frozen) has no state 'fp32' in "),
        (("0.embed.weight", None, 12), "0.embed.weight has shape [12, 6]: index 12 leaves a dimension of 12"),
        (("0.embed.weight", None, (0, 0, 0)), "0.embed.weight has shape [12, 6]: an index of 3 dimensions leaves it"),
    ],
)
def test_what_is_not_there_is_told(asked: tuple[Any, ...], message: str, sharded: Path) -> None:
    with pytest.raises(NotInCheckpointError, match=re.escape(message)):
        ucp_deepspeed.open_checkpoint(sharded, spec=SPEC).read(*asked)


@pytest.mark.parametrize(
    "index",
    [
        *(slice(None, None, -1), True, "0", None, 1.5, (0, [1, 2]), [0, 1], range(2), b"a", (..., ...)),
        *(torch.tensor([1]), torch.tensor([1, 2]), torch.ones(1).numpy(), torch.tensor([1]).numpy()),
    ],
)
def test_indices_of_other_kinds(index: Any, sharded: Path) -> None:
    with pytest.raises(TypeError, match=r"^index .* (is neither an integer|has)"):
        ucp_deepspeed.open_checkpoint(sharded, spec=SPEC).read("0.embed.weight", None, index)


def test_without_layouts_all_but_whole_tensors_can_be_seen(sharded: Path) -> None:
    opened = ucp_deepspeed.open_checkpoint(sharded)
    assert opened.parameters["1.down.weight"].shape is None
    assert opened.parameters["1.down.weight"].local_shapes == ((5, 2), (5, 2))
    assert isinstance(opened.layouts_unknown, SpecError)
    with pytest.raises(SpecError):
        opened.read("0.embed.weight")
    with pytest.raises(SpecError):
        ucp_deepspeed.open_checkpoint(sharded, spec="megatron_core_gpt")


def test_a_state_of_no_elementwise_form_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = write_native(tmp_path, small_model(), NativeRun(stage=1))
    path = next(folder.glob("*optim_states.pt"))
    saved = torch.load(path, weights_only=False)
    base = saved["optimizer_state_dict"]["base_optimizer_state"]
    base["state"][0]["factors"] = torch.ones(3)
    torch.save(saved, path)
    opened = ucp_deepspeed.open_checkpoint(tmp_path)
    with pytest.raises(UnsupportedError, match=r"0.embed.weight/factors can't be read: "):
        opened.read("0.embed.weight", "factors")


def test_a_checkpoint_that_was_saved_again_is_not_mixed_with_the_new_one(tmp_path: Path) -> None:
    folder = write_native(tmp_path, small_model(), NativeRun(stage=1))
    opened = ucp_deepspeed.open_checkpoint(tmp_path)
    opened.read("0.embed.weight")
    path = next(folder.glob("*optim_states.pt"))
    torch.save(torch.load(path, weights_only=False), path)
    with pytest.raises(DamagedCheckpointError, match="was changed while it was read"):
        opened.read("0.embed.weight")


def test_neither_deepspeed_nor_megatron_is_needed() -> None:
    """Files that DeepSpeed wrote, which name its classes, in a process that can import none of it."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("deepspeed", "megatron", "transformers", "apex"):
            raise ImportError(f"{name} is not installed")
sys.meta_path.insert(0, Absent())
import ucp_deepspeed
for path in sys.argv[1:]:
    opened = ucp_deepspeed.open_checkpoint(path)
    for name, parameter in opened.parameters.items():
        assert all(opened.read(name, state) is not None for state in parameter.states)
    opened.client_state, opened.run, opened.groups
print(len(sys.argv) - 1, "read")
"""
    folders = sorted(map(str, GOLDEN.glob("*/*")))
    done = subprocess.run([sys.executable, "-c", code, *folders], capture_output=True, text=True, timeout=120)
    assert done.stdout == f"{len(folders)} read\n", done.stderr


def test_what_can_be_imported_is_listed() -> None:
    assert {"open_checkpoint", "tags"} <= set(dir(ucp_deepspeed))
    with pytest.raises(AttributeError, match="has no attribute 'open_checkpoints'"):
        ucp_deepspeed.open_checkpoints  # noqa: B018
