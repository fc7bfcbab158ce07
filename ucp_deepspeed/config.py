"""The ``universal_checkpoint`` block of a DeepSpeed config, and the variable that stands in for it."""

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
    field_validator,
    model_validator,
)

from ucp_deepspeed import environment, tunables
from ucp_deepspeed.checkpoint.checkpoint import OnUnreadable
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.retention import Keep
from ucp_deepspeed.errors import ConfigError, worded

CONFIG_KEY = "universal_checkpoint"


class OnSignal(BaseModel):
    """The block ``on_signal``, or its folder alone.

    Attributes:
        grace_seconds: time from the signal until the process is killed; it is only told.
        exit_code: exit status of a run that isn't at its end.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    folder: str = Field(min_length=1)
    grace_seconds: PositiveFloat = 30.0
    exit_code: int = Field(default=75, ge=1, le=255)


class SaveConfig(BaseModel):
    """The block ``save``; ``docs/configuration.md`` says what the keys do.

    A rank is later than ``timeout`` seconds only if it died without its launcher noticing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    asynchronous: bool = Field(default=False, alias="async")
    checksums: bool = True
    keep: Keep | None = None
    timeout: PositiveFloat = 1800.0
    on_signal: OnSignal | None = None

    @field_validator("on_signal", mode="before")
    @classmethod
    def _with_folder(cls, value: Any) -> Any:
        return {"folder": value} if isinstance(value, str) else value


class UniversalCheckpointConfig(BaseModel):
    """The keys of the block; ``docs/configuration.md`` says what they do. Errors of keys and types name the key."""

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
    scheduler: Literal["restore", "keep"] = "restore"
    random_state: Literal["restore", "keep"] = "restore"
    on_unreadable: OnUnreadable = "error"
    verify: Literal["pieces", "off"] = "pieces"
    fallback: Literal["newest-whole", "none"] = "newest-whole"
    batch: Literal["as-given", "keep"] = "as-given"
    shared_read_bytes: NonNegativeInt = tunables.SHARED_READ_NUMBYTES
    read_memory_bytes: int = Field(default=tunables.MEMORY_NUMBYTES, ge=tunables.LEAST_MEMORY_NUMBYTES)
    save: SaveConfig = SaveConfig()

    @property
    def has_policies(self) -> bool:
        """Return whether more than a plain restore is allowed or asked for. DeepSpeed's own path can't do that."""
        chosen = self.on_missing, self.on_extra, self.optimizer_states, self.hyperparameters, self.scheduler
        return chosen != ("error", "error", "restore", "restore", "restore")

    @model_validator(mode="after")
    def _can_follow(self) -> UniversalCheckpointConfig:
        if self.load == "never" and (self.has_policies or self.on_differing != "error"):
            raise ValueError(
                "'on_missing', 'on_extra', 'on_differing', 'optimizer_states', 'hyperparameters' and 'scheduler' need another "
                "'load'"
            )
        return self


def parse_config(ds_config: Mapping[str, Any]) -> UniversalCheckpointConfig:
    """Read the block of a DeepSpeed config. Without one, or without its key ``enabled``, the variable ``UCP_DEEPSPEED`` says
    whether it counts as enabled; a config that asks for DeepSpeed's own universal load and has no block stays as it is.

    Raises:
        ConfigError: lists each unknown key and each value of a wrong type; or DeepSpeed's own universal load is on too.
    """
    block, checkpoint = ds_config.get(CONFIG_KEY), ds_config.get("checkpoint")
    asks_too = isinstance(checkpoint, Mapping) and checkpoint.get("load_universal")
    if block is None:
        return UniversalCheckpointConfig(enabled=environment.asks() and not asks_too)
    if not isinstance(block, Mapping):
        raise ConfigError(f"{CONFIG_KEY!r} must be a block of settings, not {block!r}")
    try:
        config = UniversalCheckpointConfig.model_validate({"enabled": environment.asks(), **block})
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, (CONFIG_KEY, *item['loc'])))}: {_say(item)}" for item in error.errors()]
        raise ConfigError("\n".join(["the DeepSpeed config is not valid:", *lines])) from error
    if config.enabled and config.load != "never" and asks_too:
        raise ConfigError(
            f"'checkpoint.load_universal' and {CONFIG_KEY!r} are two ways to load: the first reads what DeepSpeed's own tool "
            f'converted, the second any checkpoint; remove one of them, or set "load": "never" in the second'
        )
    return config


BLOCKS: Mapping[tuple[str, ...], type[BaseModel]] = {
    (): UniversalCheckpointConfig,
    ("save",): SaveConfig,
    ("save", "keep"): Keep,
    ("save", "on_signal"): OnSignal,
}
"""The blocks within one another, by the keys that lead to them."""


def _say(item: Any) -> str:
    place = tuple(item["loc"])
    within, key = place[:-1], (place or (None,))[-1]
    if item["type"] == "extra_forbidden":
        inner = next(
            (names for names, block in BLOCKS.items() if names[:-1] == within and names and key in _keys(block)), None
        )
        hint = f"; it belongs into {inner[-1]!r}" if inner else ""
        return f"unknown key{hint}; known keys: {', '.join(_keys(BLOCKS.get(within, UniversalCheckpointConfig)))}"
    if place in BLOCKS and not isinstance(item["input"], Mapping):
        kind = "a folder, or a block of settings" if BLOCKS[place] is OnSignal else "a block of settings"
        return f"must be {kind} (found {item['input']!r}); known keys: {', '.join(_keys(BLOCKS[place]))}"
    return worded(item)


def _keys(block: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in block.model_fields.items()]
