"""The files of a tag folder that DeepSpeed wrote: their names, and opening them. Names and keys: DeepSpeed 0.19.8,
``runtime/engine.py`` (``_get_ckpt_name``, ``_get_rank_zero_ckpt_name``, ``_common_checkpoint_state``)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, cast

from ucp_deepspeed.checkpoint.bounds import check_regular
from ucp_deepspeed.checkpoint.checkpoint import Precision
from ucp_deepspeed.checkpoint.checksums import sums_by
from ucp_deepspeed.checkpoint.deepspeed.autoep import AutoEpLayers, read_autoep_layers
from ucp_deepspeed.checkpoint.deepspeed.contents import (
    EARLY_OPTIMIZER,
    MODEL_STATES,
    WHOLE_OPTIMIZER,
    check_degree,
    check_numbers,
    check_types,
    enabled_precision,
    in_flat,
    value_of,
)
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, STALE_MANIFEST, Manifest, read_manifest
from ucp_deepspeed.checkpoint.deepspeed.older_files import (
    RESAVE_HINT,
    buffer_names,
    in_flat_groups,
    is_older,
    mapped_shapes,
)
from ucp_deepspeed.checkpoint.deepspeed.written_names import (
    RANKS_FILE,
    TOLD_KEY,
    VALUES_KEY,
    check_written_name,
    is_further,
    is_model_states,
    layer_file,
    model_states_name,
    optimizer_name,
    optimizer_prefix,
    zero_file,
)
from ucp_deepspeed.checkpoint.deepspeed.zero_slots import BF16_OPTIMIZER, NamedShapes, ZeroFile
from ucp_deepspeed.checkpoint.expert_names import expert_of, missing_expert, optimizer_file, weight_file
from ucp_deepspeed.checkpoint.torch_files.archives import fill_described, is_archive_file, storages_of
from ucp_deepspeed.checkpoint.torch_files.damage import REMEDY
from ucp_deepspeed.checkpoint.torch_files.foreign import opaque_in
from ucp_deepspeed.checkpoint.torch_files.safe_load import PRECISIONS, open_torch_file
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.remote import is_url

ENGINE_KEYS = frozenset(
    f"""
    {VALUES_KEY} {TOLD_KEY}
    module buffer_names optimizer param_shapes frozen_param_shapes shared_params frozen_param_fragments lr_scheduler
    data_sampler random_ltd skipped_steps global_steps global_samples sparse_tensor_module_names csr_tensor_module_names
    dp_world_size mp_world_size ds_config ds_version checkpoint_parallel_dimensions num_experts ds_autoep_layers
    autoep_layers universal_checkpoint_info folding
    """.split()
)
"""Top-level keys of a model_states file that DeepSpeed writes; all others are the user's client state."""

WEIGHTS_KEYS = frozenset({"module", "optimizer"})
"""Keys whose tensors a load reads where it needs them."""

REQUIRED_KEYS = ("module", "buffer_names", "dp_world_size", "mp_world_size", "global_steps", "skipped_steps")
"""Keys that a model_states file must have."""

BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu")
"""Keys of a DeepSpeed config: each config that DeepSpeed ran with has one of these. A mapping without them is no config."""

SLICED_HINT = "; with ZeRO-3 these hold the weights too, so that without them nothing can be loaded: fetch them as well"
"""Hint if the optimizer's files are missing."""


