"""A small model with awkward shapes, and reading it back whole from the files that the oracle wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

import torch
from native_files import NativeModel, NativeParameter, NativeRun
from native_files.described import kept_parameters
from native_files.optimizers import hyperparameters

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, Manifest
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer import FileReader, gather

SHAPES: dict[str, tuple[int, ...]] = {
    "gain": (1,),
    "scale": (),
    "embedding.weight": (11, 3),
    "norm.weight": (7,),
    "norm.bias": (7,),
    "up.weight": (5, 7),
    "down.weight": (7, 5),
    "tail": (2, 3, 2),
}
"""Names and shapes, in the model's order: odd sizes, one element, no dimension, and two of the same shape."""


def model_of(shapes: Mapping[str, tuple[int, ...]], frozen: tuple[str, ...] = ()) -> NativeModel:
    """A model in which every element of every state has a value of its own."""
    generator = torch.Generator().manual_seed(11)
    parameters = []
    for name, shape in shapes.items():
        master, moment, square = (torch.randn(shape, generator=generator) for _ in range(3))
        states = {} if name in frozen else {"exp_avg": moment, "exp_avg_sq": square.square()}
        parameters.append(NativeParameter(name, master, states, frozen=name in frozen))
    return NativeModel(tuple(parameters))


def awkward_model() -> NativeModel:
    """`SHAPES`, with a frozen parameter, an empty one, buffers, a tied name and keys without a value."""
    plain = model_of(SHAPES | {"position": (5, 3), "nothing": (0, 4)}, frozen=("position",))
    return replace(
        plain,
        buffers={"running": torch.arange(5.0), "calls": torch.tensor(17)},
        aliases={"head.weight": "embedding.weight"},
        extra_state=("up._extra_state", "down._extra_state"),
    )


def whole(view: UniversalView, name: str, state: str) -> torch.Tensor:
    """One state of one whole parameter, read from the files."""
    shape = view.logical_shape(name)
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
    flat = torch.zeros(prod(shape), dtype=dtype[view.parameters[name].states[state]])
    gather(view, name, state, 0, flat, FileReader())
    return flat.view(shape)


def check_reads_back(folder: Path, model: NativeModel, run: NativeRun) -> Checkpoint:
    """Everything of the model is in the catalog, bit for bit, and nothing else is."""
    checkpoint = open_checkpoint(folder)
    view = UniversalView.of(checkpoint)
    stepped = run.steps > 0 or run.kind in ("unfused", "fused")
    kept = kept_parameters(model, run)
    if run.stage == 3 and run.exclude_frozen:
        kept = [parameter for parameter in kept if parameter.optimized]  # one without elements is described nowhere
    assert set(checkpoint.parameters) == {parameter.name for parameter in kept} | set(model.buffers)
    for parameter in kept:
        found = checkpoint.parameters[parameter.name]
        assert found.kind == ("trainable" if parameter.optimized else "frozen"), parameter.name
        expected = {"fp32": parameter.fp32, **(parameter.states if stepped else {})}
        if not parameter.optimized:
            expected = {"weight": parameter.fp32.to(run.dtype)}
        assert found.states.keys() == expected.keys(), parameter.name
        for state, tensor in expected.items():
            assert torch.equal(whole(view, parameter.name, state), tensor), (parameter.name, state)
    for name, buffer in model.buffers.items():
        assert checkpoint.parameters[name].kind == "buffer"
        assert torch.equal(whole(view, name, "weight"), buffer)
    return checkpoint


def write_manifest(folder: Path, run: NativeRun, groups: tuple[tuple[str | None, ...], ...]) -> None:
    """A manifest as the save hook writes it, with the sizes of the files that are there."""
    topology = Topology(run.tp, 1, run.dp, run.stage)
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    manifest = Manifest(topology=topology, optimizer=run.kind, parameter_groups=(groups,), parameters={}, files=files)
    (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(), encoding="utf-8")


def group_decay(group: int, run: NativeRun) -> float:
    """The weight decay by which the oracle's parameter groups differ."""
    decay: float = hyperparameters(group, run)["weight_decay"]
    return decay
