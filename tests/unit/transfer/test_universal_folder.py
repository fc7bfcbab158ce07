"""DeepSpeed's own universal folder as an output, beside the folder that DeepSpeed's tool makes of the same files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from deepspeed.checkpoint import ds_to_universal
from deepspeed.checkpoint.universal_checkpoint import SubparamShape
from deepspeed.runtime.fp16.loss_scaler import LossScalerBase
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from sketches import Sketch

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import ParameterGroup
from ucp_deepspeed.checkpoint.dcp.output import DcpOutput
from ucp_deepspeed.checkpoint.deepspeed.consolidated_output import ConsolidatedOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout.pattern import Replicate, Scale, Shard
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.processes import taking_part

SHAPES = {"words": (6, 4), "norm": (5,), "columns": (3, 8), "gate_up": (8, 4), "qkv": (16, 4)}
CUTS: Mapping[str, Any] = {"words": "rows", "columns": "columns", "gate_up": "gate_up"}

INFO = {
    "universal_checkpoint_version": 0.3,
    "original_vocab_size": 5,
    "vocabulary_parameter_patterns": ["words"],
    "tp_replicated_parameter_patterns": ["norm", "qkv"],
    "parameter_with_row_parallelism_patterns": ["columns"],
    "parameter_with_2_sub_params_cat_dim_0": ["gate_up"],
}
FUSED = {"parameter_with_sub_params": [{"patterns": ["qkv"], "shape": ((8, 4, 4), 4), "partition_dim": 0}]}


def native(folder: Path, info: Mapping[str, Any] = INFO, **run: Any) -> Path:
    """Write DeepSpeed's files of a small model by hand; return the tag folder."""
    generator = torch.Generator().manual_seed(7)
    names = ("fp32", "exp_avg", "exp_avg_sq")
    values = {(name, s): torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for s in names}
    parameters = tuple(
        NativeParameter(
            name,
            values[name, "fp32"],
            {state: values[name, state] for state in names[1:]},
            cut=CUTS.get(name, "replicated") if run.get("tp", 1) > 1 else "replicated",
        )
        for name in SHAPES
    )
    frozen = NativeParameter("held", torch.randn(3, 2, generator=generator), frozen=True)
    model = NativeModel((*parameters, frozen), {"mask": torch.arange(4)}, aliases={"tied": "norm"})
    return write_native(
        folder, model, NativeRun(**run), client_state={"universal_checkpoint_info": dict(info), "epoch": 3}
    )


def by_the_tool(source: Path, destination: Path) -> Path:
    """Run DeepSpeed's ``ds_to_universal`` in this process."""
    given = {"input_folder": str(source), "output_folder": str(destination), "keep_temp_folder": False, "strict": False}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    ds_to_universal.main(argparse.Namespace(**given, **workers, inject_missing_state=True))
    return destination


def written(source: Path, destination: Path) -> Path:
    convert(UniversalView.of(open_checkpoint(source)), destination, ConsolidatedOutput())
    return destination


def atoms(folder: Path) -> dict[str, Any]:
    """Return all files of parameters, in one form: ZeRO-3's have no marks and no shape."""
    found = {}
    for path in sorted((folder / "zero").glob("*/*.pt")):
        held = torch.load(path, weights_only=False)
        marks = {key: value for key, value in held.items() if key != "param"} if isinstance(held, dict) else {}
        value = held["param"] if isinstance(held, dict) else held
        found[f"{path.parent.name}/{path.name}"] = (marks, value)
    return found


def check_alike(found: tuple[dict[str, Any], Any], wanted: tuple[dict[str, Any], Any], flat: bool) -> None:
    """Compare two atoms; what the tool doesn't tell, or tells of what no rank shares, is left out."""
    (marks, value), (told, expected) = found, wanted
    if isinstance(expected, torch.Tensor):
        assert value.dtype == expected.dtype
        assert torch.equal(value.reshape(-1) if flat else value, expected)
    else:
        assert (type(value), value) == (type(expected), expected)
    for key in marks.keys() | told.keys() if not flat else ():
        one, other = (held.get(key, 0 if key == "cat_dim" else None) for held in (marks, told))
        if isinstance(other, SubparamShape):
            assert isinstance(one, SubparamShape)
            one, other = ((each.shape, each.partition_dim) for each in (one, other))
        assert one == other, key


