"""Plans for topologies without an engine, against tensors cut by brute force and against real engines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from native_files.described import held_by

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter, open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import ParameterGroup, Precision, RunState
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError, SpecError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.layout import Layout, Topology
from ucp_deepspeed.plan import Fragment, Target, plan_tensor
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, build_engine, train
from ucp_deepspeed.transfer import FileReader, run_copies
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.targeting import RankPlan, counted, plan_target

RULES = [
    {"match": "embedding", "pattern": "shard", "dim": 0},
    {"match": "layers.*.up", "pattern": "shard", "dim": 0, "parts": [1, 1]},
    {"match": "layers.*.down", "pattern": "shard", "dim": 1},
    {"match": ["layers.*.norm", "scale", "final"], "pattern": "replicate"},
]
SPEC = Spec.parse({"family": "tests", "rules": RULES}, "tests")
CUTS = {"embedding": "rows", "up": "gate_up", "down": "columns"}
SHAPES = {
    "embedding": (6, 3),
    **{
        f"layers.{n}.{name}": shape
        for n in range(3)
        for name, shape in (("norm", (3,)), ("up", (8, 3)), ("down", (3, 4)))
    },
    "scale": (5,),
    "final": (7,),
}
"""In the model's order; ``scale`` is frozen."""

STAGES = [list(SHAPES)[:7], [*list(SHAPES)[7:], "mask"]]
"""The names that each of two pipeline stages holds; the buffer stands behind the layers."""

BIASES = ("layers.0.norm", "layers.1.norm", "layers.2.norm", "final")
GROUPS = (tuple(name for name in SHAPES if name not in (*BIASES, "scale")), BIASES)

SOURCES = {
    "zero1": NativeRun(tp=2, dp=2, stage=1, groups=GROUPS),
    "zero2-one-group": NativeRun(dp=3, stage=2, precision="bf16"),
    "zero3": NativeRun(tp=2, dp=3, stage=3, precision="bf16", groups=GROUPS, sub_group_size=20),
    "zero0": NativeRun(tp=2, precision="fp16", groups=GROUPS),
}
TARGETS = [Topology(tp, pp, dp, stage) for stage in range(4) for tp in (1, 2) for pp in (1, 2) for dp in (1, 3)]
POSSIBLE = [target for target in TARGETS if target.pp == 1 or target.zero_stage < 2]


def model(shapes: dict[str, tuple[int, ...]] = SHAPES) -> NativeModel:
    generator = torch.Generator().manual_seed(3)

    def parameter(name: str) -> NativeParameter:
        values = [torch.randn(shapes[name], generator=generator) for _ in range(3)]
        states = {} if name == "scale" else {"exp_avg": values[1], "exp_avg_sq": values[2]}
        cut = CUTS.get(name.rpartition(".")[2], "replicated")
        return NativeParameter(name, values[0], states, cut=cut, frozen=name == "scale")  # type: ignore[arg-type]

    return NativeModel(tuple(parameter(name) for name in shapes), {"mask": torch.arange(5)})


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sources")
    folders = {name: write_native(root / name, model(), run) for name, run in SOURCES.items()}
    folders["universal"] = root / "universal" / "step"
    convert(UniversalView.of(open_checkpoint(folders["zero1"]), SPEC), folders["universal"])
    return folders


