"""The save hook: DeepSpeed's own files, and beside them a manifest with what they don't tell.

Order of events: the tag's folder is marked as unfinished, the old manifest is removed, DeepSpeed writes its files, all ranks
meet, rank 0 writes the manifest and removes the mark, then ``latest`` moves. So ``latest`` never moves to a checkpoint that some
rank is still writing, a manifest never describes other files, and readers tell a save that was killed. A save in the background
(`background`) keeps an earlier checkpoint whole until the new one takes its place in one step.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial as bound
from pathlib import Path
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.module import TiedLayerSpec

from ucp_deepspeed.checkpoint.checkpoint import HeldShapes
from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME, Manifest, ManifestParameter
from ucp_deepspeed.checkpoint.deepspeed.pipeline import TIED
from ucp_deepspeed.checkpoint.deepspeed.run_state import number_groups
from ucp_deepspeed.checkpoint.deepspeed.written_names import is_deepspeeds
from ucp_deepspeed.checkpoint.opening import LATEST_NAME
from ucp_deepspeed.checkpoint.slots import NAMING_KEYS
from ucp_deepspeed.checkpoint.torch_files.safe_load import TORCH_DTYPES
from ucp_deepspeed.checkpoint.universal.index import INDEX_NAME
from ucp_deepspeed.checkpoint.view import layouts_of
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.client_state import to_be_saved
from ucp_deepspeed.engine.deepspeed_types import Engine, PipelineModule
from ucp_deepspeed.engine.differing_copies import differing_copies, numbers_are_same, tell_of_differing, tell_of_others
from ucp_deepspeed.engine.known_layouts import KnownLayouts, kept_layouts
from ucp_deepspeed.engine.model import EngineModel, describe_model, gather_model_parallel, has_elements
from ucp_deepspeed.engine.module_states import has_extra_states
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.node_local import open_here, writes_for_node
from ucp_deepspeed.engine.optimizers import engine_optimizer
from ucp_deepspeed.engine.random_state import packed_random_state, random_states_text
from ucp_deepspeed.engine.saving.background import (
    ENDED_NAME,
    OWN,
    Job,
    SnapshotEngine,
    begin,
    gone_error,
    is_pending,
    settle_saves,
    wait_for_save,
    when_on_disk,
)
from ucp_deepspeed.engine.saving.kept_errors import KeptError
from ucp_deepspeed.engine.saving.marking import check_mark, marked_unfinished, undisturbed, writes
from ucp_deepspeed.engine.saving.written import Written, noting_files, write_manifest
from ucp_deepspeed.errors import SaveError, SpecError, UniversalCheckpointError, UnsupportedError, system_errors_as
from ucp_deepspeed.language import logical_names, naming_specs, resolve_patterns
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.layout.pattern import AnyPattern, Pattern, PerRank, Replicate, Unique
from ucp_deepspeed.remote import is_url, on_disk
from ucp_deepspeed.transfer.commit import (
    flush,
    is_seen,
    make_partial_folder,
    remove_partial_folder,
    replace_folder,
    write_atomically,
)
from ucp_deepspeed.transfer.pruning import prune
from ucp_deepspeed.transfer.stage_copies import stages_with

logger = logging.getLogger("ucp_deepspeed")


def save_checkpoint(
    native: Callable[..., bool],
    engine: Engine,
    save_dir: str,
    tag: str | None = None,
    client_state: dict[str, Any] | None = None,
    save_latest: bool = True,
    exclude_frozen_parameters: bool = False,
) -> bool:
    """Save in place of ``engine.save_checkpoint``; same arguments, same result. Collective.

    Raises:
        SpecError, MismatchError: the layouts that the config names don't fit the model; nothing is written.
        SaveError: the tag is a universal checkpoint, or the client state has keys of DeepSpeed's, and nothing is written; or the
            engine's last asynchronous save failed; or a rank couldn't collect or write its state, or the manifest, and ``latest``
            still names the checkpoint that it named before.
    """
    wait_for_save(engine)
    settle_saves(Path(save_dir or "."))
    begun = time.monotonic()
    name = str(tag) if tag is not None else f"global_step{engine.global_steps}"
    rest = {"client_state": client_state or {}, "exclude_frozen_parameters": exclude_frozen_parameters}
    with system_errors_as(SaveError, f"{Path(save_dir or '.') / name} can't be saved"):
        saved = _save(native, engine, save_dir, tag, name, save_latest, rest)
    vars(engine)[SECONDS] = time.monotonic() - begun
    return saved


IN_ONE_STEP = "_universal_checkpoint_in_one_step"
"""Attribute of an engine: whether a save takes the way of those in the background, which replaces a tag in one step."""

SECONDS = "_universal_checkpoint_save_seconds"
"""Attribute of an engine: how long its last save stopped the training."""


def seconds_of_last_save(engine: Engine) -> float | None:
    """Return how long the engine's last save took until it was on disk; None if there was none."""
    stopped, writing = vars(engine).get(SECONDS), vars(engine).get(OWN)
    if stopped is None or writing is None:
        return stopped
    return None if writing.seconds is None else float(stopped + writing.seconds)


