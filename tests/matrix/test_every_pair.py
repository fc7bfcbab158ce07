"""Every source topology with every target topology, in memory: what a rank of the target is filled with, bit for bit.

Source files and target contents both come from the brute-force writer, which shares no code with the package. Targets whose ranks
hold the same, to the last bit and at the same place, share those ranks: a source is read into each of them once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path

import pytest
import torch
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest, write_native
from native_files.described import Held, held_by, of_stage

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, Precision
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.layout import FlatGroup, Flattening, Layout, SlicedGroup
from ucp_deepspeed.plan import Fragment, Target, overlapping_fragments, plan_tensor
from ucp_deepspeed.transfer import FileReader, TransferCount, run_copies

HIDDEN, FFN, VOCABULARY, QUERY_GROUPS, HEAD, QUERY_HEADS, SEQUENCE = 12, 20, 44, 4, 3, 2, 5
Sizes = dict[str, tuple[tuple[int, ...], Cut]]
"""Local names of one layer → whole shape and cut."""

WORDS: Sizes = {"word_embeddings.weight": ((VOCABULARY, HIDDEN), "rows")}
LLAMA_LAYER: Sizes = {
    "input_layernorm.weight": ((HIDDEN,), "replicated"),
    "self_attention.linear_proj.weight": ((HIDDEN, QUERY_GROUPS * QUERY_HEADS * HEAD), "columns"),
    "self_attention.linear_qkv.weight": ((QUERY_GROUPS * (QUERY_HEADS + 2) * HEAD, HIDDEN), "rows"),
    "self_attention.q_layernorm.weight": ((HEAD,), "replicated"),
    "mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), "gate_up"),
    "mlp.linear_fc2.weight": ((HIDDEN, FFN), "columns"),
}
GPT_LAYER: Sizes = {
    "self_attention.linear_qkv.bias": ((QUERY_GROUPS * 3 * HEAD,), "rows"),
    "self_attention.linear_proj.bias": ((HIDDEN - 1,), "replicated"),
    "mlp.linear_fc1.weight": ((FFN, HIDDEN), "rows"),
    "mlp.linear_fc2.weight": ((HIDDEN, FFN), "columns"),
}


@dataclass(frozen=True)
class Flavour:
    """A Megatron-Core model of three transformer layers, which neither two nor four stages share evenly.

    Attributes:
        family: its spec.
        layers: of the pipeline.
        tied: of `NativeModel`.
    """

    family: str
    layers: tuple[Sizes, ...]
    tied: tuple[int, ...] = ()

    def __hash__(self) -> int:
        return hash(self.family)

    def names(self) -> dict[str, str]:
        """Name in the pipeline → name in the plain model, in the model's order."""
        last = len(self.layers) - 1
        homes = {0: "embedding.", 1: "embedding.", last - 1: "decoder.", last: ""}
        named: dict[str, str] = {}
        for layer, sizes in enumerate(self.layers):
            own = "tied_modules.embedding" if layer in self.tied else str(layer)
            home = homes.get(layer, f"decoder.layers.{layer - 2}.")
            named |= {f"{own}.{local_name}": f"{home}{local_name}" for local_name in sizes}
        return named


FLAVOURS = {
    "llama": Flavour(
        "megatron_core_llama",
        (
            WORDS,
            {},
            *[LLAMA_LAYER] * 3,
            {"final_layernorm.weight": ((HIDDEN + 1,), "replicated")},
            {"output_layer.weight": ((VOCABULARY, HIDDEN), "rows")},
        ),
    ),
    "tied": Flavour(
        "megatron_core_gpt",
        (
            WORDS,
            {"position_embeddings.weight": ((SEQUENCE, HIDDEN), "replicated")},
            *[GPT_LAYER] * 3,
            {"final_layernorm.bias": ((HIDDEN + 1,), "replicated")},
            {},
        ),
        tied=(0, 6),
    ),
}
STATES = ("fp32", "exp_avg", "exp_avg_sq")
READ = ("fp32", "exp_avg_sq")
"""The moments lie alike in every form: the second is read for both."""

TOPOLOGIES = [*product((1, 2), (1, 2, 4)), (4, 1)]
"""Tensor- and data-parallel sizes; the last one of plain engines only."""

PIPELINES = (1, 2, 4)
STEPS = 5
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def runs(precision: Precision) -> list[NativeRun]:
    """Every topology and stage of one precision, stage 0 of plain engines once with each class of optimizer."""
    kinds = [(0, "plain")] if precision == "fp32" else [(0, "unfused"), (0, "fused")]
    kinds += [(stage, "zero") for stage in (1, 2, 3)]
    plain = [
        NativeRun(tp, dp, stage, precision, kind, steps=STEPS)  # type: ignore[arg-type]
        for stage, kind in kinds
        for tp, dp in TOPOLOGIES
    ]
    return plain + [
        NativeRun(tp, dp, stage, precision, steps=STEPS, pp=pp)
        for stage in (0, 1)
        for pp in PIPELINES
        for tp, dp in TOPOLOGIES[:-1]
    ]


