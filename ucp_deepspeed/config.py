"""The ``universal_checkpoint`` block of a DeepSpeed config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError

from ucp_deepspeed.errors import ConfigError

CONFIG_KEY = "universal_checkpoint"


class UniversalCheckpointConfig(BaseModel):
    """What the block may hold. Unknown keys and wrong types are errors that name the key.

    Attributes:
        enabled: without it everything else is ignored and DeepSpeed behaves as if the package weren't there.
        spec: ``auto``, a family's name, or the path of a spec file.
        load: ``auto`` takes DeepSpeed's own path when the topology is the same; ``always`` and ``never`` say so.
        vocabulary_size: rows of the unpadded vocabulary; needed when source and target pad it differently.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    enabled: bool = False
    spec: str = "auto"
    load: Literal["auto", "always", "never"] = "auto"
    vocabulary_size: PositiveInt | None = None


def parse_config(ds_config: Mapping[str, Any]) -> UniversalCheckpointConfig:
    """The block of a DeepSpeed config; disabled when there is none.

    Raises:
        ConfigError: lists each unknown key and each value of a wrong type.
    """
    block = ds_config.get(CONFIG_KEY)
    if block is None:
        return UniversalCheckpointConfig()
    if not isinstance(block, Mapping):
        raise ConfigError(f"{CONFIG_KEY!r} must be a block of settings, not {block!r}")
    try:
        return UniversalCheckpointConfig.model_validate(dict(block))
    except ValidationError as error:
        allowed = ", ".join(UniversalCheckpointConfig.model_fields)
        lines = [f"  {CONFIG_KEY}.{'.'.join(map(str, item['loc']))}: {_say(item)}" for item in error.errors()]
        raise ConfigError(
            "\n".join(["the DeepSpeed config is not valid:", *lines, f"  known keys: {allowed}"])
        ) from error


def _say(item: Any) -> str:
    return "unknown key" if item["type"] == "extra_forbidden" else f"{item['msg']} (found {item['input']!r})"
