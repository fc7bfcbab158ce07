"""The load hook: fill an engine's partitions straight from the files of any checkpoint.

Plan, prove, agree, fill: every rank has a plan that covers what it holds before anything of the engine is touched.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.written_names import VALUES_KEY
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.agreement import agreement, agreement_before
from ucp_deepspeed.engine.client_state import COUNTERS, LOADED, take_values
from ucp_deepspeed.engine.console import told_once
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.differing_copies import look_at_copies, with_copies_for
from ucp_deepspeed.engine.known_layouts import KnownLayouts, keep_layouts, known_by_manifest, known_by_plan
from ucp_deepspeed.engine.loading.custom_load import check_custom_load, local_state_dict, run_custom_load
from ucp_deepspeed.engine.loading.fallback import Loaded, falling_back
from ucp_deepspeed.engine.loading.filling import Filling, check_exchange, own_cores, share_of_cores
from ucp_deepspeed.engine.loading.finding import Found, find
from ucp_deepspeed.engine.loading.native import LoadOptions, check_sums, only_held_against_the_list
from ucp_deepspeed.engine.loading.planning import pair_with, plan_filling, policies_of, target_slots
from ucp_deepspeed.engine.loading.training_state import (
    GroupSettings,
    check_scheduler,
    lacks_schedule,
    live_groups,
    plan_hyperparameters,
    restore_data_schedules,
    restore_run,
    scheduled_keys,
    tell_of_schedule,
    without_begun_anew,
)
from ucp_deepspeed.engine.loading.ways_on import telling_ways_on
from ucp_deepspeed.engine.model import EngineModel, describe_model
from ucp_deepspeed.engine.module_states import ExtraStates, plan_extra_states
from ucp_deepspeed.engine.optimizers import EngineOptimizer, engine_optimizer, is_offloaded, only_evaluates
from ucp_deepspeed.engine.random_state import keep_to_restore, restore_random_state
from ucp_deepspeed.engine.saving.background import settle_saves, wait_for_save
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError, UnsupportedError, system_errors_as
from ucp_deepspeed.remote import on_disk
from ucp_deepspeed.transfer import TransferCount
from ucp_deepspeed.transfer.planning.numbers import PartitionNumbers
from ucp_deepspeed.transfer.planning.pairing import Pair
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.pruning import reading

logger = logging.getLogger("ucp_deepspeed")


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The result of a universal load on this rank; kept as ``engine.universal_checkpoint_report``.

    ``docs/python.md`` says what the attributes are.
    """

    source: str
    target: str
    bytes_read: int
    bytes_needed: int
    files: int
    seconds: float
    restored: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]
    kept_settings: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()
    bytes_checked: int = 0


@telling_ways_on
@falling_back
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
    load_dir = on_disk(load_dir)
    schedule = load_lr_scheduler_states and engine.universal_checkpoint_config.scheduler == "restore"
    options = LoadOptions(load_module_strict, load_optimizer_states, schedule, load_module_only, custom_load_fn)
    started = time.monotonic()
    telling = partial(system_errors_as, UniversalCheckpointError, f"{load_dir} can't be loaded")
    with telling():
        found, tag = find(engine, load_dir, tag, options)
    with nullcontext() if found.folder is None else reading(found.folder):
        if found.universal:
            assert found.checkpoint is not None
            with telling():
                loaded = _load_universal(engine, found.checkpoint, options, started)
        else:
            if isinstance(found.checkpoint, DeepSpeedCheckpoint):
                with telling(), agreement():
                    check_sums(found.checkpoint, engine)
            loaded = _load_natively(native, engine, load_dir, tag, options, found)
    setattr(engine, LOADED, loaded[1] or {})
    if (
        found.checkpoint is not None
        and loaded[0] is not None
        and engine.universal_checkpoint_config.scheduler == "restore"
    ):
        tell_of_schedule(engine, found.checkpoint, options)
    if found.streams and loaded[0] is not None:
        keep_to_restore(engine, found.random_state)
        restore_random_state(engine, found.random_state)
    elif loaded[0] is not None and not load_module_only:
        _tell_of_streams(engine, Path(loaded[0]).parent)
    return loaded


