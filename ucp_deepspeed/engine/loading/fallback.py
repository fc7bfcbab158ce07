"""Another tag in the place of one that can't be loaded, where the script names none."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint.opening import LATEST_NAME, read_latest
from ucp_deepspeed.checkpoint.whole import checkpoints_in
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.errors import CheckpointNotFoundError, DamagedCheckpointError
from ucp_deepspeed.remote import located

logger = logging.getLogger("ucp_deepspeed")

Loaded = tuple[str | None, dict[str, Any] | None]
"""Result of ``engine.load_checkpoint``: the path, None if there was nothing to load, and the client state."""


def falling_back(load: Callable[..., Loaded]) -> Callable[..., Loaded]:
    """Wrap a load (``native, engine, load_dir, tag, …``): if none is named and the one that ``latest`` names is damaged or gone,
    or ``latest`` is, load the newest whole tag, and tell of it. If no other can be loaded, raise the first error. Collective."""

    @wraps(load)
    def tried(native: Any, engine: Engine, load_dir: str, tag: str | None = None, *rest: Any, **options: Any) -> Loaded:
        config: UniversalCheckpointConfig = engine.universal_checkpoint_config
        stays = tag is not None or config.fallback == "none" or config.load == "never"
        loaded: Loaded = (None, {})
        first: DamagedCheckpointError | CheckpointNotFoundError | None = None
        try:
            loaded = load(native, engine, load_dir, tag, *rest, **options)
            if stays or loaded[0] is not None:
                return loaded
        except (DamagedCheckpointError, CheckpointNotFoundError) as error:
            if stays:
                raise
            first = error
        why = "there is no file 'latest'" if first is None else f"the one that 'latest' names is lost: {first}"
        for name in _others(load_dir):
            if dist.get_rank() == 0:
                logger.warning("taking the tag %s of %s, since %s", name, load_dir, why)
            try:
                return load(native, engine, load_dir, name, *rest, **options)
            except (DamagedCheckpointError, CheckpointNotFoundError) as error:
                if dist.get_rank() == 0:
                    logger.warning("the tag %s can't be loaded either: %s", name, error)
        if first is not None:
            raise first
        return loaded

    return tried


def _others(load_dir: str) -> list[str]:
    """Return the whole tags of a folder but the one that ``latest`` names, the newest first, as the first rank sees them.
    Collective."""
    with agreement(tells=True) as told:
        told.mine = []
        if dist.get_rank() == 0:
            root, tried = located(load_dir), None
            with suppress(DamagedCheckpointError, OSError):
                tried = read_latest(root / LATEST_NAME)
            found = (each.path for each in checkpoints_in(root) if each.problem is None)
            told.mine = [path.name for path in found if path.name != tried]
    others: list[str] = told.values[0]
    return others
