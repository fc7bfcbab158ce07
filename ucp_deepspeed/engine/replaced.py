"""Attributes that DeepSpeed's objects have for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **values: Any) -> Iterator[None]:
    """Give an object attributes of its own in the block; afterwards it has those that it had."""
    own = dict(vars(owner))
    try:
        vars(owner).update(values)
        yield
    finally:
        for name in values:
            del vars(owner)[name]
        vars(owner).update({name: own[name] for name in values if name in own})
