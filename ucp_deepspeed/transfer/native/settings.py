"""The engine that is to load the files: its settings, as far as they decide what is in the files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from typing import Any, Literal, TypeVar

from ucp_deepspeed.checkpoint.checkpoint import Precision, RunState
from ucp_deepspeed.checkpoint.deepspeed.contents import enabled_precision
from ucp_deepspeed.checkpoint.deepspeed.weights import FP32_NAMES
from ucp_deepspeed.checkpoint.export.weights import DTYPES
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import ConfigError, UnsupportedError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.target_ranks import BufferSettings

T = TypeVar("T")

WRITTEN_VERSION = "0.19.8"
"""Version of DeepSpeed whose files are written."""

DEFAULT_CLIPPING = 1.0
"""``gradient_clipping`` of that version (``runtime/constants.py``)."""

OptimizerForm = Literal["plain", "fp16-unfused", "fp16-fused", "bf16-optimizer", "zero"]
"""Class of the engine's optimizer: the base optimizer itself, ``FP16_UnfusedOptimizer``, ``FP16_Optimizer``, ``BF16_Optimizer``,
or one of the two of ZeRO."""


@dataclass(frozen=True)
class NativeSettings:
    """Settings of an engine.

    Attributes:
        topology: its topology.
        precision: precision of the weights that it computes with.
        form: see `OptimizerForm`.
        buffers: the way in which it lays out the optimizer's buffers.
        config: its DeepSpeed config, or the saving run's with the ZeRO stage of this one.
        clip_grad: its ``gradient_clipping``; None if no config tells.
    """

    topology: Topology
    precision: Precision
    form: OptimizerForm
    buffers: BufferSettings
    config: Mapping[str, Any]
    clip_grad: float | None

    @property
    def stage(self) -> int:
        """ZeRO stage."""
        return self.topology.zero_stage

    @property
    def partitioned(self) -> bool:
        """Return whether each data-parallel rank has a file of its own with its part of the optimizer's state."""
        return self.form in ("zero", "bf16-optimizer")

    @property
    def weight_dtype(self) -> str:
        """Type of the trained weights, as a key of `ucp_deepspeed.dtypes.ITEMSIZE`."""
        return DTYPES[self.precision]

    @classmethod
    def of(
        cls,
        topology: Topology,
        run: RunState,
        groups: Sequence[Mapping[str, Any]],
        saved: Mapping[str, Any],
        config: Mapping[str, Any] | None = None,
        order: tuple[str, ...] = (),
    ) -> NativeSettings:
        """Tell the settings.

        Args:
            run: the run that saved.
            groups: hyper-parameters of the optimizer's groups.
            saved: config of that run; empty if it isn't known.
            config: the engine's config; by default that of the run that saved.
            order: see `BufferSettings`.

        Raises:
            ConfigError: the config contradicts the topology.
            UnsupportedError: an engine with this config keeps its state elsewhere.
        """
        given = saved if config is None else config
        zero = _section(given, "zero_optimization")
        if config is not None:
            _check_filled_in(config)
        if config is not None and zero.get("stage", 0) != topology.zero_stage:
            raise ConfigError(
                f"the config has ZeRO stage {zero.get('stage', 0)}, and --zero {topology.zero_stage}: make them the same"
            )
        precision = run.precision if config is None else enabled_precision(config) or "fp32"
        _check_supported(zero)
        form = _form(topology, precision, given, any(map(_is_fused, groups)))
        size = ITEMSIZE[DTYPES[precision]]
        buffers = BufferSettings(
            order=order,
            fused=form == "fp16-fused",
            flat=form == "bf16-optimizer",
            sub_group_size=max(int(_number(zero, "sub_group_size", BufferSettings().sub_group_size)), 1),
            round_robin=form == "zero" and bool(zero.get("round_robin_gradients")),
            alignment=16 // gcd(16, size) if form == "zero" and zero.get("parameter_alignment") else 1,
        )
        clipping = _number(given, "gradient_clipping", None)
        return cls(topology, precision, form, buffers, _written(given, topology, precision), clipping)


def reorders(config: Mapping[str, Any]) -> bool:
    """Return whether an engine with this config lists a group's parameters in another order than it is given them."""
    return bool(_section(config, "zero_optimization").get("round_robin_gradients"))


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _number(config: Mapping[str, Any], key: str, default: T) -> float | T:
    """Return a number in a config, or the default for ``"auto"`` and the like, and if it isn't there."""
    found = config.get(key)
    return found if isinstance(found, (int, float)) and not isinstance(found, bool) else default


def _check_filled_in(config: Mapping[str, Any]) -> None:
    """Refuse a config that leaves the precision to a library which fills it in."""
    for key in ("bf16", "bfloat16", "fp16"):
        if isinstance(found := _section(config, key).get("enabled"), str):
            raise ConfigError(
                f'the config has "{key}": {{"enabled": "{found}"}}, which another library fills in when it starts; '
                f"write true or false, as the engine has it"
            )


def _check_supported(zero: Mapping[str, Any]) -> None:
    offloaded = _section(zero, "offload_optimizer").get("device"), _section(zero, "offload_param").get("device")
    if "nvme" in offloaded:
        raise UnsupportedError(
            "an engine that offloads to NVMe keeps its state in files of its own, which aren't written: give --config with the "
            'device "cpu", or resume with this package'
        )
    if zero.get("zenflow"):
        raise UnsupportedError("ZenFlow's files aren't written: give --config without it, or resume with this package")


def _is_fused(settings: Mapping[str, Any]) -> bool:
    """Return whether a group's hyper-parameters are those of DeepSpeed's ``FusedAdam`` (``ops/adam/fused_adam.py``)."""
    others = ("amsgrad", "max_coeff", "max_grad_norm")  # of DeepSpeedCPUAdam, and of LAMB
    return "bias_correction" in settings and "betas" in settings and not any(key in settings for key in others)


def _form(topology: Topology, precision: Precision, config: Mapping[str, Any], fused: bool) -> OptimizerForm:
    """Return the class that an engine takes (``runtime/engine.py::_do_optimizer_sanity_check``)."""
    stage, accumulated = topology.zero_stage, _section(config, "data_types").get("grad_accum_dtype")
    offloaded = _section(_section(config, "zero_optimization"), "offload_optimizer").get("device") == "cpu"
    if stage == 1 and precision == "bf16" and accumulated in FP32_NAMES and not offloaded:
        return "bf16-optimizer"
    if stage:
        return "zero"
    if precision == "fp32":
        return "plain"
    if precision == "bf16" and topology.pp > 1:
        raise UnsupportedError(
            "DeepSpeed can't load its own files of a pipeline in bf16 without ZeRO: take --zero 1, or resume with this package"
        )
    return "fp16-fused" if fused else "fp16-unfused"


def _written(config: Mapping[str, Any], topology: Topology, precision: Precision) -> dict[str, Any]:
    """Return the config to put into the files."""
    found = dict(config)
    found["zero_optimization"] = {**_section(config, "zero_optimization"), "stage": topology.zero_stage}
    if (enabled_precision(found) or "fp32") != precision:
        for key in ("bf16", "bfloat16", "fp16"):
            found.pop(key, None)
        found |= {precision: {"enabled": True}} if precision != "fp32" else {}
    return found
