"""Universal checkpointing for DeepSpeed and Megatron-Core: a run saved on any topology resumes on any other.

Importing this package before ``deepspeed.initialize`` is all that a training script does; without a ``universal_checkpoint``
block in its DeepSpeed config, and without ``UCP_DEEPSPEED=1``, nothing changes.

`wait_for_save` waits for saves in the background. `open_checkpoint` and `tags` look into checkpoints, `verify` compares their
bytes with checksums, and `last_checkpoint` finds the newest whole one. `add_to_client_state` registers a value that each save of
an engine asks for.

This package doesn't import DeepSpeed: the hooks are set when the training script imports it. Torch is imported only when a
checkpoint is opened.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ucp_deepspeed.arming import arm
from ucp_deepspeed.integrations import arm_frameworks
from ucp_deepspeed.waiting import wait_for_save

if TYPE_CHECKING:
    from ucp_deepspeed.engine.client_state import add_to_client_state
    from ucp_deepspeed.reading import last_checkpoint, open_checkpoint, tags, verify

__all__ = [
    "__version__",
    "add_to_client_state",
    "last_checkpoint",
    "open_checkpoint",
    "tags",
    "verify",
    "wait_for_save",
]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used."""
    if name in ("last_checkpoint", "open_checkpoint", "tags", "verify"):
        from ucp_deepspeed import reading

        return getattr(reading, name)
    if name == "add_to_client_state":
        from ucp_deepspeed.engine import client_state

        return client_state.add_to_client_state
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


arm()
arm_frameworks()
