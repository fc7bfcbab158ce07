"""The catalog of a pipeline's files, against the brute-force writer. Tensor parallelism is in ``tests/matrix``."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native
from native_files.described import of_stage, stage_layers
from native_models import check_reads_back, group_decay, model_of, whole

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import Precision
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError
from ucp_deepspeed.layout import Layout, across_stages
from ucp_deepspeed.layout.layout import LocalTensor

SHAPES: dict[str, tuple[int, ...]] = {
    "tied_modules.words.embedding.weight": (11, 3),
    "tied_modules.words.gain": (1,),
    "2.up.weight": (5, 7),
    "2.norm.weight": (7,),
    "2.position": (5, 3),
    "3.up.weight": (5, 7),
    "3.norm.weight": (7,),
    "3.position": (5, 3),
    "4.tail": (2, 3, 2),
    "4.scale": (),
    "4.nothing": (0, 4),
}
"""Layers 0 and 5 use the tied module, layer 1 holds nothing, 2 and 3 are of one class."""

FROZEN = ("3.position",)
GROUPS = (("4.tail", "2.up.weight", "tied_modules.words.embedding.weight", "3.up.weight"),)
"""Not in the model's order, and not everything: the rest is in a second group."""


def pipeline_model() -> NativeModel:
    """`SHAPES`, with a frozen parameter, an empty one, buffers and a key without a value."""
    buffers = {"2.running": torch.arange(7.0), "4.calls": torch.tensor(17)}
    return replace(
        model_of(SHAPES, FROZEN),
        buffers=buffers,
        extra_state=("2.up._extra_state", "3.up._extra_state"),
        layers=6,
        tied={"words": (0, 5)},
    )


def two_groups() -> tuple[tuple[str, ...], ...]:
    left = [name for name in reversed(SHAPES) if name not in (*GROUPS[0], *FROZEN, "4.nothing")]
    return (*GROUPS, tuple(left))


RUNS: dict[str, NativeRun] = {
    **{
        f"{precision} zero-{stage} pp{pp} dp{dp}": NativeRun(
            dp=dp,
            stage=stage,
            precision=precision,  # type: ignore[arg-type]
            pp=pp,
        )
        for precision, stage in (("fp32", 1), ("bf16", 1), ("bf16", 0))
        for pp in (1, 2, 3)
        for dp in (1, 2, 3)
    },
    "last stage has the tied module only": NativeRun(stage=1, dp=2, pp=3, parts=(3, 2, 1)),
    "one layer on the first stage": NativeRun(stage=1, dp=2, pp=3, parts=(1, 2, 3)),
    "bf16 without zero, one layer on the first stage": NativeRun(precision="bf16", dp=2, pp=3, parts=(1, 3, 2)),
    "groups": NativeRun(stage=1, dp=2, pp=2, groups=two_groups()),
    "groups, bf16 without zero": NativeRun(precision="bf16", dp=3, pp=2, groups=two_groups()),
    "elastic": NativeRun(stage=1, dp=3, pp=2, elastic=True),
    "round robin": NativeRun(stage=1, dp=3, pp=2, round_robin=True),
    "aligned": NativeRun(stage=1, dp=2, precision="bf16", pp=2, parameter_alignment=True),
    "without frozen": NativeRun(stage=1, dp=2, pp=2, exclude_frozen=True),
    "before a step": NativeRun(stage=1, dp=2, pp=2, steps=0),
    "bf16 without zero before a step": NativeRun(precision="bf16", dp=2, pp=2, steps=0),
}

STAGE_0: dict[str, NativeRun] = {
    **{f"plain pp{pp}": NativeRun(pp=pp, dp=2) for pp in (1, 2, 3)},
    "plain in groups": NativeRun(pp=2, groups=two_groups()),
    "plain before a step": NativeRun(pp=2, steps=0),
    "unfused": NativeRun(pp=2, precision="fp16"),
    "fused": NativeRun(pp=3, precision="fp16", optimizer="fused"),
}


