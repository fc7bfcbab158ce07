"""The load hook: fill an engine's partitions straight from the files of any checkpoint.

Plan, prove, agree, fill: every rank has a plan that covers what it holds before anything of the engine is touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.checkpoint import Checkpoint, resolve_tag
from ucp_deepspeed.checkpoint.deepspeed.files import VALUES_KEY
from ucp_deepspeed.checkpoint.expert_forms import in_form_of
from ucp_deepspeed.checkpoint.opening import LATEST_NAME
from ucp_deepspeed.checkpoint.universal.catalog import INDEX_NAME, home_of
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.console import told_once
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.extra_states import plan_extra_states
from ucp_deepspeed.engine.known_layouts import KnownLayouts, keep_layouts, known_by_manifest
from ucp_deepspeed.engine.loading.custom_load import check_custom_load, local_state_dict, run_custom_load
from ucp_deepspeed.engine.loading.native import LoadOptions, takes_universal_path
from ucp_deepspeed.engine.loading.pairing import in_ties_of, match_model, match_names, policies_of
from ucp_deepspeed.engine.loading.planning import plan_filling, target_slots
from ucp_deepspeed.engine.loading.training_state import (
    GroupSettings,
    check_scheduler,
    plan_hyperparameters,
    plan_scheduler,
    restore_data_schedules,
    restore_run,
    without_begun_anew,
)
from ucp_deepspeed.engine.loading.unpickled import files_to_unpickle, look_into, only_held_against_the_list
from ucp_deepspeed.engine.loading.ways_on import telling_ways_on
from ucp_deepspeed.engine.model import (
    EngineModel,
    agreement,
    check_same_on_all_ranks,
    describe_model,
)
from ucp_deepspeed.engine.node_local import check_all_here, open_here
from ucp_deepspeed.engine.optimizer_only import take_values
from ucp_deepspeed.engine.optimizers import EngineOptimizer, engine_optimizer, only_evaluates
from ucp_deepspeed.engine.random_state import read_random_state, restore_random_state
from ucp_deepspeed.engine.saving.background import settle_saves, wait_for_save
from ucp_deepspeed.engine.stage_copies import with_copies_for
from ucp_deepspeed.errors import (
    CheckpointNotFoundError,
    ConfigError,
    DamagedCheckpointError,
    FormatError,
    MismatchError,
    UnsupportedError,
)
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers

logger = logging.getLogger("ucp_deepspeed")

Loaded = tuple[str | None, dict[str, Any] | None]


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The result of a universal load on this rank; kept as ``engine.universal_checkpoint_report``.

    Attributes:
        source: form and topology of the checkpoint.
        target: topology of the engine.
        bytes_read: bytes copied out of files.
        bytes_needed: bytes that this rank's partitions, frozen parameters and buffers hold, in the source's dtypes. Where
            replicas read together, it counts this rank's part.
        files: files that bytes came from.
        seconds: from the call to the return.
        initialised: parameters that kept the model's values, in whole, in further rows, or in their optimizer states alone.
        dropped: parameters of the checkpoint for which the model has no place, or no place for their optimizer states.
        unread: keys of the client state that couldn't be read and were left out.
        kept_settings: hyper-parameters for which the engine kept its own values, which differ from the checkpoint's.
        copies: parameters whose values differ over the checkpoint's pipeline stages, and the stage whose values were read, in
            words.
        merged: numbers of this rank that differed over the partitions of the checkpoint and became one, by ``on_differing``.
    """

    source: str
    target: str
    bytes_read: int
    bytes_needed: int
    files: int
    seconds: float
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]
    kept_settings: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


