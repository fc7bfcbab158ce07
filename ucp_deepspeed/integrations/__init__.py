"""Frameworks that build DeepSpeed's engines for their users: each is wrapped when it is imported, and only where its engine has
the block on.

Each module has a function ``wrap`` that gets the framework's module. A wrapper asks `is_on` first and otherwise changes nothing.
What another version lacks is left to the framework (`features`).
"""

from __future__ import annotations

from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

FRAMEWORKS: dict[str, str] = {
    "accelerate.accelerator": "accelerate",
    "transformers.trainer": "huggingface",
    "lightning.pytorch.strategies.deepspeed": "lightning",
    "pytorch_lightning.strategies.deepspeed": "lightning",
}
"""Modules of frameworks, and those here that wrap them."""


def arm_frameworks() -> None:
    """Wrap the frameworks as soon as they are imported."""
    for module, name in FRAMEWORKS.items():
        wrapt.register_post_import_hook(partial(_wrap, name), module)


def _wrap(name: str, module: ModuleType) -> None:
    from ucp_deepspeed.integrations.features import Feature

    try:
        import_module(f"{__name__}.{name}").wrap(module)
    except (AttributeError, ImportError) as error:  # the import of the library succeeds all the same
        failed = Feature(module.__name__.split(".")[0], "versions.md", "its resumes and its rotation are its own", {})
        failed.arm()
        failed.fails(error)


def is_on(engine: Any) -> bool:
    """Return whether an engine has the block on, and can be handled."""
    config = getattr(engine, "universal_checkpoint_config", None)
    if config is None or not config.enabled:
        return False
    from ucp_deepspeed.engine import support

    return not support.is_left_alone(engine)