def check(folder: Path, model: NativeModel, run: NativeRun) -> Checkpoint:
    checkpoint = check_reads_back(folder, model, run)
    topology = checkpoint.topology
    assert (topology.tp, topology.pp, topology.dp, topology.zero_stage) == (1, run.pp, run.dp, run.stage)
    trained = [parameter for parameter in checkpoint.parameters.values() if parameter.kind == "trainable"]
    for parameter in trained:
        stages = [of_stage(model, run, stage).parameters for stage in range(run.pp or 1)]
        held = [any(other.name == parameter.name for other in parameters) for parameters in stages]
        assert [shape is not None for shape in parameter.local_shapes] == held, parameter.name
    return checkpoint


@pytest.mark.parametrize("layouts", [None, False, True], ids=["stock", "older manifest", "manifest"])
@pytest.mark.parametrize("name", RUNS)
def test_everything_is_read_back(tmp_path: Path, name: str, layouts: bool | None) -> None:
    """With a manifest and without one; each stage has what its layers hold."""
    run, model = RUNS[name], pipeline_model()
    folder = write_native(tmp_path, model, run)
    if layouts is not None:
        add_manifest(folder, model, run, layouts=layouts)
    checkpoint = check(folder, model, run)
    assert checkpoint.form == ("deepspeed zero-1/2" if run.stage else "deepspeed bf16-optimizer")
    kept = [name for name in SHAPES if name not in FROZEN or not run.exclude_frozen]
    assert [name for name in checkpoint.parameters if name not in model.buffers] == kept


@pytest.mark.parametrize("layouts", [False, True], ids=["older manifest", "manifest"])
@pytest.mark.parametrize("name", STAGE_0)
def test_stage_0_is_read_back_with_a_manifest(tmp_path: Path, name: str, layouts: bool) -> None:
    run, model = STAGE_0[name], pipeline_model()
    folder = write_native(tmp_path, model, run)
    add_manifest(folder, model, run, layouts=layouts)
    check(folder, model, run)


@pytest.mark.parametrize("pp", [1, 2])
def test_stage_0_is_refused_without_a_manifest(pp: int, tmp_path: Path) -> None:
    """Even of one stage the order doesn't tell: DeepSpeed's optimizer has the tied modules first, which no file names."""
    folder = write_native(tmp_path, pipeline_model(), NativeRun(pp=pp))
    checkpoint = open_checkpoint(folder)
    assert "which layers a pipeline stage held, or shared, isn't recorded" in str(checkpoint.lacking)
    assert {parameter.kind for parameter in checkpoint.parameters.values()} == {"trainable", "buffer"}  # weights alone


@pytest.mark.parametrize("layouts", [None, False, True], ids=["stock", "older manifest", "manifest"])
@pytest.mark.parametrize("run", [RUNS["groups"], RUNS["groups, bf16 without zero"]], ids=str)
def test_groups_of_all_stages_are_joined(tmp_path: Path, run: NativeRun, layouts: bool | None) -> None:
    folder = write_native(tmp_path, pipeline_model(), run)
    if layouts is not None:
        add_manifest(folder, pipeline_model(), run, layouts=layouts)
    groups = open_checkpoint(folder).groups
    assert [set(group.names) for group in groups] == [set(names) for names in two_groups()]
    assert [group.hyperparameters["weight_decay"] for group in groups] == [group_decay(0, run), group_decay(1, run)]


