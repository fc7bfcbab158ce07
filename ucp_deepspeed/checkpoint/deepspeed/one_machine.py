"""A machine's files of a checkpoint that was saved on each machine's own disk (DeepSpeed's ``use_node_local_storage``)."""

from __future__ import annotations

from pathlib import Path

from ucp_deepspeed.checkpoint.deepspeed.files import DeepSpeedFiles
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_model_states
from ucp_deepspeed.layout import Topology


class NodeLocalFiles(DeepSpeedFiles):
    """Like `DeepSpeedFiles`. If a file isn't here, one of the same kind replaces it, to tell names, shapes and settings.

    This lets a rank compare its state with its own files. To read from all files, all must be here.

    Attributes:
        missing: names of the files that aren't here, once the topology is known.
    """

    are_all_here = False

    def __init__(self, path: Path, verify: bool = True) -> None:
        super().__init__(path, verify)
        self.missing: tuple[str, ...] = ()
        self._stands_in = True

    def model_states_path(self, rank: int, partition: int) -> Path:
        """See `DeepSpeedFiles.model_states_path`."""
        path = super().model_states_path(rank, partition)
        return self._here(path, [name for name in sorted(self.names) if is_model_states(name)], rank)

    def optimizer_path(self, rank: int, partition: int) -> Path:
        """See `DeepSpeedFiles.optimizer_path`."""
        path = super().optimizer_path(rank, partition)
        start = path.name.split("zero_pp_rank_")[0] + "zero_pp_rank_"
        found = [name for name in sorted(self.names) if name.startswith(start) and name.endswith("_optim_states.pt")]
        return self._here(path, found, rank)

    def _here(self, path: Path, others: list[str], rank: int) -> Path:
        if not self._stands_in or path.name in self.names or not others:
            return path
        return self.path / next((name for name in others if f"mp_rank_{rank:02d}_" in name), others[0])

    def check_complete(self, topology: Topology) -> None:
        """Note the files that aren't here; see `DeepSpeedFiles.check_complete`."""
        _ = self.sliced, self.partitioned  # files that are here tell both, and the answers are kept
        self._stands_in = False
        self.missing = tuple(name for name in self.expected(topology) if name not in self.names)
        self._stands_in = True
