"""An accelerator for Lightning with which its ``DeepSpeedStrategy``, which asks for GPUs, runs on CPU ranks.

    trainer = Trainer(accelerator=CPUForDeepSpeed(), devices=2, strategy=DeepSpeedStrategy(…))

It is for tests and examples. The strategy takes no accelerator that isn't a `CUDAAccelerator`, and compares the devices' indices
with the local ranks, so a device here has an index, which torch otherwise leaves out for CPUs. Set ``DS_ACCELERATOR=cpu`` too.

Import it after Lightning: it is for ``pytorch_lightning`` where that name was imported, else for ``lightning.pytorch``.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch

PACKAGE = "pytorch_lightning" if "pytorch_lightning" in sys.modules else "lightning.pytorch"

CUDAAccelerator: Any = import_module(f"{PACKAGE}.accelerators").CUDAAccelerator


class CPUForDeepSpeed(CUDAAccelerator):  # type: ignore[misc]
    """Takes the place of a GPU with CPU ranks over gloo."""

    def setup_device(self, device: torch.device) -> None:
        """Leave the device as it is."""

    def setup(self, trainer: Any) -> None:
        """Set nothing."""

    def teardown(self) -> None:
        """Free nothing."""

    def get_device_stats(self, device: Any) -> dict[str, Any]:
        """Return nothing: there are no statistics."""
        return {}

    @staticmethod
    def parse_devices(devices: int | str | list[int]) -> list[int]:
        """Return the indices of the ranks on this machine."""
        return devices if isinstance(devices, list) else list(range(int(devices)))

    @staticmethod
    def get_parallel_devices(devices: list[int]) -> list[torch.device]:
        """Return a device with an index for each rank."""
        return [torch.device("cpu", index) for index in devices]

    @staticmethod
    def auto_device_count() -> int:
        """Return how many ranks ``devices="auto"`` means."""
        return 1

    @staticmethod
    def is_available() -> bool:
        """Return that there is always a CPU."""
        return True

    @staticmethod
    def name() -> str:
        """Return a name of its own."""
        return "cpu_for_deepspeed"
