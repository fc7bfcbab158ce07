"""Set the hooks: when ``deepspeed.runtime.engine`` is imported, now or later, its engine's methods are wrapped.

The wrappers keep the methods' signatures (other libraries inspect them) and import `ucp_deepspeed.engine` only for engines
whose config asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from types import ModuleType
from typing import Any

import wrapt

ENGINE_MODULE = "deepspeed.runtime.engine"
CONFIG_MODULE = "deepspeed.runtime.config"

HOOKS = {
    "save_checkpoint": "ucp_deepspeed.engine.saving.save",
    "load_checkpoint": "ucp_deepspeed.engine.loading.load",
}
"""Methods of the engine, and the modules with the functions of the same names that take their place."""


def arm() -> None:
    """Wrap DeepSpeed's engine as soon as it is imported. Calling it again changes nothing."""
    wrapt.register_post_import_hook(_wrap_engine, ENGINE_MODULE)
    wrapt.register_post_import_hook(_wrap_config, CONFIG_MODULE)


def _wrap_engine(module: ModuleType) -> None:
    if isinstance(vars(module.DeepSpeedEngine)["load_checkpoint"], wrapt.FunctionWrapper):
        return
    wrapt.wrap_function_wrapper(module, "DeepSpeedEngine.__init__", _init)
    for name in HOOKS:
        wrapt.wrap_function_wrapper(module, f"DeepSpeedEngine.{name}", partial(_hooked, name))


def _wrap_config(module: ModuleType) -> None:
    found = vars(module.DeepSpeedConfig).get("_set_batch_related_parameters")
    if found is not None and not isinstance(found, wrapt.FunctionWrapper):
        wrapt.wrap_function_wrapper(module, "DeepSpeedConfig._set_batch_related_parameters", _set_batch)


def _set_batch(wrapped: Callable[..., None], config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    block = config._param_dict.get("universal_checkpoint")
    if isinstance(block, Mapping) and block.get("batch") == "keep":
        from ucp_deepspeed.config import parse_config

        if parse_config(config._param_dict).enabled:
            from ucp_deepspeed.engine.batch import keep_batch

            keep_batch(config)
    wrapped(*args, **kwargs)


def _init(wrapped: Callable[..., None], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    from ucp_deepspeed.config import UniversalCheckpointConfig, parse_config

    config = kwargs.get("config")
    checked = parse_config(config) if isinstance(config, Mapping) else None
    wrapped(*args, **kwargs)
    if checked is None:  # a path, or arguments of the command line: DeepSpeed has read it by now
        checked = parse_config(engine.config) if isinstance(engine.config, Mapping) else UniversalCheckpointConfig()
    engine.universal_checkpoint_config = checked
    if checked.enabled:
        from ucp_deepspeed.engine.support import check_engine

        check_engine(engine)


def _hooked(name: str, wrapped: Callable[..., Any], engine: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    config = getattr(engine, "universal_checkpoint_config", None)
    if config is None or not config.enabled:
        return wrapped(*args, **kwargs)
    from ucp_deepspeed.engine import support

    module = support if support.is_left_alone(engine) else import_module(HOOKS[name])
    return getattr(module, name)(wrapped, engine, *args, **kwargs)
