"""Every source topology with every target topology, in memory: what a rank of the target is filled with, bit for bit.

Source files and target contents both come from the brute-force writer, which shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import pytest
import torch

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.checkpoint import Precision
from ucp_deepspeed.checkpoint.view import UniversalView, layouts_of
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.layout import FlatGroup, Flattening, SlicedGroup
from ucp_deepspeed.plan import Fragment, Target, overlapping_fragments, plan_tensor
from ucp_deepspeed.testing.native_files import (
    Cut,
    Held,
    NativeModel,
    NativeParameter,
    NativeRun,
    held_by,
    write_native,
)
from ucp_deepspeed.transfer import FileReader, TransferCount, run_copies

HIDDEN, FFN, VOCABULARY, QUERY_GROUPS, HEAD, QUERY_HEADS = 20, 36, 44, 4, 5, 2
LAYER = "decoder.layers.0"
PARAMETERS: dict[str, tuple[tuple[int, ...], Cut]] = {
    "embedding.word_embeddings.weight": ((VOCABULARY, HIDDEN), "rows"),
    f"{LAYER}.input_layernorm.weight": ((HIDDEN,), "replicated"),
    f"{LAYER}.self_attention.linear_proj.weight": ((HIDDEN, QUERY_GROUPS * QUERY_HEADS * HEAD), "columns"),
    f"{LAYER}.self_attention.linear_qkv.weight": ((QUERY_GROUPS * (QUERY_HEADS + 2) * HEAD, HIDDEN), "rows"),
    f"{LAYER}.self_attention.q_layernorm.weight": ((HEAD,), "replicated"),
    f"{LAYER}.pre_mlp_layernorm.weight": ((HIDDEN,), "replicated"),
    f"{LAYER}.mlp.linear_fc1.weight": ((2 * FFN, HIDDEN), "gate_up"),
    f"{LAYER}.mlp.linear_fc2.weight": ((HIDDEN, FFN), "columns"),
    "decoder.final_layernorm.weight": ((HIDDEN + 1,), "replicated"),
    "output_layer.weight": ((VOCABULARY, HIDDEN), "rows"),
}
STATES = ("fp32", "exp_avg", "exp_avg_sq")
TOPOLOGIES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (4, 1)]
STEPS = 5
PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16")


def runs(precision: Precision) -> list[NativeRun]:
    """Every topology and stage of one precision, stage 0 once with each class of optimizer."""
    kinds = [(0, "plain")] if precision == "fp32" else [(0, "unfused"), (0, "fused")]
    kinds += [(stage, "zero") for stage in (1, 2, 3)]
    return [
        NativeRun(tp, dp, stage, precision, kind, steps=STEPS)  # type: ignore[arg-type]
        for stage, kind in kinds
        for tp, dp in TOPOLOGIES
    ]


@lru_cache(maxsize=1)
def llama() -> NativeModel:
    """One layer of a Megatron-Core Llama; every element of every state has a value of its own."""
    generator = torch.Generator().manual_seed(3)
    parameters = []
    for name, (shape, cut) in PARAMETERS.items():
        values = [torch.randn(shape, generator=generator) for _ in STATES]
        parameters.append(
            NativeParameter(name, values[0], {"exp_avg": values[1], "exp_avg_sq": values[2].square()}, cut)
        )
    return NativeModel(tuple(parameters))


@dataclass(frozen=True)
class Wanted:
    """One rank of a target: its buffers, the fragments of each parameter in them, and what the oracle says they hold."""

    run: NativeRun
    tp_rank: int
    dp_rank: int
    held: list[Held]
    fragments: Mapping[str, list[Fragment[int]]]

    @property
    def numel(self) -> int:
        """Elements of one state that the rank holds, without padding."""
        return sum(fragment.numel for found in self.fragments.values() for fragment in found)


@cache
def target(run: NativeRun) -> list[Wanted]:
    """The ranks of a target."""
    return [_wanted(run, tp_rank, dp_rank) for tp_rank in range(run.tp) for dp_rank in range(run.dp)]


def _wanted(run: NativeRun, tp_rank: int, dp_rank: int) -> Wanted:
    held = held_by(llama(), run, tp_rank, dp_rank)
    fragments: dict[str, list[Fragment[int]]] = {}
    for buffer, entry in enumerate(held):
        shapes = [target_shapes(run)[name][tp_rank] for name in entry.names]
        numels = tuple(torch.Size(shape).numel() for shape in shapes)
        flattening = _flattening(run, numels)
        partition = dp_rank if run.stage else 0
        assert flattening.buffer_numel(partition) == entry.states["fp32"].numel()
        for part in flattening.held_by(partition):
            fragment = Fragment(part.local_start, part.numel, buffer, part.buffer_start)
            fragments.setdefault(entry.names[part.index], []).append(fragment)
    return Wanted(run, tp_rank, dp_rank, held, fragments)


def _flattening(run: NativeRun, numels: tuple[int, ...]) -> Flattening:
    if run.stage == 3:
        return SlicedGroup(numels, run.dp)
    return FlatGroup(numels, run.dp if run.stage else 1, alignment=2 if run.stage else 1)


@cache
def target_shapes(run: NativeRun) -> Mapping[str, tuple[tuple[int, ...], ...]]:
    """Local shapes on each tensor-parallel rank, as the patterns give them."""
    patterns = load_spec("megatron_core_llama").patterns(PARAMETERS)
    return {name: patterns[name].local_shapes(shape, run.tp) for name, (shape, _) in PARAMETERS.items()}


def problems_of(view: UniversalView, run: NativeRun, steps: int) -> Iterator[str]:
    """What is wrong when a source is read into a target; nothing when all is well."""
    layouts = layouts_of(view.patterns, target_shapes(run), run.tp, None, "the target")
    reader = FileReader()
    for wanted in target(run):
        count = TransferCount()
        place = f"{run} rank tp{wanted.tp_rank} dp{wanted.dp_rank}"
        if overlapping_fragments([part for found in wanted.fragments.values() for part in found]) is not None:
            yield f"{place}: fragments overlap"
        for state in STATES:
            buffers = [torch.full_like(entry.states[state], float("nan")) for entry in wanted.held]
            for name, fragments in wanted.fragments.items():
                want = Target(layouts[name], wanted.tp_rank, fragments)
                count.add(run_copies(plan_tensor(view.source(name, state), want, state), reader, buffers.__getitem__))
            for buffer, entry in zip(buffers, wanted.held, strict=True):
                # Padding is NaN on both sides: it must be left alone.
                if not torch.equal(buffer.view(torch.int32), entry.states[state].view(torch.int32)):
                    yield f"{place}: {state} of {entry.names} differs"
        if count.bytes_read != 4 * len(STATES) * wanted.numel:
            yield f"{place}: {count.bytes_read} bytes read, {4 * len(STATES) * wanted.numel} needed"
    found = {parameter.scalars["step"] for parameter in view.parameters.values()}
    if found != {steps}:
        yield f"step is {found}, expected {steps}"
    reader.close()


@pytest.mark.parametrize("source", runs("bf16") + runs("fp32"), ids=str)
def test_source_fills_every_target(tmp_path: Path, source: NativeRun) -> None:
    """Each rank of each target holds what it would have saved itself; only the needed bytes are read."""
    checkpoint = open_checkpoint(write_native(tmp_path, llama(), source))
    assert (checkpoint.topology.tp, checkpoint.topology.dp) == (source.tp, source.dp)
    assert checkpoint.topology.zero_stage == source.stage
    assert list(checkpoint.parameters) == list(PARAMETERS)
    view = UniversalView.of(checkpoint, load_spec("megatron_core_llama"))
    steps = STEPS + (source.kind in ("unfused", "fused"))
    problems = [f"{source} → {problem}" for run in runs(source.precision) for problem in problems_of(view, run, steps)]
    assert not problems, "\n".join(problems[:20])


def test_the_matrix_is_complete() -> None:
    """All four stages with all six topologies, in both precisions."""
    for precision in PRECISIONS:
        assert {(run.stage, run.tp, run.dp) for run in runs(precision)} == {
            (stage, tp, dp) for stage in range(4) for tp, dp in TOPOLOGIES
        }
