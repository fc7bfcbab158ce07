"""The universal format as an output: atoms in safetensors files, then tensors of the client state, the index last."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.output import Output, OutputFile, OutputPlan, Region
from ucp_deepspeed.checkpoint.safetensors_files import safetensors_file
from ucp_deepspeed.checkpoint.universal.catalog import (
    CLIENT_TENSORS_NAME,
    INDEX_NAME,
    Index,
    UniversalCheckpoint,
    atom_key,
)
from ucp_deepspeed.checkpoint.universal.describing import describe
from ucp_deepspeed.checkpoint.view import UniversalView

FIRST_RANDOM_STATE_NAME = "ucp_random_state_rank_00000.json"
"""Random state whose seed gives new streams of random numbers on any topology (``docs/format.md``, *Random state*)."""


@dataclass(frozen=True)
class UniversalOutput(Output):
    """A universal checkpoint. See `Output`.

    Attributes:
        drop_client_state: top-level keys of the client state to leave out.
        on_unreadable: see `OnUnreadable`.
        file_numbytes: bytes of atoms in one file, unless a single atom is larger.
    """

    drop_client_state: Collection[str] = ()
    on_unreadable: OnUnreadable = "error"
    on_differing: OnDiffering = "error"
    file_numbytes: int = tunables.FILE_NUMBYTES

    def plan(self, view: UniversalView) -> OutputPlan:
        """See `Output.plan`.

        Raises:
            ConfigError: the client state has no such key.
            UnsupportedError: the client state, a scheduler or a hyper-parameter holds a value that has no universal form.
            MismatchError: numbers differ over the partitions, or there is no optimizer state.
        """
        files = lay_out(view, self.file_numbytes)
        homes = {(region.name, region.state): file.file_name for file in files for region in file.regions}
        index, tensors = describe(view, homes, self.drop_client_state, self.on_unreadable, self.on_differing)
        finish = partial(_write_rest, view, index, tensors)
        return OutputPlan(files, finish, sum(tensor.nbytes for tensor in tensors.values()))


def lay_out(view: UniversalView, file_numbytes: int) -> tuple[OutputFile, ...]:
    """Place all atoms in files, by parameter."""
    bins: list[dict[str, Region]] = [{}]
    held = 0
    for name, parameter in view.parameters.items():
        for state in parameter.states:
            region = Region.whole(view, name, state)
            if bins[-1] and held + region.numbytes > file_numbytes:
                bins.append({})
                held = 0
            bins[-1][atom_key(name, state)] = region
            held += region.numbytes
    names = [f"atoms-{number:05d}-of-{len(bins):05d}.safetensors" for number in range(1, len(bins) + 1)]
    return tuple(map(safetensors_file, names, bins))


def _write_rest(view: UniversalView, index: Index, tensors: dict[str, torch.Tensor], folder: Path) -> None:
    """Write everything but the atoms. Open the result again: what can't be opened must not be committed."""
    if tensors:
        try:
            safetensors.torch.save_file(tensors, folder / CLIENT_TENSORS_NAME)
        except safetensors.SafetensorError as error:
            raise OSError(f"{folder / CLIENT_TENSORS_NAME} can't be written: {error}") from error
    random_state = view.checkpoint.path / FIRST_RANDOM_STATE_NAME
    if random_state.is_file():
        view.checkpoint.versions.note(random_state)
        shutil.copyfile(random_state, folder / FIRST_RANDOM_STATE_NAME)
    sizes = {entry.name: entry.stat().st_size for entry in sorted(folder.iterdir())}
    index = index.model_copy(update={"files": sizes})
    (folder / INDEX_NAME).write_text(index.model_dump_json(indent=1), encoding="utf-8")
    UniversalCheckpoint(folder)
