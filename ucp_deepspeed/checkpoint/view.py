"""The universal view: a checkpoint whose parameters are whole, whatever files and ranks they lie in.

This is the paper's universal checkpoint as a view instead of a copy: *Extract* is the catalog's fragments, *Union* the layouts'
pieces, *StripPad* the logical shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, Parameter
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language.resolve import resolve_patterns
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout import Layout, Shape
from ucp_deepspeed.layout.pattern import Pattern, Replicate, Unique
from ucp_deepspeed.plan import Source


class UniversalView:
    """Layouts over a catalog.

    Attributes:
        checkpoint: the catalog.
        patterns: of every parameter and buffer.
        layouts: of every parameter and buffer, over the checkpoint's model-parallel ranks.
        vocabulary_size: rows of the unpadded vocabulary; None when not known, then nothing is stripped.

    Raises:
        MismatchError: local shapes contradict the patterns; lists the parameters.
    """

    def __init__(
        self, checkpoint: Checkpoint, patterns: Mapping[str, Pattern], vocabulary_size: int | None = None
    ) -> None:
        self.checkpoint = checkpoint
        self.vocabulary_size = vocabulary_size if vocabulary_size is not None else checkpoint.vocabulary_size
        self.patterns = {
            name: patterns.get(name) or (Replicate() if parameter.kind == "buffer" else Unique())
            for name, parameter in checkpoint.parameters.items()
        }
        local_shapes = {name: parameter.local_shapes for name, parameter in checkpoint.parameters.items()}
        self.layouts = layouts_of(self.patterns, local_shapes, self.vocabulary_size, "the checkpoint")

    @classmethod
    def of(cls, checkpoint: Checkpoint, spec: Spec | None = None, vocabulary_size: int | None = None) -> UniversalView:
        """The view of a checkpoint by itself, without a live target.

        Raises:
            SpecError: tensor parallelism, and nothing tells the layouts.
        """
        names = [name for name, parameter in checkpoint.parameters.items() if parameter.kind != "buffer"]
        degree = checkpoint.topology.model_parallel
        patterns = resolve_patterns(names, degree=degree, spec=spec, recorded=checkpoint.patterns)
        return cls(checkpoint, patterns, vocabulary_size)

    def parameter(self, name: str) -> Parameter:
        """The catalog's entry."""
        return self.checkpoint.parameters[name]

    def logical_shape(self, name: str) -> Shape:
        """Shape of the whole, unpadded parameter."""
        return self.layouts[name].logical_shape

    def source(self, name: str, state: str) -> Source[FileExtent]:
        """What a plan reads from."""
        return Source(
            self.layouts[name],
            lambda rank, start, stop: self.checkpoint.fragments(name, state, rank, start, stop),
        )


def layouts_of(
    patterns: Mapping[str, Pattern],
    local_shapes: Mapping[str, Sequence[Shape]],
    vocabulary_size: int | None,
    side: str,
) -> dict[str, Layout]:
    """The layout of each parameter on one side.

    Args:
        local_shapes: shape of the local tensor of each model-parallel rank.
        side: ``the checkpoint`` or ``the target``, for the message.

    Raises:
        MismatchError: shapes contradict patterns; lists the parameters.
    """
    layouts: dict[str, Layout] = {}
    problems: list[str] = []
    for name, shapes in local_shapes.items():
        try:
            layouts[name] = _layout(patterns[name], tuple(shapes), vocabulary_size)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise MismatchError(f"shapes of {side} contradict the patterns", problems)
    return layouts


@lru_cache(maxsize=4096)
def _layout(pattern: Pattern, shapes: tuple[Shape, ...], vocabulary_size: int | None) -> Layout:
    """Cached, since the layers of a model share a few layouts."""
    return pattern.layout(pattern.logical_shape(shapes, vocabulary_size), shapes)
