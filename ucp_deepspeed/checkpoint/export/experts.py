"""Experts as ``save_pretrained`` writes them: a matrix of one expert is a tensor of its own, whatever tensors the run had.

Source: transformers 5, ``conversion_mapping.py``. Its models load such files into fused tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from math import prod

from ucp_deepspeed.checkpoint.expert_forms import Matrix, matrices_in, matrix_shape
from ucp_deepspeed.checkpoint.output import StoredTensor
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.layout import Box, Layout

_MIXTRAL = frozenset(("mixtral", "minimax"))
_QWEN = frozenset(
    ("qwen2_moe", "qwen3_moe", "qwen3_next", "deepseek_v2", "deepseek_v3", "dots1", "glm4_moe", "olmoe", "flex_olmo")
)
"""Values of ``model_type``: models whose files call the matrices w1, w3 and w2; and gate_proj, up_proj and down_proj."""

_TITLES: Mapping[bool, Mapping[str, str]] = {
    True: {"gate": "w1", "up": "w3", "down": "w2"},
    False: {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
}

_STACKED = re.compile(r"(.+)\.experts\.w[123]")

_OF_AUTOEP = ((r"(?:router|gate)\.(?:gate\.)?(.+)", r"gate.\1"),)
_OF_AUTOEP_QWEN2 = (
    *_OF_AUTOEP,
    (r"shared_experts\.(.+)", r"shared_expert.\1"),
    (r"shared_experts_gate\.(.+)", r"shared_expert_gate.\1"),
)
"""Names of the other tensors of an AutoEP layer → transformers' (``module_inject/auto_ep_layer.py``)."""


def with_single_experts(tensors: Mapping[str, StoredTensor], model_type: str | None) -> dict[str, StoredTensor]:
    """Return the tensors of a model's files.

    Args:
        tensors: by name, experts in any form that `matrices_in` knows.
        model_type: that of the model's configuration, if there is one.

    Raises:
        UnsupportedError: experts are in AutoEP's form, and nothing tells how the model calls them.
    """
    layers = {matched[1] for name in tensors if (matched := _STACKED.fullmatch(name))}
    if model_type not in _MIXTRAL | _QWEN:
        if layers:
            kind = "a model without config.json" if model_type is None else f"a model of type {model_type!r}"
            raise UnsupportedError(
                f"the experts of these layers are in the tensors of DeepSpeed's AutoEP, and their names in {kind} aren't known",
                sorted(layers),
                "name the folder with the model's configuration (--config-from), or export with --to torch",
            )
        return dict(tensors)
    others = _OF_AUTOEP_QWEN2 if model_type == "qwen2_moe" else _OF_AUTOEP
    found: dict[str, StoredTensor] = {}
    for name, tensor in tensors.items():
        matrices = matrices_in(name, tensor.shape)
        if len(tensor.shape) == 3 and matrices:
            found |= _taken_apart(name, tensor, model_type in _MIXTRAL)
        elif matrices:
            found[_title(matrices[0], model_type in _MIXTRAL)] = tensor
        else:
            found[_in_file(_plain(name, layers, others), model_type in _MIXTRAL)] = tensor
    return found


def _plain(name: str, layers: set[str], others: tuple[tuple[str, str], ...]) -> str:
    """Return a name without what AutoEP has changed."""
    layer = next((layer for layer in layers if name.startswith(f"{layer}.")), None)
    rest = "" if layer is None else name.removeprefix(f"{layer}.")
    for automatic, plain in others:
        if layer is not None and re.fullmatch(automatic, rest):
            return f"{layer}.{re.sub(automatic, plain, rest)}"
    return name


def _in_file(name: str, mixtral: bool) -> str:
    return re.sub(r"\.mlp\.(gate|experts)\.", r".block_sparse_moe.\1.", name) if mixtral else name


def _title(matrix: Matrix, mixtral: bool) -> str:
    """Return the name of a matrix in a file."""
    layer, kind, number = matrix
    return _in_file(f"{layer}.experts.{number}.{_TITLES[mixtral][kind]}.weight", mixtral)


def _taken_apart(name: str, tensor: StoredTensor, mixtral: bool) -> dict[str, StoredTensor]:
    """Return the matrices of a tensor that holds those of all experts of a layer."""
    (region,) = tensor.regions
    shape = region.layout.logical_shape
    matrices, (rows, columns) = matrices_in(name, shape), matrix_shape(name, shape)
    found = {}
    for index, matrix in enumerate(matrices):
        number, first = matrix[2], index * rows % shape[1]
        layout = Layout.around(shape, Box((number, first, 0), (number + 1, first + rows, columns)))
        part = replace(region, layout=layout, local_start=0, numel=prod((rows, columns)))
        found[_title(matrix, mixtral)] = StoredTensor((rows, columns), (part,))
    return found
