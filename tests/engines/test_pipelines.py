"""Pipeline engines as sources and targets, in real engines: bit-exact state, and training that goes on along the same losses.

DeepSpeed's universal checkpoints keep the pipeline's names, so that a pipeline's run never becomes a plain one's, and with it
never ZeRO-3; a bf16 pipeline without ZeRO can't even be resumed where it was saved (``KeyError: 0``).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree

import pytest
import torch
from checkpoints import LAST_STEP, STEP, Source, differences, warnings_of

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine, train
from ucp_deepspeed.transfer import FileReader, gather
from ucp_deepspeed.transfer.conversion import convert

BOUND = {"fp32": 2e-5, "bf16": 3e-2}
"""Largest accepted difference of a loss near 3.9 where sums run in another order; see `test_every_stage_change`."""

UNCLIPPED = {"gradient_clipping": 0.0}
"""In fp32 without ZeRO, DeepSpeed leaves the later stages' norms and biases out of the gradient norm, and counts a tied weight
once for each stage (``runtime/utils.py::clip_grad_norm_``): with clipping, stages would train differently."""

GRAD_FP32 = UNCLIPPED | {"data_types": {"grad_accum_dtype": "fp32"}}
ZERO_0, ZERO_1, ZERO_2, ZERO_3 = ({"stage": stage} for stage in range(4))
UNTIED = {"layers": 3}

SOURCES = {
    "tied-zero1-bf16": (Run("gpt", pp=2, zero=ZERO_1, precision="bf16", config=UNCLIPPED), 4, "zero-1/2"),
    "tied-zero0-bf16": (Run("gpt", pp=2, zero=ZERO_0, precision="bf16", config=UNCLIPPED), 4, "bf16-optimizer"),
    "tied-zero0-fp32": (Run("gpt", pp=2, tp=2, zero=ZERO_0, config=UNCLIPPED), 4, "plain"),
    "tied-plain-model": (Run("gpt", tp=2, zero=ZERO_3, config=UNCLIPPED), 4, "zero-3"),
    "untied-uneven-fp32": (
        Run("llama", UNTIED, pp=4, zero=ZERO_1, partition="uniform", config=UNCLIPPED),
        4,
        "zero-1/2",
    ),
    "untied-tp2-bf16": (Run("llama", UNTIED, tp=2, pp=2, zero=ZERO_1, precision="bf16", config=GRAD_FP32), 4, None),
}

TARGETS = {
    "one-stage": (Run(pp=1, zero=ZERO_1), 2),
    "four-stages": (Run(pp=4, zero=ZERO_1, partition="uniform"), 4),
    "tp2-pp2": (Run(pp=2, tp=2, zero=ZERO_1), 4),
    "no-zero": (Run(pp=2, zero=ZERO_0), 4),
    "plain-zero0": (Run(zero=ZERO_0), 1),
    "plain-zero2": (Run(tp=2, zero=ZERO_2), 2),
    "plain-zero3": (Run(zero=ZERO_3), 4),
}

RESET = {"enabled": True, "optimizer_states": "reset"}

GetSource = Callable[[str, Run, int], Source]
Ranks = Callable[[int], RankPool]


def like(target: Run, source: Run) -> Run:
    """The target's topology for the source's model."""
    return replace(target, model=source.model, size=source.size, precision=source.precision, config=UNCLIPPED)


@pytest.mark.covers(
    "megatron_core_gpt", "megatron_core_llama", shows="pipelines, as plain models and back, state and losses"
)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("origin", SOURCES)
def test_state_is_bit_exact_and_training_goes_on(
    origin: str, target: str, source: GetSource, ranks: Ranks, tmp_path: Path
) -> None:
    """Each source to each target; of these pairs DeepSpeed's universal load manages those within ZeRO-1 and pipelines."""
    run, world_size, form = SOURCES[origin]
    saved = source(origin, run, world_size)
    wanted, target_world = TARGETS[target]

    outcome = ranks(target_world).run(
        train,
        like(wanted, run),
        LAST_STEP,
        load=str(saved.folder),
        save=str(tmp_path),
        save_tag="again",
        save_first=True,
    )

    assert differences(saved.folder / f"global_step{STEP}", tmp_path / "again") == []
    report = outcome[0].report
    assert report is not None or origin == "untied-uneven-fp32"  # one of its targets is the same
    assert report is None or form is None or report.source.startswith(f"deepspeed {form} ")
    gaps = [abs(outcome[0].losses[step] - saved.losses[step]) for step in range(STEP + 1, LAST_STEP + 1)]
    assert max(gaps) <= BOUND[run.precision], (gaps, outcome[0].losses, saved.losses)


