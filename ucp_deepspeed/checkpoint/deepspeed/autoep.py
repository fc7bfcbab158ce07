"""DeepSpeed's automatic expert parallelism (AutoEP): layers of Hugging Face models with all experts in three tensors.

The tensors are ``w1`` (gate), ``w2`` (down) and ``w3`` (up), of shape (experts, out, in). Each expert-parallel rank has
consecutive experts of each, under the same names. Here a parameter is the tensor of the whole layer; a rank's files hold a part.

Source: DeepSpeed 0.19.8, ``module_inject/auto_ep_layer.py``, ``runtime/engine.py::_save_moe_checkpoint``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ucp_deepspeed.checkpoint.deepspeed.contents import AUTOEP_LAYERS
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.layout import Shape

WEIGHTS = ("w1", "w2", "w3")
"""The tensors of a layer's experts (``moe/ep_experts.py::GroupedExperts``)."""

ROUTER = "router"
"""Name of a layer's router. Transformers wants to find it as ``gate`` too, so that a ``state_dict`` has it twice."""

_NAME = re.compile(r"(?:.+\.)?experts\.w[123]")


def is_stacked(name: str, shape: Shape) -> bool:
    """Return whether a parameter looks like all experts of a layer. Used if no file tells."""
    return len(shape) == 3 and _NAME.fullmatch(name) is not None


@dataclass(frozen=True, slots=True)
class AutoEpLayer:
    """A layer.

    Attributes:
        module: its name; empty for the model itself.
        experts: number of experts on all ranks together.
        ep: expert-parallel size; expert-parallel rank ``e`` has the experts from ``e * experts / ep`` on.
    """

    module: str
    experts: int
    ep: int

    @property
    def prefix(self) -> str:
        """Prefix of the names of its parameters."""
        return f"{self.module}." if self.module else ""

    @property
    def local(self) -> int:
        """Number of experts on each rank."""
        return self.experts // self.ep


Part = tuple[Shape, int]
"""Some consecutive experts of a tensor: shape of the whole tensor, and position of their first element in it."""


@dataclass(frozen=True, slots=True)
class AutoEpLayers:
    """The layers of a model.

    Attributes:
        layers: layers by the names of their experts' tensors.
    """

    layers: Mapping[str, AutoEpLayer] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.layers)

    @property
    def ep(self) -> int:
        """Expert-parallel size: DeepSpeed gives all layers the same."""
        return max((layer.ep for layer in self.layers.values()), default=1)

    def part(self, name: str, ep_rank: int, shape: Shape) -> Part:
        """Return the part of a parameter that a rank holds, from the shape in its files; all of it if it isn't of experts."""
        layer = self.layers.get(name)
        if layer is None:
            return shape, 0
        return (layer.experts, *shape[1:]), ep_rank * layer.local * prod(shape[1:])

    def expert_of(self, key: str) -> tuple[str, int] | None:
        """Return the tensor and the expert's number for a key of a file of weights; None for any other key."""
        name, _, number = key.rpartition(".")
        return (name, int(number)) if name in self.layers and number.isdecimal() else None

    def second_names(self, keys: Iterable[str]) -> dict[str, str]:
        """Map the names under which a ``state_dict`` has the routers a second time to the first names."""
        known = frozenset(keys)
        found: dict[str, str] = {}
        for prefix in {layer.prefix for layer in self.layers.values()}:
            router = {key.removeprefix(f"{prefix}{ROUTER}.") for key in known if key.startswith(f"{prefix}{ROUTER}.")}
            inner = {key.removeprefix(prefix).partition(".")[0] for key in known if key.startswith(prefix)}
            for child in inner - {ROUTER}:
                if router and all(f"{prefix}{child}.{rest}" in known for rest in router):
                    found |= {f"{prefix}{child}.{rest}": f"{prefix}{ROUTER}.{rest}" for rest in router}
        return found


def read_autoep_layers(recorded: Any, place: Path) -> AutoEpLayers:
    """Read the layers from ``ds_autoep_layers`` of a model_states file.

    Raises:
        UnsupportedError: experts aren't dealt out consecutively and evenly, or the record has another form.
    """
    layers: dict[str, AutoEpLayer] = {}
    try:
        entries = AUTOEP_LAYERS.validate_python(recorded or (), strict=True)
    except ValidationError as error:
        raise UnsupportedError(
            f"{place} records its layers of DeepSpeed's AutoEP in a form that isn't known"
        ) from error
    for entry in entries:
        layer = AutoEpLayer(entry["module_path"], entry["num_experts"], entry["ep_size"])
        usual = [list(range(first, first + layer.local)) for first in range(0, layer.experts, max(layer.local, 1))]
        dealt = [list(rank["experts"]) for rank in (entry.get("expert_placement") or {}).get("ranks", ())]
        if layer.experts % layer.ep or (dealt and dealt != usual):
            raise UnsupportedError(
                f"{place}: the {layer.experts} experts of {layer.module}, an AutoEP layer, are dealt out over {layer.ep} ranks "
                f"in a way that this release can't read: {dealt}"
            )
        layers |= {f"{layer.prefix}experts.{weight}": layer for weight in WEIGHTS}
    return AutoEpLayers(layers)
