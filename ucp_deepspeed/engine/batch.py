"""``"batch": "keep"``: the batch of a step stays what it is on any number of ranks; the micro-batch and accumulation follow."""

from __future__ import annotations

import logging
import sys
from typing import Any

from deepspeed import comm as dist

from ucp_deepspeed.elastic.sizes import Sizes, micro_batch
from ucp_deepspeed.errors import ConfigError

logger = logging.getLogger("ucp_deepspeed")

FRAMEWORKS = ("accelerate", "transformers", "lightning", "pytorch_lightning")
"""Packages that accumulate themselves, and make their loaders before DeepSpeed reads its config."""


def keep_batch(config: Any) -> None:
    """Set the micro-batch and the number of accumulation steps of a ``DeepSpeedConfig`` for this number of ranks.

    ``train_batch_size`` stays, and ``train_micro_batch_size_per_gpu`` is the largest micro-batch that fits into memory.

    Raises:
        ConfigError: one of the two is missing, the ranks can't share the batch evenly, or a framework has set them already.
    """
    batch, largest = config.train_batch_size, config.train_micro_batch_size_per_gpu
    given = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": largest}
    wrong = [f"{name!r} is {value!r}" for name, value in given.items() if not isinstance(value, int) or value < 1]
    if wrong:
        raise ConfigError(
            f'"batch": "keep" needs the batch of a step and the largest micro-batch that fits, as whole numbers: '
            f"{' and '.join(wrong)}; set them in the DeepSpeed config"
        )
    data = config.world_size
    micro = micro_batch(batch, largest, data)
    if micro is None:
        raise ConfigError(_uneven(batch, data))
    parts = batch // (micro * data)
    planned = largest, config.gradient_accumulation_steps or batch // max(largest * data, 1)
    if (micro, parts) == planned:
        return
    if (framework := _framework_above()) is not None:
        raise ConfigError(
            f'"batch": "keep" would change the micro-batch from {largest} to {micro} and accumulate {parts} times, but '
            f"{framework} has made its loaders and its accumulation already; give {framework} a batch of {micro} for each rank "
            f'and {parts} accumulation steps on this number of ranks, or leave out "batch"'
        )
    config.train_micro_batch_size_per_gpu, config.gradient_accumulation_steps = micro, parts
    if dist.get_rank() == 0:
        logger.info(
            "a batch of %s on %s data-parallel ranks: micro-batches of %s, %s of them", batch, data, micro, parts
        )


def _uneven(batch: int, data: int) -> str:
    """Say on which numbers of ranks the batch can be kept."""
    ranks = dist.get_world_size()
    parallel = max(ranks // data, 1)
    fitting = [*Sizes(batch, tensor=parallel).up_to(batch * parallel)][::-1]
    shown = ", ".join(map(str, fitting[:16])) + (" …" if len(fitting) > 16 else "")
    near = max((size for size in fitting if size <= ranks), default=fitting[0])
    return (
        f"a batch of {batch} can't be shared by {data} data-parallel ranks; numbers of ranks that work here: {shown}; start "
        f'{near} ranks (ucp run --batch leaves out the others by itself), or leave out "batch": "keep"'
    )


def _framework_above() -> str | None:
    """Return the framework that builds this engine, if one does."""
    frame = sys._getframe(1)
    while frame is not None:
        package = frame.f_globals.get("__name__", "").partition(".")[0]
        if package in FRAMEWORKS:
            return str(package)
        frame = frame.f_back  # type: ignore[assignment]
    return None