@pytest.mark.parametrize(
    ("info", "run"),
    [
        (INFO, {"tp": 2, "dp": 2, "stage": 1}),
        (INFO, {"tp": 1, "dp": 2, "stage": 2, "precision": "fp16", "integer_step": True}),
        ({**INFO, "tp_replicated_parameter_patterns": ["norm"], **FUSED}, {"dp": 1, "stage": 1, "precision": "bf16"}),
        ({}, {"dp": 2, "stage": 3, "precision": "fp16", "dynamic_scale": False}),
    ],
    ids=["tensor parallel", "fp16", "sub-parameters", "zero-3"],
)
def test_the_files_hold_what_those_of_the_tool_do(info: dict[str, Any], run: dict[str, Any], tmp_path: Path) -> None:
    source = native(tmp_path / "a", info, **run)
    ours, theirs = written(source, tmp_path / "ours"), by_the_tool(source, tmp_path / "u" / "theirs")
    found, wanted, flat = atoms(ours), atoms(theirs), run["stage"] == 3
    others = {f"{name}/fp32.pt" for name in ("mask", "held", "tied")}  # the tool makes atoms of all that the module has
    steps = {name for name in found if name.endswith("/step.pt")} if flat else set()
    assert found.keys() - steps == wanted.keys() - others and len(found) == 4 * len(SHAPES)
    for name in found.keys() - steps:
        check_alike(found[name], wanted[name], flat)
    one, other = (torch.load(folder / "zero" / "optimizer_state.pt", weights_only=False) for folder in (ours, theirs))
    kept = {"loss_scaler", "dynamic_loss_scale"} if run.get("precision") == "fp16" else set()
    assert one.keys() == kept | {"ds_version", "param_groups", "optimizer_state_dict"} and kept <= other.keys()
    if kept:
        assert isinstance(one["loss_scaler"], LossScalerBase)
        assert type(one["loss_scaler"]) is type(other["loss_scaler"])
        assert vars(one["loss_scaler"]) == vars(other["loss_scaler"])
    for key in ("lr", "betas", "weight_decay"):
        assert [group[key] for group in one["param_groups"]] == [group[key] for group in other["param_groups"]]
    if flat:
        step, expected = (held["optimizer_state_dict"]["state"][0]["step"] for held in (one, other))
        assert (type(step), step) == (type(expected), expected)


def test_older_engines_at_stage_3_need_tensors_alone(tmp_path: Path) -> None:
    source = native(tmp_path / "a", {}, dp=2, stage=3, precision="bf16")
    theirs = atoms(by_the_tool(source, tmp_path / "u" / "theirs"))
    command = ["convert", str(source), str(tmp_path / "ours"), "--to", "deepspeed-universal", "--zero"]
    assert CliRunner().invoke(main, [*command, "3"]).exit_code == 0
    ours = atoms(tmp_path / "ours" / "global_step5")
    assert len(theirs) == 3 * len(SHAPES)
    for name, (_, tensor) in theirs.items():
        assert isinstance(ours[name][1], torch.Tensor) and torch.equal(ours[name][1], tensor)
        assert type(torch.load(tmp_path / "ours" / "global_step5" / "zero" / name, weights_only=False)) is torch.Tensor
    views = [UniversalView.of(open_checkpoint(path)) for path in (source, tmp_path / "ours")]
    assert compare(*views) == []
    refused = CliRunner().invoke(main, [*command, "0"])
    assert refused.exit_code == 2 and "at ZeRO stages 1 to 3" in refused.output
    refused = CliRunner().invoke(main, [*command, "3", "--tp", "2"])
    assert refused.exit_code == 2 and "for --to deepspeed" in refused.output


