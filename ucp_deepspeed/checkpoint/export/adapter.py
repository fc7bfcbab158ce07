"""The adapter of a PEFT run, as ``PeftModel.from_pretrained`` loads it.

Source: PEFT 0.21, ``utils/save_and_load.py::get_peft_model_state_dict``, ``tuners/lora/model.py``, ``utils/other.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from safetensors import safe_open

from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export.companions import ADAPTER_CONFIG_NAME, Companions, companions_of
from ucp_deepspeed.checkpoint.export.weights import Choice, check_range, weights_of
from ucp_deepspeed.checkpoint.output import Output, OutputPlan, StoredTensor
from ucp_deepspeed.checkpoint.safetensors_files import safetensors_file
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, MismatchError, UnsupportedError

ADAPTER_NAME = "adapter_model.safetensors"

_LORA = re.compile(r"(.+\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.([^.]+)((?:\.weight|\.bias)?)")
"""Name of a tensor of LoRA: its place, the name of the adapter, and the rest."""

_MODULE = re.compile(r"(.+)\.modules_to_save\.([^.]+)\.(.+)")
"""Name of a tensor in a module that is trained beside the adapter."""

_WRAPPER = "base_model.model."
"""Parts that PEFT puts in front of all names; an adapter that was put into a bare model lacks them in memory, not on disk."""


@dataclass(frozen=True)
class AdapterOutput(Output):
    """See `Output`. ``config_from`` is a folder with ``adapter_config.json``; by default it is searched beside the checkpoint."""

    choice: Choice
    config_from: Path | None = None
    name: str = "default"
    on_differing: OnDiffering = "error"

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`."""
        names = {name: other for name in view.parameters if (other := saved_name(name, self.name)) is not None}
        if not names:
            raise MismatchError(
                f"{view.checkpoint.path} holds no LoRA adapter of PEFT with the name {self.name!r}",
                [f"it holds {title!r}" for title in sorted({str(_title(name)) for name in adapters_in(view)})],
                "save another adapter from the script: model.save_pretrained(folder)",
            )
        if others := sorted(_trained(view) - set(adapters_in(view))):
            raise UnsupportedError(
                f"{view.checkpoint.path} has trained parameters beside the adapter, which would be lost",
                others,
                "save from the script: model.save_pretrained(folder)",
            )
        companions = companions_of(view.checkpoint.path, self.config_from, ADAPTER_CONFIG_NAME)
        config = companions.document(ADAPTER_CONFIG_NAME)
        if config is None:
            raise ConfigError(
                f"no {ADAPTER_CONFIG_NAME} beside {view.checkpoint.path}, and PEFT loads no adapter without it: name the folder "
                f"that has it (config_from, --config-from), or write it from the script: peft_config.save_pretrained(folder)"
            )
        companions = companions.with_document(ADAPTER_CONFIG_NAME, config | {"inference_mode": True})
        tensors = dict(weights_of(view, self.choice, names).tensors)
        file = safetensors_file(ADAPTER_NAME, tensors, {"format": "pt"})
        return OutputPlan((file,), partial(_finish, view, tensors, companions), companions.numbytes)

    def notes(self, view: UniversalView) -> list[str]:
        """See `Output.notes`: other adapters that are trained."""
        titles = {_title(name) for name in _trained(view)} - {self.name, None}
        if not titles:
            return []
        told = f"the adapters {', '.join(sorted(map(str, titles)))}, trained too, are left out"
        return [f"{told}; save these from the script: model.save_pretrained(folder)"]


def adapters_in(view: UniversalView) -> list[str]:
    """Return the parameters that PEFT has put beside a model's own."""
    return [name for name in view.parameters if _LORA.fullmatch(name) or _MODULE.fullmatch(name)]


def _title(name: str) -> str | None:
    """Return the adapter that a parameter is part of; None if it is of none."""
    found = _LORA.fullmatch(name) or _MODULE.fullmatch(name)
    return found[2] if found else None


def _trained(view: UniversalView) -> set[str]:
    return {name for name, parameter in view.parameters.items() if parameter.kind == "trainable"}


def saved_name(name: str, adapter: str) -> str | None:
    """Return the name in the adapter's file; None for what isn't the adapter's."""
    name = name.replace("_orig_mod.", "").removeprefix("module.")
    if found := _LORA.fullmatch(name):
        place, title, rest = found.groups()
        saved = place if place.endswith("lora_magnitude_vector") else place + rest
    elif found := _MODULE.fullmatch(name):
        place, title, rest = found.groups()
        saved = f"{place}.{rest}"
    else:
        return None
    if title != adapter:
        return None
    return saved if saved.startswith(_WRAPPER) else _WRAPPER + saved


def _finish(
    view: UniversalView,
    tensors: Mapping[str, StoredTensor],
    companions: Companions,
    folder: Path,
    sums: Sequence[FileSums],
) -> None:
    """Write the configuration, and open the file."""
    companions.write(folder)
    with safe_open(folder / ADAPTER_NAME, "pt") as opened:
        check_range(view, tensors, opened.get_tensor)
