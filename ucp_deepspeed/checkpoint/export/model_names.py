"""Weights under the names of a Hugging Face model: by the spec of a family that has other names, or as they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

from ucp_deepspeed.checkpoint.export.companions import model_type_of
from ucp_deepspeed.checkpoint.export.weights import Choice, Weights, model_names, weights_of
from ucp_deepspeed.checkpoint.output import Region, StoredTensor
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.language.families import find_family
from ucp_deepspeed.language.huggingface import HuggingFaceNames
from ucp_deepspeed.language.schemes import plain_name
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout import Box, Layout
from ucp_deepspeed.layout.pattern import Shard

_HEADS = "lm_head.weight", "embed_out.weight"
"""Names of output layers."""

_MEGATRON = "embedding.word_embeddings.", "language_model."
"""Beginnings of names in Megatron's models, and in none of Hugging Face's."""


def huggingface_weights(
    view: UniversalView, choice: Choice, config: Mapping[str, Any] | None, spec: Spec | None
) -> Weights:
    """Return the weights under the names that ``from_pretrained`` looks for.

    Args:
        config: content of the model's ``config.json``.
        spec: the user's; by default the family that fits.

    Raises:
        MismatchError: the model's configuration doesn't fit the checkpoint.
        UnsupportedError: nothing tells the names of some parameters.
    """
    names = [name for name, parameter in view.parameters.items() if parameter.kind != "buffer"]
    shapes = {name: [view.logical_shape(name)] for name in names}
    fitting = [each.spec for each in find_family(names, shapes).candidates if each.fits] if spec is None else [spec]
    if not any(each.huggingface for each in fitting):
        if any(plain_name(name).startswith(_MEGATRON) for name in names):
            family = " or ".join(each.family for each in fitting) or "no known family"
            raise UnsupportedError(
                f"{view.checkpoint.path} has names of Megatron's ({family}), and nothing tells those of a Hugging Face model",
                names,
                "add 'huggingface' to a spec file (docs/language.md, Hugging Face names), and name it: --spec FILE",
            )
        return weights_of(view, choice, model_names(view))
    return _renamed(view, choice, config, _names_for(view, config, fitting))


def _names_for(view: UniversalView, config: Mapping[str, Any] | None, specs: Sequence[Spec]) -> HuggingFaceNames:
    """Return the entry of the specs for the model's type."""
    path, known = view.checkpoint.path, [each for spec in specs for each in spec.huggingface]
    types = ", ".join(dict.fromkeys(kind for each in known for kind in each.models))
    if config is None:
        raise MismatchError(
            f"{path} has names of {specs[0].family}: the configuration of the Hugging Face model tells its names and heads; name "
            f"its folder (--config-from), of type {types}"
        )
    kind = model_type_of(config)
    found = [each for each in known if kind in each.models]
    if not found or any(each != found[0] for each in found):
        raise MismatchError(
            f"{path} has names of {' or '.join(spec.family for spec in specs)}, which can become models of type {types}; "
            f"config.json is of type {kind!r}; name the folder of another (--config-from)"
        )
    return found[0]


def _renamed(view: UniversalView, choice: Choice, config: Mapping[str, Any] | None, entry: HuggingFaceNames) -> Weights:
    assert config is not None
    held = weights_of(view, choice, {name: name for name in view.parameters})
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    for name, tensor in held.tensors.items():
        region = _without_padding(view, tensor.regions[0], config)
        try:
            cut = entry.cuts(name, region.layout.locals[0].shape, config)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        if cut is None:
            problems.append(f"{name}: nothing tells what becomes of it")
            continue
        layout = cut.layout or region.layout
        for rank, title in enumerate(cut.names):
            numel = prod(layout.locals[rank].shape)
            part = replace(region, layout=layout, rank=rank, numel=numel, transposed=cut.transposed)
            tensors[title] = StoredTensor.of(part)
    if problems:
        told = f"{view.checkpoint.path} can't become a model of type {config.get('model_type')}"
        raise UnsupportedError(told, problems, "correct 'huggingface' in the spec, or the configuration")
    has_head = not tensors.keys().isdisjoint(_HEADS)
    if config.get("tie_word_embeddings") is has_head:
        there = "has an output layer of its own" if has_head else "has none, or ties it to the embedding"
        raise MismatchError(
            f"config.json says tie_word_embeddings: {str(has_head).lower()}, and {view.checkpoint.path} {there}; correct "
            f"config.json"
        )
    return Weights(tensors, {})


def _without_padding(view: UniversalView, region: Region, config: Mapping[str, Any]) -> Region:
    """Return the rows of a vocabulary that the model has."""
    pattern, rows = view.patterns[region.name], config.get("vocab_size")
    shape = region.layout.logical_shape
    padded = isinstance(pattern, Shard) and pattern.vocabulary and isinstance(rows, int) and 0 < rows < shape[0]
    if not padded:
        return region
    box = Box((0,) * len(shape), (rows, *shape[1:]))  # type: ignore[arg-type]
    return replace(region, layout=Layout.around(shape, box), numel=box.numel)
