"""Facts that earlier releases of DeepSpeed left out of their files, and other sources of them.

Before 0.19.3 a model_states file with mixtures of experts has no ``buffer_names``, ``param_shapes`` and ``ds_config``. The files
of the expert-parallel ranks hold the optimizer's state of all parameters (``runtime/engine.py::_save_moe_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ucp_deepspeed.checkpoint.deepspeed.contents import item_of, value_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import ManifestParameter
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import ZERO_3, NamedShapes, ZeroFile, described_numels
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError

RESAVE_HINT = (
    'resume where it was saved, with "load": "auto" (DeepSpeed itself loads it there), and save again: that records it'
)
"""The user's way on if the files don't tell enough."""


def is_older(saved: Mapping[str, Any]) -> bool:
    """Return whether a model_states file is of that kind."""
    return "num_experts" in saved and "buffer_names" not in saved


def buffer_names(saved: Mapping[str, Any], recorded: Mapping[str, ManifestParameter]) -> list[str]:
    """Return the names of a rank's buffers: as recorded, else of tensors that can't have a gradient. Others count as frozen."""
    if recorded:
        return [name for name, entry in recorded.items() if entry.kind == "buffer"]
    tensors = ((name, value) for name, value in (saved.get("module") or {}).items() if isinstance(value, torch.Tensor))
    return [name for name, tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())]


def mapped_shapes(opened: Sequence[ZeroFile], weights: Mapping[str, Any], reordered: bool) -> list[NamedShapes]:
    """Replace ``param_shapes``: names as the partitions map them, and shapes of the weights in the model's files.

    Args:
        opened: the files of all partitions.
        weights: weights of the rank. The files number the first rank's experts as each rank numbers its own.
        reordered: the run's config has ``round_robin_gradients``.

    Raises:
        UnsupportedError: the mappings are missing, or don't tell the order.
    """
    path = opened[0].path
    if any(file.mappings is None for file in opened):
        raise UnsupportedError(
            f"{path} doesn't say which parameters it holds: DeepSpeed recorded that for mixtures of experts under ZeRO in no "
            f"way before 0.7.3, and of ZeRO-3 before 0.19.3; {RESAVE_HINT}"
        )
    named = [[group.get("name") for group in file.groups] for file in opened]
    if reordered or any(names != named[0] for names in named):
        raise UnsupportedError(f"{path}: the order of the parameters in it can't be told; {RESAVE_HINT}")
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items() if isinstance(tensor, torch.Tensor)}
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in opened[0].mappings or ()]
    for file in opened:
        for index, group in enumerate(groups):
            mapping = item_of(file.mappings or (), index, "mappings of flat groups", file.path)
            for name, _ in sorted(mapping.items(), key=lambda entry: entry[1].start):
                group.setdefault(name, value_of(shapes, name, "the weight of", path.parent))
    return list(groups)


def in_flat_groups(named: NamedShapes, partitions: Sequence[ZeroFile]) -> list[NamedShapes]:
    """Split names in flat order into groups, by the groups' sizes. Early releases didn't record which group has which name.

    Raises:
        DamagedCheckpointError: the sizes don't fit the names.
    """
    numels, masters = described_numels(named), [[buffer.numel() for buffer in file.masters] for file in partitions]
    first, sizes = partitions[0], masters[0]
    if first.form is ZERO_3:  # each rank has a part of each parameter
        numels = {name: -(-numel // len(partitions)) for name, numel in numels.items()}
    elif all(len(held) == len(sizes) for held in masters):
        sizes = [sum(held) for held in zip(*masters, strict=True)]
    groups: list[dict[str, Sequence[int]]] = []
    left = 0
    for name, numel in numels.items():
        if left == 0 and (numel or not groups) and len(groups) < len(sizes):
            groups.append({})
            left = sizes[len(groups) - 1]
        left -= numel
        if groups:
            groups[-1][name] = named[name]
    if left or len(groups) != len(sizes):
        raise DamagedCheckpointError(f"{first.path}: param_shapes doesn't fit flat groups of {sizes} elements")
    return list(groups)