@telling_ways_on
def load_checkpoint(
    native: Callable[..., Loaded],
    engine: Engine,
    load_dir: str,
    tag: str | None = None,
    load_module_strict: bool = True,
    load_optimizer_states: bool = True,
    load_lr_scheduler_states: bool = True,
    load_module_only: bool = False,
    custom_load_fn: Callable[..., None] | None = None,
) -> Loaded:
    """Load in place of ``engine.load_checkpoint``; same arguments, same result.

    Raises:
        UniversalCheckpointError: one of its subclasses, on every rank, before anything of the engine has changed. SaveError if an
            asynchronous save, for which this waits, failed. It is raised later only where a file that was whole can't be read any
            more.
    """
    wait_for_save(engine)
    settle_saves()
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    options = LoadOptions(
        load_module_strict, load_optimizer_states, load_lr_scheduler_states, load_module_only, custom_load_fn
    )
    started = time.monotonic()
    folder, prepared, universal, random_state = None, None, False, None
    check_same_on_all_ranks("load_checkpoint", options.arguments() | {"custom_load_fn": custom_load_fn is not None})
    goes_on = config.random_state == "restore" and config.load != "never" and not load_module_only
    goes_on = goes_on and not only_evaluates(engine)
    tag = _one_tag(Path(load_dir), None if tag is None else str(tag), config.load)
    with agreement():
        folder = _find(Path(load_dir), tag, config.load)
        if folder is not None:
            checkpoint = _opened(engine, folder, config)
            prepared = None if checkpoint is None else (checkpoint, engine_optimizer(engine))
        if folder is not None and prepared is not None:
            random_state = read_random_state(folder, prepared[0].run.global_steps) if goes_on else None
            universal = takes_universal_path(config, engine, *prepared, options)
    _check_one_step(None if prepared is None else prepared[0])
    if not any(_gathered(universal)):  # a pipeline's stages may have changed on some ranks only
        if folder is not None and (tag is None or folder.name != Path(tag).name):
            load_dir, tag = str(folder.parent), folder.name  # the user named the folder itself, or it lies aside
        checked = only_held_against_the_list(None if prepared is None else prepared[0], engine)
        with told_once(load_dir, tag), nullcontext() if folder is None else checked:
            loaded = native(load_dir, tag=tag, **options.arguments())
        take_values(engine, loaded[1])
        with agreement():
            if prepared is not None:
                _check_unchanged(prepared[0])
        if loaded[0] is not None:
            keep_layouts(engine, KnownLayouts() if prepared is None else known_by_manifest(prepared[0], engine))
            if prepared is not None and dist.get_rank() == 0:
                logger.info(
                    "loaded %s (step %d) by DeepSpeed itself, which can: it was saved on %s",
                    prepared[0].path,
                    prepared[0].run.global_steps,
                    prepared[0].topology,
                )
    else:
        with agreement():
            if prepared is None:
                raise CheckpointNotFoundError(f"no checkpoint at {load_dir}, where other ranks see one")
        assert prepared is not None
        check_all_here(prepared[0])
        loaded = _load_universal(engine, *prepared, options, started)
    if goes_on and loaded[0] is not None:
        restore_random_state(engine, random_state)
    return loaded


def _opened(engine: Engine, folder: Path, config: UniversalCheckpointConfig) -> Checkpoint | None:
    """Return the catalog; None where this release can't read the files, and DeepSpeed by itself may be able to.

    Raises:
        UniversalCheckpointError: see `open_checkpoint`; also if the files hold more than data.
    """
    try:
        return open_here(engine, folder)
    except UnsupportedError as error:
        if isinstance(error, FormatError) or config.load == "always" or config.has_policies:
            raise
        if (folder / INDEX_NAME).is_file():
            raise
        for path in files_to_unpickle(folder, [entry.name for entry in folder.iterdir()], engine):
            look_into(path, None)
        if dist.get_rank() == 0:
            logger.warning(
                "the load, random streams included, is left to DeepSpeed, and works at most on the topology that saved: %s",
                error,
            )
        return None


def _check_unchanged(checkpoint: Checkpoint) -> None:
    """Check, after DeepSpeed has loaded by itself, that it read the files that were checked before."""
    try:
        checkpoint.versions.check()
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(
            f"{error}; the engine may hold two saves' state and can't be used without another load"
        ) from error