def _tell_of_streams(engine: Engine, folder: Path) -> None:
    """Say that ``"load": "never"`` leaves out the random states in a folder."""
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    asked = config.load == "never" and config.random_state == "restore"
    if asked and dist.get_rank() == 0 and (folder / RANDOM_STATES_NAME).is_file():
        told = '"load": "never" leaves out %s: random streams stay as the script has seeded them'
        logger.warning(told, folder / RANDOM_STATES_NAME)


def _load_natively(
    native: Callable[..., Loaded], engine: Engine, load_dir: str, tag: str | None, options: LoadOptions, found: Found
) -> Loaded:
    """Leave the load to DeepSpeed, which unpickles only what has been held against the allow-list. Collective."""
    checkpoint, folder = found.checkpoint, found.folder
    if folder is not None and (tag is None or folder.name != Path(tag).name):
        load_dir, tag = str(folder.parent), folder.name  # the user named the folder itself, or it lies aside
    checked = nullcontext() if folder is None else only_held_against_the_list(checkpoint, engine)
    with agreement_before(*_collectives(engine)):  # DeepSpeed itself may raise on one rank
        try:
            with told_once(load_dir, tag), checked:
                loaded = native(load_dir, tag=tag, **options.arguments())
        except UniversalCheckpointError:
            raise
        except Exception:
            _check_unchanged(checkpoint)  # half a file, or files of two saves: the reason is that they change
            raise
        take_values(engine, loaded[1])
        _check_unchanged(checkpoint)
        if loaded[0] is not None:
            keep_layouts(engine, KnownLayouts() if checkpoint is None else known_by_manifest(checkpoint, engine))
    if loaded[0] is not None and checkpoint is not None and dist.get_rank() == 0:
        logger.info(
            "loaded %s (step %d) by DeepSpeed itself, since each rank takes files as they are: it was saved on %s",
            checkpoint.path,
            checkpoint.run.global_steps,
            checkpoint.topology,
        )
    return loaded


def _check_unchanged(checkpoint: Checkpoint | None) -> None:
    """Check, after DeepSpeed has loaded by itself, that a checkpoint's files are those that were opened first."""
    try:
        if checkpoint is not None:
            checkpoint.versions.check()
    except DamagedCheckpointError as error:
        told = f"{error}; the engine may hold two saves' state and can't be used without another load"
        raise DamagedCheckpointError(told) from error


def _collectives(engine: Engine) -> list[tuple[Any, str]]:
    """List the methods by which ranks meet while DeepSpeed loads: ZeRO-3 gathers parameters around the module's load and at the
    end, pipelines broadcast tied weights, and ZeRO gathers weights after a load of DeepSpeed's universal form."""
    return [
        (engine, "load_module_state_dict"),
        (engine.module, "_synchronize_tied_weights"),
        (engine.optimizer, "update_lp_params"),
        (engine.optimizer, "checkpoint_event_epilogue"),
    ]


def _load_universal(engine: Engine, checkpoint: Checkpoint, options: LoadOptions, started: float) -> Loaded:
    """Plan on every rank, agree that all can, fill. Collective."""
    _reload_offloaded(engine)
    # 1. Where pipeline stages hold copies of one parameter, all ranks together compare these.
    model, seen = None, []
    if checkpoint.topology.pp > 1:
        with agreement(tells=True) as told:
            model = describe_model(engine)
            told.mine = look_at_copies(checkpoint, model)
        seen = told.values
    # 2. Each rank plans all that it will hold.
    with agreement(tells=True) as told:
        model = model or describe_model(engine)
        optimizer, policies = engine_optimizer(engine), _policies(engine, options)
        plan = _planned(engine, model, checkpoint, optimizer, options, policies, seen)
        told.mine = plan.filling.exchange_key(), own_cores()
    keys, cores = zip(*told.values, strict=True)
    check_exchange(keys)
    threads = min(share_of_cores(cores[dist.get_rank()], cores), tunables.MOST_THREADS)
    # 3. Tensors come first: up to here nothing of the engine has changed.
    read = plan.filling.run(optimizer, engine.universal_checkpoint_config.read_memory_bytes, threads)
    _restore_rest(engine, optimizer, options, plan)
    # 4. Tell what was done.
    with agreement():
        engine.universal_checkpoint_report = report = plan.report(optimizer, read, time.monotonic() - started)
        _log(report, plan.pair.checkpoint, plan.model, policies)
    return plan.path, _without_restored(plan.state, options)