def test_groups_with_settings_that_are_tensors_are_joined(tmp_path: Path) -> None:
    """The tensors have several elements, as a user's own optimizer may have its ``betas``. NaN equals itself."""
    run = RUNS["groups"]
    folder = write_native(tmp_path, pipeline_model(), run)
    for path in folder.glob("*_optim_states.pt"):
        saved = torch.load(path, weights_only=False)
        for group in saved["optimizer_state_dict"]["base_optimizer_state"]["param_groups"]:
            group |= {"betas": torch.tensor([0.9, 0.99]), "note": float("nan")}
        torch.save(saved, path)
    groups = open_checkpoint(folder).groups
    assert [set(group.names) for group in groups] == [set(names) for names in two_groups()]
    assert all(torch.equal(group.hyperparameters["betas"], torch.tensor([0.9, 0.99])) for group in groups)


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("recorded", [False, True], ids=["stock", "manifest"])
def test_of_a_tied_module_the_first_stage_is_read(tmp_path: Path, recorded: bool, stage: int) -> None:
    """The last stage's optimizer holds another copy: it isn't looked at."""
    run, model = NativeRun(stage=stage, dp=2, pp=2, precision="bf16"), pipeline_model()
    other = [
        replace(p, fp32=p.fp32 + 1, states={key: state + 1 for key, state in p.states.items()})
        for p in model.parameters
    ]
    folder = write_native(tmp_path / "run", model, run)
    spoilt = write_native(tmp_path / "other", replace(model, parameters=tuple(other)), run)
    for path in spoilt.glob("*_mp_rank_01_optim_states.pt"):
        path.replace(folder / path.name)
    if recorded:
        add_manifest(folder, model, run)
    view = UniversalView.of(open_checkpoint(folder))
    for name in ("tied_modules.words.embedding.weight", "tied_modules.words.gain"):
        for state, tensor in {"fp32": model[name].fp32, **model[name].states}.items():
            assert torch.equal(whole(view, name, state), tensor), (name, state)
        # Nor would it be by a rank of a later stage.
        assert {rank for found in view.layouts[name].holders().values() for rank, _ in found} == {0}
    # The last stage's own parameters come from the file that was exchanged.
    assert torch.equal(whole(view, "4.tail", "exp_avg"), model["4.tail"].states["exp_avg"] + 1)


@pytest.mark.parametrize("run", [NativeRun(pp=2), NativeRun(stage=1, dp=2, pp=2)], ids=str)
def test_of_several_files_of_a_tied_module_the_first_is_read(tmp_path: Path, run: NativeRun) -> None:
    """Each layer that uses the module without a function of its own has a file; none of them is another parameter."""
    model = pipeline_model()
    folder = write_native(tmp_path, model, run)
    saved = torch.load(folder / "layer_00-model_00-model_states.pt")
    torch.save({key: tensor + 1 for key, tensor in saved.items()}, folder / "layer_05-model_00-model_states.pt")
    add_manifest(folder, model, run)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["layer_keys"] |= {f"5.{key}": f"tied_modules.words.{key}" for key in saved}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    check(folder, model, run)


@pytest.mark.parametrize("recorded", [False, True], ids=["stock", "manifest"])
def test_two_tied_modules_of_one_class(tmp_path: Path, recorded: bool) -> None:
    """A manifest tells which layers use which; without one the sizes tell."""
    run, other = NativeRun(precision="bf16", dp=2, pp=2), (3, 2) if recorded else (4, 2)
    shapes = {"tied_modules.b.weight": (3, 2), "tied_modules.a.weight": other, "2.up.weight": (5,), "2.shift": (2,)}
    model = replace(model_of(shapes), layers=5, tied={"b": (0, 4), "a": (1, 3)})
    folder = write_native(tmp_path, model, run)
    if recorded:
        add_manifest(folder, model, run)
    check(folder, model, run)


@pytest.mark.parametrize("recorded", [False, True], ids=["stock", "manifest"])
def test_what_isnt_trained_in_a_tied_module(tmp_path: Path, recorded: bool) -> None:
    run = NativeRun(precision="bf16", stage=1, dp=2, pp=2)
    shapes = {"tied_modules.b.weight": (3, 2), "tied_modules.b.shift": (2,), "2.up": (5,)}
    model = replace(model_of(shapes, frozen=("tied_modules.b.shift",)), layers=4, tied={"b": (0, 3)})
    model = replace(model, buffers={"tied_modules.b.calls": torch.tensor(3)})
    folder = write_native(tmp_path, model, run)
    if recorded:
        add_manifest(folder, model, run)
    check(folder, model, run)


