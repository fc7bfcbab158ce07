"""The loads that are left to DeepSpeed: each rank can take over the checkpoint's files as they are.

DeepSpeed unpickles them (``torch.load(weights_only=False)``): code in a file would run. So each rank first checks the files that
it will read against the allow-list (`ucp_deepspeed.checkpoint.torch_files.safe_load`). The catalog has opened most of
them by then.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import MASTER
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.files import open_saved
from ucp_deepspeed.checkpoint.deepspeed.run_state import hyperparameters
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import BF16_OPTIMIZER
from ucp_deepspeed.checkpoint.expert_names import weight_file
from ucp_deepspeed.checkpoint.slots import Slot
from ucp_deepspeed.checkpoint.torch_files.foreign import Content, opaque_in
from ucp_deepspeed.config import UniversalCheckpointConfig
from ucp_deepspeed.engine.deepspeed_types import Engine, PipelineModule
from ucp_deepspeed.engine.model import (
    engine_precision,
    engine_topology,
    first_element,
    has_elements,
    local_shape,
    model_parallel_rank,
)
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers import EngineOptimizer, EngineSlot, is_offloaded, only_evaluates
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.language.schemes import seen_through
from ucp_deepspeed.remote import is_url
from ucp_deepspeed.transfer.planning.numbers import usable

logger = logging.getLogger("ucp_deepspeed")


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The arguments of ``engine.load_checkpoint`` under their own names."""

    load_module_strict: bool = True
    load_optimizer_states: bool = True
    load_lr_scheduler_states: bool = True
    load_module_only: bool = False
    custom_load_fn: Callable[..., None] | None = None

    def arguments(self) -> dict[str, Any]:
        """Return the arguments by name. ``dataclasses.asdict`` would copy them, also the object of a bound method."""
        return {each.name: getattr(self, each.name) for each in fields(self)}

    @property
    def schedule(self) -> bool:
        """Return whether the state of a scheduler is restored."""
        return self.load_lr_scheduler_states and not self.load_module_only

    @property
    def takes_what_matches(self) -> bool:
        """Return whether the load begins a run from another model's weights."""
        return not (self.load_optimizer_states or self.load_module_strict)

    @property
    def optimizer_states(self) -> bool:
        """Return whether optimizer states and hyper-parameters are restored."""
        return self.load_optimizer_states and not self.load_module_only


def takes_universal_path(
    config: UniversalCheckpointConfig,
    engine: Engine,
    checkpoint: Checkpoint,
    optimizer: EngineOptimizer,
    options: LoadOptions,
) -> bool:
    """Return whether this rank can't leave the load to DeepSpeed."""
    if not isinstance(checkpoint, DeepSpeedCheckpoint) or config.load == "always" or config.has_policies:
        return True
    if is_url(checkpoint.path):
        return True  # DeepSpeed opens files of mounted file systems alone
    if is_offloaded(engine) and engine.zero_optimization_stage() == 3:
        return True  # DeepSpeed finds no weights to fill (IndexError in ``stage3.py::_rigid_load_state_dict``)
    trusting = config.on_unreadable == "error"
    if not (_can_take_over(engine, checkpoint, optimizer, options) and _holds_data_alone(checkpoint, engine, trusting)):
        return True
    _warn_of_unrecorded(checkpoint)
    return False


def _warn_of_unrecorded(checkpoint: DeepSpeedCheckpoint) -> None:
    """Warn of weights that are in no file: DeepSpeed by itself keeps the model's own, and says nothing."""
    try:
        unrecorded = checkpoint.unrecorded
    except UnsupportedError:
        return
    if unrecorded and dist.get_rank() == 0:
        listed = "; ".join(f"{name}: {why}" for name, why in unrecorded.items())
        logger.warning("%s: the model keeps its own values of what is in no file: %s", checkpoint.path, listed)


def _can_take_over(
    engine: Engine, checkpoint: DeepSpeedCheckpoint, optimizer: EngineOptimizer, options: LoadOptions
) -> bool:
    """Return whether DeepSpeed would restore on this rank what the options ask for."""
    if only_evaluates(engine):
        saved, live = checkpoint.topology, engine_topology(engine)
        # DeepSpeed doesn't find weights where ZeRO-3 is on either side. In bf16 it asks for optimizer states that aren't there.
        looks_for_states = engine.optimizer is not None and options.optimizer_states
        same = (saved.tp, saved.pp) == (live.tp, live.pp)
        return same and max(saved.zero_stage, live.zero_stage) < 3 and not looks_for_states
    if not options.optimizer_states and not (options.load_module_only and checkpoint.topology.zero_stage == 0):
        return False  # DeepSpeed leaves the weights of ZeRO-3, or without ZeRO their masters, as they were
    if options.custom_load_fn is not None and not isinstance(engine, PipelineEngine):
        return False  # under ZeRO, DeepSpeed overwrites the function's changes with the saved masters
    return _same_topology(checkpoint, engine, optimizer)


