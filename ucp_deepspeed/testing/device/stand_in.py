"""The device ``standin`` as torch and DeepSpeed know devices."""

from __future__ import annotations

import hashlib
import os
from functools import cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch._dynamo
from deepspeed.accelerator import set_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

NAME = "standin"
BACKEND = "nccl_like"


@cache
def extension() -> Any:
    """Return the compiled half; each version of it is built once for an environment, in less than a minute."""
    from torch.utils import cpp_extension

    source = Path(__file__).parent / "device.cpp"
    name = f"ucp_standin_{hashlib.sha256(source.read_bytes()).hexdigest()[:12]}"
    return cpp_extension.load(name, [str(source)], extra_cflags=["-O1", "-std=c++20"])


class _Device:
    """``torch.standin.device``: the device to be current in the block."""

    def __init__(self, device: Any) -> None:
        self._index = device if isinstance(device, int) else torch.device(device).index

    def __enter__(self) -> None:
        self._before = extension().current_device()
        if self._index is not None:
            extension().set_device(self._index)

    def __exit__(self, *error: object) -> None:
        extension().set_device(self._before)


def _module() -> ModuleType:
    """Return ``torch.standin``."""
    found: Any = ModuleType(f"torch.{NAME}")
    compiled = extension()
    for name in ("current_device", "set_device", "device_count", "synchronize"):
        setattr(found, name, getattr(compiled, name))
    found.device, found.cudart = _Device, extension
    found.is_available = found.is_initialized = lambda: True
    found._is_in_bad_fork = lambda: False
    found.get_amp_supported_dtype = lambda: [torch.float16, torch.bfloat16]
    found.get_rng_state = lambda device=None: torch.get_rng_state()
    found.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    found.manual_seed = found.manual_seed_all = lambda seed: None  # its generator is the host's
    return found  # type: ignore[no-any-return]


class StandInAccelerator(CPU_Accelerator):  # type: ignore[misc]
    """DeepSpeed's accelerator for the device."""

    _torch_pins_host_memory = True

    def __init__(self) -> None:
        super().__init__()
        self._name, self._communication_backend_name = NAME, BACKEND

    def is_synchronized_device(self) -> bool:
        return False

    def device_name(self, device_index: int | None = None) -> str:
        return NAME if device_index is None else f"{NAME}:{device_index}"

    def device(self, device_index: int | None = None) -> Any:
        return _Device(device_index)

    def set_device(self, device_index: int | str | torch.device) -> None:
        extension().set_device(device_index if isinstance(device_index, int) else torch.device(device_index).index or 0)

    def current_device(self) -> int:
        return int(extension().current_device())

    def current_device_name(self) -> str:
        return f"{NAME}:{self.current_device()}"

    def device_count(self) -> int:
        return int(os.environ.get("LOCAL_SIZE", extension().device_count()))

    def synchronize(self, device_index: int | None = None) -> None:
        extension().synchronize()

    @property
    def Stream(self) -> Any:  # noqa: N802 - DeepSpeed's name
        return lambda *_, **__: torch.Stream(device=NAME)

    @property
    def Event(self) -> Any:  # noqa: N802
        return lambda *_, **__: torch.Event(device=NAME)

    def stream(self, stream: Any) -> Any:
        return stream

    def current_stream(self, device_index: int | None = None) -> Any:
        return torch.accelerator.current_stream(device_index)

    def default_stream(self, device_index: int | None = None) -> Any:
        return torch.Stream(
            stream_id=0, device_index=device_index or 0, device_type=int(torch._C._autograd.DeviceType.PrivateUse1)
        )

    BFloat16Tensor = partial(torch.tensor, dtype=torch.bfloat16, device=NAME)
    ByteTensor = partial(torch.tensor, dtype=torch.uint8, device=NAME)
    DoubleTensor = partial(torch.tensor, dtype=torch.double, device=NAME)
    FloatTensor = partial(torch.tensor, dtype=torch.float, device=NAME)
    HalfTensor = partial(torch.tensor, dtype=torch.half, device=NAME)
    IntTensor = partial(torch.tensor, dtype=torch.int, device=NAME)
    LongTensor = partial(torch.tensor, dtype=torch.long, device=NAME)

    def is_fp16_supported(self) -> bool:
        return True

    def pin_memory(self, tensor: torch.Tensor, make_copy: bool = True, match_shape: bool = True) -> torch.Tensor:
        return tensor.pin_memory()

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.is_pinned()

    def on_accelerator(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == NAME

    def memory_allocated(self, device_index: int | None = None) -> int:
        return int(extension().device_bytes())


def _set_data_across_devices() -> None:
    """Let ``tensor.data = other`` bring a tensor to another device, as CUDA's tensors do; torch refuses it for its extensions."""
    data = torch._C.TensorBase.data  # type: ignore[attr-defined]

    def set_data(tensor: torch.Tensor, other: torch.Tensor) -> None:
        if tensor.device.type == other.device.type:
            data.__set__(tensor, other)
        else:
            extension().set_data(tensor, other)

    torch.Tensor.data = property(data.__get__, set_data)  # type: ignore[assignment]


def _keep_parameters() -> None:
    """Let ``Module.to`` keep the parameters' objects, as it does for CUDA: torch makes new ones on devices of its extensions."""
    apply = torch.nn.Module._apply

    def keeping(module: torch.nn.Module, function: Any, recurse: bool = True) -> torch.nn.Module:
        def in_place(tensor: torch.Tensor) -> torch.Tensor:
            moved: torch.Tensor = function(tensor)
            if not isinstance(tensor, torch.nn.Parameter) or moved.device == tensor.device:
                return moved
            tensor.data = moved
            return tensor

        return apply(module, in_place, recurse)

    torch.nn.Module._apply = keeping  # type: ignore[assignment]


def use() -> None:
    """Make it this process's accelerator, for torch and DeepSpeed. Call it before anything is built."""
    torch._dynamo.config.disable = True  # nothing compiles for it
    _set_data_across_devices()
    _keep_parameters()
    if torch._C._get_privateuse1_backend_name() != NAME:
        torch.utils.rename_privateuse1_backend(NAME)
        torch._register_device_module(NAME, _module())
        torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
        set_accelerator(StandInAccelerator())
        from deepspeed.runtime.utils import PartitionedTensor

        PartitionedTensor.from_meta.__func__.__defaults__ = (
            NAME,
        )  # DeepSpeed asked its accelerator when it was imported
