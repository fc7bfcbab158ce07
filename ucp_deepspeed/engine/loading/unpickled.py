"""Files that DeepSpeed unpickles when a load is left to it, by ``torch.load(weights_only=False)``: code in a file would run.

So each rank first checks the files that it will read against the allow-list (`ucp_deepspeed.checkpoint.torch_files.reading`). The
catalog has opened most of them by then.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.deepspeed.files import open_saved
from ucp_deepspeed.checkpoint.experts import weight_file
from ucp_deepspeed.engine.deepspeed_types import Engine, PipelineModule
from ucp_deepspeed.engine.model import model_parallel_rank
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers import only_evaluates
from ucp_deepspeed.errors import UnsupportedError


def files_to_unpickle(folder: Path, held: Collection[str], engine: Engine) -> list[Path]:
    """Return the files that DeepSpeed reads on this rank, by its own names for them (``runtime/engine.py::_load_checkpoint``).

    Args:
        folder: the tag's folder.
        held: names of the files in it.
        engine: the engine that loads.
    """
    place = str(folder.parent), folder.name
    listed = [*_first_and_own(engine._get_all_ckpt_names(*place), model_parallel_rank(engine), engine.mp_world_size)]
    if isinstance(engine, PipelineEngine):
        rank, degree = engine.grid.get_slice_parallel_rank(), engine.grid.get_slice_parallel_world_size()
        module: PipelineModule = engine.module
        for index, layer in enumerate(module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                layer_files = module.ckpt_layer_path_list(str(folder), index)
                listed += _first_and_own(layer_files, rank, degree)
    names = ModelNames(engine)
    if names.layers and not engine.zero_optimization() and not only_evaluates(engine):
        listed.append(engine._get_optimizer_ckpt_name(*place, names.ep_rank))
    if engine.zero_optimization():
        listed += _partitions(engine, place)
    return [path for path in map(Path, listed) if path.is_file()] + _experts(folder, held, engine, names)


def _first_and_own(files: list[str], rank: int, degree: int) -> Iterator[str]:
    """Yield the first file of a sorted list, which DeepSpeed looks into, and the rank's own, which it reads
    (``runtime/state_dict_factory.py``)."""
    if files:
        yield files[0]
        yield from (files[index] for index in {rank * len(files) // degree} if index < len(files))


def _partitions(engine: Engine, place: tuple[str, str]) -> list[str]:
    """Return the optimizer's files: this rank's own, or all of them for elastic checkpoints."""
    group = engine.optimizer.dp_process_group
    every = (
        range(dist.get_world_size(group=group)) if engine.zero_elastic_checkpoint() else [dist.get_rank(group=group)]
    )
    rank = model_parallel_rank(engine)
    return [
        engine._get_rank_zero_ckpt_name(*place, mp_rank=rank, dp_rank=partition, bf16_mode=bf16)
        for partition in every
        for bf16 in (True, False)
    ]


def own_partition(folder: Path, engine: Engine) -> Path:
    """Return the optimizer's file that DeepSpeed reads on this rank under ZeRO
    (``runtime/engine.py::_get_all_zero_checkpoints``)."""
    place, partition = (
        (str(folder.parent), folder.name),
        dist.get_rank(engine.optimizer.dp_process_group),
    )
    own = engine._get_rank_zero_ckpt_name(*place, model_parallel_rank(engine), partition, engine.bfloat16_enabled())
    return Path(own)


def _experts(folder: Path, held: Collection[str], engine: Engine, names: ModelNames) -> list[Path]:
    """Return the files with the weights of this rank's experts."""
    own = {layer.ep_rank * layer.local + expert for layer in names.layers.values() for expert in range(layer.local)}
    places = {name: weight_file(name) for name in held} if own else {}
    rank = model_parallel_rank(engine)
    return [folder / name for name, place in places.items() if place and place[1] in own and place[2] == rank]


def look_into(path: Path, checkpoint: DeepSpeedCheckpoint | None) -> dict[str, Any]:
    """Return the content of a file that DeepSpeed will unpickle; read by the catalog, where that can read it.

    Raises:
        DamagedCheckpointError: it holds something that could run code.
    """
    if checkpoint is not None:
        with suppress(UnsupportedError):
            return checkpoint.files.open(path)
    return open_saved(path, foreign=True)


@contextmanager
def only_held_against_the_list(checkpoint: Checkpoint | None, engine: Engine) -> Iterator[None]:
    """Check each file against the allow-list before DeepSpeed unpickles it, also one that `files_to_unpickle` doesn't know.

    Raises:
        DamagedCheckpointError: it holds something that could run code; parts of the engine are filled by then.
    """
    assert checkpoint is None or isinstance(checkpoint, DeepSpeedCheckpoint), "DeepSpeed can't load any other form"
    reader, load = engine.checkpoint_engine, engine.checkpoint_engine.load

    def checked_load(path: Any, *args: Any, **kwargs: Any) -> Any:
        look_into(Path(path), checkpoint)
        return load(path, *args, **kwargs)

    reader.load = checked_load
    try:
        yield
    finally:
        del reader.load
