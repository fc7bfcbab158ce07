"""Names that known wrappers of modules give: the wrapped module's parameters, with parts of the name more.

``torch.compile`` puts ``_orig_mod`` into the name of what it compiles, be it the model or a layer; FSDP and activation
checkpointing have parts of their own, data parallelism puts ``module`` in front, and PEFT ``base_model.model``, with
``base_layer`` for each module that it adds adapters to.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

_WRAPPED = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?:\.|$)|(?<=\.)base_layer\."
)
"""Parts that stand anywhere; a module of the model's own that is called ``base_layer`` stands at its top."""

_LEADING = re.compile(r"^(?:module\.|base_model\.model\.)+(?=.)")
"""Of what wraps the whole model."""


def plain_name(name: str) -> str:
    """A name without the parts that wrappers put into it."""
    return _LEADING.sub("", _WRAPPED.sub("", name)) or name


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """The plain name of each; those that would become the same as another keep their own."""
    plain = {name: plain_name(name) for name in names}
    count = Counter(plain.values())
    found = {name: each if count[each] == 1 else name for name, each in plain.items()}
    return found if len(set(found.values())) == len(found) else {name: name for name in plain}


def seen_through(source: Collection[str], target: Collection[str]) -> dict[str, str]:
    """Names of the source that the target has only under another that is the same but for wrappers → that one.

    None of which there are two on a side, nor any that is the same, but for wrappers, as one that both sides have.
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
