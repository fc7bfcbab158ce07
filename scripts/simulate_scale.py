"""Plans one rank's resume of models that don't fit here, from checkpoints of which only the metadata is made.

Prints, for each pair of topologies, what planning costs that rank and what it would read. Opening the files comes on top.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import click

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, HeldShapes, Parameter, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.experts import EXPERTS, holder_of, numbers_of_experts
from ucp_deepspeed.layout import FlatGroup, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard
from ucp_deepspeed.plan import Fragment
from ucp_deepspeed.transfer.target_ranks import stages_of
from ucp_deepspeed.transfer.targeting import plan_target

STATES = {"fp32": "F32", "exp_avg": "F32", "exp_avg_sq": "F32"}

Tensors = dict[str, tuple[Shape, Pattern]]


@dataclass(frozen=True, slots=True)
class Model:
    """A transformer: dense, or with DeepSpeed's experts in each layer."""

    name: str
    layers: int
    hidden: int
    ffn: int
    vocabulary: int
    experts: int = 0
    expert_ffn: int = 0

    def tensors(self) -> Tensors:
        """Whole shape and pattern of each parameter, under Megatron-Core's names."""
        rows, columns = Shard(0), Shard(1)
        found: Tensors = {"embedding.word_embeddings.weight": ((self.vocabulary, self.hidden), rows)}
        for layer in range(self.layers):
            held: Tensors = {
                "input_layernorm.weight": ((self.hidden,), Replicate()),
                "self_attention.linear_qkv.weight": ((3 * self.hidden, self.hidden), rows),
                "self_attention.linear_proj.weight": ((self.hidden, self.hidden), columns),
                "pre_mlp_layernorm.weight": ((self.hidden,), Replicate()),
            }
            if self.ffn:
                held["mlp.linear_fc1.weight"] = ((2 * self.ffn, self.hidden), Shard(0, parts=(1, 1)))
                held["mlp.linear_fc2.weight"] = ((self.hidden, self.ffn), columns)
            for expert in range(self.experts):
                own = f"mlp.{EXPERTS}.{expert}"
                held[f"{own}.linear_fc1.weight"] = ((2 * self.expert_ffn, self.hidden), Shard(0, parts=(1, 1)))
                held[f"{own}.linear_fc2.weight"] = ((self.hidden, self.expert_ffn), columns)
            found |= {f"decoder.layers.{layer}.{name}": entry for name, entry in held.items()}
        found["decoder.final_layernorm.weight"] = ((self.hidden,), Replicate())
        return found | {"output_layer.weight": ((self.vocabulary, self.hidden), rows)}


MODELS = {
    "7b": Model("GPT 7B", 32, 4096, 11008, 32768),
    "176b": Model("GPT 176B", 70, 14336, 38144, 250880),
    "1t": Model("dense 1T", 128, 25600, 68096, 51200),
    "671b": Model("MoE 671B", 58, 7168, 0, 129280, experts=256, expert_ffn=2048),
}

CASES = [
    ("7b", Topology(2, 2, 16, 1), Topology(2, 2, 12, 1)),
    ("7b", Topology(1, 1, 64, 3), Topology(4, 1, 32, 1)),
    ("176b", Topology(4, 12, 8, 1), Topology(8, 6, 6, 1)),
    ("1t", Topology(8, 64, 2, 1), Topology(8, 32, 3, 1)),
    ("1t", Topology(8, 64, 2, 1), Topology(8, 64, 32, 1)),
    ("1t", Topology(8, 64, 32, 1), Topology(8, 64, 2, 1)),
    ("671b", Topology(1, 1, 1024, 1, 64), Topology(1, 1, 768, 1, 32)),
    ("671b", Topology(1, 1, 1024, 1, 64), Topology(1, 1, 2048, 1, 128)),
]
"""From 64 to 16,384 ranks, to fewer and to more: model, source, target."""


