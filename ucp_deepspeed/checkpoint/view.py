"""The universal view: a checkpoint whose parameters are whole, whichever files and ranks hold them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from typing import TypeVar

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, HeldShapes, Parameter
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import AUTOTP_FAMILIES, before_records
from ucp_deepspeed.errors import DamagedCheckpointError, MismatchError, SpecError, each_or_problem
from ucp_deepspeed.language.families import find_family, naming_specs
from ucp_deepspeed.language.name_spaces import LogicalName
from ucp_deepspeed.language.resolve import CHECK_HINT, contradicts_record, describe, resolve_patterns
from ucp_deepspeed.language.schemes import logical_names, seen_through
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout import Layout, Shape, across_stages
from ucp_deepspeed.layout.pattern import AnyPattern, Pattern, Replicate, Shard, Unique
from ucp_deepspeed.plan import Source

T = TypeVar("T")


class UniversalView:
    """Layouts over a catalog.

    Attributes:
        logical_of: the checkpoint's names → logical ones.
        parameters: its entries, by logical name.
        patterns: pattern of every parameter and buffer.
        layouts: layout of every parameter and buffer, over the checkpoint's model-parallel ranks or, where it knows them
            (`Checkpoint.layout`), over the boxes in its files.
        vocabulary_size: rows of the unpadded vocabulary; if it is None, it isn't known and nothing is stripped.

    Raises:
        MismatchError: local shapes, or records in the checkpoint, contradict the patterns; lists the parameters.
        DamagedCheckpointError: the boxes in the files don't make a whole tensor.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        names: Mapping[str, str],
        patterns: Mapping[str, AnyPattern],
        vocabulary_size: int | None = None,
        wanted: Collection[str] | None = None,
        check_record: bool = True,
    ) -> None:
        """Args:
        names: parameter of the checkpoint, or further name of one, → logical name.
        patterns: patterns by logical name.
        wanted: logical names to include; by default all.
        check_record: refuse patterns that contradict the record of the run that saved.
        """
        self.checkpoint = checkpoint
        self.vocabulary_size = vocabulary_size if vocabulary_size is not None else checkpoint.vocabulary_size
        self.parameters: Mapping[str, Parameter] = {
            names[name]: replace(parameter, name=names[name])
            for name, parameter in checkpoint.parameters.items()
            if wanted is None or names[name] in wanted
        }
        self.groups = tuple(
            replace(group, names=tuple(names.get(name, name) for name in group.names)) for group in checkpoint.groups
        )
        self.patterns = {
            name: patterns.get(name) or (Replicate() if parameter.kind == "buffer" else Unique())
            for name, parameter in self.parameters.items()
        }
        self.logical_of = {name: logical for name, logical in names.items() if logical in self.parameters}
        self._catalog_names = {names[name]: name for name in checkpoint.parameters if name in names}
        self._further = {name: logical for name, logical in names.items() if name not in checkpoint.parameters}
        degree = checkpoint.topology.tp
        local_shapes = {name: _of_one_stage(entry, degree) for name, entry in self.parameters.items()}
        self.layouts = layouts_of(self.patterns, local_shapes, degree, self.vocabulary_size, "the checkpoint")
        for name, layout in self.layouts.items():
            try:
                boxes = checkpoint.layout(self._catalog_names[name])
            except ValueError as error:
                raise DamagedCheckpointError(f"{checkpoint.path} doesn't hold all of {name}: {error}") from error
            if boxes is not None:
                self.layouts[name] = boxes.cropped(layout.logical_shape)
        self._check_copies()
        self._checked = check_record
        if check_record:
            self._check_record()

    def _check_copies(self) -> None:
        """Check that a copy has the layout of the parameter that it is tied to in the files."""
        copies = {name: owner for name, owner in self.checkpoint.copies.items() if name in self.logical_of}
        problems = [
            f"{name}: {describe(self.patterns[name])}; in the checkpoint it is tied to {owner}, which is "
            f"{describe(self.patterns[owner])}; correct the spec"
            for name, owner in ((self.logical_of[name], self.logical_of.get(owner)) for name, owner in copies.items())
            if owner is not None and self.layouts[name] != self.layouts[owner]
        ]
        if problems:
            raise MismatchError("tied parameters can't be cut in different ways", problems)

    def _check_record(self) -> None:
        """Check the patterns against the record of the run that saved. Contradicting ones would join its files wrongly."""
        problems: list[str] = []
        for name, logical in self.logical_of.items():
            pattern, recorded = self.patterns[logical], self.checkpoint.patterns.get(name)
            if name not in self.checkpoint.recorded_shapes or recorded is None:
                continue
            found, expected = self.logical_shape(logical), self.checkpoint.recorded_shapes[name]
            if contradicts_record(pattern, recorded):
                problems.append(f"{logical}: {describe(pattern)}; recorded was {describe(recorded)}")
            elif found != expected and not (isinstance(pattern, Shard) and pattern.vocabulary):
                problems.append(f"{logical}: logical shape {found}; recorded was {expected}")
        if problems:
            path = self.checkpoint.path
            record = f"{MANIFEST_NAME} in {path}; if that is wrong, remove it"
            if not (path / MANIFEST_NAME).exists():
                record = f"what AutoTP recorded in {path}; correct the spec"
            raise MismatchError(f"the layouts contradict {record}", problems)

    @classmethod
    def of(
        cls, checkpoint: Checkpoint, spec: Spec | None = None, vocabulary_size: int | None = None, degree: int = 1
    ) -> UniversalView:
        """Make the view of a checkpoint by itself, without a live target.

        Args:
            degree: tensor-parallel size of a target for which the patterns must also work.

        Raises:
            SpecError: tensor-parallel sizes differ, and nothing tells the layouts, or only a guess that may be wrong.
        """
        names = names_of(checkpoint, naming_specs(spec, parameter_names(checkpoint)))
        patterns = patterns_of(checkpoint, names, [names[name] for name in parameter_names(checkpoint)], spec, degree)
        if spec is None:
            _check_guess(checkpoint, list(patterns), held_shapes(checkpoint, names))
        return cls(checkpoint, names, patterns, vocabulary_size)

    def under_names_of(self, other: UniversalView) -> UniversalView:
        """Return this view with the other's names, if names differ by wrappers of modules alone; itself if none does."""
        wrapped = seen_through(self.parameters, other.parameters)
        return self.under({name: wrapped.get(logical, logical) for name, logical in self.logical_of.items()})

    def under(self, names: Mapping[str, str]) -> UniversalView:
        """Return this view with other logical names, by the checkpoint's names; itself if none differs."""
        renamed = {self.logical_of[name]: logical for name, logical in names.items() if name in self.logical_of}
        if all(name == logical for name, logical in renamed.items()):
            return self
        patterns = {renamed.get(name, name): pattern for name, pattern in self.patterns.items()}
        names = {**self._further, **self.logical_of, **names}
        return UniversalView(self.checkpoint, names, patterns, self.vocabulary_size, check_record=self._checked)

    def over(self, checkpoint: Checkpoint) -> UniversalView:
        """Return the same view of another catalog of the same parameters."""
        names = self.logical_of | self._further
        return UniversalView(checkpoint, names, self.patterns, self.vocabulary_size, check_record=self._checked)

    def with_padding(self) -> UniversalView:
        """Return this view with the rows of padding that all vocabularies have in the checkpoint."""
        cut = {name: p.dim for name, p in self.patterns.items() if isinstance(p, Shard) and p.vocabulary}
        rows = min((self.padded_shape(name)[dim] for name, dim in cut.items()), default=self.vocabulary_size)
        names = self.logical_of | self._further
        return UniversalView(self.checkpoint, names, self.patterns, rows, check_record=self._checked)

    @property
    def tied(self) -> dict[str, str]:
        """Further logical names of tied parameters → the logical name that each has here."""
        return {
            self._further[alias]: self.logical_of[owner]
            for alias, owner in self.checkpoint.tied.items()
            if alias in self._further and owner in self.logical_of
        }

    @classmethod
    def of_single_rank(cls, checkpoint: Checkpoint, names: Mapping[str, str], wanted: Collection[str]) -> UniversalView:
        """Make the view of a checkpoint without tensor parallelism, padding included: all that its rank holds."""
        # The record tells how other ranks would share it, and contradicts nothing here.
        return cls(checkpoint, names, dict.fromkeys(wanted, Replicate()), None, wanted, check_record=False)

    def logical_shape(self, name: str) -> Shape:
        """Shape of the whole, unpadded parameter."""
        return self.layouts[name].logical_shape

    def padded_shape(self, name: str) -> Shape:
        """Shape of the whole parameter with the rows of padding that the checkpoint holds."""
        held = _of_one_stage(self.parameters[name], self.checkpoint.topology.tp)
        return self.patterns[name].logical_shape(tuple(shape for shape in held if shape is not None))

    def layouts_on(self, degree: int) -> dict[str, Layout]:
        """Return all layouts on a plain model of another tensor-parallel size; a MismatchError lists what can't be cut so."""
        shapes, problems = each_or_problem(
            self.patterns, lambda name: self.patterns[name].local_shapes(self.logical_shape(name), degree)
        )
        if problems:
            raise MismatchError(f"{self.checkpoint.path} can't be cut over {degree} tensor-parallel ranks", problems)
        return layouts_of(self.patterns, shapes, degree, self.vocabulary_size, "the target")

    def source(self, name: str, state: str) -> Source[FileExtent]:
        """Return the source that a plan reads from."""
        return Source(self.layouts[name], partial(self.checkpoint.fragments, self._catalog_names[name], state))