def _save(
    native: Callable[..., bool],
    engine: Engine,
    save_dir: str,
    tag: str | None,
    name: str,
    save_latest: bool,
    rest: dict[str, Any],
) -> bool:
    later = not save_dir or engine.checkpoint_engine.is_decoupled()
    asynchronous = engine.universal_checkpoint_config.save.asynchronous or vars(engine).get(IN_ONE_STEP, False)
    folder = Path(save_dir or ".") / name
    with agreement(tells=True) as first:  # on its own: the manifest is made by all ranks together
        rest["client_state"] = to_be_saved(engine, rest["client_state"])
        if not later:
            _check_tag(save_dir, name, asynchronous, save_latest)
        first.mine = secrets.token_hex(8), not save_dir, name if writes(engine) and not later else None
    save_id, lacking = first.values[0][0], [lacks for _, lacks, _ in first.values]
    if len(set(lacking)) > 1:
        rank = lacking.index(True)
        raise SaveError(f"rank {rank} gives no save_dir, and others do; give all ranks the same")
    if len(tags := {tag for *_, tag in first.values} - {None}) > 1:
        raise SaveError(f"ranks save different tags into {save_dir}: {', '.join(sorted(tags))}")
    if later:
        logger.warning("checkpoint engine commits later: no manifest is written")
        return native(save_dir, tag=tag, save_latest=save_latest, **rest)
    if asynchronous:
        return _save_in_background(native, engine, save_dir, name, save_latest, save_id, rest)
    with agreement():
        manifest = _manifest(engine)
    with marked_unfinished(engine, folder, save_id):
        kept, checksums = KeptError(folder), engine.universal_checkpoint_config.save.checksums
        with kept.in_parts_of(engine), noting_files(engine, checksums) as written:
            saved = native(save_dir, tag=name, save_latest=False, **rest)
        with agreement():  # when all have written
            kept.check()
        with agreement(tells=True) as told:
            told.mine = packed_random_state(engine), written()
        with agreement():
            if writes_for_node(engine):
                _describe(
                    manifest, folder, save_id, told.values, Path(save_dir) / LATEST_NAME if save_latest else None, name
                )
                _warn_if_unreadable(engine, folder)
    if writes_for_node(engine):  # when the folder's lock is free
        _prune(engine, Path(save_dir))
    return saved


ONE_CHECKPOINT = "_universal_checkpoint_one_checkpoint"
"""Attribute of an engine while a framework saves several engines into one folder: the tags in it are one checkpoint."""


def _prune(engine: Engine, root: Path) -> None:
    """Remove checkpoints beside one that is on disk, as the block says. The save is done: a removal that fails is warned of."""
    keep = engine.universal_checkpoint_config.save.keep
    if keep is None or hasattr(engine, ONE_CHECKPOINT):
        return
    try:
        prune(root, keep, in_use=lambda path: "it is being written" if is_pending(path) else None)
    except Exception as error:
        logger.warning("old checkpoints of %s aren't removed: %s", root, error)


def _describe(
    manifest: Manifest,
    folder: Path,
    save_id: str,
    of_ranks: Sequence[tuple[bytes, Written]],
    latest: Path | None,
    name: str,
) -> None:
    """Write what describes the files of a save, take the mark away, and move ``latest``, if that is wanted."""
    packed, written = zip(*of_ranks, strict=True)
    check_mark(folder, save_id)
    try:
        write_manifest(manifest, folder, save_id, random_states_text(packed, save_id), written)
        (folder / MARK_NAME).unlink(missing_ok=True)
        if latest is not None:
            write_atomically(latest, name)
    except OSError as error:
        reason = f"manifest and random states of {folder} could not be written, and 'latest' was not moved: {error}"
        raise SaveError(reason) from error


