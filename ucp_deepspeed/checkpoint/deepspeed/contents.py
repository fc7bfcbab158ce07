"""Types of the values in DeepSpeed's files. They are checked where a file is read, so that other code relies on them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from pydantic import AfterValidator, Field, InstanceOf, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from ucp_deepspeed.checkpoint.checkpoint import Precision
from ucp_deepspeed.checkpoint.extra_states import is_extra_state
from ucp_deepspeed.checkpoint.torch_files.unpickling import FragmentAddress, LossScaler
from ucp_deepspeed.errors import DamagedCheckpointError, worded

T = TypeVar("T")

Types = Mapping[str, TypeAdapter[Any]]
"""Key → the type of its value."""


MOST_NESTED = 8
"""Most dictionaries around a tensor in a module's state; Megatron-DeepSpeed has three."""


def in_flat(module: Any) -> Any:
    """Return a module's state with a dotted name for each value. Plain models of Megatron-DeepSpeed save nested dictionaries, one
    for each part of the names (``megatron/checkpointing.py``, ``state_dict_for_save_checkpoint``)."""
    expanded: set[int] = set()  # a damaged file may hold one in itself

    def is_nested(name: Any, value: Any) -> bool:
        return (
            isinstance(value, dict) and isinstance(name, str) and not is_extra_state(name) and id(value) not in expanded
        )

    for _ in range(MOST_NESTED):
        if not isinstance(module, dict) or not any(is_nested(*item) for item in module.items()):
            break
        found: dict[Any, Any] = {}
        for name, value in module.items():
            if is_nested(name, value):
                expanded.add(id(value))
                found |= {f"{name}.{inner}": held for inner, held in value.items()}
            else:
                found[name] = value
        module = found
    return module


def _types(**kinds: Any) -> Types:
    return {key: TypeAdapter(kind) for key, kind in kinds.items()}


def _listed(kind: Any) -> Any:
    return list[kind] | tuple[kind, ...]


def _record(*required: str, **kinds: Any) -> Any:
    """Return the type of a dictionary with some required keys. Other keys may be there too, and hold anything."""
    types = _types(**kinds)

    def checked(held: dict[Any, Any]) -> dict[Any, Any]:
        if lacking := [key for key in required if key not in held]:
            raise ValueError(f"lacks {lacking[0]!r}")
        for key in types.keys() & held.keys():
            types[key].validate_python(held[key], strict=True)
        return held

    return Annotated[dict[Any, Any], AfterValidator(checked)]


MOST_NUMEL = 2**48
"""Most elements of a parameter; several of so many still fit into the numbers that torch calculates with."""


def _small(shape: Sequence[int]) -> Sequence[int]:
    if prod(shape) > MOST_NUMEL:
        raise ValueError("a parameter can't have so many elements")
    return shape


def _whole(address: FragmentAddress) -> FragmentAddress:
    if any(type(vars(address).get(key)) is not int or vars(address)[key] < 0 for key in ("numel", "start")):
        raise ValueError("an address lacks its start or its number of elements")
    return address


_Tensor = InstanceOf[torch.Tensor]
_Shapes: Any = dict[str, Annotated[_listed(NonNegativeInt), AfterValidator(_small)]]  # type: ignore[misc]
_Address = Annotated[InstanceOf[FragmentAddress], AfterValidator(_whole)]
_Keyed = dict[Any, Any]
_Group = _record("params", params=_listed(int))
_Base = _record(state=_Keyed, param_groups=_listed(_Group))
_Sharing = _record("partition_count", partition_count=PositiveInt, partition_ranks=_listed(int))

MODEL_STATES = _types(
    module=dict[str, Any] | None,
    buffer_names=_listed(str),
    param_shapes=_listed(_Shapes) | None,
    frozen_param_shapes=_Shapes | None,
    frozen_param_fragments=dict[str, _Tensor] | None,
    shared_params=dict[str, str] | None,
    num_experts=NonNegativeInt | _listed(NonNegativeInt) | None,
    checkpoint_parallel_dimensions=_Keyed | None,
    optimizer=_Keyed | None,
    ucp_optimizer_only=dict[str, Any] | None,
)
"""Types in a model_states file. Sizes and counters are checked with the limits that they have (`check_numbers`)."""

WHOLE_OPTIMIZER = _types(
    state=_Keyed,
    param_groups=_listed(_Group),
    optimizer_state_dict=_Base,
    dynamic_loss_scale=bool | int,
    fp32_groups_flat=_listed(_Tensor),
    fp32_groups=_listed(_listed(_Tensor)),
)
"""Types in the state of an optimizer without ZeRO."""

