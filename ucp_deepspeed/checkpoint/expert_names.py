"""DeepSpeed's mixture-of-experts layers. Their experts are spread over expert-parallel ranks.

Every rank calls its own experts 0, 1, …, in the model and in optimizer files. Names here have the numbers in the whole layer.

Source: ``moe/experts.py``, ``utils/groups.py::_create_expert_and_data_parallel``, ``runtime/engine.py::_save_moe_checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ucp_deepspeed.errors import UnsupportedError

EXPERTS = "deepspeed_moe.experts.deepspeed_experts"
"""Name of the experts in a layer (``deepspeed.moe.layer.MoE``)."""

_NAME = re.compile(rf"((?:.+\.)?{re.escape(EXPERTS)}\.)(\d+)(\..+)")
_WEIGHT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")


def expert_of(name: str) -> tuple[str, int] | None:
    """Return the layer's list of experts, and the expert's number in it; None if the name isn't an expert's."""
    found = _NAME.fullmatch(name)
    return (found[1], int(found[2])) if found else None


def mixes_experts(names: Iterable[str]) -> bool:
    """Return whether parameters of one group are experts and others, as an engine with ZeRO has them in none."""
    return len({expert_of(name) is None for name in names}) > 1


def renumbered(name: str, shift: int) -> str:
    """Return the name of the same tensor in the expert with a number higher by ``shift``; other names stay as they are."""
    found = _NAME.fullmatch(name)
    return f"{found[1]}{int(found[2]) + shift}{found[3]}" if found else name


def numbers_of_experts(names: Iterable[str]) -> dict[str, int]:
    """Count the experts in each layer's list among the names."""
    counts: dict[str, int] = {}
    for name in names:
        if (found := expert_of(name)) is not None:
            counts[found[0]] = max(counts.get(found[0], 0), found[1] + 1)
    return counts


def holder_of(name: str, numbers: Mapping[str, int], ep: int) -> int | None:
    """Return the expert-parallel rank that holds a parameter; None if it isn't an expert's. ``numbers``: all experts by layer."""
    found = expert_of(name)
    return None if found is None else found[1] // max(numbers[found[0]] // ep, 1)


def names_on(names: Iterable[str], ep_rank: int) -> tuple[str, ...]:
    """Turn a rank's own names of its parameters into the names in the whole model."""
    held = tuple(names)
    counts = numbers_of_experts(held)
    shifts = {name: ep_rank * counts[expert[0]] for name in held if (expert := expert_of(name))}
    return tuple(renumbered(name, shifts.get(name, 0)) for name in held)


def names_on_all(names: Iterable[str], ep: int) -> list[str]:
    """Do the same as `names_on` for all expert-parallel ranks. Names that all of them hold aren't repeated."""
    held = tuple(names)
    return list(dict.fromkeys(name for ep_rank in range(ep) for name in names_on(held, ep_rank)))


def weight_file(file_name: str) -> tuple[int, int, int] | None:
    """Return layer, expert and model-parallel rank of a file with one expert's weights; None for any other file."""
    found = _WEIGHT_FILE.fullmatch(file_name)
    return (int(found[1]), int(found[2]), int(found[3])) if found else None


def missing_expert(totals: int | Sequence[int], places: Collection[tuple[int, int]]) -> tuple[int, int] | None:
    """Return the first expert without a file of weights; None if all have one.

    Args:
        totals: experts of each layer, or of all layers as older files have it.
        places: (number of the layer, number of the expert) of each file.
    """
    layers = (
        ((layer, totals) for layer in sorted({at for at, _ in places}))
        if isinstance(totals, int)
        else enumerate(totals)
    )
    return next(((layer, i) for layer, total in layers for i in range(total) if (layer, i) not in places), None)


def optimizer_file(file_name: str) -> tuple[int, int] | None:
    """Return expert-parallel and model-parallel rank of a stage-0 optimizer file; None for any other file."""
    found = _OPTIMIZER_FILE.fullmatch(file_name)
    return (int(found[1]), int(found[2])) if found else None


@dataclass(frozen=True, slots=True)
class ExpertRanks:
    """The ranks that hold each expert of a layer.

    Attributes:
        ep: expert-parallel size: expert ``i`` of rank ``e`` is number ``e * local experts + i`` of the layer.
        dp: data-parallel size.
        tp: tensor-parallel size.
        tensor_parallel: True if each expert is cut over the tensor-parallel ranks (``enable_expert_tensor_parallelism``). If
            False, experts are spread over these ranks too.
        data_first: the config's ``use_data_before_expert_parallelism``.
    """

    ep: int
    dp: int
    tp: int
    tensor_parallel: bool
    data_first: bool = False

    @property
    def partitions(self) -> int:
        """Number of ranks that hold the same experts. ZeRO cuts their group over so many."""
        return (self.dp if self.tensor_parallel else self.dp * self.tp) // self.ep

    def holder(self, ep_rank: int, partition: int, rank: int) -> tuple[int, int]:
        """Return model-parallel and data-parallel rank of one of the ranks that hold an expert-parallel rank's experts.

        Args:
            partition: its position among them.
            rank: the model-parallel rank; only its pipeline stage counts if experts aren't cut.
        """
        position = ep_rank * self.partitions + partition if self.data_first else ep_rank + self.ep * partition
        if self.tensor_parallel:
            return rank, position
        return rank - rank % self.tp + position % self.tp, position // self.tp


def recognise_experts(
    names: Iterable[str], totals: Collection[int], partitions: int, dp: int, tp: int, data_first: bool, where: Path
) -> ExpertRanks:
    """Find out how the experts of a group are spread, from DeepSpeed's records of it.

    Args:
        names: names of one rank's parameters in the group.
        totals: number of experts of each layer of the model, in any order.
        partitions: number of ranks that the group is cut over.

    Raises:
        UnsupportedError: no way, or more than one, fits these numbers.
    """
    local = set(numbers_of_experts(names).values())
    fitting = {
        ranks
        for cut in (True, False)
        for ep in [(dp if cut else dp * tp) // partitions]
        if all(count * ep in totals for count in local)
        for ranks in [ExpertRanks(ep, dp, tp, cut or tp == 1, data_first)]
        if ranks.partitions == partitions
    }
    if len(fitting) != 1:
        raise UnsupportedError(
            f"{where} has {sorted(local)} experts of layers with {sorted(totals)}, cut over {partitions} ranks of TP{tp}·DP{dp}: "
            f"how they are spread can't be told"
        )
    return fitting.pop()