def test_stages_of_other_degrees() -> None:
    shape, half = (4, 2), LocalTensor((2, 2), ())
    one = Layout.whole(shape)
    two = replace(one, locals=(*one.locals, half))
    with pytest.raises(ValueError, match=r"shapes \(4, 2\) and \(4, 2\), over 1 and 2 tensor-parallel ranks"):
        across_stages([one, two])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("frozen", [0, 1], ids=["before", "after"])
def test_a_frozen_layer_of_the_form_of_a_tied_module(tmp_path: Path, frozen: int, precision: Precision) -> None:
    """It may be another file of the module: only a manifest tells."""
    run = NativeRun(stage=int(precision == "fp32"), dp=2, pp=2, precision=precision)
    shapes = {"tied_modules.b.weight": (3, 2), "tied_modules.b.shift": (2,), "2.up": (5,)}
    shapes |= {f"{frozen}.weight": (3, 2), f"{frozen}.shift": (4,)}
    model = model_of(shapes, frozen=("tied_modules.b.shift", f"{frozen}.weight", f"{frozen}.shift"))
    model = replace(model, layers=4, tied={"b": (1 - frozen, 3)})
    folder = write_native(tmp_path, model, run)
    with pytest.raises(MismatchError, match="which layers use a tied module, and several fit") as caught:
        _ = open_checkpoint(folder).parameters
    assert caught.value.problems == ("0.weight", "0.shift", "1.weight", "1.shift")
    add_manifest(folder, model, run)
    check(folder, model, run)


def test_two_tied_modules_and_one_file(tmp_path: Path) -> None:
    """It could be that of either."""
    shapes = {"tied_modules.b.weight": (3, 2), "tied_modules.a.weight": (3, 2), "2.up": (5,)}
    run, model = NativeRun(stage=1, pp=2), replace(model_of(shapes), layers=5, tied={"b": (0, 4), "a": (1, 3)})
    folder = write_native(tmp_path, model, run)
    (folder / "layer_01-model_00-model_states.pt").unlink()
    with pytest.raises(MismatchError, match=r"several fit[\s\S]*\(1\):\n  0\.weight$"):
        _ = open_checkpoint(folder).parameters


def test_a_frozen_layer_of_another_size_is_no_tied_module(tmp_path: Path) -> None:
    run, shapes = NativeRun(stage=1, dp=2, pp=2), {"tied_modules.b.weight": (3, 2), "1.weight": (4, 2), "2.up": (5,)}
    model = replace(model_of(shapes, frozen=("1.weight",)), layers=4, tied={"b": (0, 3)})
    check(write_native(tmp_path, model, run), model, run)


@pytest.mark.parametrize("run", [RUNS["bf16 zero-1 pp2 dp2"], RUNS["bf16 zero-0 pp2 dp2"]], ids=str)
def test_layer_files_without_a_tensor_parallel_rank(tmp_path: Path, run: NativeRun) -> None:
    """A topology of pipeline and data parallelism only leaves it out of the name."""
    folder = write_native(tmp_path, pipeline_model(), run)
    for path in folder.glob("layer_*"):
        path.rename(folder / path.name.replace("-model_00", ""))
    assert (folder / "layer_04-model_states.pt").is_file()
    check(folder, pipeline_model(), run)


def test_layers_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    """More than a hundred: two digits in a file's name are the least."""
    shapes = {f"{layer}.weight": (1 + layer % 3,) for layer in range(103)}
    model, run = replace(model_of(shapes), layers=103), NativeRun(precision="bf16", dp=2, pp=4)
    assert [len(layers) for layers in stage_layers(model, run)] == [26, 26, 26, 25]
    checkpoint = check(write_native(tmp_path, model, run), model, run)
    assert list(checkpoint.parameters) == list(shapes)


