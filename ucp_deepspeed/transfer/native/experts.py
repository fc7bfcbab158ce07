"""DeepSpeed's own mixture-of-experts layers in the files (``runtime/engine.py::_save_moe_checkpoint``).

Each rank has its experts under numbers of its own, and each expert has a file of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ucp_deepspeed.checkpoint.expert_names import expert_of, mixes_experts, numbers_of_experts, renumbered
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.target_ranks import stacked_experts


@dataclass(frozen=True)
class Experts:
    """The experts of a model on a topology.

    Attributes:
        counts: for each layer's list of experts, in the model's order, their number; empty for a model without experts.
        ep: the target's expert-parallel size.
    """

    counts: Mapping[str, int]
    ep: int

    @classmethod
    def of(cls, view: UniversalView, topology: Topology, hint: str) -> Experts:
        """Find the experts.

        Raises:
            UnsupportedError: they aren't written on this topology.
            ConfigError: they can't be dealt out to so many ranks.
        """
        path, counts, ep = view.checkpoint.path, numbers_of_experts(view.parameters), topology.ep
        if stacked_experts(view):
            raise UnsupportedError(
                f"{path} has experts of AutoEP, which aren't written in DeepSpeed's own files; {hint}"
            )
        if not counts and ep > 1:
            raise ConfigError(f"{path} has no experts; leave --ep out")
        if counts and (topology.model_parallel > 1 or topology.zero_stage in (0, 3)):
            raise UnsupportedError(
                f"{path} has experts, which are written in DeepSpeed's own files for ZeRO-1 and 2 alone, without model "
                f"parallelism; {hint}"
            )
        for group in view.groups:
            if mixes_experts(group.names):
                raise UnsupportedError(
                    f"{path} has experts and other parameters in one group, as engines with ZeRO, which would load the files, "
                    f"can't have; {hint}"
                )
        if wrong := [count for count in {topology.dp, *counts.values()} if counts and count % ep]:
            raise ConfigError(f"--ep {ep} doesn't divide {wrong[0]}: it must divide --dp and the number of experts")
        return cls(counts, ep)

    def check(self, config: Mapping[str, Any], hint: str) -> None:
        """Refuse an engine that deals its experts out in another order; an UnsupportedError says so."""
        if self.counts and config.get("use_data_before_expert_parallelism"):
            raise UnsupportedError(f"experts in the order of use_data_before_expert_parallelism aren't written; {hint}")

    def ordered(self, names: Iterable[str]) -> list[str]:
        """Return logical names with the experts of each layer one after another, where the layer first appears."""
        listed, first = list(names), dict[str, int]()
        keys: dict[str, tuple[int, int]] = {}
        for place, name in enumerate(listed):
            layer, number = expert_of(name) or (name, 0)
            keys[name] = first.setdefault(layer, place), number
        return sorted(listed, key=keys.__getitem__) if self.counts else listed

    def names_on(self, names: Mapping[str, str], partition: int) -> Mapping[str, str]:
        """Return names in the files of one data-parallel rank, by logical name."""
        if not self.counts:
            return names
        found = dict(names)
        for logical, name in names.items():
            if (expert := expert_of(logical)) is not None:
                found[logical] = renumbered(name, -(partition % self.ep) * (self.counts[expert[0]] // self.ep))
        return found

    def settings(self, group: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a group's hyper-parameters: the name of a group of experts tells the expert-parallel size."""
        return {**group, "name": f"ep_size_{self.ep}"} if group.get("moe") else group

    def files(self, weights: Mapping[str, Any], names: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
        """Yield name and content of each expert's file.

        Args:
            weights: the tensors of all experts, by logical name.
            names: names in the whole model, by logical name.
        """
        for number, layer in enumerate(self.counts):
            for expert in range(self.counts[layer]):
                held = {names[name]: weight for name, weight in weights.items() if expert_of(name) == (layer, expert)}
                yield f"layer_{number}_expert_{expert}_mp_rank_00_model_states.pt", held
