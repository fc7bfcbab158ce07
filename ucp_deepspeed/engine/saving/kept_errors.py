"""Errors of one rank while DeepSpeed saves, kept until it is through with its barriers: other ranks would wait there for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ucp_deepspeed.engine.agreement import agreement_before
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.replaced import replaced
from ucp_deepspeed.errors import SaveError

PARTS = ("_save_checkpoint", "_save_moe_checkpoint", "_save_zero_checkpoint")
"""Methods between whose calls ranks meet (``runtime/engine.py``, ``save_checkpoint``). They collect the state and write it."""


class KeptError:
    """The first error of a save, for which the ranks don't wait.

    Args:
        folder: the tag's folder, for the message.

    Attributes:
        error: the error; None if there is none.
    """

    def __init__(self, folder: Path) -> None:
        self.error: SaveError | None = None
        self._folder = folder

    @contextmanager
    def keeping(self, path: str | None = None) -> Iterator[None]:
        """Keep an error of the block, if it is the first.

        Args:
            path: the file that is being saved, for the message.
        """
        try:
            yield
        except Exception as error:
            if self.error is None:
                reason = f"{type(error).__name__}: {error}"
                self.error = SaveError(f"{path or self._folder} can't be saved, and 'latest' was not moved: {reason}")
                self.error.__cause__ = error

    @contextmanager
    def in_parts_of(self, engine: Engine, **attributes: Any) -> Iterator[None]:
        """Keep errors of the engine's `PARTS` in the block. All ranks raise those of ZeRO-3's preparation, and others that
        come before it gathers parameters. Collective at the end of the block.

        Args:
            attributes: further attributes that the engine has there.
        """
        attributes |= {name: self._kept(getattr(engine, name)) for name in PARTS}
        optimizer = engine.optimizer
        with (
            replaced(engine, **attributes),
            agreement_before(
                (optimizer, "checkpoint_event_epilogue"), after=[(optimizer, "checkpoint_event_prologue")]
            ),
        ):
            yield

    def _kept(self, part: Callable[..., None]) -> Callable[..., None]:
        def kept(*args: Any, **kwargs: Any) -> None:
            with self.keeping():
                part(*args, **kwargs)

        return kept

    def check(self) -> None:
        """Raise the error."""
        if self.error is not None:
            raise self.error
