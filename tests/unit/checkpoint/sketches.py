"""Checkpoints and models sketched by hand, for tests of planning: their files are imaginary, and there are no ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.checkpoint.checkpoint import HeldShapes, Kind, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.layout.pattern import Pattern, Replicate
from ucp_deepspeed.plan import Fragment
from ucp_deepspeed.transfer.planning.pairing import Pair, pair
from ucp_deepspeed.transfer.planning.policies import Obstacles, Policies
from ucp_deepspeed.transfer.planning.target import ModelDescription, ModelTensor

STATES = {"fp32": "F32", "exp_avg": "F32"}


class Sketch(Checkpoint):
    """A checkpoint whose files are imaginary: one for each local tensor, named as `file_of` says."""

    def __init__(self, shapes: Mapping[str, Shape], kinds: Mapping[str, Kind] | None = None, **changes: Any) -> None:
        """Args:
        shapes: whole shapes.
        changes: attributes of the checkpoint, and its ``scheduler``.
        """
        self.path, self.form, self.topology = Path("sketch"), "sketch", Topology(zero_stage=1)
        self.patterns, self.recorded_shapes, self.logical_names = {}, {}, {}
        self.versions, self.vocabulary_size = FileVersions(), None
        self.run = RunState("fp32", 3, 3, 0, changes.pop("scheduler", None), None, "0")
        for name in changes.keys() - {"groups"}:
            setattr(self, name, changes[name])
        self.parameters = {
            name: Parameter(
                name,
                kind := (kinds or {}).get(name, "trainable"),
                cut(shape, self.patterns.get(name), self.topology.tp),
                STATES if kind == "trainable" else {"weight": "F32"},
                {"step": 3.0} if kind == "trainable" else {},
            )
            for name, shape in shapes.items()
        } | changes.get("parameters", {})
        trained = tuple(name for name, parameter in self.parameters.items() if parameter.kind == "trainable")
        self.groups = changes.get("groups", (ParameterGroup(trained, {"lr": 0.1}),))

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        parameter = self.parameters[name]
        shape = parameter.local_shapes[rank]
        assert shape is not None
        extent = FileExtent(file_of(name, state, rank), 0, parameter.states[state], prod(shape))
        yield Fragment(local_start, local_stop - local_start, extent, local_start)

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        return ({},)

    def client_state(self, rank: int = 0, partition: int = 0) -> tuple[str, dict[str, Any]]:
        raise AssertionError("not needed for a plan")


def file_of(name: str, state: str, rank: int) -> str:
    return f"{name}/{state}/{rank}"


def cut(shape: Shape, pattern: Pattern | None, degree: int) -> HeldShapes:
    """The local shapes of a tensor on so many tensor-parallel ranks."""
    return (pattern or Replicate()).local_shapes(shape, degree)


def model(shapes: Mapping[str, Shape], kinds: Mapping[str, Kind] | None = None, **more: Any) -> ModelDescription:
    """A model whose tensors the patterns in ``inferred`` cut."""
    topology, patterns = more.get("topology", Topology(zero_stage=1)), more.get("inferred", {})
    tensors = {
        name: ModelTensor(name, (kinds or {}).get(name, "trainable"), cut(shape, patterns.get(name), topology.tp))
        for name, shape in shapes.items()
    }
    return ModelDescription(**{"topology": topology, "tensors": tensors, **more})


def paired(checkpoint: Checkpoint, described: ModelDescription, policies: Policies | None = None, *ties: str) -> Pair:
    """Pair; ``ties`` is what comparing them finds."""
    return pair(checkpoint, described, policies or Policies(), Obstacles(), lambda *_: ties)


def reasons(found: Pair) -> dict[str | None, str]:
    return {obstacle.name: obstacle.reason for obstacle in found.obstacles}
