"""Lightning's ``DeepSpeedStrategy``: saves in the background beside its checkpoint callbacks, evaluation with the user's block,
and the position in the data (`lightning_position`).

Lightning renames, links and removes checkpoints as soon as a save returns, and on rank 0 alone. Here a link moves, and an old
checkpoint goes, only when the new one is on disk.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from ucp_deepspeed.checkpoint.whole import last_checkpoint, problem_of
from ucp_deepspeed.config import CONFIG_KEY, parse_config
from ucp_deepspeed.integrations import is_on, lightning_position
from ucp_deepspeed.integrations.features import Feature

logger = logging.getLogger("ucp_deepspeed")

Wrapped = Callable[..., Any]

_NEWEST = "_universal_checkpoint_newest"
"""Attribute of a strategy: the folder that it saved last."""

_LINKED = "_universal_checkpoint_linked"
"""Attribute of a strategy: folders to be removed as soon as no link names them."""


def wrap(module: ModuleType) -> None:
    """Wrap what is in the strategy's package: ``lightning.pytorch``, or ``pytorch_lightning`` with the same code."""
    root = module.__name__.removesuffix(".strategies.deepspeed")
    strategy, callback, loop = "strategies.deepspeed", "callbacks.model_checkpoint", "loops.fit_loop"
    everything: dict[str, dict[str, dict[str, Wrapped]]] = {
        "its callbacks don't wait for saves in the background, and an old checkpoint may go before the new one is on disk": {
            strategy: {
                "DeepSpeedStrategy.save_checkpoint": _save,
                "DeepSpeedStrategy.load_checkpoint": _load,
                "DeepSpeedStrategy.remove_checkpoint": _remove,
            },
            callback: {"ModelCheckpoint._link_checkpoint": _link},
            loop: {"_FitLoop.on_run_end": _end_fit},
        },
        'ckpt_path="last" and "best" don\'t ask which checkpoints are whole': {
            callback: {"ModelCheckpoint._find_last_checkpoints": _find_last},
            "trainer.connectors.checkpoint_connector": {"_CheckpointConnector._parse_ckpt_path": _choose},
        },
        "validate, test and predict load as DeepSpeed alone does": {
            strategy: {"DeepSpeedStrategy._initialize_deepspeed_inference": _evaluate}
        },
    }
    for lost, wrappers in everything.items():
        _feature(root, lost, wrappers).arm()
    lightning_position.FEATURES[root] = _feature(root, lightning_position.LOST, lightning_position.WRAPPERS)
    lightning_position.FEATURES[root].arm()


def _feature(root: str, lost: str, wrappers: dict[str, dict[str, Wrapped]]) -> Feature:
    return Feature("lightning", "lightning.md", lost, {f"{root}.{place}": names for place, names in wrappers.items()})