@cache
def whole_tensors(flavour: Flavour) -> dict[str, NativeParameter]:
    """By name in the plain model; every element of every state has a value of its own."""
    generator = torch.Generator().manual_seed(3)
    sizes = [size for layer in flavour.layers for size in layer.values()]
    found = {}
    for name, (shape, cut) in zip(flavour.names().values(), sizes, strict=True):
        values = [torch.randn(shape, generator=generator) for _ in STATES]
        found[name] = NativeParameter(name, values[0], {"exp_avg": values[1], "exp_avg_sq": values[2].square()}, cut)
    return found


@cache
def model_of(flavour: Flavour, pipeline: bool) -> NativeModel:
    """The model under the names of its class."""
    parameters = whole_tensors(flavour)
    if not pipeline:
        return NativeModel(tuple(parameters.values()))
    named = [
        NativeParameter(name, parameters[logical].fp32, parameters[logical].states, parameters[logical].cut)
        for name, logical in flavour.names().items()
    ]
    return NativeModel(
        tuple(named), layers=len(flavour.layers), tied={"embedding": flavour.tied} if flavour.tied else {}
    )


def logical(flavour: Flavour, name: str) -> str:
    """Name in the plain model."""
    return flavour.names().get(name, name)


@dataclass(frozen=True, eq=False)
class Wanted:
    """One rank of a target: its buffers, the fragments of each parameter in them, and what the oracle says they hold.

    Attributes:
        rank: among the model-parallel ranks.
        layouts: of all parameters in the target.
    """

    rank: int
    layouts: Mapping[str, Layout]
    held: list[Held]
    fragments: Mapping[str, list[Fragment[int]]]

    @property
    def numel(self) -> int:
        """Elements of one state that the rank holds, without padding."""
        return sum(fragment.numel for found in self.fragments.values() for fragment in found)


@cache
def target(flavour: Flavour, run: NativeRun) -> list[Wanted]:
    """The ranks of a target."""
    stages = range(run.pp or 1)
    return [_wanted(flavour, run, *place) for place in product(stages, range(run.tp), range(run.dp))]


def _wanted(flavour: Flavour, run: NativeRun, stage: int, tp_rank: int, dp_rank: int) -> Wanted:
    held = held_by(of_stage(model_of(flavour, run.pp is not None), run, stage), run, tp_rank, dp_rank)
    rank = stage * run.tp + tp_rank
    shapes = target_shapes(flavour, run.tp, run.pp)
    fragments: dict[str, list[Fragment[int]]] = {}
    for buffer, entry in enumerate(held):
        names = [logical(flavour, name) for name in entry.names]
        numels = tuple(torch.Size(shapes[name][rank] or ()).numel() for name in names)
        flattening = _flattening(run, numels)
        partition = dp_rank if run.partitioned else 0
        assert flattening.buffer_numel(partition) == entry.states["fp32"].numel()
        for part in flattening.held_by(partition):
            fragment = Fragment(part.local_start, part.numel, buffer, part.buffer_start)
            fragments.setdefault(names[part.index], []).append(fragment)
    contents = tuple(entry.states[state].numpy().tobytes() for entry in held for state in STATES)
    places = tuple((name, tuple(found)) for name, found in fragments.items())
    key = (flavour, run.tp, run.pp or 1, rank, places, contents)
    return _RANKS.setdefault(key, Wanted(rank, target_layouts(flavour, run.tp, run.pp), held, fragments))


_RANKS: dict[object, Wanted] = {}
"""Ranks that hold the same are one."""


def _flattening(run: NativeRun, numels: tuple[int, ...]) -> Flattening:
    if run.stage == 3:
        return SlicedGroup(numels, run.dp)
    return FlatGroup(numels, run.dp if run.partitioned else 1, alignment=2 if run.partitioned else 1)


@cache
def target_shapes(flavour: Flavour, tp: int, pp: int | None) -> dict[str, HeldShapes]:
    """Local shapes on each model-parallel rank, as the patterns give them; None on stages that don't hold the parameter."""
    whole = whole_tensors(flavour)
    patterns = load_spec(flavour.family).patterns(whole)
    run = NativeRun(tp, pp=pp)
    found: dict[str, HeldShapes] = dict.fromkeys(whole, ())
    for stage in range(pp or 1):
        part = of_stage(model_of(flavour, pp is not None), run, stage)
        names = {logical(flavour, parameter.name) for parameter in part.parameters}
        for name, parameter in whole.items():
            shapes = patterns[name].local_shapes(tuple(parameter.fp32.shape), tp)
            found[name] += shapes if name in names else (None,) * tp
    return found


