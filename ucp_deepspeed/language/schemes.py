"""The choice of a spec's naming scheme for a model's parameters, and their logical names under it.

Wrappers of modules add parts to names. ``torch.compile`` puts ``_orig_mod`` into the name of the model or layer that it compiles.
FSDP and activation checkpointing have parts of their own. Data parallelism puts ``module`` in front. PEFT puts
``base_model.model`` in front, and adds ``base_layer`` for each module that gets adapters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress

from ucp_deepspeed.errors import SpecError
from ucp_deepspeed.language.globs import form_of
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.language.naming import translate, translate_back, without_collisions
from ucp_deepspeed.language.spec import Spec

_FIRST_NUMBER = re.compile(r"(?:^|\.)(\d+)(?=\.)")


def logical_names(
    names: Sequence[str], specs: Sequence[Spec], recorded: Mapping[str, str] | None = None
) -> dict[str, LogicalName]:
    """Return the logical name of each parameter: the one that the checkpoint records, else the specs' name, else its own.

    Args:
        specs: those that may apply (`ucp_deepspeed.language.families.naming_specs`); each gives the scheme under which
            most names match a rule.

    Raises:
        SpecError: the specs disagree on a name; see also `ucp_deepspeed.language.naming.translate`.
    """
    found = [best_scheme(names, spec)[1] for spec in specs] or [{name: name for name in names}]
    for other, spec in zip(found[1:], specs[1:], strict=True):
        differing = [name for name in names if found[0][name] != other[name]]
        if differing:
            raise SpecError(
                f"families {specs[0].family!r} and {spec.family!r} both fit and name {differing[0]} otherwise; name one in the "
                f"config or with --spec. Parameters that they name otherwise",
                differing,
            )
    logical = without_collisions(found[0] | {name: each for name, each in (recorded or {}).items() if name in found[0]})
    return {name: LogicalName(each) for name, each in logical.items()}


def best_scheme(names: Sequence[str], spec: Spec) -> tuple[str | None, dict[str, str]]:
    """Return the scheme under which most names match a rule, and the logical names under it.

    Returns:
        None and the names themselves if no scheme does better. A scheme under which names collide isn't considered. Of two
        schemes that count layers from different numbers, the one that begins at 0 is taken. The parts of names that wrappers add
        are left out if more names match then.
    """
    named = _named(names, spec)
    seen = plain_names(names)
    if all(plain == name for name, plain in seen.items()):
        return named
    title, plain = _named(list(seen.values()), spec)
    if spec.coverage(plain.values()) <= spec.coverage(named[1].values()):
        return named
    return title, {name: plain[each] for name, each in seen.items()}


def names_in_scheme(names: Sequence[str], spec: Spec, title: str, among: Sequence[str] = ()) -> dict[str, str]:
    """Return the name under one of the spec's naming schemes for each logical name; see `translate_back`.

    Raises:
        SpecError: the spec has no such scheme; see also `translate_back`.
    """
    if title not in spec.names:
        there = ", ".join(spec.names) or "none"
        raise SpecError(f"spec {spec.family!r} has no naming scheme {title!r}; its schemes: {there}")
    return translate_back(names, spec.names[title], among)


def _named(names: Sequence[str], spec: Spec) -> tuple[str | None, dict[str, str]]:
    """Return the scheme for names as they are, and the names under it."""
    found: list[tuple[str | None, dict[str, str]]] = [(None, {name: name for name in names})]
    forms = set(map(form_of, names)) if spec.names else ()
    for title, scheme in spec.names.items():
        if not any(renaming.may_apply(form) for renaming in scheme for form in forms):
            continue
        with suppress(SpecError):
            if _renamed(translated := translate(names, scheme)):
                found.append((title, translated))
    if len(found) == 1:
        return found[0]
    return max(
        found, key=lambda named: (spec.coverage(named[1].values()), _renamed(named[1]), -_first_number(named[1]))
    )


def _first_number(names: Mapping[str, str]) -> int:
    """Return the first layer's number. Layers count from 0: the scheme whose names begin there is preferred."""
    return min((int(number) for name in names.values() for number in _FIRST_NUMBER.findall(name)), default=0)


def _renamed(names: Mapping[str, str]) -> int:
    """Count the names that a scheme changes. If schemes match equally many names, the one that changes more is taken."""
    return sum(name != logical for name, logical in names.items())


_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)|(?<=\.)base_layer\."
)
"""Parts that can stand anywhere; ``base_layer`` only below the top, since the model may have a module of this name there."""

_LEADING = re.compile(r"^(?:module\.|base_model\.model\.)+(?=.)")
"""Parts of wrappers around the whole model."""


FUSED_NORMS: Mapping[str, str] = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
"""Beginnings of the names of norms that Transformer Engine has in the layer behind them → those of the modules that they are in
Megatron-Core's own layers (``sharded_state_dict_keys_map`` in ``models/gpt/gpt_layer_specs.py``)."""


def plain_name(name: str) -> str:
    """Return a name without the parts that wrappers put into it."""
    return _LEADING.sub("", _WRAPPED.sub("", name)) or name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the plain name of each; a name keeps its own form if the plain one is another's too."""
    plain = {name: plain_name(name) for name in names}
    count = Counter(plain.values())
    found = {name: each if count[each] == 1 else name for name, each in plain.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in plain}


def seen_through(source: Collection[str], target: Collection[str]) -> dict[str, str]:
    """Map names of the source to names of the target that differ only by wrappers, or by where Megatron-Core has a norm. Names
    that both sides have are left out.

    A name is left out if two on a side have the same plain name, or if a name that both sides have has that plain name too.
    """
    known, wanted = frozenset(source), frozenset(target)
    taken = {_alike(name) for name in known & wanted}
    extra, missing = ([(_alike(name), name) for name in names] for names in (known - wanted, wanted - known))
    counts = Counter(plain for plain, _ in extra), Counter(plain for plain, _ in missing)
    of_plain = dict(missing)
    return {
        name: of_plain[plain]
        for plain, name in extra
        if plain not in taken and all(count[plain] == 1 for count in counts)
    }


def _alike(name: str) -> str:
    plain = plain_name(name)
    for fused, apart in FUSED_NORMS.items():
        plain = plain.replace(f".{fused}", f".{apart}")
    return plain
