"""Accelerate: checkpoints that rotate once the new one is whole, and runs that go on as if they had never been interrupted, on
any number of processes.

``save_state`` puts a record into the engines' client state: where the accumulation, the schedules and the data loaders stand.
``load_state`` goes by it, since Accelerate's own files are one for each process, or count processes.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from inspect import signature
from pathlib import Path
from types import ModuleType
from typing import Any

from ucp_deepspeed.checkpoint.opening import resolve_tag
from ucp_deepspeed.checkpoint.whole import ACCELERATE_KEY, TAGS_KEY, problem_of
from ucp_deepspeed.errors import CheckpointNotFoundError
from ucp_deepspeed.integrations import accelerate_data, accelerate_schedule, is_on
from ucp_deepspeed.integrations.features import Feature
from ucp_deepspeed.integrations.rotation import rotate

logger = logging.getLogger("ucp_deepspeed")


def wrap(module: ModuleType) -> None:
    """Wrap ``accelerate.accelerator`` and what it uses."""
    of_accelerator: dict[str, Callable[..., Any]] = {
        "Accelerator.save_state": _save_state,
        "Accelerator.load_state": _load_state,
        "Accelerator.prepare": _prepare,
        "Accelerator.prepare_data_loader": _prepare,
    }
    lost = (
        "load_state goes by Accelerate's own files: its step, its schedules and the place in the data fit the same number of "
        "processes alone, and total_limit doesn't ask which checkpoints are whole"
    )
    wrappers = {module.__name__: of_accelerator, **accelerate_schedule.WRAPPERS, **accelerate_data.WRAPPERS}
    feature = Feature("accelerate", "accelerate.md", lost, wrappers)
    feature.arm()
    accelerate_data.wrap(feature)


def _engines(accelerator: Any) -> list[Any]:
    """Return the engines of an Accelerator that have the block on."""
    return [model for model in accelerator._models if is_on(model)]


def _prepare(wrapped: Callable[..., Any], accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    prepared = wrapped(*args, **kwargs)
    if _engines(accelerator):
        accelerate_data.count(accelerator._dataloaders)
    return prepared


def _save_state(wrapped: Callable[..., Any], accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Save, with a record. Rotate when the checkpoint is on disk, and not before it is written."""
    from ucp_deepspeed.engine.replaced import replaced
    from ucp_deepspeed.engine.saving.background import when_on_disk

    engines, configuration = _engines(accelerator), accelerator.project_configuration
    if not engines:
        return wrapped(*args, **kwargs)
    most = configuration.total_limit
    with _recorded(engines, _record(accelerator)), replaced(configuration, total_limit=None):
        location = wrapped(*args, **kwargs)
    if configuration.automatic_checkpoint_naming and most is not None and accelerator.is_main_process:
        folder, tags = Path(location), _tags(accelerator)
        when_on_disk(folder, lambda: _rotate(folder.parent, most, tags))
    return location


@contextmanager
def _recorded(engines: Sequence[Any], record: Mapping[str, Any]) -> Iterator[None]:
    """Save a record with engines that are saved in the block, as one checkpoint."""
    from ucp_deepspeed.engine.client_state import ADDED, add_to_client_state
    from ucp_deepspeed.engine.replaced import replaced
    from ucp_deepspeed.engine.saving.save import ONE_CHECKPOINT

    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(replaced(engine, **{ONE_CHECKPOINT: True}))
            add_to_client_state(engine, ACCELERATE_KEY, lambda: record)
            stack.callback(vars(engine)[ADDED].pop, ACCELERATE_KEY)
        yield


def _record(accelerator: Any) -> dict[str, Any]:
    steps, accumulation = int(accelerator.step), int(accelerator.gradient_accumulation_steps)
    return {
        TAGS_KEY: _tags(accelerator),
        "processes": int(accelerator.num_processes),
        "step": steps,
        "begun": steps % accumulation,
        "schedules": [accelerate_schedule.described(each) for each in accelerator._schedulers],
        "loaders": [accelerate_data.described(each, steps % accumulation) for each in accelerator._dataloaders],
    }


def _tags(accelerator: Any) -> list[str]:
    """Return the tags under which an Accelerator saves its models."""
    from accelerate.utils import MODEL_NAME

    return [MODEL_NAME if index == 0 else f"{MODEL_NAME}_{index}" for index in range(len(accelerator._models))]


def _made_in(folder: Path) -> list[Path]:
    """Return the checkpoints that Accelerate has named itself, the oldest first."""
    found = [entry for entry in folder.glob("checkpoint_*") if re.fullmatch(r"checkpoint_\d+", entry.name)]
    return sorted((entry for entry in found if entry.is_dir()), key=_number)


def _number(folder: Path) -> int:
    return int(folder.name.rpartition("_")[2])


def _problem(tags: Sequence[str], folder: Path) -> str | None:
    """Return why a checkpoint of Accelerate's isn't whole; None if it is."""
    missing = [tag for tag in tags if not (folder / tag).is_dir()]
    return problem_of(folder) or (f"{folder} lacks {missing[0]}: its save was not finished" if missing else None)


