"""Files that stand beside a model's weights: its configuration, its tokenizer, and the like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint.bounds import read_bounded
from ucp_deepspeed.errors import ConfigError, DamagedCheckpointError

CONFIG_NAME = "config.json"

ADAPTER_CONFIG_NAME = "adapter_config.json"

BESIDE_MODEL = (
    *(CONFIG_NAME, "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*"),
    *("merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.*", "additional_chat_templates/*"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", "*.py"),
)
"""Names of files that ``save_pretrained`` of models, tokenizers and processors writes beside the weights."""

_DTYPE_KEYS = ("dtype", "torch_dtype")
"""Keys of a configuration with the type of the weights: of transformers 5, and of earlier versions."""


@dataclass(frozen=True)
class Companions:
    """Files to copy: path in the folder of the output → content."""

    files: dict[str, bytes]
    folder: Path | None = None

    @property
    def numbytes(self) -> int:
        """Size of all."""
        return sum(map(len, self.files.values()))

    def write(self, folder: Path) -> None:
        """Write them."""
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def document(self, name: str) -> dict[str, Any] | None:
        """Return the object in a JSON file; None if there is no such file.

        Raises:
            DamagedCheckpointError: it holds no object.
        """
        if name not in self.files:
            return None
        try:
            found = json.loads(self.files[name])
        except (ValueError, RecursionError) as error:
            raise DamagedCheckpointError(f"{self.folder} / {name} is no JSON: {error}; name another folder") from error
        if not isinstance(found, dict):
            raise DamagedCheckpointError(f"{self.folder} / {name} holds no object; name another folder")
        return found

    def with_document(self, name: str, document: dict[str, Any]) -> Companions:
        """Return them with a JSON file replaced."""
        return Companions(self.files | {name: (json.dumps(document, indent=2) + "\n").encode()}, self.folder)


def companions_of(checkpoint: Path, config_from: Path | None, main: str, others: Sequence[str] = ()) -> Companions:
    """Find a configuration, and read the files that stand beside it.

    Args:
        checkpoint: the tag folder. Without ``config_from`` it is searched, and then the folder around it, as Trainer leaves them.
        main: name of the configuration.
        others: globs of the further files.

    Returns:
        No files, if there is no configuration.

    Raises:
        ConfigError: the folder named by ``config_from`` has no configuration.
        DamagedCheckpointError: a file is too large or can't be read.
    """
    places = [checkpoint, checkpoint.absolute().parent] if config_from is None else [config_from]
    place = next((each for each in places if (each / main).is_file()), None)
    if place is None and config_from is not None:
        raise ConfigError(f"{config_from} has no {main}; name the folder that has it")
    if place is None:
        return Companions({})
    found = {path for glob in (main, *others) for path in place.glob(glob) if path.is_file()}
    return Companions({path.relative_to(place).as_posix(): read_bounded(path) for path in sorted(found)}, place)


def model_type_of(config: Mapping[str, Any]) -> str | None:
    """Return the type that a model's configuration tells; None if it tells none."""
    found = config.get("model_type")
    return found if isinstance(found, str) else None


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Return a model's configuration that tells the type of its weights, as ``save_pretrained`` would write it.

    Without it ``from_pretrained`` would round fp32 weights to what the run was configured with.
    """
    changed = {
        key: with_dtype(value, dtype) if key.endswith("_config") and _tells_dtype(value) else value
        for key, value in config.items()
    }
    told = [key for key in _DTYPE_KEYS if key in config] or ["dtype"]
    return changed | dict.fromkeys(told, dtype)


def _tells_dtype(value: Any) -> bool:
    return isinstance(value, dict) and any(key in value for key in _DTYPE_KEYS)