def test_both_kinds_of_engines_find_the_state_of_the_run(tmp_path: Path) -> None:
    source = native(tmp_path / "a", tp=2, dp=2, stage=1, precision="bf16")
    folder = written(source, tmp_path / "u")
    plain, sliced = (
        torch.load(folder / f"{name}mp_rank_00_model_states.pt", weights_only=False) for name in ("", "zero_pp_rank_0_")
    )
    saved = torch.load(source / "mp_rank_00_model_states.pt", weights_only=False)
    assert plain.keys() == sliced.keys() and plain["mp_world_size"] == 1 and plain["epoch"] == 3
    for key in (
        "global_steps",
        "skipped_steps",
        "global_samples",
        "dp_world_size",
        "lr_scheduler",
        "ds_config",
        "ds_version",
    ):
        assert plain[key] == sliced[key] == saved[key], key
    assert torch.equal(plain["module"]["mask"], torch.arange(4))
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        ["mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_model_states.pt", "zero"]
    )


def test_nothing_is_lost_when_the_package_reads_it(tmp_path: Path) -> None:
    """Also in copies without links, and by way of other forms."""
    source = UniversalView.of(open_checkpoint(native(tmp_path / "a", tp=2, dp=2, stage=1, precision="fp16")))
    places = {"direct": source}
    for name, output in (("dcp", DcpOutput()), ("ours", None)):
        convert(source, tmp_path / name, output)
        places[name] = UniversalView.of(open_checkpoint(tmp_path / name))
    for name, view in places.items():
        convert(view, tmp_path / f"{name}-u", ConsolidatedOutput())
        found = UniversalView.of(open_checkpoint(tmp_path / f"{name}-u"))
        assert compare(source, found) == []
        assert found.patterns == source.patterns
        assert found.tied == source.tied == {"tied": "norm"} and found.parameters["held"].kind == "frozen"
        assert found.vocabulary_size == source.vocabulary_size == 5
        assert found.checkpoint.run == source.checkpoint.run
        held = open_checkpoint(tmp_path / f"{name}-u").client_state()[1]
        assert held["epoch"] == 3
        check = [path.relative_to(tmp_path / "direct-u") for path in (tmp_path / "direct-u" / "zero").rglob("*.pt")]
        assert all(
            (tmp_path / f"{name}-u" / each).read_bytes() == (tmp_path / "direct-u" / each).read_bytes()
            for each in check
        )


@pytest.mark.parametrize("count", [2, 3])
def test_several_ranks_write_it_to_the_same_bytes(count: int, tmp_path: Path) -> None:
    source = native(tmp_path / "a", tp=2, dp=2, stage=1)
    alone, store = written(source, tmp_path / "alone"), dist.HashStore()

    def one(rank: int) -> None:
        with taking_part(store, rank, count) as ranks:
            convert(UniversalView.of(open_checkpoint(source)), tmp_path / "u", ConsolidatedOutput(), ranks=ranks)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
    for path in alone.rglob("*.pt"):
        assert path.read_bytes() == (tmp_path / "u" / path.relative_to(alone)).read_bytes()


class Held(Sketch):
    """A sketch of a checkpoint without client state."""

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        return "", {}


def changed(name: str, **changes: Any) -> Held:
    """Return a checkpoint of two parameters, one of them with other numbers or states."""
    found = Held({"a": (4, 2), "b": (4, 2)})
    found.parameters = {**found.parameters, name: replace(found.parameters[name], **changes)}
    return found


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        (lambda: Held({"a/b": (2,)}), "a/b: no folder can have this name"),
        (lambda: Held({"x" * 256: (2,)}), "no folder can have this name"),
        (lambda: changed("a", scalars={"step": 3.0, "mu": 0.5}), "a: its optimizer's state has the number 'mu'"),
        (
            lambda: changed("a", scalars={"step": 2.0}),
            "a and b, both of parameter group 0, have different states",
        ),
        (
            lambda: changed("b", states={"fp32": "F32"}),
            "a and b, both of parameter group 0, have different",
        ),
    ],
    ids=["slash", "long", "number", "steps", "states"],
)
def test_what_the_form_cannot_hold_is_refused(checkpoint: Callable[[], Held], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message) as caught:
        ConsolidatedOutput().plan(UniversalView.of(checkpoint()))
    assert "--to universal and --to dcp keep it" in str(caught.value)