def test_parameter_groups_follow_the_parameters(source: GetSource, ranks: Ranks, tmp_path: Path) -> None:
    """Each stage numbers its own groups. (A stage without a parameter of some group hangs DeepSpeed's gradient norm.)"""
    run = Run("gpt", pp=2, zero=ZERO_1, groups="decay")
    saved = source("tied-decay", run, 4)
    groups = open_checkpoint(saved.folder / f"global_step{STEP}").groups
    assert [(group.hyperparameters["weight_decay"], len(group.names)) for group in groups] == [(0.1, 10), (0.0, 18)]
    for number, target in enumerate((replace(run, pp=None, zero=ZERO_3), replace(run, pp=1))):
        again = f"again{number}"
        ranks(2).run(train, target, STEP, load=str(saved.folder), save=str(tmp_path), save_tag=again, save_first=True)
        assert differences(saved.folder / f"global_step{STEP}", tmp_path / again) == []


@pytest.mark.nccl_like
@pytest.mark.parametrize("origin", SOURCES)
def test_same_topology_continues_bit_for_bit(origin: str, source: GetSource, ranks: Ranks) -> None:
    """DeepSpeed loads what it can load by itself; a bf16 pipeline without ZeRO takes the universal path."""
    run, world_size, _ = SOURCES[origin]
    saved = source(origin, run, world_size)
    for mode in ("auto", "always"):
        again = replace(run, universal={"enabled": True, "load": mode})
        for rank, found in enumerate(ranks(world_size).run(train, again, LAST_STEP, load=str(saved.folder))):
            expected = {step: loss for step, loss in saved.outcomes[rank].losses.items() if step > STEP}
            assert found.losses == expected
            assert (found.report is not None) == (mode == "always" or origin == "tied-zero0-bf16")


@pytest.mark.parametrize("origin", ["tied-zero1-bf16", "tied-zero0-bf16", "untied-uneven-fp32"])
def test_saved_without_the_plugin(origin: str, source: GetSource, ranks: Ranks, tmp_path: Path) -> None:
    """Tied layers and the order of a bf16 pipeline's flat groups are found without a manifest."""
    run, world_size, _ = SOURCES[origin]
    saved = source(origin, run, world_size)
    stock = copytree(saved.folder, tmp_path / "stock")
    (stock / f"global_step{STEP}" / MANIFEST_NAME).unlink()
    assert differences(saved.folder / f"global_step{STEP}", stock / f"global_step{STEP}") == []


def test_stage_0_in_fp32_names_no_parameters(source: GetSource, tmp_path: Path) -> None:
    run, world_size, _ = SOURCES["tied-zero0-fp32"]
    saved = source("tied-zero0-fp32", run, world_size)
    stock = copytree(saved.folder, tmp_path / "stock")
    (stock / f"global_step{STEP}" / MANIFEST_NAME).unlink()
    assert "which layers a pipeline stage held, or shared, isn't recorded" in str(open_checkpoint(stock).lacking)


def test_weights_of_a_stage_0_that_names_no_parameters(ranks: Ranks, tmp_path: Path) -> None:
    """They load on any topology; the rest is refused there, and goes on where it was saved."""
    run = Run("llama", UNTIED, pp=2, zero=ZERO_0, precision="fp16", partition="uniform", config=UNCLIPPED)
    ranks(2).run(train, replace(run, universal=None), 2, save=str(tmp_path / "a"), save_tag="step")
    target, weights = replace(run, pp=1, zero=ZERO_1), weights_of(tmp_path / "a")
    ways = [
        (target, {"load_module_only": True}),
        (target, {"load_optimizer_states": False}),
        (replace(target, universal=RESET), {}),
    ]
    for number, (wanted, options) in enumerate(ways):
        saving = {"save": str(tmp_path / f"b{number}"), "save_tag": "step", "save_first": True}
        ranks(1).run(train, wanted, 0, load=str(tmp_path / "a"), options=options, **saving)
        loaded = weights_of(tmp_path / f"b{number}")
        assert loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)
    with pytest.raises(RankError) as caught:
        ranks(1).run(train, target, 2, load=str(tmp_path / "a"))
    assert isinstance(caught.value.original, MismatchError)
    for way in ("load_module_only=True", '"optimizer_states": "reset"', "on the topology that saved it"):
        assert way in str(caught.value.original)
    on = {"save": str(tmp_path / "c"), "save_tag": "step", "save_first": True}
    [again, *_] = ranks(2).run(train, run, 4, load=str(tmp_path / "a"), **on)
    [moved] = ranks(1).run(train, target, 4, load=str(tmp_path / "c"))
    assert list(again.losses) == [3, 4] == list(moved.losses) and moved.report is not None
    # The first load was left to DeepSpeed, and the second, on another topology, goes on as that did.
    assert max(abs(again.losses[step] - moved.losses[step]) for step in (3, 4)) <= BOUND["bf16"]


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """Masters, or the weights that stand for them, in fp32."""
    view = UniversalView.of(open_checkpoint(folder))
    found = {}
    for name in view.parameters:
        dtype = {"F32": torch.float32, "F16": torch.float16}[view.parameters[name].states["fp32"]]
        flat = torch.empty(view.logical_shape(name), dtype=dtype).flatten()
        gather(view, name, "fp32", 0, flat, FileReader())
        found[name] = flat.float()
    return found