def cut_model() -> NativeModel:
    """Two layers that tensor parallelism cuts by row."""
    whole_tensor = torch.arange(8.0).view(4, 2)
    states = {"exp_avg": whole_tensor + 10, "exp_avg_sq": whole_tensor + 20}
    return NativeModel(
        tuple(NativeParameter(f"{layer}.up", whole_tensor, states, "rows") for layer in (0, 1)), layers=2
    )


@pytest.mark.parametrize("lacking", ["layer_01-model_01-model_states.pt", "layer_00-model_00-model_states.pt"])
def test_a_layer_that_some_ranks_lack_is_named(tmp_path: Path, lacking: str) -> None:
    folder = write_native(tmp_path, cut_model(), NativeRun(tp=2, stage=1, pp=2))
    (folder / lacking).unlink()
    layer, rank = int(lacking[6:8]), int(lacking[15:17])
    with pytest.raises(
        DamagedCheckpointError, match=f"lacks the files of 1 layers .* first of layer {layer} on rank {rank}"
    ):
        _ = open_checkpoint(folder).parameters


def test_a_missing_layer_is_named_where_a_manifest_lists_it(tmp_path: Path) -> None:
    run = NativeRun(tp=2, stage=1, pp=2)
    folder = write_native(tmp_path, cut_model(), run)
    add_manifest(folder, cut_model(), run)
    for rank in range(2):
        (folder / f"layer_01-model_{rank:02d}-model_states.pt").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"lacks 2 of \d+ files: .*layer_01-model_0[01]"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("run", "gone", "told"),
    [
        (NativeRun(stage=1, dp=2, pp=2), (3,), "1 layers: layer_03-*model_states.pt (of 3."),
        (NativeRun(stage=1, dp=2, pp=2), range(6), "3 layers: layer_02-*model_states.pt (of 2."),
        (NativeRun(precision="fp16", pp=2), (4,), "1 layers: layer_04-*model_states.pt (of 4.calls)"),
    ],
    ids=["one", "all", "of a buffer, without ZeRO"],
)
def test_a_missing_layer_is_told_by_what_is_known_to_be_in_it(
    run: NativeRun, gone: Iterable[int], told: str, tmp_path: Path
) -> None:
    """No manifest lists the files."""
    folder = write_native(tmp_path, pipeline_model(), run)
    for layer in gone:
        (folder / f"layer_{layer:02d}-model_00-model_states.pt").unlink(missing_ok=True)
    with pytest.raises(DamagedCheckpointError, match=re.escape(f"lacks the files of {told}")):
        _ = open_checkpoint(folder).parameters


def test_a_buffer_that_its_layers_file_lacks(tmp_path: Path) -> None:
    folder = write_native(tmp_path, pipeline_model(), NativeRun(stage=1, dp=2, pp=2))
    path = folder / "layer_04-model_00-model_states.pt"
    saved = torch.load(path)
    del saved["calls"]
    torch.save(saved, path)
    with pytest.raises(DamagedCheckpointError, match=r"layer_04-\*model_states.pt lacks the buffer 4.calls"):
        _ = open_checkpoint(folder).parameters


@pytest.mark.parametrize(
    "name", ["mp_rank_01_model_states.pt", "zero_pp_rank_1_mp_rank_01_optim_states.pt"], ids=["weights", "optimizer"]
)
def test_a_missing_file_of_a_later_stage_is_named(tmp_path: Path, name: str) -> None:
    folder = write_native(tmp_path, pipeline_model(), NativeRun(stage=1, dp=2, pp=2))
    (folder / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"lacks 1 of 6 files: {name}"):
        open_checkpoint(folder)


def test_bf16_without_zero_lacks_an_optimizer_file(tmp_path: Path) -> None:
    """The model_states file holds the first rank's share of the state; the others' shares are in files of their own."""
    folder = write_native(tmp_path, pipeline_model(), NativeRun(precision="bf16", dp=2, pp=2))
    name = "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt"
    (folder / name).unlink()
    with pytest.raises(DamagedCheckpointError, match=f"lacks 1 of 6 files: {name}"):
        open_checkpoint(folder)