def _rotate(folder: Path, most: int, tags: Sequence[str]) -> None:
    rotate(_made_in(folder), most, problem=partial(_problem, tags))


def _load_state(wrapped: Callable[..., Any], accelerator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load, and go on by the record: all ranks at the same boundary, with the same schedule, at the same sample. Collective."""
    engines = _engines(accelerator)
    if not engines:
        return wrapped(*args, **kwargs)
    from ucp_deepspeed.engine.agreement import agreement
    from ucp_deepspeed.engine.client_state import LOADED
    from ucp_deepspeed.engine.random_state import as_they_are

    given = signature(wrapped).bind_partial(*args, **kwargs)
    if given.arguments.get("input_dir") is None and accelerator.project_configuration.automatic_checkpoint_naming:
        given.arguments["input_dir"] = _newest(accelerator)
    folder = given.arguments.get("input_dir")
    put_back = as_they_are(engines[0])
    with agreement(tells=True) as told:
        if folder is not None and (place := Path(folder).expanduser()).is_dir():
            for tag in _tags(accelerator):
                resolve_tag(place, tag)
        loaded = wrapped(*given.args, **given.kwargs)
        record = getattr(engines[0], LOADED, {}).get(ACCELERATE_KEY)
        told.mine = (record, int(accelerator.step))
    record, step = told.values[0]
    assert folder is not None, "Accelerate has refused it"
    place = Path(folder).expanduser()
    held = len(list(place.glob("random_states_*.pkl")))
    record = dict(record or {"processes": held or None, "step": step})
    _go_on(accelerator, record, place)
    _restore_streams(engines[0], accelerator, place, held, put_back)
    return loaded


def _newest(accelerator: Any) -> str | None:
    """Return the newest whole checkpoint of those that Accelerate names itself, as rank 0 sees them; None where there are none at
    all, which Accelerate tells. Later saves get the numbers after them. Collective.

    Raises:
        CheckpointNotFoundError: none of them is whole.
    """
    from ucp_deepspeed.engine.agreement import agreement
    from ucp_deepspeed.engine.saving.background import settle_saves

    folder, tags = Path(accelerator.project_dir) / "checkpoints", _tags(accelerator)
    settle_saves(folder)
    with agreement(tells=True) as told:
        made = _made_in(folder)[::-1]
        problems = [(each, _problem(tags, each)) for each in made] if accelerator.process_index == 0 else []
        whole = [number for number, (_, problem) in enumerate(problems) if problem is None]
        if problems and not whole:
            listed = "; ".join(problem for _, problem in problems if problem is not None)
            raise CheckpointNotFoundError(
                f"no checkpoint in {folder} is whole: {listed}; start anew, or name another folder"
            )
        if whole:
            told.mine = str(made[whole[0]]), _number(made[0]), [problem for _, problem in problems[: whole[0]]]
    if told.values[0] is None:
        return None
    found, number, passed = told.values[0]
    if passed and accelerator.is_main_process:
        logger.warning("taking %s; newer ones aren't whole: %s", found, "; ".join(passed))
    configuration = accelerator.project_configuration
    configuration.iteration = max(configuration.iteration, number + 1)
    return str(found)


def _go_on(accelerator: Any, record: Mapping[str, Any], folder: Path) -> None:
    """Put the accumulation, the schedules and the data loaders where the record says, alike on all ranks."""
    step, begun = record["step"], record.get("begun", 0)
    accelerator.step = step - step % accelerator.gradient_accumulation_steps
    tells = accelerator.is_main_process
    if begun and tells:
        logger.warning(
            "%s was saved in the middle of an accumulation: the gradients of its %d micro-batches aren't in the checkpoint, so "
            "the run goes on at the last optimizer step; skip_first_batches hands these micro-batches out again",
            folder,
            begun,
        )
    for index, scheduler in enumerate(accelerator._schedulers):
        saved = dict(enumerate(record.get("schedules", ()))).get(index)
        told = accelerate_schedule.go_on(scheduler, saved, record["processes"])
        if told is not None and tells:
            logger.log(told.level, "%s", told.text)
    for index, loader in enumerate(accelerator._dataloaders):
        saved = dict(enumerate(record.get("loaders", ()))).get(index)
        accelerate_data.go_on(loader, saved, tells)


def _restore_streams(engine: Any, accelerator: Any, folder: Path, held: int, put_back: Callable[[], None]) -> None:
    """Let the engine's load have the last word on random streams, which Accelerate has for the saved ranks alone. Collective."""
    from ucp_deepspeed.engine.random_state import as_they_are, restore_again

    loaded = as_they_are(engine)
    put_back()  # new streams are shared by ranks that the script has seeded alike
    if restore_again(engine):
        if held != accelerator.num_processes and accelerator.is_main_process:
            logger.info(
                "%s has random states of %d processes: the streams of all %d are derived from those of the engine's checkpoint",
                folder,
                held,
                accelerator.num_processes,
            )
    elif held >= accelerator.num_processes:
        loaded()
    elif accelerator.is_main_process:
        logger.warning(
            "%s has random states of %d processes alone, and the engine's checkpoint none that it takes: the streams of all "
            "%d stay as the script has seeded them",
            folder,
            held,
            accelerator.num_processes,
        )
