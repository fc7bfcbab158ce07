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

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.errors import ConfigError

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
    """All keys of the block. Unknown keys and wrong types are errors that name the key.

    Attributes:
        enabled: without it everything else is ignored and DeepSpeed behaves as if the package weren't there.
        spec: ``auto``, a family's name, or the path of a spec file.
        load: ``auto`` takes DeepSpeed's own path if the topology is the same and no policy is set; ``always`` and ``never`` fix
            the choice.
        vocabulary_size: rows of the unpadded vocabulary; needed if source and target pad it differently.
        on_missing: policy for trained parameters, rows of them, or their optimizer states that the checkpoint lacks: ``error``,
            or ``init``: keep the model's value, with zero state, and list them.
        on_extra: policy for trained parameters or their optimizer states that have no place in the model: ``error``, or ``drop``
            and list them.
        on_differing: policy for optimizer numbers that differ between partitions, if the target has other partitions: ``error``,
            or make one number of them: the ``first``, ``last``, ``mean`` or ``max``. It applies also to copies of a parameter
            that pipeline stages hold and trained apart, if the target has other stages: ``error``; ``last`` takes the last copy,
            and all others take the first.
        optimizer_states: ``restore``, or ``reset``: start all of them as before a first step.
        hyperparameters: ``restore`` those of the parameter groups (rates, weight decay, …), or ``keep`` the configured ones.
        shared_read_bytes: least size of shared bytes that are read once. Bytes that all data-parallel ranks hold (everything at
            stage 0, frozen weights, buffers) are then read in parts, one by each rank, and exchanged; below this size each rank
            reads them all. The same is true of parameters that all tensor-parallel ranks hold whole, if the checkpoint has fewer
            copies of them.
        read_memory_bytes: most memory of a rank for data on its way from a file to its place, at least 1 KiB.
        on_unreadable: policy for entries of the client state that can't be read without running code of their classes:
            ``error``, or ``drop`` and list them. DeepSpeed itself does a load on the same topology, and reads them.
        random_state: ``restore`` each rank's random streams, or derive new ones on another topology; ``keep``: don't change them.
        save: settings of saving; see `SaveConfig`.
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
    shared_read_bytes: NonNegativeInt = tunables.SHARED_READ_NUMBYTES
    read_memory_bytes: int = Field(default=tunables.MEMORY_NUMBYTES, ge=tunables.LEAST_MEMORY_NUMBYTES)
    save: SaveConfig = SaveConfig()

    @property
    def has_policies(self) -> bool:
        """Return whether more than a plain restore is allowed or asked for. DeepSpeed's own path can't do that."""
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
    """Read the block of a DeepSpeed config; disabled if there is none.

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