def _holds_data_alone(checkpoint: DeepSpeedCheckpoint, engine: Engine, trusting: bool) -> bool:
    """Return whether nothing in the files that DeepSpeed would unpickle could run code. With ``trusting`` a client state may:
    its objects' own code then runs. The universal path doesn't need all of these files."""
    try:
        for path in files_to_unpickle(checkpoint.path, checkpoint.files.names, engine):
            held = look_into(path, checkpoint)
            if not trusting and (opaque_in(held) is not None or isinstance(held, Content)):
                return False
    except DamagedCheckpointError as error:
        logger.warning("the load isn't left to DeepSpeed, which would unpickle a file that isn't data alone: %s", error)
        return False
    return True


def _same_topology(checkpoint: DeepSpeedCheckpoint, engine: Engine, optimizer: EngineOptimizer) -> bool:
    """Return whether each rank can take over one rank's files as they are: same degrees, stage, precision and slots. Slots show
    another optimizer, ``round_robin_gradients``, ``parameter_alignment`` or ``sub_group_size``, and other shapes of a size."""
    topology = engine_topology(engine)
    if _serves_any_size(checkpoint, engine):
        topology = replace(topology, dp=checkpoint.topology.dp)
    if (checkpoint.topology, checkpoint.optimizer_form, checkpoint.run.precision) != (
        topology,
        optimizer.form,
        engine_precision(engine),
    ):
        return False
    names = ModelNames(engine)
    groups = hyperparameters(checkpoint.files, model_parallel_rank(engine))
    if not optimizer.has_keys(groups):
        return False  # DeepSpeed puts the saved groups in place of the live ones
    if len({layer.ep for layer in names.layers.values()}) > 1:
        return False  # DeepSpeed relies on the order of the groups of experts, which it takes from a set
    if not _finds_own_files(checkpoint, engine, names):
        return False
    try:
        return _same_contents(checkpoint, engine, optimizer, names, groups)
    except UnsupportedError as error:  # DeepSpeed relies on the order in the files, which is that of the topology
        logger.warning("the load is left to DeepSpeed, since this release can't read the checkpoint: %s", error)
        return True


def _finds_own_files(checkpoint: DeepSpeedCheckpoint, engine: Engine, names: ModelNames) -> bool:
    """Return whether DeepSpeed finds this rank's partition under the name it looks for
    (``runtime/engine.py::_get_all_zero_checkpoints``), and under ZeRO-3 what it expects for weights.

    Before 0.6.2 the files of bf16 were named as others are, and the placeholder of a partitioned weight had an element.
    """
    if checkpoint.topology.zero_stage == 0:
        return True
    rank, partition = model_parallel_rank(engine), dist.get_rank(group=engine.optimizer.dp_process_group)
    place = str(checkpoint.path.parent), checkpoint.path.name
    if not Path(engine._get_rank_zero_ckpt_name(*place, rank, partition, engine.bfloat16_enabled())).is_file():
        return False
    if checkpoint.topology.zero_stage < 3:
        return True
    held = checkpoint.files.model_states(rank, partition)["module"]
    cut = (name for param, name in names.of_parameters.items() if hasattr(param, "ds_tensor") and name in held)
    return all(held[name].numel() == 0 for name in cut)


