"""Engines that this release can't handle and DeepSpeed can: DeepSpeed's own saves and loads are used, on one topology.

`support.check_engine` says which engines, and why. Where the block asks for more than DeepSpeed does (``"load": "always"``, a
policy, a save in the background) it refuses them when they are built. These loads trust the files, as DeepSpeed does.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, resolve_tag
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.universal.catalog import INDEX_NAME, home_of
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.console import told_once
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.loading.native import LoadOptions
from ucp_deepspeed.engine.model import engine_topology
from ucp_deepspeed.engine.node_local import open_here, writes_for_node
from ucp_deepspeed.errors import UniversalCheckpointError, UnsupportedError

logger = logging.getLogger("ucp_deepspeed")

REASON = "universal_checkpoint_left_alone"
"""Attribute of an engine: the `UnsupportedError` that says why it is left to DeepSpeed, or None."""


def leave_alone(engine: Engine, reason: UnsupportedError) -> None:
    """Leave the engine's saves and loads to DeepSpeed.

    Raises:
        UnsupportedError: the block asks for more than DeepSpeed does.
    """
    if _asks_for_more(engine.universal_checkpoint_config):
        raise UnsupportedError(
            reason.heading,
            reason.problems,
            'change that; or leave saves and loads on the same topology to DeepSpeed: "load": "auto", without policies and '
            'without "async": true',
        )
    setattr(engine, REASON, reason)
    if dist.get_rank() == 0:
        logger.warning(
            "%s: saves and loads of this engine are left to DeepSpeed alone (no manifest; the same topology only)",
            reason,
        )


def _asks_for_more(config: UniversalCheckpointConfig) -> bool:
    return config.load == "always" or config.has_policies or config.save.asynchronous


def is_left_alone(engine: Engine) -> bool:
    """Return whether the engine's saves and loads are DeepSpeed's own."""
    return getattr(engine, REASON, None) is not None


def save_checkpoint(
    native: Callable[..., bool], engine: Engine, save_dir: str, tag: Any = None, *positional: Any, **named: Any
) -> bool:
    """Save by DeepSpeed itself, in place of ``engine.save_checkpoint``. Remove an old manifest, which describes other files."""
    if save_dir and writes_for_node(engine):
        manifest = Path(save_dir) / (f"global_step{engine.global_steps}" if tag is None else str(tag)) / MANIFEST_NAME
        if manifest.is_file():
            manifest.unlink()
    return native(save_dir, tag, *positional, **named)


def load_checkpoint(
    native: Callable[..., Any], engine: Engine, load_dir: str, tag: Any = None, *positional: Any, **named: Any
) -> Any:
    """Load by DeepSpeed itself, in place of ``engine.load_checkpoint``.

    Raises:
        UnsupportedError: the checkpoint is a universal one, or is known to be of another topology; on every rank, before
            anything of the engine has changed.
    """
    options = LoadOptions(*positional, **named)
    with agreement():
        aside = _check_loadable(engine, Path(load_dir), None if tag is None else str(tag), options)
        if aside is not None:
            load_dir, tag = str(aside.parent), aside.name
    with told_once(load_dir, tag):
        return native(load_dir, tag=tag, **options.arguments())


def _check_loadable(engine: Engine, load_dir: Path, tag: str | None, options: LoadOptions) -> Path | None:
    """Refuse checkpoints that DeepSpeed can't load, as far as that can be told; DeepSpeed has its own messages for the rest.

    Returns:
        The folder of a tag that lies aside (`resolve_tag`), which DeepSpeed doesn't find by its name; None for any other.
    """
    reason: UnsupportedError = getattr(engine, REASON)
    try:
        folder = resolve_tag(load_dir, tag)
    except UniversalCheckpointError:
        return None
    aside = None if home_of(folder) == folder else folder
    if (folder / INDEX_NAME).is_file():
        raise UnsupportedError(
            f"{folder} is a universal checkpoint, which this engine can't load: {reason.heading}",
            reason.problems,
            'change that: "load": "auto" or "always" then loads it',
        )
    if engine.universal_checkpoint_config.load == "never":
        return aside
    try:
        checkpoint = open_here(engine, folder)
    except UniversalCheckpointError:
        return aside
    if _is_of_another_topology(checkpoint, engine, options):
        raise UnsupportedError(
            f"{folder} was saved on {checkpoint.topology}, and this engine, on {engine_topology(engine)}, can load what its own "
            f"topology saved: {reason.heading}",
            reason.problems,
            f'change that, or resume on {checkpoint.topology}, where "load": "auto" leaves it to DeepSpeed',
        )
    return aside


def _is_of_another_topology(checkpoint: Checkpoint, engine: Engine, options: LoadOptions) -> bool:
    """Return whether DeepSpeed can't resume from it. Without ZeRO, and for weights below stage 3, one file serves all
    replicas."""
    saved, live = checkpoint.topology, engine_topology(engine)
    if (saved.tp, saved.pp) != (live.tp, live.pp):
        return True
    stages = saved.zero_stage, live.zero_stage
    if not options.optimizer_states and max(stages) < 3:
        return False
    if saved.ep != live.ep or (stages[0] != stages[1] and set(stages) != {1, 2}):
        return True
    return saved.dp != live.dp and max(stages) > 0