def test_parameters_of_no_group_are_refused() -> None:
    found = Held({"a": (4,), "b": (4,)}, groups=(ParameterGroup(("a",), {"lr": 0.1}),))
    with pytest.raises(UnsupportedError, match="b: it is in no parameter group"):
        ConsolidatedOutput().plan(UniversalView.of(found))


def test_the_notes_say_what_deepspeed_does_otherwise() -> None:
    groups = (ParameterGroup(("a",), {"lr": 0.1}), ParameterGroup(("b",), {"lr": 0.2}))
    found = Held({"a": (4, 2), "b": (4,), "c": (3,)}, {"c": "buffer"}, groups=groups)
    found.patterns = {"b": Replicate(scale=Scale())}
    notes = "\n".join(ConsolidatedOutput().notes(UniversalView.of(found)))
    for told in (
        "buffers and frozen parameters, 1 in all",
        "Adam's states alone into a ZeRO-3 engine, and here are: exp_avg",
        "gives all 2 groups of a ZeRO-3 engine the hyper-parameters and steps of the first",
        "nothing tells how its ranks would share 1 parameters, such as a",
        "can't share 1 parameters among tensor-parallel ranks, such as b",
    ):
        assert told in notes
    plain = Held({"a": (4, 2)})
    plain.parameters = {
        "a": replace(plain.parameters["a"], states=dict.fromkeys(("fp32", "exp_avg", "exp_avg_sq"), "F32"))
    }
    plain.patterns = {"a": Shard(0)}
    assert ConsolidatedOutput().notes(UniversalView.of(plain)) == []


def test_the_command_names_the_folder_in_the_file_that_deepspeed_reads(tmp_path: Path) -> None:
    source = native(tmp_path / "a", dp=2, stage=1)
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "latest").write_text("other")
    command = ["convert", str(source), str(tmp_path / "u"), "--to", "deepspeed-universal", "--quiet"]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0 and "buffers and frozen parameters, 2 in all" in done.output
    assert (tmp_path / "u" / "latest_universal").read_text() == "global_step5"
    assert (tmp_path / "u" / "latest").read_text() == "other"
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2 and "exists already" in again.output
    assert CliRunner().invoke(main, ["verify", str(tmp_path / "u" / "global_step5")]).exit_code == 0


@pytest.mark.parametrize(
    "told", ["{", 5, '{"patterns": {"norm": {"pattern": "other"}}, "vocabulary_size": 5, "may_be_buffers": []}']
)
def test_damaged_additions_are_named(told: Any, tmp_path: Path) -> None:
    folder = written(native(tmp_path / "a", stage=1), tmp_path / "u")
    path = folder / "mp_rank_00_model_states.pt"
    saved = torch.load(path, weights_only=False)
    torch.save(saved | {"ucp_told": told}, path)
    with pytest.raises(DamagedCheckpointError, match=r"mp_rank_00_model_states.pt: 'ucp_told' can't be parsed"):
        open_checkpoint(folder)


def test_files_of_two_runs_are_told_apart_from_one_file_with_two_names(tmp_path: Path) -> None:
    folder = by_the_tool(native(tmp_path / "a", stage=1), tmp_path / "u" / "b")
    (folder / "zero_pp_rank_0_mp_rank_00_model_states.pt").write_bytes(
        (folder / "mp_rank_00_model_states.pt").read_bytes()
    )
    with pytest.raises(DamagedCheckpointError, match="holds the files of two runs"):
        open_checkpoint(folder)


def test_it_may_lie_in_a_store(tmp_path: Path) -> None:
    source, run = native(tmp_path / "a", dp=2, stage=1), CliRunner().invoke
    done = run(main, ["convert", str(source), "memory://universal-folder/u", "--to", "deepspeed-universal"])
    assert done.exit_code == 0 and f"to {4 * len(SHAPES) + 3} files" in done.output, done.output
    found = run(main, ["diff", str(source), "memory://universal-folder/u"])
    assert found.exit_code == 0, found.output
