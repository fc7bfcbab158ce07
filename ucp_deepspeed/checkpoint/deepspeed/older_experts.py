"""Facts that DeepSpeed before 0.19.3 left out of checkpoints with mixtures of experts, and other sources of them.

Such a model_states file has no ``buffer_names``, ``param_shapes`` and ``ds_config``. The files of the expert-parallel ranks hold
the optimizer's state of all parameters (``runtime/engine.py::_save_moe_checkpoint``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from ucp_deepspeed.checkpoint.deepspeed.contents import item_of, value_of
from ucp_deepspeed.checkpoint.deepspeed.manifest import Manifest
from ucp_deepspeed.checkpoint.deepspeed.zero import NamedShapes
from ucp_deepspeed.checkpoint.deepspeed.zero_files import ZeroFile
from ucp_deepspeed.checkpoint.experts import weight_file
from ucp_deepspeed.errors import UnsupportedError

RESAVE_HINT = (
    'resume where it was saved, with "load": "auto" (DeepSpeed itself loads it there), and save again: that records it'
)
"""The user's way on if the files don't tell enough."""


class Files(Protocol):
    """The members of a tag folder that this module uses; see `ucp_deepspeed.checkpoint.deepspeed.files.DeepSpeedFiles`."""

    path: Path
    manifest: Manifest | None

    @property
    def open(self) -> Callable[[Path], dict[str, Any]]:
        """Describe the content of a file."""

    @property
    def names(self) -> frozenset[str]:
        """Names of all files in the folder."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Config that DeepSpeed ran with."""

    def model_states(self, rank: int, partition: int = 0) -> dict[str, Any]:
        """Return the content of a model_states file."""

    def weights(self, path: Path) -> dict[str, Any]:
        """Return the content of a file of weights alone."""

    def optimizer_state(self, rank: int, partition: int) -> ZeroFile:
        """Return the optimizer's state in the file of one partition."""


def is_older(saved: Mapping[str, Any]) -> bool:
    """Return whether a model_states file is of that kind."""
    return "num_experts" in saved and "buffer_names" not in saved


def completed(files: Files, saved: Mapping[str, Any], rank: int) -> dict[str, Any]:
    """Return a model-parallel rank's file with the names of buffers added, and without ZeRO the optimizer's state.

    Raises:
        UnsupportedError: no file has this rank's optimizer state.
    """
    recorded = files.manifest.parameters if files.manifest else {}
    buffers = [name for name, entry in recorded.items() if entry.kind == "buffer"]
    if not recorded:  # tensors that can't have a gradient; others count as frozen
        tensors = (
            (name, value) for name, value in (saved.get("module") or {}).items() if isinstance(value, torch.Tensor)
        )
        buffers = [name for name, tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())]
    path = first_expert_optimizer(files, rank)
    if path.name not in files.names and any(name.startswith("expp_rank_") for name in files.names):
        raise UnsupportedError(
            f"{files.path} lacks {path.name}: which file has that rank's state can't be told; {RESAVE_HINT}"
        )
    optimizer = value_of(files.open(path), "optimizer", "the key", path) if path.name in files.names else None
    return {**saved, "buffer_names": buffers, "optimizer": optimizer}


def first_expert_optimizer(files: Files, rank: int) -> Path:
    """Return the file of the first expert-parallel rank. It has the state of all parameters that aren't experts too."""
    return files.path / f"expp_rank_0_mp_rank_{rank:02d}_optim_states.pt"


def mapped_shapes(files: Files, rank: int) -> list[NamedShapes]:
    """Replace ``param_shapes``: names as the partitions map them, and shapes of the weights in the model's files.

    Raises:
        UnsupportedError: the mappings are missing, or don't tell the order.
    """
    saved = files.model_states(rank)
    opened = [files.optimizer_state(rank, partition) for partition in range(saved["dp_world_size"])]
    path, mappings = opened[0].path, [file.mappings for file in opened]
    if any(mapping is None for mapping in mappings):
        raise UnsupportedError(
            f"{path} doesn't say which parameters it holds: DeepSpeed recorded that for mixtures of experts under ZeRO in no "
            f"way before 0.7.3, and of ZeRO-3 before 0.19.3; {RESAVE_HINT}"
        )
    zero = files.config.get("zero_optimization")
    named = [[group.get("name") for group in file.groups] for file in opened]
    if (isinstance(zero, Mapping) and zero.get("round_robin_gradients")) or any(names != named[0] for names in named):
        raise UnsupportedError(f"{path}: the order of the parameters in it can't be told; {RESAVE_HINT}")
    shapes = _shapes(files, saved, rank)
    groups: list[dict[str, tuple[int, ...]]] = [{} for _ in mappings[0] or ()]
    for file in opened:
        for index, group in enumerate(groups):
            mapping = item_of(file.mappings or (), index, "mappings of flat groups", file.path)
            for name, _ in sorted(mapping.items(), key=lambda entry: entry[1].start):
                group.setdefault(name, value_of(shapes, name, "the weight of", files.path))
    return list(groups)


def _shapes(files: Files, saved: Mapping[str, Any], rank: int) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all weights. The files number the first rank's experts as each rank numbers its own."""
    held = dict(saved["module"] or {})
    for name in sorted(files.names):
        place = weight_file(name)
        if place is not None and place[2] == rank:
            held |= files.weights(files.path / name)
    return {name: tuple(tensor.shape) for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}
