"""The catalog of a native DeepSpeed checkpoint, stages 0 to 3, saved with this plugin or without.

File names and keys: DeepSpeed 0.19.8, ``runtime/engine.py`` (``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``,
``_common_checkpoint_state``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ucp_deepspeed.checkpoint.checkpoint import (
    WEIGHT,
    Checkpoint,
    FileExtent,
    LossScale,
    Parameter,
    ParameterGroup,
    Precision,
    RunState,
)
from ucp_deepspeed.checkpoint.deepspeed_stage0 import Groups, stage0_form, stage0_slots
from ucp_deepspeed.checkpoint.deepspeed_zero import frozen_slice_slots, recognise, zero_slots
from ucp_deepspeed.checkpoint.manifest import Manifest, read_manifest
from ucp_deepspeed.checkpoint.slots import Slot, shapes_of, whole_tensor_slot
from ucp_deepspeed.checkpoint.torch_files import TORCH_DTYPES, extent_of, open_torch_file
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Flattening, Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern
from ucp_deepspeed.plan import Fragment

ENGINE_KEYS = frozenset(
    {
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
        "checkpoint_parallel_dimensions",
        "num_experts",
        "ds_autoep_layers",
        "autoep_layers",
        "universal_checkpoint_info",
        "folding",
    }
)
"""Top-level keys of a model_states file that DeepSpeed writes; all others are the user's client state."""

REQUIRED_KEYS = ("module", "buffer_names", "dp_world_size", "mp_world_size", "global_steps", "skipped_steps")
"""Keys without which a model_states file tells too little."""

RETURNED_SEPARATELY = frozenset(
    ["module", "skipped_steps", "global_steps", "dp_world_size", "mp_world_size", "data_sampler", "random_ltd"]
)
"""Keys that ``engine.load_checkpoint`` never returns as client state (``runtime/engine.py::_load_checkpoint``)."""