def _save_in_background(
    native: Callable[..., bool],
    engine: Engine,
    save_dir: str,
    tag: str,
    save_latest: bool,
    save_id: str,
    rest: Mapping[str, Any],
) -> bool:
    """Copy into host memory what DeepSpeed would write, and begin to write it. Collective."""
    folder, rank, world_size = Path(save_dir).absolute() / tag, dist.get_rank(), dist.get_world_size()
    with agreement():  # on its own: the manifest is made by all ranks together
        place = folder.resolve() if folder.is_symlink() else folder
    with agreement():
        manifest = _manifest(engine)
    partial = _make_partial(place, tag, engine.local_rank == 0)
    try:
        taken = SnapshotEngine(engine, folder)
        with taken.in_place_of_files(engine):
            saved = native(save_dir, tag=tag, save_latest=False, **rest)
        files = taken.copied()
        with agreement(tells=True) as told:
            told.mine = packed_random_state(engine)
        with agreement():
            random_states = random_states_text(told.values, save_id) if rank == 0 else ""
            is_new = place.is_dir() and not any(place.iterdir())  # DeepSpeed has just made it
    except BaseException:
        if rank == 0:
            remove_partial_folder(partial, place)
        raise
    latest = Path(save_dir).absolute() / LATEST_NAME

    def commit(of_ranks: Sequence[Written]) -> None:
        if is_new and not place.is_dir():
            raise gone_error(folder, place)
        for each in range(world_size):
            (partial / ENDED_NAME.format(rank=each)).unlink(missing_ok=True)
        write_manifest(manifest, partial, save_id, random_states, of_ranks)
        flush(partial)
        with undisturbed(place):
            replace_folder(partial, place, _is_part)
        if save_latest:
            write_atomically(latest, tag)
        _warn_if_unreadable(engine, folder)

    config = engine.universal_checkpoint_config.save
    begin(engine, Job(partial, folder, tuple(files), config.checksums, commit, rank, world_size, config.timeout))
    if rank == 0 and not hasattr(engine, ONE_CHECKPOINT):
        when_on_disk(folder, bound(_prune, engine, folder.parent))
    return saved


def _check_tag(save_dir: str, tag: str, asynchronous: bool, save_latest: bool) -> None:
    """Refuse a tag whose folder a save can't fill, or that ``latest`` can't name."""
    if is_url(save_dir) or on_disk(save_dir) is not save_dir:
        raise SaveError(
            f"{save_dir} is a URL, and DeepSpeed saves into mounted file systems alone: it would make a folder of that name; "
            f"save into a folder and copy it, or let ucp convert write there"
        )
    folder = Path(save_dir) / tag
    if save_latest and tag.encode(errors="replace").decode() != tag:
        raise SaveError(f"the file 'latest' can't name the tag {tag!r} of {save_dir}, which has no form in UTF-8")
    if save_latest and tag != tag.strip():
        logger.warning("'latest' loses blanks at the ends of a tag: a load has to name %r itself", tag)
    if asynchronous and (not Path(tag).parts or ".." in Path(tag).parts):
        raise SaveError(f"the tag {tag!r} names no folder of its own in {save_dir}, which asynchronous saving needs")
    if folder.exists() and not folder.is_dir():
        raise SaveError(f"{folder} is a file; save under another tag")
    if (folder / INDEX_NAME).is_file():
        raise SaveError(
            f"{folder} holds a universal checkpoint, which DeepSpeed's files would hide; save under another tag"
        )


def _make_partial(folder: Path, tag: str, tells: bool) -> Path:
    """Return the hidden folder, made by rank 0 and seen by all, which must save the same tag. Collective."""
    made: Path | None = None
    try:
        with agreement(tells=True) as told:
            if dist.get_rank() == 0:
                try:
                    folder.parent.mkdir(parents=True, exist_ok=True)
                    made = make_partial_folder(folder)
                except OSError as error:
                    raise SaveError(f"{folder} can't be saved, and 'latest' was not moved: {error}") from error
            told.mine = made, tag
        partial: Path = told.values[0][0]
        if len(tags := {each for _, each in told.values}) > 1:
            raise SaveError(f"ranks save different tags into {folder.parent}: {', '.join(sorted(tags))}")
        with agreement():
            if not is_seen(partial, tells):
                raise SaveError(
                    f"{partial.parent} isn't the same folder on all ranks: rank {dist.get_rank()} doesn't see what rank 0 made; "
                    f"save on a shared file system, or set \"async\": false in 'universal_checkpoint.save'"
                )
    except BaseException:
        if made is not None:
            remove_partial_folder(made, folder)
        raise
    return partial


