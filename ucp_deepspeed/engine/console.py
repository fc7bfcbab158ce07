"""Lines on stderr, as DeepSpeed has its own: one per load and per finished background save, and warnings.

Scripts for DeepSpeed rarely configure Python's logging. DeepSpeed's own logger isn't used: it writes to stdout, and leaves
out everything below a warning.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deepspeed import comm as dist
from deepspeed.utils import logger as deepspeeds

from ucp_deepspeed.checkpoint.opening import LATEST_NAME
from ucp_deepspeed.remote import located

NAME = "ucp_deepspeed"


class Console(logging.Handler):
    """Writes to stderr, unless the script has handlers of its own that get the package's lines."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line."""
        logger = logging.getLogger(NAME)
        theirs = [*logger.handlers, *(logging.getLogger().handlers if logger.propagate else ())]
        if theirs != [self]:
            return
        try:
            print(self.format(record), file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def show() -> None:
    """Show the package's lines from now on, down to `logging.INFO`. A level that the script has set stays."""
    logger = logging.getLogger(NAME)
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)
    if not any(isinstance(handler, Console) for handler in logger.handlers):
        console = Console()
        console.setFormatter(logging.Formatter(f"[%(asctime)s] [%(levelname)s] [{NAME}] %(message)s"))
        logger.addHandler(console)


@contextmanager
def told_once(load_dir: str | Path, tag: str | None) -> Iterator[None]:
    """Let only the first rank say that DeepSpeed found no checkpoint, and not every rank, while DeepSpeed loads."""
    if dist.get_rank() == 0 or tag is not None or (located(load_dir) / LATEST_NAME).is_file():
        yield
        return

    def is_error(record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR

    deepspeeds.addFilter(is_error)
    try:
        yield
    finally:
        deepspeeds.removeFilter(is_error)