def _save(wrapped: Wrapped, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Save the position in the data with Lightning's own state."""
    if not is_on(strategy.model):
        wrapped(*args, **kwargs)
        return
    _save_here(wrapped, strategy, *args, **kwargs)


def _save_here(
    wrapped: Wrapped, strategy: Any, checkpoint: Mapping[str, Any], filepath: Any, *rest: Any, **named: Any
) -> None:
    trainer = strategy.lightning_module.trainer
    position = lightning_position.to_be_saved(trainer, strategy.model)
    wrapped({**checkpoint, lightning_position.KEY: position}, filepath, *rest, **named)
    folder = Path(filepath).absolute()
    setattr(strategy, _NEWEST, folder)
    if strategy.is_global_zero and any(map(_takes_files, trainer.loggers)):
        from ucp_deepspeed.engine.saving.background import finish_here

        finish_here(folder)


def _takes_files(logger_of_run: Any) -> bool:
    """Return whether a logger does something with a checkpoint as soon as it is saved, such as an upload."""
    method = type(logger_of_run).after_save_checkpoint
    return not method.__module__.endswith((".loggers.logger", ".loggers.tensorboard"))


def _load(wrapped: Wrapped, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load a checkpoint that this process may still be writing."""
    if is_on(strategy.model):
        from ucp_deepspeed.engine.saving.background import finish_here

        finish_here(Path(args[0] if args else kwargs["checkpoint_path"]))
    return wrapped(*args, **kwargs)


def _remove(wrapped: Wrapped, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Remove a checkpoint when the one that was saved last is on disk."""
    if not is_on(strategy.model) or not strategy.is_global_zero:
        wrapped(*args, **kwargs)
        return
    from ucp_deepspeed.engine.saving.background import when_on_disk

    folder = Path(args[0] if args else kwargs["filepath"]).absolute()
    newest = vars(strategy).get(_NEWEST, folder)
    remove = partial(_remove_old, wrapped, strategy, folder, newest)
    when_on_disk(newest, partial(when_on_disk, folder, remove))


def _remove_old(wrapped: Wrapped, strategy: Any, folder: Path, newest: Path) -> None:
    if newest != folder and (problem := problem_of(newest)) is not None:
        logger.warning("%s isn't removed, since the newer one isn't whole: %s", folder, problem)
    elif folder.is_symlink():
        folder.unlink()
    elif _links_to(folder):
        vars(strategy).setdefault(_LINKED, {})[folder] = wrapped
    else:
        wrapped(str(folder))


def _links_to(folder: Path) -> list[Path]:
    """Return the links beside a folder that name it."""
    beside = folder.parent.iterdir() if folder.parent.is_dir() else ()
    return [each for each in beside if each.is_symlink() and each.resolve() == folder.resolve()]


def _link(wrapped: Wrapped, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Let ``last.ckpt`` name a checkpoint when it is on disk."""
    trainer, *_ = args or (kwargs["trainer"],)
    if not is_on(trainer.strategy.model):
        wrapped(*args, **kwargs)
        return
    _link_here(*args, **kwargs)


def _link_here(trainer: Any, filepath: str, linkpath: str) -> None:
    folder, link = Path(filepath).absolute(), Path(linkpath).absolute()
    if trainer.is_global_zero and folder != link:
        from ucp_deepspeed.engine.saving.background import when_on_disk

        when_on_disk(folder, partial(_move_link, trainer.strategy, folder, link))
    trainer.strategy.barrier()


def _move_link(strategy: Any, folder: Path, link: Path) -> None:
    """Let a link name another folder, in one step. Then remove what it alone kept."""
    beside, aside = link.with_name(f".{link.name}.link"), link.with_name(f".{link.name}.old")
    beside.unlink(missing_ok=True)
    beside.symlink_to(os.path.relpath(folder, link.parent))
    if link.is_dir() and not link.is_symlink():  # saved as a checkpoint of its own before
        link.rename(aside)
    beside.replace(link)
    if aside.is_dir():
        shutil.rmtree(aside)
    kept: dict[Path, Wrapped] = vars(strategy).get(_LINKED, {})
    for each in [each for each in kept if not _links_to(each)]:
        kept.pop(each)(str(each))


def _evaluate(wrapped: Wrapped, strategy: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Give the engine of ``validate``, ``test`` and ``predict`` the user's block, which Lightning leaves out of its config."""
    block = strategy.config.get(CONFIG_KEY)
    config = parse_config({CONFIG_KEY: block})
    if config.enabled and strategy.zero_stage_3:
        strategy.config.setdefault(
            "zero_allow_untested_optimizer", False
        )  # Lightning looks it up; this is DeepSpeed's default
    wrapped(*args, **kwargs)
    if block is None:
        return
    engine = strategy.model
    engine.universal_checkpoint_config = config
    if config.enabled:
        from ucp_deepspeed.engine.support import check_engine

        check_engine(engine)


def _end_fit(wrapped: Wrapped, loop: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Wait, at the end of ``fit``, until its last save is on disk."""
    wrapped(*args, **kwargs)
    engine = loop.trainer.strategy.model
    if is_on(engine):
        from ucp_deepspeed.engine.saving.background import wait_for_save

        wait_for_save(engine)


def _asks(strategy: Any) -> bool:
    """Return whether a strategy's config has the block on; its engine may not be there yet."""
    config = getattr(strategy, "config", None)
    return isinstance(config, Mapping) and "zero_stage_3" in dir(strategy) and parse_config(config).enabled


def _problem(path: str) -> str | None:
    """Return why a folder isn't a whole checkpoint, once this process has written it; None if it is, or is a file."""
    from ucp_deepspeed.engine.saving.background import finish_here

    finish_here(Path(path))
    return None if Path(path).is_file() else problem_of(Path(path))


def _find_last(wrapped: Wrapped, callback: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """Find whole checkpoints for ``ckpt_path="last"``: if none is called so, the newest of the folder."""
    found: set[str] = wrapped(*args, **kwargs)
    trainer = args[0] if args else kwargs["trainer"]
    if not _asks(trainer.strategy):
        return found
    passed = {path: problem for path in sorted(found) if (problem := _problem(path)) is not None}
    whole = found - passed.keys()
    if not whole and callback.save_last and callback.dirpath is not None:
        newest = last_checkpoint(callback.dirpath)
        whole = set() if newest is None else {newest}
    if passed and trainer.is_global_zero:
        taken = f"taking {', '.join(sorted(whole))}" if whole else "there is none"
        logger.warning('ckpt_path="last" takes whole checkpoints only: %s; passed over: %s', taken, _listed(passed))
    return whole


def _choose(wrapped: Wrapped, connector: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Choose a whole checkpoint for ``ckpt_path="best"``: the best of those that are."""
    chosen = wrapped(*args, **kwargs)
    asked = args[1] if len(args) > 1 else kwargs.get("ckpt_path")
    trainer = connector.trainer
    callback = trainer.checkpoint_callback
    is_best = asked in ("best", None) and callback is not None and chosen == getattr(callback, "best_model_path", None)
    if not chosen or not is_best or not _asks(trainer.strategy) or (problem := _problem(chosen)) is None:
        return chosen
    passed = {chosen: problem}
    ranked = sorted(callback.best_k_models, key=callback.best_k_models.get, reverse=callback.mode == "max")
    for path in ranked:
        if path not in passed and (problem := _problem(path)) is not None:
            passed[path] = problem
        elif path not in passed:
            if trainer.is_global_zero:
                told = 'ckpt_path="best" takes whole checkpoints only: taking %s; passed over: %s'
                logger.warning(told, path, _listed(passed))
            return path
    return chosen  # whose load says what is wrong


def _listed(passed: Mapping[str, str]) -> str:
    return "; ".join(f"{path} ({problem})" for path, problem in passed.items())
