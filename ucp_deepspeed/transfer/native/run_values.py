"""Values that the model's files have beside tensors: the user's client state, the schedule, extra states of modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pickle import PicklingError
from typing import Any

from ucp_deepspeed.checkpoint.bounds import misshapen
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, OnUnreadable
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.files import ENGINE_KEYS
from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import INFO, REFUSED
from ucp_deepspeed.checkpoint.deepspeed.written_names import layer_file
from ucp_deepspeed.checkpoint.extra_states import is_extra_state
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.writing import value_archive
from ucp_deepspeed.checkpoint.universal.atoms_output import DATA_SCHEDULES, left_out
from ucp_deepspeed.errors import ConfigError, MismatchError, UnsupportedError


@dataclass(frozen=True)
class RunValues:
    """The values.

    Attributes:
        config: DeepSpeed config of the run that saved; empty if it isn't known.
        client_state: entries of the user's.
        schedules: states of DeepSpeed's schedules of data; None where there are none.
        extra_states: for each tensor-parallel rank of the checkpoint the extra states of modules, by key.
        without_state: keys of modules that have the function for extra states, and return none.
    """

    config: Mapping[str, Any]
    client_state: Mapping[str, Any]
    schedules: Mapping[str, Any]
    extra_states: tuple[Mapping[str, Any], ...]
    without_state: tuple[str, ...] = ()

    @classmethod
    def of(cls, checkpoint: Checkpoint, drop: Collection[str], on_unreadable: OnUnreadable) -> RunValues:
        """Read the values.

        Args:
            drop: keys of the client state, and of extra states, to leave out.
            on_unreadable: whether values that can't be read are an error, or are left out.

        Raises:
            UnsupportedError: a value can't be read, or can't be written.
            ConfigError: there is no key to drop, or a key is one of DeepSpeed's own.
        """
        if on_unreadable == "error" and (unread := left_out(checkpoint, drop)):
            told = f"{checkpoint.path} can't be read as a whole; --on-unreadable drop converts the rest"
            raise UnsupportedError(told, unread)
        _, state = checkpoint.client_state()
        config = state.get("ds_config")
        kept = {key: value for key, value in state.items() if key not in ENGINE_KEYS}
        if isinstance(info := state.get(INFO), Mapping) and REFUSED not in info:
            kept[INFO] = info  # Megatron-DeepSpeed's, which is a part of its client state
        extra = tuple(checkpoint.extra_states())
        known = {str(key) for key in (*kept, *(key for held in extra for key in held), *checkpoint.unreadable())}
        if unknown := sorted(set(drop) - known):
            raise ConfigError(f"client state has no key {', '.join(unknown)}; its keys: {', '.join(sorted(known))}")
        kept = {key: value for key, value in kept.items() if str(key) not in drop}
        if problems := list(_unwritable(kept)):
            fix = " ".join(f"--drop-client-state {line.partition(':')[0]}" for line in problems)
            raise UnsupportedError(
                f"DeepSpeed's files can't hold all of the client state; leave it out: {fix}", problems
            )
        return cls(
            config if isinstance(config, Mapping) else {},
            kept,
            {key: state.get(key) for key in DATA_SCHEDULES},
            tuple({key: value for key, value in held.items() if key not in drop} for held in extra),
            tuple(_without_state(checkpoint)),
        )

    def extra_states_on(self, degree: int, rank: int) -> Mapping[str, Any]:
        """Return the extra states of one rank of another tensor-parallel size.

        Raises:
            MismatchError: those of the ranks differ, and their number isn't the checkpoint's.
        """
        none = dict.fromkeys(self.without_state)
        if degree == len(self.extra_states):
            return {**none, **self.extra_states[rank % degree]}
        first, *others = self.extra_states or ({},)
        if any(repr(other) != repr(first) for other in others):
            raise MismatchError(
                "extra states of modules differ over tensor-parallel ranks, whose number would change: leave them out with "
                "--drop-client-state KEY for each",
                sorted(first),
            )
        return {**none, **first}


def _without_state(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield the keys under which a module's ``state_dict`` has None: strict loads ask for them. Only DeepSpeed's files tell."""
    if not isinstance(checkpoint, DeepSpeedCheckpoint):
        return
    held = {"": checkpoint.files.model_states(0)["module"] or {}}
    for name in sorted(checkpoint.files.names) if checkpoint.files.is_pipeline else ():
        if (place := layer_file(name)) is not None and place[1] == 0:
            held[f"{place[0]}."] = checkpoint.files.weights(checkpoint.path / name)
    for prefix, module in held.items():
        yield from (f"{prefix}{key}" for key, value in module.items() if value is None and is_extra_state(key))


def _unwritable(state: Mapping[Any, Any]) -> Iterator[str]:
    """Yield ``key: reason`` for each value that can't be pickled here."""
    for key, value in state.items():
        if why := misshapen(value):
            yield f"{key}: {why}"
        elif (kind := opaque_in(value)) is not None:
            yield f"{key}: it holds an object of {kind}"
        else:
            try:
                value_archive("value", value)
            except (PicklingError, TypeError, AttributeError, RecursionError) as error:
                yield f"{key}: {error}"
