"""Plans one rank's resume of models that don't fit here, from checkpoints of which only the metadata is made.

Prints, for each pair of topologies, what it costs that rank to list the folder, to read the manifest, to learn from the files
that it opens what is in them, and to plan; how many files it opens, and how many of these it reads from. Reading the files'
headers comes on top.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import re
import resource
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import click
import torch

from ucp_deepspeed.checkpoint.deepspeed import files as deepspeed_files
from ucp_deepspeed.checkpoint.deepspeed import manifest as manifests
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, Manifest, ManifestParameter
from ucp_deepspeed.checkpoint.expert_names import EXPERTS, expert_of, holder_of, numbers_of_experts
from ucp_deepspeed.layout import FlatGroup, Shape, SlicedGroup, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Shard
from ucp_deepspeed.transfer.planning.target_ranks import stages_of
from ucp_deepspeed.transfer.planning.targeting import plan_target

T = TypeVar("T")

Tensors = dict[str, tuple[Shape, Pattern]]

SHAPES_NAME, TAG = "shapes", "global_step1000"

FILE_NUMBYTES, DIGEST = 1_234_567_890, "0123456789abcdef"
"""The manifest's entry for each file, and the digest of the first data-parallel rank's: as long as real ones."""


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
    ("7b", Topology(1, 1, 64, 1), Topology(2, 1, 512, 0)),
    ("7b", Topology(1, 1, 4096, 3), Topology(1, 1, 2048, 3)),
    ("7b", Topology(1, 1, 16384, 3), Topology(1, 1, 8192, 3)),
    ("176b", Topology(4, 12, 8, 1), Topology(8, 6, 6, 1)),
    ("176b", Topology(4, 12, 8, 1), Topology(4, 12, 64, 1)),
    ("1t", Topology(8, 64, 2, 1), Topology(8, 32, 3, 1)),
    ("1t", Topology(8, 64, 2, 1), Topology(8, 64, 32, 1)),
    ("1t", Topology(8, 64, 32, 1), Topology(8, 64, 2, 1)),
    ("671b", Topology(1, 1, 1024, 1, 64), Topology(1, 1, 768, 1, 32)),
    ("671b", Topology(1, 1, 1024, 1, 64), Topology(1, 1, 2048, 1, 128)),
]
"""From 64 to 16,384 ranks, to fewer and to more: model, source, target."""


class Saved:
    """Makes a checkpoint of which no byte of a tensor exists: its manifest, all files as names with a size, and beside the tag
    folder what is in the files of each model-parallel rank, for `Opened`.
    """

    def __init__(self, model: Model, topology: Topology, folder: Path) -> None:
        self._model, self._topology, self._folder = model, topology, folder
        self._tensors = model.tensors()
        self._experts = numbers_of_experts(self._tensors)
        self._stages = stages_of(list(self._tensors), topology.pp)
        self._shares = {
            name: tuple(pattern.local_shapes(shape, topology.tp)) for name, (shape, pattern) in self._tensors.items()
        }
        held: list[list[str]] = [[] for _ in range(topology.pp)]
        for name, stage in self._stages.items():
            held[stage].append(name)
        self._groups = [self._groups_of(names) for names in held]

    def write(self) -> None:
        """All of it."""
        tag, shapes = self._folder / TAG, self._folder / SHAPES_NAME
        tag.mkdir()
        shapes.mkdir()
        files = dict.fromkeys(sorted(self._names()), FILE_NUMBYTES)
        for name, numbytes in files.items():
            with (tag / name).open("wb") as file:
                os.truncate(file.fileno(), numbytes)
        (tag / MANIFEST_NAME).write_text(self._manifest(files).model_dump_json(), encoding="utf-8")
        for rank in range(self._topology.model_parallel):
            stage, tp_rank = divmod(rank, self._topology.tp)
            held = [{name: self._shares[name][tp_rank] for name in group} for group in self._groups[stage]]
            (shapes / str(rank)).write_bytes(pickle.dumps(held))

    def _groups_of(self, names: Sequence[str]) -> list[list[str]]:
        """Groups of one stage: parameters of all ranks, and experts under the names of the first expert-parallel rank."""
        holders = {name: holder_of(name, self._experts, self._topology.ep) for name in names}
        groups = [[name for name in names if holders[name] == holder] for holder in (None, 0)]
        return [group for group in groups if group]

    def _manifest(self, files: Mapping[str, int]) -> Manifest:
        groups = tuple(tuple(map(tuple, held)) for held in self._groups)
        return Manifest(
            topology=self._topology,
            optimizer="zero-3" if self._topology.zero_stage == 3 else "zero-1/2",
            vocabulary_size=self._model.vocabulary,
            parameter_groups=groups,
            group_numbers=tuple(tuple(range(len(held))) for held in groups),
            parameters={
                name: ManifestParameter(
                    kind="trainable",
                    logical_shape=shape,
                    pattern=pattern,
                    local_shapes=self._shares[name][:1] if len(set(self._shares[name])) == 1 else self._shares[name],
                    stages=(self._stages[name],),
                )
                for name, (shape, pattern) in self._tensors.items()
            },
            same_numbers=True,
            has_extra_states=False,
            files=files,
            contents={name: DIGEST for name in files if re.match(r"(bf16_)?(zero_pp_rank_0_)?mp_rank_", name)},
        )

    def _names(self) -> Iterator[str]:
        """Names of all files but the manifest, as the engine and the save hook would write them."""
        topology = self._topology
        for rank in range(topology.model_parallel):
            for part in range(topology.dp):
                yield f"bf16_zero_pp_rank_{part}_mp_rank_{rank:02d}_optim_states.pt"
                if topology.zero_stage == 3:
                    yield f"zero_pp_rank_{part}_mp_rank_{rank:02d}_model_states.pt"
            if topology.zero_stage < 3:
                yield f"mp_rank_{rank:02d}_model_states.pt"
        yield "ucp_random_states.jsonl"
        if topology.pp > 1:
            for layer, rank in product(range(self._model.layers + 3), range(topology.tp)):
                yield f"layer_{layer:02d}-model_{rank:02d}-model_states.pt"
        for number, expert in product(range(len(self._experts)), range(self._model.experts)):
            yield f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt"
        for rank in range(topology.ep if self._experts else 0):
            yield f"expp_rank_{rank}_mp_rank_00_optim_states.pt"


class Opened:
    """Content of a checkpoint of `Saved`, as a load finds it: its `open` stands for `open_torch_file`.

    Attributes:
        names: names of the files that were opened.
    """

    def __init__(self, model: Model, topology: Topology, folder: Path) -> None:
        self._model, self._topology, self._folder = model, topology, folder
        self.names: set[str] = set()

    def open(self, path: Path, owned: Collection[str] | None = None, **_: bool) -> dict[str, Any]:
        """Return what DeepSpeed would have written, as far as a load looks at it. All of it can be read."""
        self.names.add(path.name)
        found = re.fullmatch(r"(?:bf16_)?(?:zero_pp_rank_\d+_)?mp_rank_(\d+)_(model|optim)_states.pt", path.name)
        assert found is not None, path
        shapes = pickle.loads((self._folder / SHAPES_NAME / str(int(found[1]))).read_bytes())
        return self._weights(shapes) if found[2] == "model" else {"optimizer_state_dict": self._optimizer(shapes)}

    def _weights(self, shapes: list[dict[str, Shape]]) -> dict[str, Any]:
        held = [(name, shape) for group in shapes for name, shape in group.items() if not expert_of(name)]
        module = {name: _described(shape, place) for place, (name, shape) in enumerate(held)}
        return {
            "module": None if self._topology.pp > 1 else module,
            "buffer_names": [],
            "param_shapes": shapes,
            "dp_world_size": self._topology.dp,
            "mp_world_size": self._topology.model_parallel,
            "checkpoint_parallel_dimensions": {"pp_degree": self._topology.pp},
            "num_experts": [self._model.experts] * self._model.layers if self._model.experts else [],
            "ds_config": {"bf16": {"enabled": True}},
            "global_steps": 1000,
            "skipped_steps": 0,
        }

    def _optimizer(self, shapes: list[dict[str, Shape]]) -> dict[str, Any]:
        """All partitions are alike: a real one's last may be shorter, without its padding."""
        numels = [tuple(map(prod, group.values())) for group in shapes]
        counts = [self._topology.dp, self._topology.dp // self._topology.ep][: len(shapes)]
        cuts: list[FlatGroup | SlicedGroup]
        if self._topology.zero_stage == 3:
            cuts = [SlicedGroup(numel, count) for numel, count in zip(numels, counts, strict=True)]
        else:
            cuts = [FlatGroup(numel, count) for numel, count in zip(numels, counts, strict=True)]
        sizes = [cut.buffer_numel(0) for cut in cuts]
        state = {
            group: {"step": 1000.0, **{key: _described((size,), group) for key in ("exp_avg", "exp_avg_sq")}}
            for group, size in enumerate(sizes)
        }
        settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
        base = {"state": state, "param_groups": [settings | {"params": [group]} for group in state]}
        masters = [_described((size,), group) for group, size in enumerate(sizes)]
        if self._topology.zero_stage == 3:
            return {"zero_stage": 3, "fp32_flat_groups": masters, "optimizer_state_dict": base}
        return {
            "zero_stage": self._topology.zero_stage,
            "single_partition_of_fp32_groups": masters,
            "base_optimizer_state": base,
            "partition_count": counts,
        }


def _described(shape: Shape, place: int) -> torch.Tensor:
    """A tensor as `open_torch_file` returns it, at some place in its file."""
    tensor = torch.empty(shape, device="meta")
    tensor.untyped_storage()._checkpoint_offset = place << 40
    return tensor


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of planning for one rank, and the amount that it would read.

    ``seconds`` of processor time, ``memory`` in bytes: the peak beyond what a process has that has imported everything and done
    nothing yet; ``opened``: files, those that are read from (``files``) included. ``balance``: the most that one of some ranks
    reads, over their mean: the first, the last and those in the middle of both axes.
    """

    model: str
    source: str
    target: str
    source_ranks: int
    target_ranks: int
    seconds: float
    memory: int
    opened: int
    files: int
    copies: int
    bytes_read: int
    bytes_held: int
    balance: float


def measure(key: str, source: Topology, target: Topology) -> Cost:
    """Plan a rank in the middle. Another process makes the checkpoint, and yet another plans: what making it takes, and leaves
    free for the plan to use, doesn't count.
    """
    with tempfile.TemporaryDirectory() as folder:
        _apart(_save, key, source, Path(folder))
        return _apart(_plan, key, source, target, Path(folder))


def _apart(function: Callable[..., T], *arguments: object) -> T:
    """Call it in a process of its own, which ends then."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(function, arguments)


def _save(key: str, source: Topology, folder: Path) -> None:
    Saved(MODELS[key], source, folder).write()


def _plan(key: str, source: Topology, target: Topology, folder: Path) -> Cost:
    held = Opened(MODELS[key], source, folder)
    deepspeed_files.open_torch_file = held.open  # type: ignore[assignment]  # this process measures, and ends
    manifests.digest_of = lambda path: DIGEST  # type: ignore[assignment]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    wanted = (target.model_parallel // 2, target.dp // 2)
    plan = plan_target(DeepSpeedCheckpoint(folder / TAG), target, only={wanted})
    seconds = time.process_time() - started
    memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if not plan.possible:
        raise SystemExit("\n".join(map(str, plan.obstacles)))
    opened, [rank] = len(held.names), plan.ranks
    corners = set(product(_ends(target.model_parallel), _ends(target.dp)))
    sampled = [each.bytes_read for each in plan_target(DeepSpeedCheckpoint(folder / TAG), target, only=corners).ranks]
    return Cost(
        MODELS[key].name,
        str(source),
        str(target),
        source.model_parallel * source.dp,
        target.model_parallel * target.dp,
        seconds,
        memory,
        opened,
        len(rank.files),
        rank.copies,
        rank.bytes_read,
        rank.bytes_held,
        max(sampled) * len(sampled) / sum(sampled),
    )


def _ends(ranks: int) -> set[int]:
    """The first, the last, and one in the middle."""
    return {0, ranks // 2, ranks - 1}


def _table(costs: list[Cost]) -> str:
    rows = [
        "| model | source | target | ranks | plan s | plan MB | opened | files | copies | MB read | × held | balance |"
    ]
    rows.append("| --- | --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    for cost in costs:
        rows.append(
            f"| {cost.model} | {cost.source} | {cost.target} | {cost.source_ranks:,} → {cost.target_ranks:,} | "
            f"{cost.seconds:.2f} | {cost.memory / 1e6:.0f} | {cost.opened} | {cost.files} | {cost.copies} | "
            f"{cost.bytes_read / 1e6:,.0f} | {cost.bytes_read / cost.bytes_held:.3f} | {cost.balance:.2f} |"
        )
    return "\n".join(rows)


@click.command(help=__doc__)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def main(as_json: bool) -> None:
    """Measure every case."""
    costs: list[Cost] = []
    for case in CASES:
        costs.append(measure(*case))
        if as_json:
            click.echo(json.dumps(asdict(costs[-1])))
    if not as_json:
        click.echo(_table(costs))


if __name__ == "__main__":
    main()
