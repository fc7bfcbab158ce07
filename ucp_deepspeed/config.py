"""The ``universal_checkpoint`` block of a DeepSpeed config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.plan import SHARED_READ_NUMBYTES
from ucp_deepspeed.transfer.copying import LEAST_MEMORY_NUMBYTES, MEMORY_NUMBYTES

CONFIG_KEY = "universal_checkpoint"


class SaveConfig(BaseModel):
    """The block ``save``.

    Attributes:
        asynchronous: ``async`` in the config: ``save_checkpoint`` copies the state into host memory and returns; the files are
            written in the background.
        timeout: seconds that rank 0 waits in the background for the files of the slowest rank, once its own are written. Only a
            rank that died without its launcher noticing takes so long; half an hour is more than any file system needs.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    asynchronous: bool = Field(default=False, alias="async")
    timeout: PositiveFloat = 1800.0


class UniversalCheckpointConfig(BaseModel):
    """What the block may hold. Unknown keys and wrong types are errors that name the key.

    Attributes:
        enabled: without it everything else is ignored and DeepSpeed behaves as if the package weren't there.
        spec: ``auto``, a family's name, or the path of a spec file.
        load: ``auto`` takes DeepSpeed's own path when the topology is the same and no policy is set; ``always`` and ``never`` say
            so.
        vocabulary_size: rows of the unpadded vocabulary; needed when source and target pad it differently.
        on_missing: what to do with trained parameters, rows of them, or their optimizer states that the checkpoint lacks:
            ``error``, or ``init``: keep the model's value, with zero state, and list them.
        on_extra: what to do with trained parameters or their optimizer states for which the model has no place: ``error``, or
            ``drop`` and list them.
        on_differing: what to do with numbers of the optimizer that differ over the partitions of the checkpoint, where these
            don't go on: ``error``, or make one of them: the ``first``, ``last``, ``mean`` or ``max``. And with copies of a
            parameter that pipeline stages hold and trained apart, on other stages: ``error``; ``last`` takes the last, and
            all others the first.
        optimizer_states: ``restore``, or ``reset``: start all of them as before a first step.
        hyperparameters: ``restore`` those of the parameter groups (rates, weight decay, …), or ``keep`` the configured ones.
        shared_read_bytes: what all data-parallel ranks hold alike (everything at stage 0, frozen weights, buffers) is read once,
            a part by each, and exchanged, if it has at least so many bytes; below that each reads it all. So is what all
            tensor-parallel ranks hold whole, where the checkpoint has fewer copies of it.
        read_memory_bytes: most memory of a rank for what is on its way from a file to where it belongs, at least 1 KiB.
        on_unreadable: what to do about entries of the client state that can't be read without running code of their classes:
            ``error``, or ``drop`` and list them. A load on the same topology is left to DeepSpeed, which reads them.
        random_state: ``restore`` each rank's random streams, or derive new ones on another topology; ``keep``: leave them alone.
        save: how checkpoints are written; see `SaveConfig`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = False
    spec: str = "auto"
    load: Literal["auto", "always", "never"] = "auto"
    vocabulary_size: PositiveInt | None = None
    on_missing: Literal["error", "init"] = "error"
    on_extra: Literal["error", "drop"] = "error"
    on_differing: OnDiffering = "error"
    optimizer_states: Literal["restore", "reset"] = "restore"
    hyperparameters: Literal["restore", "keep"] = "restore"
    random_state: Literal["restore", "keep"] = "restore"
    on_unreadable: OnUnreadable = "error"
    shared_read_bytes: NonNegativeInt = SHARED_READ_NUMBYTES
    read_memory_bytes: int = Field(default=MEMORY_NUMBYTES, ge=LEAST_MEMORY_NUMBYTES)
    save: SaveConfig = SaveConfig()

    @property
    def has_policies(self) -> bool:
        """Whether something else than a plain restore is allowed, or asked for; DeepSpeed's own path can't do it."""
        chosen = self.on_missing, self.on_extra, self.optimizer_states, self.hyperparameters
        return chosen != ("error", "error", "restore", "restore")

    @model_validator(mode="after")
    def _can_follow(self) -> UniversalCheckpointConfig:
        if self.load == "never" and (self.has_policies or self.on_differing != "error"):
            raise ValueError(
                "'on_missing', 'on_extra', 'on_differing', 'optimizer_states' and 'hyperparameters' need another 'load'"
            )
        return self


def parse_config(ds_config: Mapping[str, Any]) -> UniversalCheckpointConfig:
    """The block of a DeepSpeed config; disabled when there is none.

    Raises:
        ConfigError: lists each unknown key and each value of a wrong type; or DeepSpeed's own universal load is on too.
    """
    block = ds_config.get(CONFIG_KEY)
    if block is None:
        return UniversalCheckpointConfig()
    if not isinstance(block, Mapping):
        raise ConfigError(f"{CONFIG_KEY!r} must be a block of settings, not {block!r}")
    try:
        config = UniversalCheckpointConfig.model_validate(dict(block))
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, (CONFIG_KEY, *item['loc'])))}: {_say(item)}" for item in error.errors()]
        raise ConfigError("\n".join(["the DeepSpeed config is not valid:", *lines])) from error
    checkpoint = ds_config.get("checkpoint")
    if config.enabled and config.load != "never" and _asks_for_universal(checkpoint):
        raise ConfigError(
            f"'checkpoint.load_universal' and {CONFIG_KEY!r} are two ways to load: the first reads what DeepSpeed's own tool "
            f'converted, the second any checkpoint; remove one of them, or set "load": "never" in the second'
        )
    return config


def _asks_for_universal(checkpoint: Any) -> bool:
    return isinstance(checkpoint, Mapping) and bool(checkpoint.get("load_universal"))


def _say(item: Any) -> str:
    *within, key = item["loc"] or (None,)
    if item["type"] == "extra_forbidden":
        known = _keys(SaveConfig if within == ["save"] else UniversalCheckpointConfig)
        hint = "; it belongs into 'save'" if not within and key in _keys(SaveConfig) else ""
        return f"unknown key{hint}; known keys: {', '.join(known)}"
    if key == "save" and not isinstance(item["input"], Mapping):
        return f"must be a block of settings (found {item['input']!r}); known keys: {', '.join(_keys(SaveConfig))}"
    return f"{item['msg']} (found {item['input']!r})"


def _keys(block: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in block.model_fields.items()]