def _is_part(name: str) -> bool:
    """Return whether a file is DeepSpeed's or this package's. Others may lie in a tag's folder too, and are kept."""
    ours = r"ucp_(manifest|unfinished)\.json|ucp_(checksums|random_states)\.jsonl|ucp_random_state_rank_\d+\.json"
    return is_deepspeeds(name) or re.fullmatch(ours, name) is not None


def check_model(engine: Engine) -> None:
    """Check what saving would check, without saving; called when the engine is built. Collective.

    Raises:
        SpecError, MismatchError: the layouts that the config names don't fit the model.
    """
    model = describe_model(engine)
    _parameters(model, kept_layouts(engine, model))
    _warn_of_forms(model)
    if model.topology.zero_stage == 3:
        _warn_of_left_out(engine, model)


def _warn_of_forms(model: EngineModel) -> None:
    """Warn at once of tensors that DeepSpeed saves and no universal load reads."""
    strange = {
        name: str(entry.tensor.dtype) if entry.tensor.dtype not in TORCH_DTYPES else f"strides {entry.tensor.stride()}"
        for name, entry in model.tensors.items()
        if entry.tensor is not None and (entry.tensor.dtype not in TORCH_DTYPES or not entry.tensor.is_contiguous())
    }
    if strange and dist.get_rank() == 0:
        logger.warning(
            "these tensors have dtypes that no universal load reads, or their elements aren't in row-major order; DeepSpeed "
            "loads them on the same topology: %s",
            ", ".join(f"{name} ({form})" for name, form in strange.items()),
        )


def _warn_of_left_out(engine: Engine, model: EngineModel) -> None:
    """Warn of parameters that ZeRO-3's files leave out: they hold trained parameters, and frozen ones that need no gradient
    (``runtime/engine.py``)."""
    needing = {
        name for param, name in ModelNames(engine).of_parameters.items() if param.requires_grad and has_elements(param)
    }
    left_out = [name for name in model.named("frozen") if name in needing]
    if left_out and dist.get_rank() == 0:
        logger.warning(
            "with ZeRO-3 DeepSpeed saves no parameters that have gradients and that the optimizer doesn't have; give them to it, "
            "or set requires_grad to False: %s",
            ", ".join(left_out),
        )


def _warn_if_unreadable(engine: Engine, folder: Path) -> None:
    """Warn at once, and not at the resume, of client state that a load would refuse. The save itself is done."""
    try:
        unread = open_here(engine, folder).unreadable()
        if unread:
            logger.warning(
                "some entries of the client state that was just saved are read by DeepSpeed alone, on the same topology; other "
                'loads need "on_unreadable": "drop", which leaves them out: %s',
                ", ".join(f"{key} ({kind})" for key, kind in unread.items()),
            )
    except UniversalCheckpointError as error:
        logger.warning("what was just saved can be loaded by DeepSpeed alone, on the same topology: %s", error)
    except Exception as error:  # too little memory, or too few descriptors
        logger.warning(
            "%s was saved; an error came when it was looked into: %s: %s", folder, type(error).__name__, error
        )


