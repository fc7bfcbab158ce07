"""Slots of weights in the model's own files: of frozen parameters and buffers, and of trained parameters without a usable
optimizer state."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT, WEIGHTS_HINT, Kind
from ucp_deepspeed.checkpoint.deepspeed.autoep import AutoEpLayers
from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.manifest import Manifest
from ucp_deepspeed.checkpoint.extra_states import is_extra_state
from ucp_deepspeed.checkpoint.slots import Located, Slot, SplitStates, whole_slot
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES, storage_start
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError

FP32_NAMES = ("fp32", "float32", "float", "torch.float32")
"""Names of the dtype in a config (``runtime/config_utils.py::DtypeEnum``)."""


def tensors_in(state_dict: Mapping[str, Any], path: Path) -> dict[str, Located]:
    """Return weights and buffers of a module's ``state_dict``, each with its file."""
    tensors = {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}
    return {name: (value, path) for name, value in tensors.items() if not is_extra_state(name)}


def module_slot(name: str, kind: Kind, tensor: torch.Tensor, path: Path) -> Slot:
    """Return the slot of one tensor. For a trained parameter the weight replaces the master."""
    state, named = MASTER if kind == "trainable" else WEIGHT, {name: tuple(tensor.shape)}
    if tensor.dtype in TORCH_DTYPES:
        return whole_slot(named, kind, {state: (tensor, path)}, SplitStates({}, {}, {}))
    return whole_slot(named, kind, {}, SplitStates({}, {}, {state: f"{tensor.dtype} has no universal form ({path})"}))


def frozen_slots(
    autoep: AutoEpLayers, key: str, tensor: torch.Tensor, path: Path, known: Collection[str]
) -> list[Slot]:
    """Return the slots of a tensor in a file of weights; none for an AutoEP expert of a trained layer, which is ``known``."""
    name, number = autoep.expert_of(key) or (key, None)
    slot = module_slot(name, "frozen", tensor, path)
    if number is None:
        return [slot]
    whole = autoep.layers[name].experts, *slot.shapes[0]
    return [] if name in known else [replace(slot, shapes=(whole,), starts=(number * tensor.numel(),))]


def weight_slots(module: Mapping[str, Located], trained: Collection[str], path: Path) -> list[Slot]:
    """Return slots of trained parameters whose optimizer state is out of reach.

    Raises:
        DamagedCheckpointError: a weight is in no file.
    """
    if lacking := [name for name in trained if name not in module]:
        raise DamagedCheckpointError(f"{path} describes {lacking[0]}, whose weight is in no file")
    return [module_slot(name, "trainable", *module[name]) for name in trained]


def tied_names(files: DeepSpeedFiles, module: Mapping[str, Located]) -> dict[str, str]:
    """Map names of tied parameters under which no value is stored to the names that have it.

    DeepSpeed lists them under ZeRO since 0.9.2; else shared storage tells.

    Args:
        module: weights and buffers of the first model-parallel rank; empty for a pipeline.
    """
    saved = files.model_states(0)
    listed = dict(saved.get("shared_params") or {})
    if files.is_pipeline:
        return listed
    if not files.sliced:  # DeepSpeed lists parameters without elements as one: they share an address
        listed = {alias: name for alias, name in listed.items() if alias not in module or module[alias][0].numel()}
    unlisted = files.sliced and "shared_params" not in saved  # the empty tensors in their place are shared too
    first: dict[tuple[Any, ...], str] = {}
    shared: dict[str, str] = {}
    for name, (tensor, path) in module.items():
        place = path, storage_start(tensor), tensor.storage_offset(), tensor.dtype, tensor.shape
        repeated = (tensor.numel() or unlisted) and first.setdefault(place, name) != name
        if repeated and name not in saved["buffer_names"]:
            shared[name] = first[place]
    return listed | shared | files.autoep.second_names(module)


def never_stored(version: str) -> str:
    """Return why the files of ZeRO-3 have no value of a parameter."""
    return (
        f"DeepSpeed {version} left its value out: before 0.9.1 that of each frozen parameter at ZeRO-3, and of what no "
        "optimizer has in any version"
    )


def excluded(manifest: Manifest | None, known: Collection[str]) -> dict[str, str]:
    """Return the frozen parameters that a manifest tells of and that aren't among the ``known``, with the reason."""
    told = {} if manifest is None else manifest.parameters
    gone = [name for name, each in told.items() if each.kind == "frozen" and name not in known]
    stored = [
        name for name in gone if all(map(prod, told[name].local_shapes or ()))
    ]  # without elements they stand nowhere
    return dict.fromkeys(stored, "the save left it out, with exclude_frozen_parameters")


def without_optimizer(files: DeepSpeedFiles) -> MismatchError:
    """Return the error that says why a checkpoint of a run with an optimizer has no state of it."""
    path, version = files.model_states_path(0, 0), str(files.model_states(0).get("ds_version", "unknown")).strip()
    if _never_wrote_optimizer(files, version):
        fp32 = ", with gradients accumulated in fp32" if files.configured_stage else ""
        return MismatchError(
            f"{path} holds no optimizer state, and neither does another file: DeepSpeed {version}, which wrote it, left it out "
            f"at bf16 and ZeRO stage {files.configured_stage}{fp32}. The files are whole otherwise: {WEIGHTS_HINT}"
        )
    return MismatchError(
        f"{files.path} holds no optimizer state: the optimizer's files (*_optim_states.pt) aren't there. The weights are: "
        f"{WEIGHTS_HINT}"
    )


def _never_wrote_optimizer(files: DeepSpeedFiles, version: str) -> bool:
    """Return whether DeepSpeed itself left the state out: 0.17.6 to 0.18.4 took another optimizer where bf16 called for
    ``BF16_Optimizer`` (``runtime/engine.py::_configure_optimizer``)."""
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    if found is None or files.precision != "bf16" or not (0, 17, 6) <= tuple(map(int, found.groups())) < (0, 18, 5):
        return False
    types = files.config.get("data_types")
    accumulated = types.get("grad_accum_dtype") if isinstance(types, Mapping) else None
    return files.configured_stage == 0 or (files.configured_stage == 1 and accumulated in FP32_NAMES)