@cache
def target_layouts(flavour: Flavour, tp: int, pp: int | None) -> dict[str, Layout]:
    """Over all model-parallel ranks of a target."""
    patterns = load_spec(flavour.family).patterns(whole_tensors(flavour))
    return layouts_of(patterns, target_shapes(flavour, tp, pp), tp, None, "the target")


def problems_of(view: UniversalView, wanted: Wanted, reader: FileReader) -> Iterator[str]:
    """Yield the problems of reading a source into a rank."""
    if overlapping_fragments([part for found in wanted.fragments.values() for part in found]) is not None:
        yield "fragments overlap"
    count = TransferCount()
    for state in READ:
        buffers = [torch.full_like(entry.states[state], float("nan")) for entry in wanted.held]
        for name, fragments in wanted.fragments.items():
            want = Target(wanted.layouts[name], wanted.rank, fragments)
            count.add(run_copies(plan_tensor(view.source(name, state), want, state), reader, buffers.__getitem__))
        for buffer, entry in zip(buffers, wanted.held, strict=True):
            # Padding is NaN on both sides: it must be left alone.
            if not torch.equal(buffer.view(torch.int32), entry.states[state].view(torch.int32)):
                yield f"{state} of {entry.names} differs"
    if count.bytes_read != 4 * len(READ) * wanted.numel:
        yield f"{count.bytes_read} bytes read, {4 * len(READ) * wanted.numel} needed"


@pytest.mark.parametrize("source", runs("bf16") + runs("fp32"), ids=str)
@pytest.mark.parametrize("name", FLAVOURS)
def test_source_fills_every_target(tmp_path: Path, name: str, source: NativeRun) -> None:
    """Each rank of each target holds what it would have saved itself; only the needed bytes are read."""
    flavour = FLAVOURS[name]
    view = opened(tmp_path, flavour, source)
    steps = {parameter.scalars["step"] for parameter in view.parameters.values()}
    assert steps == {STEPS + (source.kind in ("unfused", "fused"))}
    reader = FileReader()
    problems: dict[Wanted, list[str]] = {}
    found: list[str] = []
    for run in runs(source.precision):
        for wanted in target(flavour, run):
            if wanted not in problems:
                problems[wanted] = list(problems_of(view, wanted, reader))
            found += [f"{source} → {run} rank {wanted.rank}: {problem}" for problem in problems[wanted]]
    reader.close()
    assert not found, "\n".join(found[:20])


def opened(folder: Path, flavour: Flavour, run: NativeRun) -> UniversalView:
    """The source's files, read by the names of the plain model."""
    model = model_of(flavour, run.pp is not None)
    written = write_native(folder, model, run)
    if run.kind == "plain" and run.pp is not None:
        add_manifest(written, model, run)  # else nothing tells which parameters a stage's optimizer had
    checkpoint = open_checkpoint(written)
    topology = checkpoint.topology
    assert (topology.tp, topology.pp, topology.dp) == (run.tp, run.pp or 1, run.dp)
    assert topology.zero_stage == run.stage
    view = UniversalView.of(checkpoint, load_spec(flavour.family))
    assert list(view.parameters) == list(whole_tensors(flavour))
    return view


def test_the_matrix_is_complete() -> None:
    """Plain engines at all four stages, pipelines at those that DeepSpeed allows, in both precisions."""
    for precision in PRECISIONS:
        places = {(run.pp, run.stage, run.tp, run.dp) for run in runs(precision)}
        assert places == {
            (pp, stage, tp, dp)
            for pp in (None, 1, 2, 4)
            for stage in range(2 if pp else 4)
            for tp, dp in ((1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (4, 1))
            if not (pp and tp == 4)
        }


@pytest.mark.parametrize("name", FLAVOURS)
def test_stages_are_uneven_and_hold_different_parameters(name: str) -> None:
    """Two stages hold four and three layers, four stages two and at last one; only a tied weight lies on several."""
    flavour = FLAVOURS[name]
    for pp, held in ((2, (4, 3)), (4, (2, 2, 2, 1))):
        shapes = target_shapes(flavour, 1, pp)
        assert sum(held) == len(flavour.layers)
        homes = {
            name: [stage for stage, shape in enumerate(found) if shape is not None] for name, found in shapes.items()
        }
        assert {stage for stages in homes.values() for stage in stages} == set(range(pp))
        several = [name for name, stages in homes.items() if len(stages) > 1]
        assert several == (["embedding.word_embeddings.weight"] if flavour.tied else [])
