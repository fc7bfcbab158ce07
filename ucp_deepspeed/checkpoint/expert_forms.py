"""Forms of expert tensors in Hugging Face models, and conversion between them.

* AutoEP: ``experts.w1``, ``experts.w3`` and ``experts.w2``, each of all experts (`ucp_deepspeed.checkpoint.deepspeed.autoep`).
* Fused, transformers 5: ``experts.gate_up_proj`` of shape (experts, 2 * inner, hidden), gate above up, and ``experts.down_proj``.
* Single, transformers 4: modules ``experts.0``, … with ``w1``, ``w3``, ``w2`` (Mixtral) or ``gate_proj``, ``up_proj``,
  ``down_proj`` (Qwen, DeepSeek).

Source: DeepSpeed 0.19.8, ``moe/ep_repack.py``; transformers 5, ``models/mixtral/modeling_mixtral.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import prod

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.derived import Regrouped, RegroupedCheckpoint, Run
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.layout import Shape

Matrix = tuple[str, str, int]
"""A matrix of one expert: the layer's name, ``gate``, ``up`` or ``down``, and the expert's number."""

_STACKED = re.compile(r"(.+)\.experts\.(w1|w2|w3)")
_FUSED = re.compile(r"(.+)\.experts\.(gate_up_proj|down_proj)")
_SINGLE = re.compile(r"(.+)\.experts\.(\d+)\.(w1|w2|w3|gate_proj|up_proj|down_proj)\.weight")

_MATRICES: Mapping[str, tuple[str, ...]] = {
    **{"w1": ("gate",), "w3": ("up",), "w2": ("down",)},
    **{"gate_proj": ("gate",), "up_proj": ("up",), "down_proj": ("down",), "gate_up_proj": ("gate", "up")},
}
"""Matrices of an expert in each tensor, from the first row on."""

_OF_LAYER = (
    (r"gate\.(weight|bias)", r"router.gate.\1"),
    (r"gate\.e_score_correction_bias", r"router.e_score_correction_bias"),
    (r"shared_expert\.(.+)", r"shared_experts.\1"),
    (r"shared_expert_gate\.(.+)", r"shared_experts_gate.\1"),
)
"""Names of a layer's other tensors in transformers, and in AutoEP (``module_inject/auto_ep_layer.py``)."""

_OLD_LAYER = "block_sparse_moe"
"""Name of Mixtral's layers in transformers 4; now ``mlp``."""


def matrices_in(name: str, shape: Shape) -> list[Matrix]:
    """Return the expert matrices in a parameter, end to end, with transformers 5's name of the layer; none for others."""
    if single := _SINGLE.fullmatch(name):
        layer, number, weight = single.groups()
        return [(_layer(layer), matrix, int(number)) for matrix in _MATRICES[weight]]
    stacked = _STACKED.fullmatch(name) or _FUSED.fullmatch(name)
    if stacked is None or len(shape) != 3:
        return []
    layer, weight = stacked.groups()
    return [(_layer(layer), matrix, number) for number in range(shape[0]) for matrix in _MATRICES[weight]]


def _layer(name: str) -> str:
    head, _, last = name.rpartition(".")
    return f"{head}.mlp" if last == _OLD_LAYER else name


def matrix_shape(name: str, shape: Shape) -> Shape:
    """Return the shape of one of the matrices in a parameter with experts."""
    rows, columns = shape[-2:]
    return (rows // len(_MATRICES[name.removesuffix(".weight").rpartition(".")[2]]), columns)


def in_form_of(checkpoint: Checkpoint, wanted: Mapping[str, Shape]) -> Checkpoint:
    """Return the checkpoint with its experts in the model's tensors. If they already are, return the checkpoint itself.

    Args:
        wanted: whole shapes of the model's parameters and buffers, by name.

    Raises:
        UnsupportedError: the checkpoint's experts are cut over model-parallel ranks.
        MismatchError: the model has another number or shape of experts; or see `RegroupedCheckpoint`.
    """
    lacking = {
        name: found
        for name, shape in wanted.items()
        if name not in checkpoint.parameters and (found := matrices_in(name, shape))
    }
    held = dict(_places(checkpoint)) if lacking else {}
    layers = {matrix[0] for matrix in held} & {matrix[0] for found in lacking.values() for matrix in found}
    if not layers:
        return checkpoint
    if checkpoint.topology.model_parallel > 1:
        raise UnsupportedError(
            f"{checkpoint.path} keeps the experts of {min(layers)} in other tensors than the model, on "
            f"{checkpoint.topology.model_parallel} model-parallel ranks: how they are cut there can't be told; resume without "
            f"model parallelism first, on the checkpoint's own model"
        )
    lacking = {name: found for name, found in lacking.items() if found[0][0] in layers}
    _check_matrices(checkpoint, held, lacking, wanted)
    made = {
        name: Regrouped(wanted[name], tuple(held[matrix][0] for matrix in found)) for name, found in lacking.items()
    }
    return RegroupedCheckpoint(checkpoint, made, _renamed(checkpoint, wanted, layers))


_Place = tuple[Run, Shape]
"""The place of an expert's matrix, and its shape."""


def _places(checkpoint: Checkpoint) -> Iterator[tuple[Matrix, _Place]]:
    for name, parameter in checkpoint.parameters.items():
        shape = next((shape for shape in parameter.local_shapes if shape is not None), ())
        found = matrices_in(name, shape)
        for index, matrix in enumerate(found):
            numel = prod(shape) // len(found)
            yield matrix, (Run(name, index * numel, numel), matrix_shape(name, shape))


def _check_matrices(
    checkpoint: Checkpoint,
    held: Mapping[Matrix, _Place],
    lacking: Mapping[str, list[Matrix]],
    wanted: Mapping[str, Shape],
) -> None:
    """Check that each matrix that the model wants is there in the same shape, and that none is left over."""
    problems: list[str] = []
    for name, found in lacking.items():
        shape, (layer, kind, _) = matrix_shape(name, wanted[name]), found[0]
        numbers = {matrix[2] for matrix in held if matrix[:2] == (layer, kind)}
        shapes = {its_shape for matrix, (_, its_shape) in held.items() if matrix[:2] == (layer, kind)}
        expected = {number for matrices in lacking.values() for each, _, number in matrices if each == layer}
        if numbers != expected:
            problems.append(f"{name}: of {len(expected)} experts, in the checkpoint there are {len(numbers)}")
        elif shapes != {shape}:
            problems.append(f"{name}: expects matrices of shape {shape}, in the checkpoint they are {sorted(shapes)}")
    if problems:
        raise MismatchError(f"{checkpoint.path} and the model have different experts", problems)


def _renamed(checkpoint: Checkpoint, wanted: Mapping[str, Shape], layers: set[str]) -> dict[str, str]:
    """Map the other names of these layers that differ in the model: the checkpoint's names → the model's."""
    missing = {_known_as(name, layers): name for name in wanted if name not in checkpoint.parameters}
    found = {
        _known_as(name, layers): name
        for name, parameter in checkpoint.parameters.items()
        if name not in wanted and not matrices_in(name, parameter.local_shapes[0] or ())
    }
    return {name: missing[known] for known, name in found.items() if known in missing}


def _known_as(name: str, layers: set[str]) -> str:
    """Return one name for tensors that the forms call differently."""
    name = name.replace(f".{_OLD_LAYER}.", ".mlp.")
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    if layer is None:
        return name
    rest = name.removeprefix(f"{layer}.")
    for plain, automatic in _OF_LAYER:
        if re.fullmatch(plain, rest):
            return f"{layer}.{re.sub(plain, automatic, rest)}"
    return name