def _reload_offloaded(engine: Engine) -> None:
    """Put back what ``engine.offload_states`` has moved away, on all ranks alike. Collective if there is something."""
    if is_offloaded(engine):
        with agreement():
            logger.info("the engine's offloaded states are reloaded to its device")
            engine.reload_states()


def _policies(engine: Engine, options: LoadOptions) -> Policies:
    restores = options.optimizer_states and not only_evaluates(engine)
    policies = policies_of(engine.universal_checkpoint_config, restores, options.load_module_strict)
    if engine.universal_checkpoint_config.scheduler == "keep" and engine.lr_scheduler is not None:
        policies = replace(policies, scheduled=scheduled_keys(engine.lr_scheduler))
    if engine.zero_optimization_stage() > 0 and not engine.zero_load_from_fp32_weights():
        policies = replace(policies, rounded=True)
    if options.custom_load_fn is not None:  # the function may fill what is missing, and use what is extra
        policies = replace(policies, initialise=True, drop=True, strict=False, reshape=True)
    return policies


@dataclass(frozen=True)
class _Plan:
    """All that a rank takes from a checkpoint. ``source`` is the state dict for the user's own function; empty without one."""

    pair: Pair
    model: EngineModel
    filling: Filling
    settings: GroupSettings
    schedule: Mapping[str, Any] | None
    numbers: PartitionNumbers
    extra_states: ExtraStates
    source: dict[str, torch.Tensor]
    path: str
    state: dict[str, Any]
    unread: tuple[str, ...]
    copies: tuple[str, ...]

    def report(self, optimizer: EngineOptimizer, read: TransferCount, seconds: float) -> LoadReport:
        """Describe the load that is done."""
        planned, checkpoint = self.filling.planned, self.pair.checkpoint
        return LoadReport(
            source=f"{checkpoint.form} {checkpoint.topology}",
            target=f"{optimizer.form} {self.model.topology}",
            bytes_read=read.bytes_read,
            bytes_needed=planned.bytes_needed,
            files=len(read.files),
            seconds=seconds,
            restored=tuple(self.pair.matching.restored),
            initialised=planned.initialised,
            dropped=planned.dropped,
            kept_settings=self.settings.kept,
            merged=tuple(self.numbers.merged),
            unread=self.unread,
            copies=self.copies,
            bytes_checked=read.bytes_checked,
        )


def _planned(
    engine: Engine,
    model: EngineModel,
    checkpoint: Checkpoint,
    optimizer: EngineOptimizer,
    options: LoadOptions,
    policies: Policies,
    seen: Sequence[Any],
) -> _Plan:
    """Plan what this rank takes, and check that its files hold that; for ``seen`` see `with_copies_for`."""
    config: UniversalCheckpointConfig = engine.universal_checkpoint_config
    reset = policies.optimizer_states == "reset"
    if policies.optimizer_states == "restore" and checkpoint.lacking is not None:
        raise checkpoint.lacking
    checkpoint, copies = with_copies_for(checkpoint, model, policies, seen)
    source = {}
    if options.custom_load_fn is not None:
        check_custom_load(engine)
        source = local_state_dict(checkpoint, model)
    found = pair_with(checkpoint, model, policies)
    checkpoint, names = found.checkpoint, found.names
    place, slots = (model.rank, model.ep_rank), target_slots(model, optimizer, names)
    numbers = PartitionNumbers(checkpoint, names.source, model.topology, place, slots, policies)
    settings, schedule = GroupSettings(), None
    if options.optimizer_states and not only_evaluates(engine):
        settings = plan_hyperparameters(found, optimizer, numbers)
    if options.schedule and engine.lr_scheduler is not None:
        if lacks_schedule(engine, checkpoint, options):
            found.check_schedule()
        schedule = found.schedule(live_groups(names, optimizer), engine.lr_scheduler.state_dict())
        parts = engine, engine.module, engine.optimizer
        check_scheduler(engine.lr_scheduler, schedule, parts, optimizer, found.obstacles)
    extra_states = plan_extra_states(found, engine.module, model)
    filling = plan_filling(found, model, optimizer, settings.values, config.shared_read_bytes, numbers)
    settings = without_begun_anew(settings, names, optimizer, frozenset(filling.planned.initialised), reset)
    client_state = _client_state(engine, checkpoint, model, config)
    filling.check_files()
    return _Plan(found, model, filling, settings, schedule, numbers, extra_states, source, *client_state, copies)