def names_of(checkpoint: Checkpoint, specs: Sequence[Spec]) -> dict[str, LogicalName]:
    """Return the logical names of a checkpoint's parameters and buffers, and of further names of tied ones if these differ.

    Raises:
        SpecError: a spec gives a parameter two names, or two parameters one name.
    """
    names = logical_names(list(checkpoint.parameters), specs, checkpoint.logical_names)
    further = [alias for alias in checkpoint.tied if alias not in names]
    if not further:
        return names
    try:
        found = logical_names([*names, *further], specs, checkpoint.logical_names)
    except SpecError:  # the scheme isn't meant for them
        found = {alias: LogicalName(alias) for alias in further}
    taken = set(names.values())
    return names | {alias: found[alias] for alias in further if found[alias] not in taken}


def parameter_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names that a spec covers: parameters, without buffers."""
    return [name for name, parameter in checkpoint.parameters.items() if parameter.kind != "buffer"]


def _check_guess(checkpoint: Checkpoint, names: Sequence[str], local_shapes: Mapping[str, tuple[Shape, ...]]) -> None:
    """Refuse to guess by names if the AutoTP that cut the model records nothing: such versions leave other parts of it whole."""
    if checkpoint.topology.tp == 1 or checkpoint.patterns or not before_records(checkpoint.run.ds_version):
        return
    family = find_family(names, local_shapes).spec
    if family is not None and family.family.startswith(AUTOTP_FAMILIES):
        raise SpecError(
            f"{checkpoint.path} was saved by DeepSpeed {checkpoint.run.ds_version}, whose AutoTP doesn't record how it cut the "
            f'model, and cut it in other ways than later ones: compare with "ucp spec check {family.family} --against '
            f'{checkpoint.path}" (is lm_head whole on each rank?), and name the spec that fits: --spec {family.family}'
        )


def patterns_of(
    checkpoint: Checkpoint,
    names: Mapping[str, LogicalName],
    wanted: Sequence[LogicalName],
    spec: Spec | None,
    degree: int,
    inferred: Mapping[str, Pattern] | None = None,
    exact: bool = False,
    refused: Mapping[str, str] | None = None,
) -> dict[str, AnyPattern]:
    """Resolve how parameters are sharded, by all that a checkpoint and perhaps a target tell; see `resolve_patterns`.

    Args:
        names: names of the checkpoint → logical names.
        wanted: logical names of the parameters.
        degree: tensor-parallel size of the target.
        inferred, exact, refused: what the target tells, by logical name.
    """

    def logical(values: Mapping[str, T]) -> dict[str, T]:
        return {names[name]: value for name, value in values.items() if name in names}

    return resolve_patterns(
        wanted,
        degree=max(checkpoint.topology.tp, degree),
        spec=spec,
        recorded=logical(checkpoint.patterns),
        inferred=inferred,
        exact=exact,
        refused={**logical(checkpoint.refused), **(refused or {})},
        local_shapes=held_shapes(checkpoint, names),
        same_degree=checkpoint.topology.tp == degree,
    )


def held_shapes(checkpoint: Checkpoint, names: Mapping[str, LogicalName]) -> dict[str, tuple[Shape, ...]]:
    """Return shapes on the tensor-parallel ranks of the pipeline stage whose copy of a parameter is read, by logical name."""
    degree = checkpoint.topology.tp
    return {
        names[name]: tuple(shape for shape in _of_one_stage(entry, degree) if shape is not None)
        for name, entry in checkpoint.parameters.items()
        if name in names
    }


def layouts_of(
    patterns: Mapping[str, AnyPattern],
    local_shapes: Mapping[str, HeldShapes],
    degree: int,
    vocabulary_size: int | None,
    side: str,
) -> dict[str, Layout]:
    """Return the layout of each parameter on one side.

    Args:
        local_shapes: shape of the local tensor of each model-parallel rank; None if it holds none.
        degree: tensor-parallel size.
        side: ``the checkpoint`` or ``the target``, for the message.

    Raises:
        MismatchError: shapes contradict patterns; lists the parameters.
    """
    layouts, problems = each_or_problem(
        local_shapes, lambda name: _layout(patterns[name], local_shapes[name], degree, vocabulary_size)
    )
    if problems:
        raise MismatchError(f"shapes of {side} contradict the patterns", problems, CHECK_HINT)
    return layouts


@lru_cache(maxsize=4096)
def _layout(pattern: AnyPattern, shapes: HeldShapes, degree: int, vocabulary_size: int | None) -> Layout:
    """Make a layout. Cached, since the layers of a model share a few layouts."""
    stages: list[Layout | None] = []
    for first in range(0, len(shapes), degree):
        held = tuple(shape for shape in shapes[first : first + degree] if shape is not None)
        if held and len(held) < degree:
            raise ValueError(f"{len(held)} of {degree} tensor-parallel ranks hold it")
        stages.append(pattern.layout(pattern.logical_shape(held, vocabulary_size), held) if held else None)
    return across_stages(stages)


def _of_one_stage(parameter: Parameter, degree: int) -> HeldShapes:
    """Return the shapes of the pipeline stage whose copy of a parameter is read, and None for other stages."""
    shapes, stage = parameter.local_shapes, parameter.stage
    if stage is None:
        stage = next((rank for rank, shape in enumerate(shapes) if shape is not None), 0) // degree
    return tuple(shape if rank // degree == stage else None for rank, shape in enumerate(shapes))