def test_converted_has_the_plain_names_and_resumes_as_a_pipeline(
    source: GetSource, ranks: Ranks, tmp_path: Path
) -> None:
    run, world_size, _ = SOURCES["tied-zero1-bf16"]
    saved = source("tied-zero1-bf16", run, world_size)
    convert(UniversalView.of(open_checkpoint(saved.folder)), tmp_path / "u" / "step")
    names = open_checkpoint(tmp_path / "u" / "step").parameters
    assert {"embedding.word_embeddings.weight", "decoder.layers.1.mlp.linear_fc1.bias"} <= names.keys()
    assert not [name for name in names if name[0].isdecimal() or name.startswith("tied_modules")]
    ranks(4).run(
        train,
        replace(run, pp=4),
        STEP,
        load=str(tmp_path / "u" / "step"),
        save=str(tmp_path),
        save_tag="again",
        save_first=True,
    )
    assert differences(saved.folder / f"global_step{STEP}", tmp_path / "again") == []


def test_a_missing_layer_file_is_named(source: GetSource, tmp_path: Path) -> None:
    run, world_size, _ = SOURCES["untied-tp2-bf16"]
    saved = source("untied-tp2-bf16", run, world_size)
    damaged = copytree(saved.folder / f"global_step{STEP}", tmp_path / "damaged")
    (damaged / "layer_03-model_01-model_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"layer_03-model_01-model_states\.pt"):
        open_checkpoint(damaged)
    (damaged / MANIFEST_NAME).unlink()
    with pytest.raises(DamagedCheckpointError, match="first of layer 3 on rank 1"):
        _ = open_checkpoint(damaged).parameters


def test_the_manifest_records_stages_and_names(source: GetSource) -> None:
    run, world_size, _ = SOURCES["tied-zero1-bf16"]
    saved = source("tied-zero1-bf16", run, world_size)
    manifest = json.loads((saved.folder / f"global_step{STEP}" / MANIFEST_NAME).read_text())
    first, last = manifest["parameter_groups"]
    assert len(first) == len(last) == 1
    tied = "tied_modules.embedding.word_embeddings.weight"
    assert tied in first[0] and tied in last[0]
    assert manifest["parameters"][tied]["logical_name"] == "embedding.word_embeddings.weight"
    assert manifest["layer_keys"] == {"0.word_embeddings.weight": tied}
    assert manifest["differing_copies"] == []  # two partitions each, cut at other elements


@pytest.mark.parametrize("partition", ["type:Layer", "uniform"])
def test_other_ways_to_cut_the_layers(partition: str, ranks: Ranks, tmp_path: Path) -> None:
    """Names carry the layer's number in the whole model, so that only which stage holds a layer changes."""
    source = Run("llama", UNTIED, pp=2, zero=ZERO_1, partition=partition, config=UNCLIPPED, groups="shuffled")
    ranks(2).run(train, source, STEP, save=str(tmp_path / "a"))
    target = replace(source, partition="parameters", groups="decay", universal={"enabled": True, "load": "always"})
    other = replace(target, groups="shuffled")
    ranks(2).run(train, other, STEP, load=str(tmp_path / "a"), save=str(tmp_path / "b"), save_first=True)
    assert differences(tmp_path / "a", tmp_path / "b") == []


def saved_with_other_copies(run: Run, folder: str) -> list[str]:
    """On a rank: change the last stage's copy of a buffer beside a tied weight, and save; returns the warnings."""
    engine = build_engine(run)
    module = engine.module.tied_modules["embedding"]
    module.register_buffer("beside", torch.ones(2) if engine.is_last_stage() else torch.zeros(2))
    return warnings_of(lambda: engine.save_checkpoint(folder))


def test_copies_of_a_buffer_that_differ(ranks: Ranks, tmp_path: Path) -> None:
    """Each stage has its own copy of a tied module's buffers. DeepSpeed saves the first stage's: a warning says so."""
    warnings = ranks(2).run(saved_with_other_copies, Run("gpt", pp=2, zero=ZERO_1), str(tmp_path / "b"))
    assert any("isn't trained in module 'embedding'" in line and line.endswith(": beside") for line in warnings[0])