def _gathered(value: Any) -> list[Any]:
    """Return the values of all ranks. Collective over these."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _one_tag(load_dir: Path, tag: str | None, load: str) -> str | None:
    """Return the tag that all ranks load. With none named it is the first rank's, since ``latest`` may move while ranks read it.
    Collective.

    Raises:
        ConfigError: ranks name different tags.
    """
    named = _gathered(tag)
    if len(set(named)) > 1:
        raise ConfigError(
            f"ranks load different tags from {load_dir}: {_by_rank(named)}; name the same on all, or none"
        )
    if tag is not None:
        return tag
    with agreement():
        folder = _find(load_dir, None, load)
    found = _gathered(None if folder is None else str(home_of(folder).relative_to(load_dir)))
    return next((name for name in found if name is not None), None)


def _check_one_step(checkpoint: Checkpoint | None) -> None:
    """Check that ranks that opened a checkpoint see the same one, each where it looks: folders may be a machine's own.
    Collective.

    Raises:
        MismatchError: they don't.
    """
    opened = _gathered(None if checkpoint is None else (checkpoint.run.global_steps, str(checkpoint.path)))
    if len({found[0] for found in opened if found is not None}) > 1:
        seen = [found and f"step {found[0]} in {found[1]}" for found in opened]
        raise MismatchError(
            f"ranks opened different checkpoints: {_by_rank(seen)}; name the same tag=… on all ranks, in a folder that all see"
        )


def _by_rank(values: Sequence[Any]) -> str:
    """List the different values, each with the first rank that has it."""
    first = {value: rank for rank, value in reversed(list(enumerate(values)))}
    return ", ".join(f"{value} on rank {rank}" for value, rank in sorted(first.items(), key=lambda item: item[1]))


def _find(load_dir: Path, tag: str | None, load: str) -> Path | None:
    """Return the tag folder. None leaves the load to DeepSpeed, which has its own message for a folder in which no tag was
    saved."""
    try:
        folder = resolve_tag(load_dir, tag)
    except CheckpointNotFoundError:
        if load == "never" or (tag is None and not (load_dir / LATEST_NAME).is_file()):
            return None
        raise
    if load != "never":
        return folder
    if (folder / INDEX_NAME).is_file():
        raise ConfigError(f'{folder} is a universal checkpoint, and "load" is "never"')
    return None


def _load_universal(
    engine: Engine, checkpoint: Checkpoint, optimizer: EngineOptimizer, options: LoadOptions, started: float
) -> Loaded:
    model, custom = describe_model(engine), options.custom_load_fn
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    restores = options.optimizer_states and not only_evaluates(engine)
    policies = policies_of(config, restores, options.load_module_strict)
    if model.topology.zero_stage > 0 and not engine.zero_load_from_fp32_weights():
        policies = replace(policies, rounded=True)
    if custom is not None:  # the function may fill what is missing, and use what is extra
        policies = replace(policies, initialise=True, drop=True, strict=False, reshape=True)
    with agreement():
        if policies.optimizer_states == "restore" and checkpoint.lacking is not None:
            raise checkpoint.lacking
    checkpoint, copies = with_copies_for(checkpoint, model, policies)
    with agreement():
        source = {}
        if custom is not None:
            check_custom_load(engine)
            source = local_state_dict(checkpoint, model)
        checkpoint = in_form_of(checkpoint, model.local_shapes)
        checkpoint = in_ties_of(checkpoint, model, (dist.get_rank(), dist.get_world_size()))
        names = match_names(checkpoint, model)
        matching = match_model(checkpoint, model, names, policies)
        place, slots = (model.rank, model.ep_rank), target_slots(model, optimizer, names)
        numbers = PartitionNumbers(checkpoint, names.source, model.topology, place, slots, policies)
        settings = GroupSettings()
        if restores:
            settings = plan_hyperparameters(checkpoint, names, optimizer, numbers, config.hyperparameters == "keep")
        schedule = None
        if options.load_lr_scheduler_states and engine.lr_scheduler is not None:
            keep = config.hyperparameters == "keep"
            schedule = plan_scheduler(checkpoint, names, optimizer, engine.lr_scheduler.state_dict(), keep)
            check_scheduler(engine.lr_scheduler, schedule, (engine, engine.module, engine.optimizer), optimizer)
        filling = plan_filling(
            checkpoint, model, optimizer, names, matching, policies, settings.values, config.shared_read_bytes, numbers
        )
        reset = policies.optimizer_states == "reset"
        settings = without_begun_anew(settings, names, optimizer, filling.initialised, reset)
        extra_states = plan_extra_states(checkpoint, engine.module, model, names, policies)
        path, state, unread = _client_state(engine, checkpoint, model, config)
        filling.check_files()
    with agreement():
        filling.check_exchange()
    read = filling.run(optimizer, config.read_memory_bytes)
    for module, value in extra_states:
        module.set_extra_state(value)
    if custom is not None:
        run_custom_load(engine, model, optimizer, custom, source)
    restore_run(engine, checkpoint, optimizer, options, settings.values, schedule, reset)
    keep_layouts(engine, filling.layouts)
    if not options.load_module_only:
        restore_data_schedules(engine, state)
    states = policies.optimizer_states == "restore"
    unfrozen, frozen = (matching.unfrozen, matching.frozen) if states else ((), ())
    engine.universal_checkpoint_report = report = LoadReport(
        source=f"{checkpoint.form} {checkpoint.topology}",
        target=f"{optimizer.form} {model.topology}",
        bytes_read=read.bytes_read,
        bytes_needed=filling.bytes_needed,
        files=len(read.files),
        seconds=time.monotonic() - started,
        initialised=tuple(dict.fromkeys((*matching.initialised, *unfrozen, *filling.initialised))),
        dropped=tuple(dict.fromkeys((*matching.dropped, *frozen, *filling.dropped))),
        kept_settings=settings.kept,
        merged=tuple(numbers.merged),
        unread=unread,
        copies=copies,
    )
    dist.barrier()
    _log(report, checkpoint, model, policies.rounded)
    return path, _without_restored(state, options)


def _client_state(
    engine: Engine, checkpoint: Checkpoint, model: EngineModel, config: UniversalCheckpointConfig
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return the path and the client state that this rank gets, and the keys that are left out of it.

    Raises:
        UnsupportedError: some keys can't be read, and the config doesn't say to leave them out.
    """
    place = _own_file(engine, checkpoint, model)
    unread = checkpoint.unreadable(*place)
    if unread and config.on_unreadable == "error":
        raise UnsupportedError(
            f"{checkpoint.path} holds a client state that can't be read without running code of its classes; "
            f'"on_unreadable": "drop" leaves these entries out, and on the topology that saved them DeepSpeed reads them',
            [f"{key}: {kind}" for key, kind in unread.items()],
        )
    return (*checkpoint.client_state(*place), tuple(unread))


