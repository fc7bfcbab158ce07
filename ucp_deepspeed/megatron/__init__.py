"""Megatron-Core under DeepSpeed: the only part of the package that imports ``megatron``."""

from ucp_deepspeed.megatron.mpu import DeepSpeedMpu

__all__ = ["DeepSpeedMpu"]
