"""Names with parts that known wrappers of modules add to the wrapped module's parameters.

``torch.compile`` puts ``_orig_mod`` into the name of the model or layer that it compiles. FSDP and activation checkpointing
have parts of their own. Data parallelism puts ``module`` in front. PEFT puts ``base_model.model`` in front, and adds
``base_layer`` for each module that gets adapters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)|(?<=\.)base_layer\."
)
"""Parts that can stand anywhere; ``base_layer`` only below the top, since the model may have a module of this name there."""

_LEADING = re.compile(r"^(?:module\.|base_model\.model\.)+(?=.)")
"""Parts of wrappers around the whole model."""


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
    """Map names of the source to names of the target that differ only by wrappers. Names that both sides have are left out.

    A name is left out if two on a side have the same plain name, or if a name that both sides have has that plain name too.
    """
    known, wanted = frozenset(source), frozenset(target)
    taken = {plain_name(name) for name in known & wanted}
    extra, missing = ([(plain_name(name), name) for name in names] for names in (known - wanted, wanted - known))
    counts = Counter(plain for plain, _ in extra), Counter(plain for plain, _ in missing)
    of_plain = dict(missing)
    return {
        name: of_plain[plain]
        for plain, name in extra
        if plain not in taken and all(count[plain] == 1 for count in counts)
    }