def expected(target: Topology, source: NativeRun, rank: int, part: int) -> tuple[int, int]:
    """Bytes read and held by one rank, by cutting the tensors themselves; padding is NaN there."""
    names = STAGES[rank // target.tp] if target.pp > 1 else [*SHAPES, "mask"]
    whole = model({name: shape for name, shape in SHAPES.items() if name in names})
    groups = source.groups or (tuple(name for name in SHAPES if name != "scale"),)
    here = tuple(found for group in groups if (found := tuple(name for name in group if name in names)))
    bf16_pipeline = target.pp > 1 and target.zero_stage == 0 and source.precision == "bf16"
    run = NativeRun(
        tp=target.tp,
        dp=target.dp,
        stage=1 if bf16_pipeline else target.zero_stage,
        optimizer=None if target.zero_stage or bf16_pipeline else "plain",
        groups=here,
    )
    buffers = [state for held in held_by(whole, run, rank % target.tp, part) for state in held.states.values()]
    read = sum(4 * int(buffer.isfinite().sum()) for buffer in buffers)
    if "scale" in names:
        scale = torch.ones(SHAPES["scale"])
        if target.zero_stage == 3:
            padded = torch.nn.functional.pad(scale, (0, -scale.numel() % target.dp))
            scale = padded.chunk(target.dp)[part]
        read += int(scale.sum()) * source.dtype.itemsize
    if "mask" in names:
        read += 5 * 8
    return read, sum(4 * buffer.numel() for buffer in buffers)


@pytest.mark.parametrize("target", POSSIBLE, ids=str)
def test_each_rank_reads_and_holds_what_brute_force_finds(target: Topology, sources: dict[str, Path]) -> None:
    for name, folder in sources.items():
        plan = plan_target(open_checkpoint(folder), target, SPEC)
        assert plan.possible, (name, plan.obstacles)
        assert plan.restored == (*SHAPES, "mask")
        run = SOURCES.get(name, SOURCES["zero1"])
        places = [(rank, part) for rank in range(target.model_parallel) for part in range(target.dp)]
        assert [(rank.model_parallel_rank, rank.data_parallel_rank) for rank in plan.ranks] == places
        for rank, place in zip(plan.ranks, places, strict=True):
            assert (rank.bytes_read, rank.bytes_held) == expected(target, run, *place), (name, place)
            assert rank.files <= {str(path) for path in folder.iterdir()} and rank.copies > 0


def test_on_its_own_topology_a_rank_reads_its_own_files(sources: dict[str, Path]) -> None:
    plan = plan_target(open_checkpoint(sources["zero1"]), Topology(2, 1, 2, 1), SPEC)
    for rank in plan.ranks:
        mp, dp = rank.model_parallel_rank, rank.data_parallel_rank
        names = {f"mp_rank_{mp:02d}_model_states.pt", f"zero_pp_rank_{dp}_mp_rank_{mp:02d}_optim_states.pt"}
        assert {Path(file).name for file in rank.files} == names
    assert len(plan.files) == 6
    [alone] = plan_target(open_checkpoint(sources["zero1"]), Topology(), SPEC).ranks
    assert len([file for file in alone.files if file.endswith("optim_states.pt")]) == 4


@pytest.mark.parametrize("pattern", ["replicate", "partial"])
def test_counted_is_what_is_read(pattern: str, sources: dict[str, Path]) -> None:
    spec = Spec.parse({"family": "tests", "rules": [*RULES[:3], {**RULES[3], "pattern": pattern}]}, "tests")
    view = UniversalView.of(open_checkpoint(sources["zero1"]), spec)
    for name, ranks_read in (("layers.1.up", 1), ("final", 2 if pattern == "partial" else 1)):
        shape = view.logical_shape(name)
        target = Target(Layout.whole(shape), 0, (Fragment(1, prod(shape) - 1, None, 0),))
        copies = plan_tensor(view.source(name, "exp_avg"), target, "exp_avg")
        buffer = torch.zeros(prod(shape))
        count = counted(copies)
        assert count == run_copies(copies, FileReader(), lambda _, buffer=buffer: buffer)  # type: ignore[misc]
        assert count.bytes_read == 4 * ranks_read * (prod(shape) - 1)


def test_layers_are_needed_to_fill_stages(sources: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(sources["zero1"])
    assert plan_target(checkpoint, Topology(1, 5, 1, 1), SPEC).possible
    plan = plan_target(checkpoint, Topology(1, 6, 1, 1), SPEC)
    assert [str(found) for found in plan.obstacles] == [
        "6 pipeline stages are too many for the 3 layers that the names tell (layers.0, …); take 5 or fewer"
    ]
    assert plan.ranks == () and plan.restored == (*SHAPES, "mask")


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_refuses_pipelines_with_cut_gradients(stage: int, sources: dict[str, Path]) -> None:
    plan = plan_target(open_checkpoint(sources["zero1"]), Topology(1, 2, 1, stage), SPEC)
    assert not plan.possible and plan.ranks == ()
    assert f"DeepSpeed refuses ZeRO-{stage} with pipeline parallelism" in str(plan.obstacles[0])


def test_unknown_layouts(sources: dict[str, Path]) -> None:
    checkpoint = open_checkpoint(sources["zero2-one-group"])
    assert plan_target(checkpoint, Topology(1, 1, 4, 3)).possible
    plan = plan_target(checkpoint, Topology(2, 2, 1, 2))
    refused, unknown = map(str, plan.obstacles)
    assert refused.startswith("DeepSpeed refuses")
    assert unknown.startswith("no layout is known for 12 parameters") and "--spec" in unknown
    assert plan.matching is None and plan.restored == ()
    other = Spec.parse({"family": "other", "rules": RULES[:1]}, "other")
    with pytest.raises(SpecError, match="matches no rule"):
        plan_target(checkpoint, Topology(), other)


def test_patterns_that_a_degree_contradicts(sources: dict[str, Path], tmp_path: Path) -> None:
    rules = [{**RULES[0], "widths": [3, 3]}, *RULES[1:]]
    spec = Spec.parse({"family": "tests", "rules": rules}, "tests")
    checkpoint = open_checkpoint(sources["zero1"])
    assert plan_target(checkpoint, Topology(2, 1, 1, 1), spec).possible
    plan = plan_target(checkpoint, Topology(3, 1, 1, 1), spec)
    assert [str(found) for found in plan.obstacles] == ["embedding: widths (3, 3) don't split 6 over 3 ranks"]
    assert plan.restored == (*list(SHAPES)[1:], "mask")

    whole = tmp_path / "whole" / "step"
    convert(UniversalView.of(open_checkpoint(sources["zero2-one-group"])), whole)
    plan = plan_target(open_checkpoint(whole), Topology(2, 1, 1, 1))
    assert len(plan.obstacles) == 1
    assert str(plan.obstacles[0]).startswith(f"no layout is known for {len(SHAPES)} parameters")


def test_shares_that_a_pattern_leaves_unequal(sources: dict[str, Path]) -> None:
    plan = plan_target(open_checkpoint(sources["zero1"]), Topology(4, 1, 1, 1), SPEC)
    assert plan.possible
    assert plan.remarks == (
        "TP 4 cuts embedding into unequal shares: the patterns allow it, Megatron-Core's layers don't",
    )
    assert (
        sum(rank.bytes_read for rank in plan.ranks)
        == sum(
            (1 if name in ("embedding",) or name.endswith(("up", "down")) else 4)
            * prod(shape)
            * (4 if name == "scale" else 12)
            for name, shape in SHAPES.items()
        )
        + 4 * 5 * 8
    )


def test_vocabularies_are_padded_for_the_target(sources: dict[str, Path]) -> None:
    rules = [{**RULES[0], "vocabulary": True, "pad_to_multiple": 2}, *RULES[1:]]
    spec = Spec.parse({"family": "tests", "rules": rules}, "tests")
    checkpoint = open_checkpoint(sources["zero1"])
    plan = plan_target(checkpoint, Topology(2, 1, 1, 1), spec)
    assert [found.name for found in plan.obstacles] == ["embedding"]
    assert "the checkpoint has 6 rows, and the target pads them to 8; say with --vocabulary-size" in str(
        plan.obstacles[0]
    )
    assert plan_target(checkpoint, Topology(1, 1, 1, 1), spec).remarks == (
        "the 6 rows of embedding count as the vocabulary, unless --vocabulary-size says otherwise",
    )

    plan = plan_target(checkpoint, Topology(2, 1, 1, 0), spec, 5)
    assert plan.possible
    assert plan.remarks == (
        "the 5 rows of embedding are padded to 8; the engine may pad them in another way",
        "embedding: 6 rows in the checkpoint and 8 in the model, of which 5 aren't padding; 2 of the model's become zero, so a "
        "loss that counts padding isn't what it would have been",
    )
    read = {number: rank.bytes_read for number, rank in enumerate(plan.ranks)}
    assert (
        read[0] - read[1] == 12 * 2 * 3
    )  # 4 and 2 of the rows, of 3 elements; the others are padding that only the model has
    assert plan.ranks[0].bytes_held == plan.ranks[1].bytes_held
    with pytest.raises(MismatchError, match="vocabulary size 7 is above"):
        plan_target(checkpoint, Topology(), spec, 7)
    rules[0]["pad_to_multiple"] = 1  # nothing tells how the target pads: as the checkpoint does
    spec = Spec.parse({"family": "tests", "rules": rules}, "tests")
    for tp, remarks in {2: 0, 1: 1}.items():
        plan = plan_target(checkpoint, Topology(tp, 1, 1, 0), spec, 5)
        assert len(plan.remarks) == remarks and all("padded to 6" in remark for remark in plan.remarks)
        every = plan_target(checkpoint, Topology(tp, 1, 1, 0), spec, 6)
        assert [rank.bytes_read for rank in plan.ranks] == [rank.bytes_read for rank in every.ranks]


def test_states_that_cannot_be_restored(tmp_path: Path) -> None:
    odd = NativeParameter("odd", torch.ones(4, 3), {"exp_avg": torch.ones(4, 3), "row": torch.ones(4)})
    even = NativeParameter("even", torch.ones(6), {"exp_avg": torch.ones(6)})
    folder = write_native(tmp_path / "odd", NativeModel((odd, even)), NativeRun())
    plan = plan_target(open_checkpoint(folder), Topology(1, 1, 1, 0))
    assert [found.name for found in plan.obstacles] == ["odd"]
    assert "optimizer state 'row' isn't element-wise" in str(plan.obstacles[0])
    assert plan.restored == ("even",)


def test_states_that_one_buffer_needs_in_common(tmp_path: Path) -> None:
    stepped = NativeParameter("stepped", torch.ones(4, 3), {"exp_avg": torch.ones(4, 3)})
    lacking = NativeParameter("lacking", torch.ones(6))
    run = NativeRun(precision="bf16", optimizer="unfused")
    folder = write_native(tmp_path / "some", NativeModel((stepped, lacking)), run)
    assert plan_target(open_checkpoint(folder), Topology(1, 1, 2, 0)).possible
    for stage in (1, 2, 3):
        plan = plan_target(open_checkpoint(folder), Topology(1, 1, 2, stage))
        [found] = plan.obstacles
        assert str(found).startswith("lacking: has states ['fp32'], scalars {}, and stepped, which the target keeps in")


def test_elastic_files_name_no_groups(tmp_path: Path) -> None:
    folder = write_native(tmp_path / "elastic", model(), replace(SOURCES["zero1"], tp=1, elastic=True))
    [first, second] = plan_target(open_checkpoint(folder), Topology(1, 1, 2, 1)).ranks
    numel = sum(prod(shape) for name, shape in SHAPES.items() if name != "scale")
    assert first.bytes_held == second.bytes_held == 12 * (-(-numel // 4) * 2)
    assert first.bytes_read + second.bytes_read == 12 * numel + 2 * (4 * 5 + 5 * 8)


class Sketch(Checkpoint):
    """A pipeline of two stages with one tied weight, in one imaginary file."""

    def __init__(self, precision: Precision) -> None:
        self.path, self.form, self.topology = Path("sketch"), "sketch", Topology(1, 2, 1, 1)
        self.run, self.versions = RunState(precision, 1, 1, 0, None, None, "0"), FileVersions()
        held = {"tied": ((5,), (5,)), "l.0.w": ((7,), None), "l.1.w": (None, (7,)), "l.2.w": (None, (7,))}
        self.parameters = {
            name: Parameter(name, "trainable", shapes, {"fp32": "F32", "exp_avg": "F32"}, {})
            for name, shapes in held.items()
        }
        self.groups = (ParameterGroup(tuple(held), {}),)
        self.patterns, self.recorded_shapes, self.logical_names, self.vocabulary_size = {}, {}, {}, None

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        yield Fragment(local_start, local_stop - local_start, FileExtent("file", 0, "F32", 100), local_start)

    def extra_states(self) -> tuple[dict[str, object], ...]:
        return ({},)

    def client_state(self, rank: int = 0) -> tuple[str, dict[str, object]]:
        raise AssertionError("not needed for a plan")


def figures(plan_ranks: tuple[RankPlan, ...]) -> list[tuple[int, int]]:
    return [(rank.bytes_read, rank.bytes_held) for rank in plan_ranks]


def test_a_weight_that_stages_share_is_on_the_first_and_the_last() -> None:
    plan = plan_target(Sketch("fp32"), Topology(1, 3, 1, 0))
    assert figures(plan.ranks) == [(8 * 12, 8 * 12), (8 * 7, 8 * 7), (8 * 12, 8 * 12)]
    assert "partition_method may cut elsewhere" in plan.remarks[0]
    assert figures(plan_target(Sketch("fp32"), Topology(1, 1, 1, 0)).ranks) == [(8 * 26, 8 * 26)]


@pytest.mark.parametrize(("precision", "partitioned"), [("fp32", False), ("bf16", True), ("fp16", False)])
def test_a_bf16_pipeline_without_zero_is_cut_all_the_same(precision: Precision, partitioned: bool) -> None:
    plan = plan_target(Sketch(precision), Topology(1, 2, 2, 0))
    first_stage = [(8 * 10, 8 * 10), (8 * 9, 8 * 10)] if partitioned else [(8 * 19, 8 * 19)] * 2
    assert figures(plan.ranks)[:2] == first_stage
    alone = plan_target(Sketch(precision), Topology(1, 1, 2, 0)).ranks
    assert figures(alone) == [(8 * 26, 8 * 26)] * 2
    assert [rank.bytes_of_weights for rank in alone] == [0 if precision == "fp32" else 2 * 26] * 2


def bytes_of_module(run: Run) -> int:
    """On a rank: bytes of an engine's weights, as it holds them, and of the buffers that it saves."""
    engine = build_engine(run)
    held = [getattr(param, "ds_tensor", param) for param in engine.module.parameters()]
    held += [buffer for name, buffer in engine.module.named_buffers() if name in engine.module.state_dict()]
    numbytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    engine.destroy()
    return numbytes


def test_real_engines_read_what_was_planned(tmp_path: Path) -> None:
    frozen, pool = ("linear_in.bias", "norm.weight"), get_pool(2)
    run = Run(zero={"stage": 1}, precision="bf16", groups="decay", frozen=frozen)
    pool.run(train, run, 2, save=str(tmp_path / "source"), timeout=280)
    for stage in (3, 2):
        target = replace(run, zero={"stage": stage})
        reports = [outcome.report for outcome in pool.run(train, target, 2, load=str(tmp_path / "source"), timeout=280)]
        planned = plan_target(open_checkpoint(tmp_path / "source"), Topology(1, 1, 2, stage))
        assert planned.possible
        for report, rank in zip(reports, planned.ranks, strict=True):
            assert rank.bytes_read == report.bytes_read == report.bytes_needed, stage
            assert len(rank.files) == report.files
        held = pool.run(bytes_of_module, target, timeout=280)
        assert held == [rank.bytes_of_weights for rank in planned.ranks], stage


def test_names_of_layers_are_remarked_on_where_the_target_may_be_a_plain_model(tmp_path: Path) -> None:
    """Without a naming scheme a plain model, which ZeRO-3 needs, has to call its parameters as the pipeline did."""
    model = NativeModel((NativeParameter("3.up", torch.ones(4), {"exp_avg": torch.ones(4)}),))
    checkpoint = open_checkpoint(write_native(tmp_path, model, NativeRun(stage=1)))
    assert "3.up are those of a pipeline" in plan_target(checkpoint, Topology(1, 1, 1, 3)).remarks[0]
    assert "3.up" not in "".join(plan_target(checkpoint, Topology(1, 2, 1, 1)).remarks)


def test_a_plan_says_what_it_takes_for_layers(tmp_path: Path) -> None:
    names = ("first", "list.0", "list.1", "list.2")
    model = NativeModel(tuple(NativeParameter(name, torch.ones(4), {"exp_avg": torch.ones(4)}) for name in names))
    checkpoint = open_checkpoint(write_native(tmp_path, model, NativeRun(stage=1)))
    [remark] = plan_target(checkpoint, Topology(1, 3, 1, 1)).remarks
    assert remark.startswith("the 3 layers that the names tell (list.0, …) are dealt out evenly over the stages; ")
    [obstacle, *_] = plan_target(checkpoint, Topology(1, 1, 2, 1, 2)).obstacles
    assert str(obstacle) == "the model has no experts; take EP 1 instead of 2"
