"""Parameters that a model ties and the checkpoint doesn't: one tensor can replace two only if these are equal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod

import torch

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.transfer.evidence.held_values import HeldValues

UNTIE_HINT = (
    "one tensor can't hold both: let the model keep them apart, as \"tie_word_embeddings\": false in a Hugging Face model's "
    "configuration does"
)


def differing_ties(
    checkpoint: Checkpoint, ties: Mapping[str, str], share: tuple[int, int] | None = (0, 1)
) -> list[str]:
    """Return a line for each parameter that differs, bit by bit, from the one that it is to become one with.

    Args:
        ties: name of a parameter → name of the parameter that the model has in its place.
        share: the part of the elements to look at, and the number of parts: ranks divide them. None to read no tensors.
    """
    held = HeldValues(checkpoint)
    try:
        problems: list[str] = []
        for name, owner in ties.items():
            found = next(_differences(held, name, owner, share), None)
            if found is not None:
                problems.append(
                    f"{name}: tied to {owner} in the model, and not in the checkpoint: {found}; {UNTIE_HINT}"
                )
        return problems
    finally:
        held.reader.close()


def _differences(held: HeldValues, name: str, owner: str, share: tuple[int, int] | None) -> Iterator[str]:
    one, other = held.checkpoint.parameters[name], held.checkpoint.parameters[owner]
    for what in ("kind", "local_shapes", "scalars", "states"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if (mine, theirs) != (theirs, mine):
            yield f"their {what.replace('_', ' ')} are {mine} and {theirs}"
            return
    if share is None:
        return
    for state, dtype in one.states.items():
        step = tunables.COMPARED_NUMBYTES // ITEMSIZE[dtype]
        for rank, shape in enumerate(one.local_shapes):
            numel = 0 if shape is None else prod(shape)
            first, last = (numel * part // share[1] for part in (share[0], share[0] + 1))
            for start in range(first, last, step):
                bits = (held.flat(each, state, rank, start, min(start + step, last)) for each in (one, other))
                if not torch.equal(*bits):
                    yield f"their values of {state!r} differ"
                    return