def _own_file(engine: Engine, checkpoint: Checkpoint, model: EngineModel) -> tuple[int, int]:
    """Return model- and data-parallel rank of the file whose client state this rank gets: its own where it has one, else the
    first."""
    saved, live = checkpoint.topology, model.topology
    rank = model.rank if (saved.tp, saved.pp, saved.ep) == (live.tp, live.pp, live.ep) else 0
    return rank, dist.get_rank(engine.seq_data_parallel_group) if saved == live and saved.zero_stage == 3 else 0


COUNTERS = ("skipped_steps", "global_steps", "dp_world_size", "mp_world_size", "data_sampler", "random_ltd")


def _without_restored(state: dict[str, Any], options: LoadOptions) -> dict[str, Any]:
    """Drop the keys that DeepSpeed doesn't return either (``runtime/engine.py::_load_checkpoint``)."""
    restored = {VALUES_KEY} if options.load_module_only else {VALUES_KEY, *COUNTERS}
    if options.load_lr_scheduler_states:
        restored.add("lr_scheduler")
    if options.load_optimizer_states:
        restored.add("optimizer")
    return {key: value for key, value in state.items() if key not in restored}


def _log(report: LoadReport, checkpoint: Checkpoint, model: EngineModel, rounded: bool) -> None:
    if dist.get_rank() == 0:
        logger.info(
            "loaded %s (step %d, saved as %s) on %s: rank 0 read %.1f MB from %d files in %.2f s",
            checkpoint.path,
            checkpoint.run.global_steps,
            report.source,
            model.topology,
            report.bytes_read / 1e6,
            report.files,
            report.seconds,
        )
        for what, names in (("kept the model's own values", report.initialised), ("were dropped", report.dropped)):
            if names:
                logger.warning("%d parameters %s, in whole or in part: %s", len(names), what, ", ".join(names))
        if rounded and checkpoint.run.precision != "fp32":
            logger.warning(
                'the masters begin as the checkpoint\'s %s weights, as "load_from_fp32_weights": false says',
                checkpoint.run.precision,
            )
        if report.copies:
            logger.warning("of different values one was read: %s", "; ".join(report.copies))
        if report.merged:
            logger.warning("numbers that differed became one: %s", "; ".join(report.merged))
        if report.unread:
            logger.warning("of the client state was left out, unread: %s", ", ".join(report.unread))
        if report.kept_settings:
            logger.info("the engine's own settings were kept: %s", "; ".join(report.kept_settings))
