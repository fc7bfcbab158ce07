"""One file with a ``state_dict``, as ``torch.load`` reads it with ``weights_only=True``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ucp_deepspeed.checkpoint.checksums import FileSums
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.export.weights import Choice, Weights, check_complete, check_range, weights_of
from ucp_deepspeed.checkpoint.output import Output, OutputPlan
from ucp_deepspeed.checkpoint.torch_files.writing import archive_file, write_sums
from ucp_deepspeed.checkpoint.view import UniversalView

TORCH_NAME = "pytorch_model.bin"


@dataclass(frozen=True)
class TorchOutput(Output):
    """See `Output`. Parameters have the names of the module that was trained, as ``zero_to_fp32`` writes them."""

    choice: Choice
    on_differing: OnDiffering = "error"

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`."""
        check_complete(view)
        weights = weights_of(view, self.choice, {name: name for name in (*view.parameters, *view.tied)})
        archive = archive_file(TORCH_NAME, weights.tensors, weights.tied)
        finish_records = partial(write_sums, [archive])
        return OutputPlan((archive.file,), partial(_finish, view, weights), finish_records=finish_records)


def _finish(view: UniversalView, weights: Weights, folder: Path, sums: Sequence[FileSums]) -> None:
    """Open the file: what can't be opened must not be committed."""
    held = torch.load(folder / TORCH_NAME, map_location="cpu", weights_only=True, mmap=True)
    check_range(view, weights.tensors, held.__getitem__)
