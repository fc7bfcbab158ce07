"""What DeepSpeed unpickles when a load is left to it, by ``torch.load(weights_only=False)``: code in a file would run.

So each rank holds the files that it will read against the allow-list first (`ucp_deepspeed.checkpoint.torch_files`). Most of them
the catalog has opened by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deepspeed import comm as dist
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.deepspeed import DeepSpeedCheckpoint
from ucp_deepspeed.checkpoint.experts import weight_file
from ucp_deepspeed.engine.model import model_parallel_rank
from ucp_deepspeed.engine.names import ModelNames
from ucp_deepspeed.engine.optimizers import only_evaluates


def files_to_unpickle(checkpoint: DeepSpeedCheckpoint, engine: Any) -> list[Path]:
    """The files that DeepSpeed reads on this rank, by its own names for them (``runtime/engine.py::_load_checkpoint``)."""
    place = str(checkpoint.path.parent), checkpoint.path.name
    listed = [*_first_and_own(engine._get_all_ckpt_names(*place), model_parallel_rank(engine), engine.mp_world_size)]
    if isinstance(engine, PipelineEngine):
        rank, degree = engine.grid.get_slice_parallel_rank(), engine.grid.get_slice_parallel_world_size()
        for index, layer in enumerate(engine.module.forward_funcs):
            if hasattr(layer, "load_state_dict"):
                layer_files = engine.module.ckpt_layer_path_list(str(checkpoint.path), index)
                listed += _first_and_own(layer_files, rank, degree)
    names = ModelNames(engine)
    if names.layers and checkpoint.topology.zero_stage == 0 and not only_evaluates(engine):
        listed.append(engine._get_optimizer_ckpt_name(*place, names.ep_rank))
    if engine.zero_optimization():
        listed += _partitions(engine, place)
    return [path for path in map(Path, listed) if path.is_file()] + _experts(checkpoint, engine, names)


def _first_and_own(files: list[str], rank: int, degree: int) -> Iterator[str]:
    """Of a sorted list DeepSpeed looks into the first, and reads its own (``runtime/state_dict_factory.py``)."""
    if files:
        yield files[0]
        yield from (files[index] for index in {rank * len(files) // degree} if index < len(files))


def _partitions(engine: Any, place: tuple[str, str]) -> list[str]:
    """The optimizer's files: this rank's own, of elastic ones all."""
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


def _experts(checkpoint: DeepSpeedCheckpoint, engine: Any, names: ModelNames) -> list[Path]:
    """The files with the weights of this rank's experts."""
    own = {layer.ep_rank * layer.local + expert for layer in names.layers.values() for expert in range(layer.local)}
    places = {name: weight_file(name) for name in checkpoint.files.names} if own else {}
    rank = model_parallel_rank(engine)
    return [checkpoint.path / name for name, held in places.items() if held and held[1] in own and held[2] == rank]


@contextmanager
def only_held_against_the_list(checkpoint: Checkpoint, engine: Any) -> Iterator[None]:
    """While DeepSpeed loads: a file that `files_to_unpickle` doesn't know is looked at before it is unpickled.

    Raises:
        DamagedCheckpointError: it holds something that could run code; parts of the engine are filled by then.
    """
    assert isinstance(checkpoint, DeepSpeedCheckpoint), "DeepSpeed can't load any other form"
    reader, files = engine.checkpoint_engine, checkpoint.files
    load = reader.load

    def checked_load(path: Any, *args: Any, **kwargs: Any) -> Any:
        files.open(Path(path))
        return load(path, *args, **kwargs)

    reader.load = checked_load
    try:
        yield
    finally:
        del reader.load
