"""Parameters that a model ties and the checkpoint doesn't: one tensor can replace two only if these are equal."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
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
        found = {name: _difference(held, name, owner, share) for name, owner in ties.items()}
    finally:
        held.reader.close()
    return [
        f"{name}: tied to {ties[name]} in the model, and not in the checkpoint: {difference}; {UNTIE_HINT}"
        for name, difference in found.items()
        if difference is not None
    ]


def _difference(held: HeldValues, name: str, owner: str, share: tuple[int, int] | None) -> str | None:
    one, other = held.checkpoint.parameters[name], held.checkpoint.parameters[owner]
    for what in ("kind", "local_shapes", "scalars", "states"):
        mine, theirs = getattr(one, what), getattr(other, what)
        if (mine, theirs) != (theirs, mine):
            return f"their {what.replace('_', ' ')} are {mine} and {theirs}"
    if share is None:
        return None
    for state in one.states:
        for rank in (rank for rank, shape in enumerate(one.local_shapes) if shape is not None):
            bits = (held.parts(each, state, rank, share) for each in (one, other))
            if not all(torch.equal(*pair) for pair in zip(*bits, strict=True)):
                return f"their values of {state!r} differ"
    return None