def _restore_rest(engine: Engine, optimizer: EngineOptimizer, options: LoadOptions, plan: _Plan) -> None:
    """Take over all that isn't a tensor of model or optimizer; what the user's classes raise on one rank is raised on all."""
    with agreement():
        for module, value in plan.extra_states:
            module.set_extra_state(value)
    if options.custom_load_fn is not None:
        run_custom_load(engine, plan.model, optimizer, options.custom_load_fn, plan.source)
    reset = plan.filling.policies.optimizer_states == "reset"
    with agreement():
        restore_run(engine, plan.pair.checkpoint, optimizer, options, plan.settings.values, plan.schedule, reset)
        keep_layouts(engine, known_by_plan(plan.pair))
        if not options.load_module_only:
            restore_data_schedules(engine, plan.state)


def _client_state(
    engine: Engine, checkpoint: Checkpoint, model: EngineModel, config: UniversalCheckpointConfig
) -> tuple[str, dict[str, Any], tuple[str, ...]]:
    """Return the path and the client state that this rank gets, and the keys that can't be read and are left out of it."""
    saved, live = checkpoint.topology, model.topology  # each rank's own file where it has one, else the first
    rank = model.rank if (saved.tp, saved.pp, saved.ep) == (live.tp, live.pp, live.ep) else 0
    partition = dist.get_rank(engine.seq_data_parallel_group) if saved == live and saved.zero_stage == 3 else 0
    unread = checkpoint.unreadable(rank, partition)
    if unread and config.on_unreadable == "error":
        raise UnsupportedError(
            f"{checkpoint.path} holds a client state that can't be read without running code of its classes; "
            f'"on_unreadable": "drop" leaves these entries out, and on the topology that saved them DeepSpeed reads them: those '
            f'that call functions of libraries only with "load": "never", if you trust the file',
            [f"{key}: {kind}" for key, kind in unread.items()],
        )
    return (*checkpoint.client_state(rank, partition), tuple(unread))


def _without_restored(state: dict[str, Any], options: LoadOptions) -> dict[str, Any]:
    """Drop the keys that DeepSpeed doesn't return either (``runtime/engine.py::_load_checkpoint``)."""
    restored = {
        VALUES_KEY,
        *(() if options.load_module_only else COUNTERS),
        *(("lr_scheduler",) if options.load_lr_scheduler_states else ()),
        *(("optimizer",) if options.load_optimizer_states else ()),
    }
    return {key: value for key, value in state.items() if key not in restored}


def _log(report: LoadReport, checkpoint: Checkpoint, model: EngineModel, policies: Policies) -> None:
    if dist.get_rank() != 0:
        return
    logger.info(
        "loaded %s (step %d, saved as %s) on %s: rank 0 read %.1f MB from %d files in %.2f s, %s",
        checkpoint.path,
        checkpoint.run.global_steps,
        report.source,
        model.topology,
        report.bytes_read / 1e6,
        report.files,
        report.seconds,
        f"{100 * report.bytes_checked // report.bytes_read} % checked" if report.bytes_checked else "unchecked",
    )
    for what, names in (("kept the model's own values", report.initialised), ("were dropped", report.dropped)):
        if names:
            logger.warning("%d parameters %s, in whole or in part: %s", len(names), what, ", ".join(names))
    if policies.scheduled:
        logger.info('the live learning rate scheduler and its rates stay as they are, as "scheduler": "keep" says')
    if policies.rounded and checkpoint.run.precision != "fp32":
        logger.warning(
            'the masters begin as the checkpoint\'s %s weights, as "load_from_fp32_weights": false says',
            checkpoint.run.precision,
        )
    for level, what, told in (
        (logging.WARNING, "pipeline stages hold different values; one was read", "; ".join(report.copies)),
        (logging.WARNING, "numbers that differed became one", "; ".join(report.merged)),
        (logging.WARNING, "entries of the client state were left out, unread", ", ".join(report.unread)),
        (logging.INFO, "the engine's own settings were kept", "; ".join(report.kept_settings)),
    ):
        if told:
            logger.log(level, "%s: %s", what, told)