def _same_contents(
    checkpoint: DeepSpeedCheckpoint,
    engine: Engine,
    optimizer: EngineOptimizer,
    names: ModelNames,
    groups: Sequence[Mapping[str, Any]],
) -> bool:
    """Compare model and optimizer with those that saved; raise an UnsupportedError if the files don't tell."""
    rank, stage = model_parallel_rank(engine), checkpoint.topology.zero_stage
    if stage == 0:
        if checkpoint.optimizer_form == BF16_OPTIMIZER.name:
            return False  # DeepSpeed can't read what it has written (KeyError in BF16_Optimizer.load_state_dict)
        if checkpoint.files.autoep.layers.keys() - names.of_parameters.values():
            return False
        recorded = checkpoint.recorded_groups(rank, names.ep_rank)
        if recorded is None:
            # The files name no parameters of the optimizer: only their order can tell, and DeepSpeed relies on it.
            held, _ = checkpoint.files.whole_optimizer(rank)
            base = held.get("optimizer_state_dict", held)
            counts = [len(group["params"]) for group in base.get("param_groups", ())]
            same = not counts or counts == [len(group["params"]) for group in optimizer.base.param_groups]
            return same and _same_weights(checkpoint, engine, names)
        if recorded != optimizer.group_names():
            return False
    if _lacks_frozen(checkpoint, engine):
        return False
    starts: dict[str, int] = {name: first_element(param) for param, name in names.of_parameters.items()}
    live = optimizer.slots()
    saved = [
        slot
        for slot in checkpoint.trained_slots(rank)
        if all(starts.get(name) == slot.start(index) for index, name in enumerate(slot.names))
    ]
    if stage == 0:  # the recorded groups have told their order; the catalog puts experts last
        places = {slot.names: place for place, slot in enumerate(live)}
        saved.sort(key=lambda slot: places.get(slot.names, len(places)))
    # Without ZeRO only sizes count: nothing is cut, though the catalog may list AutoEP's experts one by one.
    order = [
        [(slot.names, slot.flattening if stage else slot.flattening.numels, slot.overlapping) for slot in slots]
        for slots in (saved, live)
    ]
    same = (
        order[0] == order[1]
        and _same_weights(checkpoint, engine, names)
        and _same_states(saved, live, groups, optimizer)
    )
    if same and stage > 0:
        for found, mine in zip(saved, live, strict=True):
            found.tensor(mine.partition, MASTER)  # raises if this rank's file is of another save than the first one's
    return same


def _same_weights(checkpoint: DeepSpeedCheckpoint, engine: Engine, names: ModelNames) -> bool:
    """Return whether the model has the shapes and ties of the one that saved, under the same names."""
    shapes, live = checkpoint.local_shapes(model_parallel_rank(engine)), names.of_parameters
    further = {names.in_model(name) for name, _ in engine.module.named_parameters(remove_duplicate=False)}
    further.difference_update(live.values())
    if not (checkpoint.tied.keys().isdisjoint(live.values()) and further.isdisjoint(shapes)):
        return False  # what is tied on one side is apart on the other: DeepSpeed would let the last of two values win
    changed = any(shapes.get(name, local_shape(param)) != local_shape(param) for param, name in live.items())
    return not changed and not seen_through(shapes, live.values())


def _lacks_frozen(checkpoint: DeepSpeedCheckpoint, engine: Engine) -> bool:
    """Return whether a parameter needs no gradient now and needed one when the run saved: from stage 2 on DeepSpeed wouldn't find
    it (``runtime/engine.py::load_module_state_dict``)."""
    recorded = checkpoint.files.model_states(model_parallel_rank(engine)).get("frozen_param_shapes")
    if recorded is None:
        return False
    resting = {name for param, name in engine.param_names.items() if not (param.requires_grad and has_elements(param))}
    return not resting <= recorded.keys()


def _serves_any_size(checkpoint: DeepSpeedCheckpoint, engine: Engine) -> bool:
    """Return whether DeepSpeed alone can restore all of it, on any data-parallel size: each rank has everything, and only the
    order tells which parameter a state belongs to, or some states aren't element-wise."""
    saved = checkpoint.topology
    if (saved.zero_stage, saved.ep) != (0, 1) or checkpoint.optimizer_form == BF16_OPTIMIZER.name:
        return False
    if checkpoint.manifest is None:
        return True
    rank = model_parallel_rank(engine)
    if rank >= saved.model_parallel:
        return False
    return any(slot.refused for slot in checkpoint.trained_slots(rank))


def _same_states(
    saved: Sequence[Slot], live: Sequence[EngineSlot], groups: Sequence[Mapping[str, Any]], optimizer: EngineOptimizer
) -> bool:
    """Return whether the optimizer keeps the states that the checkpoint holds, by the first slot of each group. ``groups`` are
    the checkpoint's hyper-parameters, which DeepSpeed restores too; empty for elastic files."""
    first = {slot.group: index for index, slot in reversed(list(enumerate(live)))}
    for group, index in first.items():
        settings = groups[group] if group < len(groups) else {}
        held, wanted = saved[index], optimizer.kept_states(live[index], usable(settings))
        found = (held.states.keys() | held.scalars.keys() | held.refused.keys()) - {MASTER}
        if wanted is None or not found:
            continue
        if not optimizer.finds_steps(group, settings):
            return False  # DeepSpeed would let them begin anew
        if wanted.names - found or (found - wanted.names and not optimizer.is_like(group, settings)):
            return False
    return True