class DeepSpeedFiles:
    """A tag folder that DeepSpeed wrote. A file that was opened once stays in memory. A long class, of short answers.

    Attributes:
        path: the folder.
        manifest: the manifest of the save hook, or None.
        versions: versions of the files that have been opened, and the checksums of those that are to be checked.

    Args:
        verify: whether what is read is compared with the save's checksums, if there are any.

    Raises:
        DamagedCheckpointError: a file is missing, truncated, isn't what was saved, or the manifest doesn't describe it.
    """

    are_all_here = True  # a file that isn't in the folder is missing

    def __init__(self, path: Path, verify: bool = True) -> None:
        self.path, self.versions = path, FileVersions()
        self.versions.note(path / MANIFEST_NAME)
        self.manifest: Manifest | None = read_manifest(path)
        self.open = lru_cache(maxsize=None)(self._open_checked)
        self._whole = lru_cache(maxsize=None)(self._model_states)
        self._zero = lru_cache(maxsize=None)(self._read_zero)
        self._verify = verify
        if verify and self.manifest is not None:
            self.versions.sums = sums_by(path, self.manifest.checksums, self.manifest.save_id)

    def check_tensors(self, path: Path, described: Any) -> None:
        """Compare the tensors in a value of `open` with the file's checksums, if there are any."""
        if (sums := self.versions.sums(str(path))) is not None:
            sums.check_parts(path, storages_of(described))

    @cached_property
    def names(self) -> frozenset[str]:
        """Names of all files in the folder, but for those that lay there before the save, and still do."""
        found = frozenset(entry.name for entry in self.path.iterdir())
        earlier = self.manifest.earlier if self.manifest is not None else {}
        return found - {name for name in found & earlier.keys() if (self.path / name).stat().st_size == earlier[name]}

    @cached_property
    def sliced(self) -> bool:
        """Return whether each data-parallel rank wrote a model_states file of its own, as ZeRO-3 does.

        Raises:
            DamagedCheckpointError: there are files of both kinds, and no manifest tells which are the last run's, or it is stale.
        """
        found = sorted(name for name in self.names if is_model_states(name))
        sliced = [name for name in found if name.startswith("zero_pp_rank_")]
        if self.manifest is not None:
            recorded = self.manifest.topology.zero_stage == 3
            other_kind = set(found) - set(sliced) if recorded else set(sliced)
            others = sorted(other_kind - self.manifest.files.keys())
            if others:
                raise DamagedCheckpointError(f"{self.path / others[0]} isn't in {MANIFEST_NAME}{STALE_MANIFEST}")
            return recorded
        if sliced and len(sliced) < len(found):
            raise DamagedCheckpointError(
                f"{self.path} holds the files of two runs, one with ZeRO-3 and one without ({sliced[0]}, …); keep one"
            )
        return bool(sliced)

    @cached_property
    def tells_buffers(self) -> bool:
        """Return whether the files record which tensors are buffers."""
        return self.manifest is not None or not is_older(self.open(self.model_states_path(0, 0)))

    @property
    def is_pipeline(self) -> bool:
        """Return whether a pipeline engine saved it: weights and buffers lie in separate files, one for each layer."""
        return self.model_states(0).get("module") is None

    @cached_property
    def pipeline_stages(self) -> int:
        """Pipeline-parallel size. Before 0.19.5 DeepSpeed recorded only its product with the tensor-parallel size.

        Raises:
            DamagedCheckpointError: the number of tensor-parallel ranks with layer files doesn't divide that product.
        """
        saved = self.model_states(0)
        if (recorded := saved.get("checkpoint_parallel_dimensions")) is not None:
            return check_degree(recorded.get("pp_degree", 1), saved["mp_world_size"], self.model_states_path(0, 0))
        if self.manifest is not None or not self.is_pipeline:
            return self.manifest.topology.pp if self.manifest is not None else 1
        degree = 1 + max((place[1] for name in self.names if (place := layer_file(name))), default=0)
        stages, rest = divmod(saved["mp_world_size"], degree)
        if rest:
            raise DamagedCheckpointError(
                f"{self.path} holds layer files of {degree} tensor-parallel ranks, which don't divide the "
                f"{saved['mp_world_size']} model-parallel ranks of {self.model_states_path(0, 0)}: "
                f"files of two runs, or some are missing"
            )
        return int(stages)

    @cached_property
    def partitioned(self) -> bool:
        """Return whether the optimizer's state is in files of its own: with ZeRO, and in a bf16 pipeline without ZeRO."""
        if BF16_OPTIMIZER.masters in (self.model_states(0).get("optimizer") or {}):
            return True
        return self.param_shapes(0) is not None and self.has_optimizer_files

    @property
    def has_partitions(self) -> bool:
        """Return whether each partition of the optimizer has a file that a load needs."""
        return self.partitioned or self.sliced

    @property
    def has_optimizer_files(self) -> bool:
        """Return whether there are files of a ZeRO optimizer that this run may have written."""
        return self._optimizer_prefix in self._optimizer_prefixes

    def param_shapes(self, rank: int) -> Sequence[NamedShapes] | None:
        """Return names and shapes of each flat group on a model-parallel rank; None without ZeRO.

        Up to 0.5.10 DeepSpeed wrote them into the optimizer's files. With experts it wrote them nowhere before 0.19.3.

        Raises:
            UnsupportedError: nothing tells the parameters in the optimizer's files.
        """
        saved = self.model_states(rank)
        if "param_shapes" in saved or saved.get("optimizer") or not self.has_optimizer_files:
            return saved.get("param_shapes")
        path = self.optimizer_path(rank, 0)
        shapes = check_types(self.open(path), EARLY_OPTIMIZER, path, "an optimizer's file").get("param_shapes")
        if shapes is not None and not isinstance(shapes, Mapping):
            return cast(Sequence[NamedShapes], shapes)
        opened = [self.optimizer_state(rank, partition) for partition in range(saved["dp_world_size"])]
        if shapes is not None:  # all groups in one mapping
            return in_flat_groups(shapes, opened)
        weights = dict(saved["module"] or {})
        for name in sorted(self.names):
            if (place := weight_file(name)) is not None and place[2] == rank:
                weights |= self.weights(self.path / name)
        return mapped_shapes(opened, weights, self.reordered)

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """Config of the run; empty if the files hold something else, such as the path of a file."""
        saved = self.model_states(0)
        if "ds_config" not in saved and len(self._optimizer_prefixes) == 1:
            saved = self.open(self.path / min(filter(zero_file, self.names)))
        config = saved.get("ds_config")
        if not isinstance(config, dict) or not (any(key in config for key in BATCH_KEYS) or enabled_precision(config)):
            return {}
        return config

    @cached_property
    def configured_stage(self) -> int | None:
        """The ZeRO stage in the run's config; None if the files don't hold the config."""
        zero = self.config.get("zero_optimization", 0)
        stage = zero.get("stage", 0) if isinstance(zero, Mapping) else zero
        if not isinstance(stage, int):
            raise DamagedCheckpointError(f"{self.model_states_path(0, 0)} holds a config of ZeRO stage {stage!r}")
        return int(stage) if self.config else None

    @property
    def reordered(self) -> bool:
        """Return whether ``round_robin_gradients`` is on: ``param_slice_mappings`` are then of another order."""
        zero = self.config.get("zero_optimization")
        return isinstance(zero, Mapping) and bool(zero.get("round_robin_gradients"))

    @cached_property
    def lost_optimizer(self) -> bool:
        """Return whether ZeRO's files are gone that named the parameters. Up to 0.5.10 no other file did.

        Those releases couldn't save an engine under ZeRO that had no optimizer.
        """
        saved = self.model_states(0)
        if {"param_shapes", "num_experts"} & saved.keys() or saved.get("optimizer") or self.has_optimizer_files:
            return False
        return saved["global_steps"] > 0 if self.configured_stage is None else self.configured_stage > 0

    @cached_property
    def precision(self) -> Precision:
        """Precision of the weights that the run trained with: from the config, else from the weights, the trained ones if the
        files tell these. Under ZeRO-3 only empty tensors remain of them, with the same dtype."""
        if self.config:
            return enabled_precision(self.config) or "fp32"
        if self._optimizer_prefixes == {"bf16_"}:
            return "bf16"
        saved = self.model_states(0)
        held: dict[str, Any] = dict(saved["module"] or {})
        for name in sorted(filter(layer_file, self.names)) if saved["module"] is None else ():
            held |= {f"{name}/{key}": value for key, value in self.weights(self.path / name).items()}
        trained = {name for group in saved.get("param_shapes") or () for name in group} & held.keys()
        dtypes = {getattr(held[name], "dtype", None) for name in trained or held.keys() - set(saved["buffer_names"])}
        return next((precision for precision, dtype in PRECISIONS.items() if dtype in dtypes), "fp32")

    @cached_property
    def _optimizer_prefixes(self) -> frozenset[str]:
        """Prefixes of the names of ZeRO's files: they may differ between runs."""
        found = map(zero_file, self.names)
        return frozenset(name[1] or "" for name in found if name is not None)

    @cached_property
    def _optimizer_prefix(self) -> str:
        """Prefix for the run's precision: a folder saved to twice may hold both."""
        prefix = optimizer_prefix(self.precision)
        return prefix if prefix in self._optimizer_prefixes else ""

    @cached_property
    def expert_totals(self) -> tuple[int, ...]:
        """Number of experts of each mixture-of-experts layer."""
        totals = self.model_states(0).get("num_experts") or ()
        return (totals,) if isinstance(totals, int) else tuple(totals)

    @cached_property
    def autoep(self) -> AutoEpLayers:
        """The layers of AutoEP; they count in ``expert_totals`` too."""
        return read_autoep_layers(self.model_states(0).get("ds_autoep_layers"), self.model_states_path(0, 0))

    def model_states_path(self, rank: int, partition: int) -> Path:
        """Return the path for a model-parallel rank; with ZeRO-3, for one of its partitions."""
        return self.path / model_states_name(rank, partition if self.sliced else None)

    def optimizer_path(self, rank: int, partition: int) -> Path:
        """Return the path for one partition of a model-parallel rank. DeepSpeed uses one of two names."""
        return self.path / optimizer_name(rank, partition, self._optimizer_prefix)

    def expert_files(self, rank: int) -> list[Path]:
        """Return the files of all experts' weights. Under ZeRO only frozen parameters and buffers are taken from them."""
        if not self.expert_totals:
            return []
        if self.manifest is not None and self.partitioned:
            untrained = [name for name, entry in self.manifest.parameters.items() if entry.kind != "trainable"]
            if not any(expert_of(name) or name in self.autoep.layers for name in untrained):
                return []
        files: dict[tuple[int, int], str] = {}
        for name in sorted(self.names):
            place = weight_file(name)
            if place is not None and (place[2] == rank or place[:2] not in files):
                files[place[:2]] = name
        needed = self.are_all_here and not self.sliced  # ZeRO-3 has experts in its own files
        if needed and (lacking := missing_expert(self.model_states(0)["num_experts"], files)) is not None:
            raise DamagedCheckpointError(f"{self.path} lacks expert {lacking[1]} of MoE layer {lacking[0]}; {REMEDY}")
        return [self.path / name for _, name in sorted(files.items())]

    def model_states(self, rank: int, partition: int = 0) -> dict[str, Any]:
        """Return the content of a model_states file; tensors are described, not read (`open_torch_file`)."""
        return self._whole(rank, partition)

    def _model_states(self, rank: int, partition: int) -> dict[str, Any]:
        path = self.model_states_path(rank, partition)
        saved = check_types(self.open(path), MODEL_STATES, path, "a model_states file")
        if is_older(saved):
            saved = self._read_older(rank)
        if lacking := [key for key in REQUIRED_KEYS if key not in saved]:
            raise DamagedCheckpointError(f"{path} lacks {', '.join(map(repr, lacking))}")
        check_numbers(saved, path)
        if (rank, partition) != (0, 0):
            self._check_step(saved, path)
        return saved

    def _first_expert_optimizer(self, rank: int) -> Path:
        """Return the file of the first expert-parallel rank. If `is_older`, it has the state of all parameters."""
        return self.path / f"expp_rank_0_mp_rank_{rank:02d}_optim_states.pt"

    def _read_older(self, rank: int) -> dict[str, Any]:
        """Return a file that `is_older`, with the names of buffers added, and without ZeRO the optimizer's state."""
        saved, path = self.open(self.model_states_path(rank, 0)), self._first_expert_optimizer(rank)
        optimizer = value_of(self.open(path), "optimizer", "the key", path) if path.name in self.names else None
        if optimizer is None and any(name.startswith("expp_rank_") for name in self.names):
            raise UnsupportedError(
                f"{self.path} lacks {path.name}: which file has that rank's state can't be told; {RESAVE_HINT}"
            )
        buffers = buffer_names(saved, self.manifest.parameters if self.manifest else {})
        return {**saved, "buffer_names": buffers, "optimizer": optimizer}

    def weights(self, path: Path) -> dict[str, Any]:
        """Return the content of a file of weights alone."""
        saved = self.open(path)
        if strange := [key for key in saved if not isinstance(key, str)]:
            raise DamagedCheckpointError(f"{path} holds weights under {strange[0]!r}, which is no name")
        return saved

    def client_state(self, rank: int, partition: int) -> dict[str, Any]:
        """Return the top level of a model_states file, except the module and the keys in `unreadable`. Tensors are mapped; of a
        store they are read, and the optimizer's state is left out too."""
        path = self.model_states_path(rank, partition)
        self.versions.note(path)
        left_out = {*self.unreadable(rank, partition), *(WEIGHTS_KEYS if is_url(path) else ("module",))}
        self.check_tensors(path, {key: value for key, value in self.open(path).items() if key not in WEIGHTS_KEYS})
        saved = open_torch_file(path, tensors=not is_url(path), owned=ENGINE_KEYS, summed=True)
        state = {key: value for key, value in saved.items() if key not in left_out}
        return fill_described(state, path) if is_url(path) else state

    def unreadable(self, rank: int, partition: int) -> dict[str, str]:
        """Keys of the user's in a model_states file that can't be read without running code of a class → that class."""
        found = ((key, opaque_in(value)) for key, value in self.model_states(rank, partition).items())
        return {key: kind for key, kind in found if kind is not None}

    def _check_step(self, saved: dict[str, Any], path: Path) -> None:
        """Check that a model_states file is of the same step as the first one. It isn't if a second save was interrupted."""
        first, expected = self.model_states_path(0, 0), self.model_states(0)["global_steps"]
        if (saved["module"] is None) != self.is_pipeline:
            raise DamagedCheckpointError(f"{path} is of a pipeline, and {first} isn't, or the other way round")
        if (found := saved["global_steps"]) != expected:
            raise DamagedCheckpointError(
                f"{path} is of step {found}, and {first} of step {expected}: these are files of two saves"
            )

    def whole_optimizer(self, rank: int) -> tuple[dict[str, Any], Path]:
        """Return the optimizer's state on a model-parallel rank without ZeRO, and its file; empty if there is none."""
        path = self.model_states_path(rank, 0)
        home = self._first_expert_optimizer(rank) if is_older(self.open(path)) else path
        optimizer = self.model_states(rank).get("optimizer") or {}
        return check_types(optimizer, WHOLE_OPTIMIZER, home, "the optimizer's state"), home

    def expert_optimizer(self, rank: int, ep_rank: int) -> tuple[dict[str, Any], Path]:
        """Return the optimizer's state of an expert-parallel rank without ZeRO, and the file that holds it.

        If experts aren't cut, only one tensor-parallel rank has the file.
        """
        found = {held[1]: name for name in self.names if (held := optimizer_file(name)) and held[0] == ep_rank}
        if not found:
            raise DamagedCheckpointError(f"{self.path} lacks the optimizer's file of expert-parallel rank {ep_rank}")
        path = self.path / found.get(rank, found[min(found)])
        optimizer = value_of(self.open(path), "optimizer", "the key", path)
        return check_types(optimizer, WHOLE_OPTIMIZER, path, "the optimizer's state"), path

    def optimizer_state(self, rank: int, partition: int) -> ZeroFile:
        """Return the optimizer's state in the file of one partition."""
        return self._zero(self.optimizer_path(rank, partition))

    def _read_zero(self, path: Path) -> ZeroFile:
        saved = self.open(path)
        if "optimizer_state_dict" not in saved:
            raise DamagedCheckpointError(f"{path} lacks 'optimizer_state_dict'")
        return ZeroFile(saved["optimizer_state_dict"], path)

    def _open_checked(self, path: Path) -> dict[str, Any]:
        self.versions.note(path)
        if self.manifest is not None:
            self.manifest.check_file(path)
        if (sums := self.versions.sums(str(path))) is not None:
            sums.check_opened(path)
        saved = open_saved(path, summed=sums is not None or not self._verify)
        if self.manifest is None or path.name not in self.manifest.contents:
            check_written_name(path)
        module = saved.get("module") if is_model_states(path.name) else None
        flat = in_flat(module)
        if flat is not module:
            saved["module"] = flat
        return saved

    def check_complete(self, topology: Topology) -> None:
        """Check that all files of the topology are there, and name those that aren't. Opening a file checks its size.

        Without a manifest that lists the run's files, also refuse files of further model-parallel ranks.
        """
        places = {name: found for name in sorted(self.names) if (found := RANKS_FILE.fullmatch(name))}
        if self.manifest is None:
            more = [name for name, place in places.items() if int(place[2]) >= topology.model_parallel]
            if more:
                raise DamagedCheckpointError(
                    f"{self.path} holds {more[0]}, and {self.model_states_path(0, 0).name} tells of {topology.model_parallel} "
                    f"model-parallel ranks: files of two runs, or a wrong mp_world_size; move those of the other run to another "
                    f"folder"
                )
        # A damaged file may name any size: names are made one by one, no more than there are files plus a few.
        missing = list(islice((name for name in self.expected(topology) if name not in self.names), 20))
        if missing:
            each = int(self.has_partitions)
            recorded = sum(1 for _ in self._recorded())
            total = recorded + topology.model_parallel * ((topology.dp if self.sliced else 1) + each * topology.dp)
            there = sum(name in self.names for name in self._recorded())
            there += sum(self._calls_for(topology, name, place) for name, place in places.items())
            gone = self.sliced and any(zero_file(name) for name in missing)
            raise DamagedCheckpointError(
                f"{self.path} was saved as {topology} and lacks {total - there} of {total} files: "
                + ", ".join(missing)
                + (SLICED_HINT if gone else "")
            )

    def _calls_for(self, topology: Topology, name: str, place: re.Match[str]) -> bool:
        """Return whether a run on this topology writes an existing file; ``place`` is the match of `RANKS_FILE` on its name."""
        partition, rank = int(place[1] or 0), int(place[2])
        names = [self.model_states_path(rank, partition).name]
        if self.has_partitions:
            names.append(self.optimizer_path(rank, partition).name)
        return partition < topology.dp and rank < topology.model_parallel and name in names

    def check_sizes(self, topology: Topology) -> None:
        """Check that each file has the size in the manifest. Without a manifest, check that it has the end of an archive."""
        for name in self.expected(topology):
            path = self.path / name
            check_regular(path)
            if self.manifest is not None:
                self.manifest.check_file(path)
            elif not is_archive_file(path):
                open_torch_file(path)

    def expected(self, topology: Topology) -> Iterator[str]:
        """Yield the names of the files that a run on this topology writes."""
        yield from self._recorded()
        for rank in range(topology.model_parallel):
            partitions = range(topology.dp)
            yield from (self.model_states_path(rank, part).name for part in (partitions if self.sliced else [0]))
            if self.has_partitions:
                yield from (self.optimizer_path(rank, part).name for part in partitions)

    def _recorded(self) -> Iterator[str]:
        """Yield names in the manifest of files that the topology doesn't tell."""
        return filter(is_further, self.manifest.files if self.manifest else ())

    @property
    def further_names(self) -> list[str]:
        """Names of files in the folder that the topology doesn't tell."""
        return [name for name in self.names if is_further(name)]


def open_saved(path: Path, foreign: bool = False, summed: bool = False) -> dict[str, Any]:
    """Return the content of a file of DeepSpeed's. All of it must be data, except the client state (`open_torch_file`)."""
    return open_torch_file(
        path, owned=ENGINE_KEYS if is_model_states(path.name) else None, foreign=foreign, summed=summed
    )
