"""Exports: the weights of a checkpoint in the forms of other libraries, for the command and for Python alike."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ucp_deepspeed.checkpoint.bounds import check_inside
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export import AdapterOutput, HuggingFaceOutput, TorchOutput
from ucp_deepspeed.checkpoint.export.huggingface import SHARD_SIZE, numbytes_of
from ucp_deepspeed.checkpoint.export.weights import Choice, WeightsSource
from ucp_deepspeed.checkpoint.output import Output
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.language import Spec
from ucp_deepspeed.remote import is_taken, lies_in, located

Form = Literal["hf", "torch", "adapter"]
"""A folder for ``from_pretrained``, a file for ``torch.load``, or the adapter of a LoRA run for PEFT."""


@dataclass(frozen=True)
class Export:
    """Settings of an export.

    Attributes:
        to: the form.
        dtype, source: see `ucp_deepspeed.checkpoint.export.weights.Choice`.
        max_shard_size: most bytes of a file of the form ``hf`` with several tensors, as a number or as ``5GB``.
        config_from: folder with the configuration; by default where that lies beside the checkpoint.
        spec: the spec that the user has named, which may tell the names of a Hugging Face model.
        on_differing: the copy to write of a parameter that pipeline stages hold with different values.
    """

    to: Form = "hf"
    dtype: str | None = None
    source: WeightsSource | None = None
    max_shard_size: int | str = SHARD_SIZE
    config_from: str | Path | None = None
    spec: Spec | None = None
    on_differing: OnDiffering = "error"

    def output(self) -> Output:
        """Return the output.

        Raises:
            ConfigError: a setting is wrong.
        """
        if self.to not in get_args(Form):
            raise ConfigError(f"to: expected one of {', '.join(get_args(Form))} (found {self.to!r})")
        if self.to != "hf" and self.max_shard_size != SHARD_SIZE:
            raise ConfigError(f"max_shard_size: only the form hf has several files; leave it out for {self.to}")
        choice, config_from = (
            Choice(self.dtype, self.source),
            None if self.config_from is None else located(self.config_from),
        )
        if self.to == "torch":
            if config_from is not None:
                raise ConfigError("config_from: a file for torch has no configuration beside it")
            return TorchOutput(choice, self.on_differing)
        if self.to == "adapter":
            return AdapterOutput(choice, config_from, on_differing=self.on_differing)
        return HuggingFaceOutput(choice, config_from, numbytes_of(self.max_shard_size), self.spec, self.on_differing)


def check_apart(checkpoint: Checkpoint, destination: Path) -> None:
    """Check that the destination is free and lies outside the tag folder, and that no file there is a link out of it.

    Raises:
        ConfigError: it isn't, or doesn't.
        DamagedCheckpointError: a file is such a link.
    """
    if is_taken(destination):
        raise ConfigError(f"{destination} exists already; nothing was written; name a new folder")
    if lies_in(destination, checkpoint.path):
        raise ConfigError(f"{destination} lies in the checkpoint that is read; name a folder outside it")
    for path in sorted(checkpoint.path.iterdir()):
        check_inside(path)