def files_to_unpickle(folder: Path, held: Collection[str], engine: Engine) -> list[Path]:
    """Return the files that DeepSpeed reads on this rank, by its own names for them (``runtime/engine.py::_load_checkpoint``), of
    those ``held`` in the tag's folder."""
    place = str(folder.parent), folder.name
    listed = _first_and_own(engine._get_all_ckpt_names(*place), model_parallel_rank(engine), engine.mp_world_size)
    if isinstance(engine, PipelineEngine):
        rank, degree = engine.grid.get_slice_parallel_rank(), engine.grid.get_slice_parallel_world_size()
        module: PipelineModule = engine.module
        for index, layer in enumerate(module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                layer_files = module.ckpt_layer_path_list(str(folder), index)
                listed += _first_and_own(layer_files, rank, degree)
    names = ModelNames(engine)
    if names.layers and not engine.zero_optimization() and not only_evaluates(engine):
        listed.append(engine._get_optimizer_ckpt_name(*place, names.ep_rank))
    if engine.zero_optimization():
        listed += _partitions(engine, place)
    return [path for path in map(Path, listed) if path.is_file()] + _experts(folder, held, engine, names)


def _first_and_own(files: list[str], rank: int, degree: int) -> list[str]:
    """Return the first file of a sorted list, which DeepSpeed looks into, and the rank's own, which it reads
    (``runtime/state_dict_factory.py``)."""
    own = rank * len(files) // degree
    return [*files[:1], *files[own : own + 1]]


def _partitions(engine: Engine, place: tuple[str, str]) -> list[str]:
    """Return the optimizer's files: this rank's own, or all of them for elastic checkpoints."""
    group = engine.optimizer.dp_process_group
    every = (
        range(dist.get_world_size(group=group)) if engine.zero_elastic_checkpoint() else [dist.get_rank(group=group)]
    )
    rank = model_parallel_rank(engine)
    return [
        engine._get_rank_zero_ckpt_name(*place, mp_rank=rank, dp_rank=partition, bf16_mode=bf16)
        for partition in every
        for bf16 in (True, False)
    ]


def _experts(folder: Path, held: Collection[str], engine: Engine, names: ModelNames) -> list[Path]:
    """Return the files with the weights of this rank's experts."""
    own = {layer.ep_rank * layer.local + expert for layer in names.layers.values() for expert in range(layer.local)}
    places = {name: weight_file(name) for name in held} if own else {}
    rank = model_parallel_rank(engine)
    return [folder / name for name, place in places.items() if place and place[1] in own and place[2] == rank]


def look_into(path: Path, checkpoint: DeepSpeedCheckpoint | None) -> dict[str, Any]:
    """Return the content of a file that DeepSpeed will unpickle; read by the catalog, where that can read it.

    Raises:
        DamagedCheckpointError: it holds something that could run code, beyond that of classes of a client state.
    """
    held = None
    if checkpoint is not None:
        with suppress(UnsupportedError):
            held = checkpoint.files.open(path)
    if held is None:
        held = open_saved(path, foreign=True)
    if isinstance(held, Content) and held.called is not None:
        raise DamagedCheckpointError(
            f"{path} calls {held.called} when it is unpickled, and that isn't known to be harmless; "
            f'"load": "never" leaves the load to DeepSpeed all the same, if you trust the file'
        )
    return held


def check_sums(checkpoint: DeepSpeedCheckpoint, engine: Engine) -> None:
    """Compare the files that DeepSpeed will read on this rank with their checksums, all of each.

    Raises:
        DamagedCheckpointError: some bytes aren't what was saved.
    """
    for path in dict.fromkeys(files_to_unpickle(checkpoint.path, checkpoint.files.names, engine)):
        if (sums := checkpoint.versions.sums(str(path))) is not None:
            sums.check(path)


@contextmanager
def only_held_against_the_list(checkpoint: Checkpoint | None, engine: Engine) -> Iterator[None]:
    """Check each file against the allow-list before DeepSpeed unpickles it, also one that `files_to_unpickle` doesn't know.

    Raises:
        DamagedCheckpointError: it holds something that could run code; parts of the engine are filled by then.
    """
    assert checkpoint is None or isinstance(checkpoint, DeepSpeedCheckpoint), "DeepSpeed can't load any other form"
    reader, load = engine.checkpoint_engine, engine.checkpoint_engine.load

    def checked_load(path: Any, *args: Any, **kwargs: Any) -> Any:
        look_into(Path(path), checkpoint)
        return load(path, *args, **kwargs)

    reader.load = checked_load
    try:
        yield
    finally:
        del reader.load