class DeepSpeedCheckpoint(Checkpoint):
    """A tag folder that DeepSpeed wrote. See `Checkpoint`.

    Opening reads what tells the topology; asking for the parameters reads the metadata of each model-parallel rank's
    model_states file and of one optimizer file per model-parallel rank; other optimizer files are opened when a fragment in
    them is asked for.

    Raises:
        DamagedCheckpointError: a file is missing, truncated, or disagrees with another.
        UnsupportedError: pipeline modules, expert parallelism, or an unknown optimizer class.
        MismatchError: stage 0 without a manifest, and the parameter order is ambiguous; raised by ``parameters``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.manifest: Manifest | None = read_manifest(path)
        self._open = lru_cache(maxsize=None)(self._open_checked)
        self.topology = self._read_topology()
        self.form = f"deepspeed {self.optimizer_form}"
        self.run = self._read_run()
        self.patterns: Mapping[str, Pattern] = self.manifest.patterns if self.manifest else {}
        self.vocabulary_size = self.manifest.vocabulary_size if self.manifest else None

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        """See `Checkpoint.fragments`."""
        slot, index = self._where[rank][name]
        for part in slot.flattening.slices(index, local_start, local_stop):
            yield Fragment(part.local_start, part.numel, slot.extent(part.partition, state), part.buffer_start)

    def client_state(self) -> tuple[str, dict[str, Any]]:
        """See `Checkpoint.client_state`."""
        path = self._model_states_path(0, 0)
        saved = open_torch_file(path, tensors=True)
        return str(path), {key: value for key, value in saved.items() if key not in RETURNED_SEPARATELY}

    @cached_property
    def optimizer_form(self) -> str:
        """Class of optimizer that wrote the state: ``plain``, ``fp16-fused``, …, ``zero-3``, or ``none``."""
        if self.topology.zero_stage or self._optimizer_paths(0)[0].name in self._names:
            return recognise(*self._optimizer_state(0, 0)).name
        optimizer = self._model_states(0)["optimizer"]
        return stage0_form(optimizer, self._model_states_path(0, 0)) if optimizer else "none"

    @cached_property
    def parameters(self) -> Mapping[str, Parameter]:  # type: ignore[override]
        """See `Checkpoint`."""
        return self._read_parameters()

    @cached_property
    def groups(self) -> tuple[ParameterGroup, ...]:  # type: ignore[override]
        """See `Checkpoint`."""
        return self._read_groups()

    def flat_order(self, rank: int) -> list[tuple[tuple[str, ...], Flattening]]:
        """Names and flattening of the trainable slots of one model-parallel rank: equal orders can exchange files."""
        return [(slot.names, slot.flattening) for slot in self._slots[rank] if slot.kind == "trainable"]

    @cached_property
    def _slots(self) -> list[list[Slot]]:
        return [self._read_slots(rank) for rank in range(self.topology.model_parallel)]

    @cached_property
    def _where(self) -> list[dict[str, tuple[Slot, int]]]:
        return [
            {name: (slot, index) for slot in slots for index, name in enumerate(slot.names)} for slots in self._slots
        ]

    # Files

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(entry.name for entry in self.path.iterdir())

    @cached_property
    def _sliced(self) -> bool:
        """Whether each data-parallel rank wrote a model_states file of its own: ZeRO-3.

        Raises:
            DamagedCheckpointError: files of both kinds, and no manifest that tells which are the last run's.
        """
        if self.manifest is not None:
            return self.manifest.topology.zero_stage == 3
        found = [name for name in self._names if name.endswith("_model_states.pt")]
        sliced = [name for name in found if name.startswith("zero_pp_rank_")]
        if sliced and len(sliced) < len(found):
            raise DamagedCheckpointError(
                f"{self.path} holds the files of two runs, one with ZeRO-3 and one without ({sliced[0]}, …); keep one"
            )
        return bool(sliced)

    def _model_states_path(self, rank: int, partition: int) -> Path:
        prefix = f"zero_pp_rank_{partition}_" if self._sliced else ""
        return self.path / f"{prefix}mp_rank_{rank:02d}_model_states.pt"

    def _optimizer_paths(self, rank: int, partition: int = 0) -> list[Path]:
        """The one file that exists of the two names that DeepSpeed uses, or the likelier one."""
        names = [f"{prefix}zero_pp_rank_{partition}_mp_rank_{rank:02d}_optim_states.pt" for prefix in ("bf16_", "")]
        present = [name for name in names if name in self._names]
        other = next((name for name in self._names if name.endswith("_optim_states.pt")), "")
        return [self.path / (present[0] if present else names[0 if other.startswith("bf16_") else 1])]

    def _open_checked(self, path: Path) -> dict[str, Any]:
        if self.manifest is not None:
            self.manifest.check_file(path)
        return open_torch_file(path)

    def _model_states(self, rank: int, partition: int = 0) -> dict[str, Any]:
        path = self._model_states_path(rank, partition)
        saved = self._open(path)
        if lacking := [key for key in REQUIRED_KEYS if key not in saved]:
            raise DamagedCheckpointError(f"{path} lacks {', '.join(map(repr, lacking))}")
        return saved

    def _optimizer_state(self, rank: int, partition: int) -> tuple[dict[str, Any], Path]:
        path = self._optimizer_paths(rank, partition)[0]
        saved = self._open(path)
        if "optimizer_state_dict" not in saved:
            raise DamagedCheckpointError(f"{path} lacks 'optimizer_state_dict'")
        state: dict[str, Any] = saved["optimizer_state_dict"]
        return state, path

    # Reading

    def _read_topology(self) -> Topology:
        saved = self._model_states(0)
        if saved.get("module") is None:
            raise UnsupportedError(f"{self.path} was saved by a pipeline engine, which this release can't read")
        if saved.get("num_experts") or saved.get("ds_autoep_layers"):
            raise UnsupportedError(f"{self.path} holds mixture-of-experts layers, which this release can't read")
        model_parallel, dp = saved["mp_world_size"], saved["dp_world_size"]
        pp = saved.get("checkpoint_parallel_dimensions", {}).get("pp_degree", 1)
        stage = 0
        if saved.get("param_shapes") is not None:
            stage = 3 if self._sliced else int(self._optimizer_state(0, 0)[0].get("zero_stage", 1))
        topology = Topology(model_parallel // pp, pp, dp, stage)
        self._check_files(topology)
        return topology

    def _check_files(self, topology: Topology) -> None:
        """Name each file that the topology calls for and that isn't there, or has another size than when it was saved."""
        expected: list[Path] = []
        for rank in range(topology.model_parallel):
            partitions = range(topology.dp)
            expected += [self._model_states_path(rank, part) for part in (partitions if self._sliced else [0])]
            if topology.zero_stage:
                expected += [self._optimizer_paths(rank, part)[0] for part in partitions]
        missing = [path.name for path in expected if path.name not in self._names]
        if missing:
            raise DamagedCheckpointError(
                f"{self.path} was saved as {topology} and lacks {len(missing)} of {len(expected)} files: "
                + ", ".join(missing[:20])
            )

    def _read_slots(self, rank: int) -> list[Slot]:
        saved, path = self._model_states(rank), self._model_states_path(rank, 0)
        module = {key: value for key, value in saved["module"].items() if isinstance(value, torch.Tensor)}
        buffers = [name for name in saved["buffer_names"] if name in module]
        owned = {name: tensor for name, tensor in module.items() if name not in self._aliases and name not in buffers}
        param_shapes = saved.get("param_shapes")
        if param_shapes is not None:
            slots = zero_slots(param_shapes, self.topology.dp, partial(self._optimizer_state, rank))
        elif saved.get("optimizer"):
            slots = stage0_slots(saved["optimizer"], owned, self._recorded_groups(), path)
        else:
            slots = []
        known = {name for slot in slots for name in slot.names}
        if self._sliced:
            frozen = {
                name: shape for name, shape in (saved.get("frozen_param_shapes") or {}).items() if name not in known
            }
            slots += frozen_slice_slots(frozen, self.topology.dp, lambda part: self._sliced_states(rank, part))
        else:
            slots += [_module_slot(name, "frozen", owned[name], path) for name in owned if name not in known]
        slots += [_module_slot(name, "buffer", module[name], path) for name in buffers]
        return slots

    def _sliced_states(self, rank: int, partition: int) -> tuple[dict[str, Any], Path]:
        return self._model_states(rank, partition), self._model_states_path(rank, partition)

    def _recorded_groups(self) -> Groups | None:
        return [list(group) for group in self.manifest.parameter_groups] if self.manifest else None

    @cached_property
    def _aliases(self) -> frozenset[str]:
        """Names of tied parameters under which they are not stored: listed by DeepSpeed under ZeRO, else found by sharing."""
        saved = self._model_states(0)
        listed = frozenset(saved.get("shared_params") or ())
        first: dict[FileExtent, str] = {}
        path = self._model_states_path(0, 0)
        shared: set[str] = set()
        for name, tensor in saved["module"].items():
            stored = isinstance(tensor, torch.Tensor) and tensor.numel() and name not in saved["buffer_names"]
            if stored and first.setdefault(extent_of(tensor, path), name) != name:
                shared.add(name)
        return listed | shared

    def _read_parameters(self) -> dict[str, Parameter]:
        names = list(self._where[0])
        for rank, where in enumerate(self._where):
            if where.keys() != self._where[0].keys():
                differing = sorted(where.keys() ^ self._where[0].keys())
                raise DamagedCheckpointError(
                    f"{self.path}: model-parallel rank {rank} has other parameters than rank 0: {differing[:10]}"
                )
        parameters: dict[str, Parameter] = {}
        for name in self._in_model_order(names):
            slot, _ = self._where[0][name]
            shapes = tuple(where[name][0].shapes[where[name][1]] for where in self._where)
            parameters[name] = Parameter(name, slot.kind, shapes, slot.states, slot.scalars)
        return parameters

    def _in_model_order(self, names: list[str]) -> list[str]:
        order = {name: index for index, name in enumerate(self._model_states(0)["module"])}
        return sorted(names, key=lambda name: order.get(name, len(order)))

    def _read_groups(self) -> tuple[ParameterGroup, ...]:
        saved = self._model_states(0)
        if self.topology.zero_stage or self.optimizer_form == "bf16-optimizer":
            state, path = self._optimizer_state(0, 0)
            entries = recognise(state, path).hyperparameters(state)
        elif saved["optimizer"]:
            entries = saved["optimizer"].get("optimizer_state_dict", saved["optimizer"])["param_groups"]
        else:
            entries = []
        named: dict[int, list[str]] = {}
        for slot in self._slots[0]:
            if slot.group is not None:
                named.setdefault(slot.group, []).extend(slot.names)
        return tuple(
            ParameterGroup(tuple(names), {key: value for key, value in entries[group].items() if key != "params"})
            for group, names in sorted(named.items())
            if group < len(entries)
        )

    def _read_run(self) -> RunState:
        saved = self._model_states(0)
        precision = _precision(saved.get("ds_config"))
        return RunState(
            precision=precision,
            global_steps=saved["global_steps"],
            global_samples=saved.get("global_samples"),
            skipped_steps=saved["skipped_steps"],
            lr_scheduler=saved.get("lr_scheduler"),
            loss_scale=self._read_loss_scale() if precision == "fp16" else None,
            ds_version=str(saved.get("ds_version", "unknown")),
        )

    def _read_loss_scale(self) -> LossScale | None:
        if self.topology.zero_stage:
            state, _ = self._optimizer_state(0, 0)
            scaler = state.get("loss_scaler")
            if scaler is None:
                return None
            values = {key: value for key, value in vars(scaler).items() if key not in ("dynamic", "dtype")}
            return LossScale(bool(state.get("dynamic_loss_scale", scaler.dynamic)), values)
        optimizer = self._model_states(0)["optimizer"] or {}
        if "cur_scale" not in optimizer:
            return None
        keys = ("cur_scale", "cur_iter", "last_overflow_iter", "scale_factor", "scale_window")
        return LossScale(
            bool(optimizer["dynamic_loss_scale"]), {key: optimizer[key] for key in keys if key in optimizer}
        )


def _module_slot(name: str, kind: Any, tensor: torch.Tensor, path: Path) -> Slot:
    lookup: Callable[[int, str], tuple[torch.Tensor, Path]] = lambda partition, state: (tensor, path)  # noqa: E731
    shape: Shape = shapes_of({name: tensor.shape})[0]
    return whole_tensor_slot(name, kind, lookup, shape=shape, states={WEIGHT: TORCH_DTYPES[tensor.dtype]})


def _precision(ds_config: Any) -> Precision:
    config = ds_config if isinstance(ds_config, dict) else {}
    for name, keys in (("bf16", ("bf16", "bfloat16")), ("fp16", ("fp16",))):
        if any(isinstance(config.get(key), dict) and config[key].get("enabled") for key in keys):
            return name  # type: ignore[return-value]
    return "fp32"