ZERO = _types(
    single_partition_of_fp32_groups=_listed(_Tensor),
    fp32_flat_groups=_listed(_Tensor),
    base_optimizer_state=_listed(_Keyed) | _Base,
    optimizer_state_dict=_Base,
    param_slice_mappings=_listed(dict[str, _Address]) | None,
    partition_count=PositiveInt | _listed(PositiveInt),
    ds_zero_partition_groups=_listed(_Sharing) | None,
    param_alignment_paddings=_listed(_listed(NonNegativeInt)) | None,
    zero_stage=Annotated[NonNegativeInt, Field(le=3)],
    dynamic_loss_scale=bool | int,
    loss_scaler=InstanceOf[LossScaler] | None,
)
"""Types in the ``optimizer_state_dict`` of a ZeRO optimizer's file."""


CONSOLIDATED_OPTIMIZER: Types = {**ZERO, **_types(param_groups=_listed(_Group))}
"""Types in what ``ds_to_universal`` keeps of a ZeRO optimizer's state."""

_Dealt = _record(ranks=_listed(_record("experts", experts=_listed(int))))
_Layer = {"module_path": str, "num_experts": PositiveInt, "ep_size": PositiveInt}

AUTOEP_LAYERS = TypeAdapter(_listed(_record(*_Layer, **_Layer, expert_placement=_Dealt | None)))
"""Type of the record of AutoEP's layers in a model_states file."""

EARLY_OPTIMIZER = _types(param_shapes=_Shapes | _listed(_Shapes) | None)
"""Types in a ZeRO optimizer's file up to 0.5.10."""


def check_numbers(saved: Mapping[str, Any], path: Path) -> None:
    """Refuse sizes and counters in a model_states file that no run can have."""
    for key in ("mp_world_size", "dp_world_size", "global_steps", "skipped_steps", "global_samples"):
        number, least = saved.get(key), 1 if key.endswith("size") else 0
        if not (key == "global_samples" and number is None) and (
            type(number) is not int or not least <= number < 2**63
        ):
            found = number if not isinstance(number, int) or abs(number) < 2**64 else "of many digits"
            raise DamagedCheckpointError(f"{path} has {key} {found!r}; expected a whole number from {least} on")


def check_degree(pp: Any, model_parallel: int, path: Path) -> int:
    """Return a pipeline-parallel size, or refuse one that no run can have."""
    if type(pp) is not int or pp < 1:
        raise DamagedCheckpointError(f"{path} has pp_degree {pp!r}; expected a whole number from 1 on")
    if model_parallel % pp:
        raise DamagedCheckpointError(f"{path} has pp_degree {pp}, which doesn't divide mp_world_size {model_parallel}")
    return pp


def check_types(held: Any, types: Types, path: Path, what: str) -> dict[str, Any]:
    """Return a mapping in a file after a check of its values. Keys that ``types`` doesn't name may hold anything.

    Args:
        what: the mapping, for the message.

    Raises:
        DamagedCheckpointError: it is no mapping, or a value has another type.
    """
    if not isinstance(held, dict):
        raise DamagedCheckpointError(
            f"{path} holds a {type(held).__name__} as {what}, where DeepSpeed writes a dictionary"
        )
    for key in types.keys() & held.keys():
        try:
            types[key].validate_python(held[key], strict=True)
        except ValidationError as error:
            found = error.errors()[0]
            place = "".join(f"[{part!r}]" for part in found["loc"] if isinstance(part, int))
            raise DamagedCheckpointError(
                f"{path} holds something else than DeepSpeed writes as {key!r}{place} of {what}: {worded(found)}"
            ) from error
    return held


def item_of(held: Sequence[T], index: int, what: str, path: Path) -> T:
    """Return an item of a list in a file, or raise DamagedCheckpointError where the list is shorter."""
    if index < len(held):
        return held[index]
    raise DamagedCheckpointError(f"{path} holds {len(held)} {what}, and lacks number {index}")


def value_of(held: Mapping[Any, T], key: Any, what: str, path: Path) -> T:
    """Return a value of a mapping in a file, or raise DamagedCheckpointError where there is none."""
    if key in held:
        return held[key]
    raise DamagedCheckpointError(f"{path} lacks {what} {key!r}")


def state_of(states: Mapping[Any, Any], index: int, path: Path) -> Mapping[str, Any]:
    """Return the state that a base optimizer keeps of one tensor, or raise DamagedCheckpointError; empty if it took no step."""
    found = states.get(index, {})
    if not isinstance(found, Mapping):
        raise DamagedCheckpointError(
            f"{path} holds a {type(found).__name__} as the optimizer's state of tensor {index}"
        )
    return found


def enabled_precision(config: Mapping[str, Any]) -> Precision | None:
    """Return the half precision that a config switches on."""
    for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        held = (config[key].get("enabled") for key in keys if isinstance(config.get(key), dict))
        if any(isinstance(value, int | str) and value for value in held):
            return name  # type: ignore[return-value]
    return None
