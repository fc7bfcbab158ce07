"""The layouts that a load knew, kept for the saves that follow: they record what no spec or attribute tells any more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.view import layouts_of
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language.resolve import contradicts
from ucp_deepspeed.layout.pattern import Pattern, PerRank, Unique
from ucp_deepspeed.transfer.planning.pairing import Pair

ATTRIBUTE = "_universal_checkpoint_layouts"
"""Attribute of an engine: the `KnownLayouts` of its last load."""


@dataclass(frozen=True)
class KnownLayouts:
    """Layouts by the names that the live model has.

    Attributes:
        patterns: patterns of parameters, without those that say nothing about other tensor-parallel sizes.
        logical_names: logical names of parameters and buffers; nothing is known of names that aren't here.
        vocabulary_size: rows of the unpadded vocabulary.
    """

    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    logical_names: Mapping[str, str] = field(default_factory=dict)
    vocabulary_size: int | None = None


def known_by_plan(found: Pair) -> KnownLayouts:
    """Return the layouts that a universal load used."""
    names, patterns = found.names.target, found.patterns
    known = ((name, patterns[logical]) for name, logical in names.items() if logical in patterns)
    told = {name: pattern for name, pattern in known if not isinstance(pattern, Unique | PerRank)}
    return KnownLayouts(told, names, found.rows.live)


def known_by_manifest(checkpoint: Checkpoint, engine: Engine) -> KnownLayouts:
    """Return the manifest's layouts for a model that DeepSpeed itself loads: it has the same names and shares. A spec in the
    config takes precedence."""
    manifest = checkpoint.manifest if isinstance(checkpoint, DeepSpeedCheckpoint) else None
    if manifest is None or engine.universal_checkpoint_config.spec != "auto":
        return KnownLayouts()
    return KnownLayouts(manifest.patterns, manifest.logical_names, manifest.vocabulary_size)


def keep_layouts(engine: Engine, known: KnownLayouts) -> None:
    """Keep the layouts of a load that succeeded, in place of what was known before it."""
    setattr(engine, ATTRIBUTE, known)


def kept_layouts(engine: Engine, model: EngineModel) -> KnownLayouts:
    """Return what the last load knew and the live model doesn't contradict, with the config's vocabulary size if it names one."""
    known: KnownLayouts = getattr(engine, ATTRIBUTE, KnownLayouts())
    size = model.vocabulary_size or known.vocabulary_size
    return KnownLayouts(
        {name: pattern for name, pattern in known.patterns.items() if _fits(name, pattern, model, size)},
        {name: logical for name, logical in known.logical_names.items() if name in model.tensors},
        size,
    )


def _fits(name: str, pattern: Pattern, model: EngineModel, vocabulary_size: int | None) -> bool:
    if name not in model.tensors:
        return False
    live = model.inferred.get(name)
    if live is not None and contradicts(pattern, live, model.exact):
        return False
    try:
        layouts_of({name: pattern}, {name: model.tensors[name].local_shapes}, model.topology.tp, vocabulary_size, "")
    except MismatchError:
        return False
    return True