def _manifest(engine: Engine) -> Manifest:
    """Return the manifest without the files. Collective."""
    model = describe_model(engine)
    with agreement():  # whatever fails on one rank does so before ranks wait for one another
        optimizer, topology, known = engine_optimizer(engine), model.topology, kept_layouts(engine, model)
        parameters, names = _parameters(model, known), tuple(map(tuple, optimizer.group_names()))
        extra = has_extra_states(engine.module)
        mine = names, _own_layer_keys(engine), extra, _settings(optimizer.base.param_groups)
    groups, keys, extras, settings = zip(*gather_model_parallel(engine, mine), strict=True)
    tell_of_others(engine, frozenset(model.named("trainable")))
    differing = differing_copies(model, optimizer)
    tell_of_differing(engine, differing, optimizer.form)
    manifest = Manifest(
        topology=topology,
        optimizer=optimizer.form,
        vocabulary_size=known.vocabulary_size,
        parameter_groups=tuple(groups[:: topology.tp]),
        layer_keys={key: name for held in keys for key, name in held.items()},
        parameters=parameters,
        same_numbers=numbers_are_same(model.rank // topology.tp, optimizer),
        differing_copies=differing,
        has_extra_states=any(extras),
        files={},
    )
    if topology.pp == 1:
        return manifest
    return manifest.model_copy(update={"group_numbers": _group_numbers(manifest, settings[:: topology.tp])})


def _own_layer_keys(engine: Engine) -> dict[str, str]:
    """Return keys of the layer files of this rank's stage (``{layer}.{local name}``) → names, for tied modules
    (``runtime/pipe/module.py``)."""
    if not isinstance(engine, PipelineEngine):
        return {}
    module: PipelineModule = engine.module
    tied = engine.module.tied_modules
    return {
        f"{layer}.{local_name}": f"{TIED}{spec.key}.{local_name}"
        for layer, spec in enumerate(module._layer_specs)
        if isinstance(spec, TiedLayerSpec) and spec.forward_fn is None and spec.key in tied
        for local_name in tied[spec.key].state_dict()
    }


def _group_numbers(
    manifest: Manifest, settings: Sequence[Sequence[Mapping[str, Any]]]
) -> tuple[tuple[int | None, ...], ...] | None:
    """See `Manifest.group_numbers`. ``settings`` holds the hyper-parameters of each pipeline stage's groups."""
    stages = list(zip(manifest.trained_groups, settings, strict=True))
    if any(len(names) != len(groups) for names, groups in stages):
        return None
    numbers = number_groups([[each if held else None for held, each in zip(*stage, strict=True)] for stage in stages])
    return tuple(map(tuple, numbers))


def _settings(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the hyper-parameters of each group, in a form in which stages can be compared."""
    return [
        {
            key: value.tolist() if isinstance(value, torch.Tensor) else value
            for key, value in group.items()
            if key not in NAMING_KEYS
        }
        for group in groups
    ]


def _parameters(model: EngineModel, kept: KnownLayouts) -> dict[str, ManifestParameter]:
    """Return global shape, pattern and logical name of each parameter and buffer, as far as they are known."""
    specs = naming_specs(model.spec, model.named("trainable", "frozen"))
    logical = logical_names(list(model.tensors), specs, kept.logical_names)
    known = {**_patterns(model, logical, kept.patterns), **{name: Replicate() for name in model.named("buffer")}}
    shapes = {name: tensor.local_shapes for name, tensor in model.tensors.items() if name in known}
    layouts = layouts_of(known, shapes, model.topology.tp, kept.vocabulary_size, "the model")
    return {
        name: ManifestParameter(
            kind=tensor.kind,
            logical_shape=layouts[name].logical_shape if name in layouts else None,
            pattern=None if isinstance(known.get(name), Unique | PerRank) else known.get(name),
            logical_name=None if logical[name] == name else logical[name],
            local_shapes=_shares(tensor.local_shapes, model.topology.tp),
            stages=stages_with(tensor, model.topology.tp),
        )
        for name, tensor in model.tensors.items()
    }


def _shares(shapes: HeldShapes, degree: int) -> tuple[Shape, ...] | None:
    """Return the local shapes on the tensor-parallel ranks, once where all are the same; None where stages differ."""
    stages = {shapes[start : start + degree] for start in range(0, len(shapes), degree)} - {(None,) * degree}
    [held, *others] = stages
    known = tuple(shape for shape in held if shape is not None)
    if others or len(known) < degree:
        return None
    return known[:1] if len(set(known)) == 1 else known


def _patterns(
    model: EngineModel, logical: Mapping[str, LogicalName], kept: Mapping[str, Pattern]
) -> Mapping[str, AnyPattern]:
    """Return the patterns that are known when saving. Under tensor parallelism, if the sources together don't tell all, they are
    what the last load knew. A later load may add the rest."""
    names = model.named("trainable", "frozen")
    inferred: dict[str, Pattern] = {logical[name]: pattern for name, pattern in model.inferred.items()}
    try:
        patterns = resolve_patterns(
            [logical[name] for name in names],
            degree=model.topology.tp,
            spec=model.spec,
            recorded={logical[name]: pattern for name, pattern in kept.items()},
            inferred=inferred,
            exact=model.exact,
            refused={logical[name]: why for name, why in model.refused.items()},
        )
    except (SpecError, UnsupportedError):
        if model.spec is not None:
            raise
        known = f"layouts are known of {len(kept)} parameters of {len(names)}" if kept else "no layouts are known"
        logger.warning("%s for this model: a load on another tensor-parallel size will need a spec", known)
        return kept
    return {name: patterns[logical[name]] for name in names}