class Described(Checkpoint):
    """The catalog of a checkpoint that isn't there: where everything would be follows from model and topology."""

    def __init__(self, model: Model, topology: Topology) -> None:
        self.path, self.form, self.topology = Path(model.name), "described", topology
        self.run = RunState("bf16", 1000, None, 0, None, None, "")
        tensors = model.tensors()
        self._stages = stages_of(list(tensors), topology.pp)
        self.patterns = {name: pattern for name, (_, pattern) in tensors.items()}
        shares: dict[tuple[Shape, Pattern], tuple[Shape, ...]] = {}
        self.parameters = {}
        for name, (shape, pattern) in tensors.items():
            if (shape, pattern) not in shares:
                shares[shape, pattern] = tuple(pattern.local_shapes(shape, topology.tp))
            held = self._on_stages(self._stages[name], shares[shape, pattern])
            self.parameters[name] = Parameter(name, "trainable", held, STATES, {"step": 1000.0})
        self.groups = (ParameterGroup(tuple(tensors), {}),)
        self.recorded_shapes, self.logical_names, self.vocabulary_size = {}, {}, model.vocabulary
        experts = numbers_of_experts(tensors)
        self._holders = {name: holder_of(name, experts, topology.ep) for name in tensors}
        self._buffers: dict[tuple[int, int | None], tuple[dict[str, int], FlatGroup]] = {}

    def _on_stages(self, stage: int, shares: tuple[Shape, ...]) -> HeldShapes:
        nothing: HeldShapes = (None,) * self.topology.tp
        return tuple(shape for held in range(self.topology.pp) for shape in (shares if held == stage else nothing))

    @cached_property
    def _of_stage(self) -> list[list[str]]:
        found: list[list[str]] = [[] for _ in range(self.topology.pp)]
        for name, stage in self._stages.items():
            found[stage].append(name)
        return found

    def _buffer(self, rank: int, ep_rank: int | None) -> tuple[dict[str, int], FlatGroup]:
        """What a model-parallel rank has in the group of an expert-parallel rank's experts, or of all else: places and cut."""
        key = rank, ep_rank
        if key not in self._buffers:
            held = [name for name in self._of_stage[rank // self.topology.tp] if self._holders[name] == ep_rank]
            sizes = tuple(prod(self.parameters[name].local_shapes[rank] or ()) for name in held)
            cut = FlatGroup(sizes, self.topology.dp // (1 if ep_rank is None else self.topology.ep))
            self._buffers[key] = {name: index for index, name in enumerate(held)}, cut
        return self._buffers[key]

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`. Under ZeRO-3 each parameter is cut on its own, which for one file each is the same."""
        ep_rank = self._holders[name]
        places, cut = self._buffer(rank, ep_rank)
        for part in cut.slices(places[name], local_start, local_stop):
            partition = part.partition if ep_rank is None else ep_rank + self.topology.ep * part.partition
            path = f"zero_pp_rank_{partition}_mp_rank_{rank:02d}_optim_states.pt"
            extent = FileExtent(path, list(STATES).index(state) << 40, STATES[state], cut.partition_numel)
            yield Fragment(part.local_start, part.numel, extent, part.buffer_start)

    def client_state(self, rank: int = 0) -> tuple[str, dict[str, Any]]:
        """None is described."""
        return "", {}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        """None are described."""
        return ({},) * self.topology.tp


@dataclass(frozen=True, slots=True)
class Cost:
    """What one rank pays, and what it would read. ``memory`` in bytes beyond the started interpreter's."""

    model: str
    source: str
    target: str
    source_ranks: int
    target_ranks: int
    seconds: float
    memory: int
    files: int
    copies: int
    bytes_read: int
    bytes_held: int


def measure(key: str, source: Topology, target: Topology) -> Cost:
    """Plan a rank in the middle; run in a process of its own, whose peak of memory is its own too."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    wanted = (target.model_parallel // 2, target.dp // 2)
    plan = plan_target(Described(MODELS[key], source), target, only={wanted})
    seconds = time.perf_counter() - started
    if not plan.possible:
        raise SystemExit("\n".join(map(str, plan.obstacles)))
    [rank] = plan.ranks
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return Cost(
        MODELS[key].name,
        str(source),
        str(target),
        source.model_parallel * source.dp,
        target.model_parallel * target.dp,
        seconds,
        memory,
        len(rank.files),
        rank.copies,
        rank.bytes_read,
        rank.bytes_held,
    )


def _table(costs: list[Cost]) -> str:
    rows = ["| model | source | target | ranks | plan s | plan MB | files | copies | MB read | × held |"]
    rows.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cost in costs:
        rows.append(
            f"| {cost.model} | {cost.source} | {cost.target} | {cost.source_ranks:,} → {cost.target_ranks:,} | "
            f"{cost.seconds:.2f} | {cost.memory / 1e6:.0f} | {cost.files} | {cost.copies} | {cost.bytes_read / 1e6:,.0f} | "
            f"{cost.bytes_read / cost.bytes_held:.3f} |"
        )
    return "\n".join(rows)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(as_json: bool) -> None:
    """Measure every case."""
    context: Any = multiprocessing.get_context("fork")
    costs: list[Cost] = []
    for case in CASES:
        with context.Pool(1) as pool:
            costs.append(pool.apply(measure, case))
        if as_json:
            click.echo(json.dumps(asdict(costs[-1])))
    if not as_json:
        click.echo(_table(costs))


if __name__ == "__main__":
    main()
