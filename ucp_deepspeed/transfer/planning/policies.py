"""Match a checkpoint's parameters with a model's, and decide what happens to those that differ.

Everything that isn't a plain restore is an obstacle, unless a policy allows it by name. One error lists all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from ucp_deepspeed.checkpoint.checkpoint import MASTER, HeldShapes, Parameter
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.errors import ListingError, MismatchError, SpecError
from ucp_deepspeed.language.renames import as_lines, suggest_renamings
from ucp_deepspeed.layout import Shape
from ucp_deepspeed.transfer.planning.target import ModelTensor


@dataclass(frozen=True, slots=True)
class Obstacle:
    """A reason why a load is impossible; ``name`` is the parameter or group concerned, or None for the whole model. It concerns
    the ``others`` too."""

    name: str | None
    reason: str
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.reason if self.name is None else f"{self.name}: {self.reason}"


class Obstacles:
    """The obstacles to one load, each once, in the order in which they were found.

    Attributes:
        remedies: hints beyond those in the obstacles themselves.
    """

    def __init__(self) -> None:
        self._found: dict[Obstacle, None] = {}
        self.remedies: list[str] = []

    def __iter__(self) -> Iterator[Obstacle]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)

    @property
    def names(self) -> set[str | None]:
        """Parameters and groups with an obstacle; None for the whole model."""
        return {name for obstacle in self for name in (obstacle.name, *obstacle.others)}

    def add(self, name: str | None, reason: str, others: tuple[str, ...] = ()) -> None:
        """Add an obstacle."""
        self._found[Obstacle(name, reason, others)] = None

    def add_line(self, line: str, reason: str = "") -> None:
        """Add an obstacle as an error lists it: a name, and the reason if it isn't the same for all of them."""
        name, _, own = line.partition(": ")
        self.add(name, own or reason)

    def add_error(self, error: ListingError) -> None:
        """Add what an error lists; a spec's error stays one."""
        if isinstance(error, SpecError):
            self.add(None, str(error))
            return
        if not error.problems:
            self.add(None, error.heading)
        for problem in error.problems:
            self.add_line(problem, error.heading)
        self.add_remedy(error.remedy)

    def add_remedy(self, remedy: str) -> None:
        """Add a hint, if there is one."""
        if remedy and remedy not in self.remedies:
            self.remedies.append(remedy)

    def check(self, source: object) -> None:
        """Refuse to go on with obstacles.

        Args:
            source: the checkpoint, for the message.

        Raises:
            MismatchError: lists them all.
        """
        lines, remedy = [str(obstacle) for obstacle in self], "\n".join(self.remedies)
        if self.names == {None} and len(self) == 1:
            raise MismatchError(lines[0], remedy=remedy)
        if lines:
            raise MismatchError(f"{source} doesn't fit the model", lines, remedy)


@dataclass(frozen=True)
class Policies:
    """The policies of a load: what it may do beside restoring.

    Attributes:
        initialise: a trained parameter, or a part of one, that the checkpoint lacks keeps the model's value, with zero state.
        drop: a trained parameter or an optimizer state that the model has no place for is left out.
        optimizer_states: ``restore`` them; ``keep`` the live ones; ``reset`` them to zero, as before a first step.
        strict: frozen parameters and buffers must be the same on both sides too.
        reshape: parameters of another shape keep the model's value: a function of the user's own fills what doesn't match.
        differing: how numbers of the optimizer that differ over partitions become one, where the partitions change.
        rounded: masters begin as the source's low-precision weights (``zero_optimization.load_from_fp32_weights: false``).
        keep_settings: parameter groups keep the model's hyper-parameters; counts of steps are restored even so.
        scheduled: hyper-parameters that groups keep since the live scheduler, which sets them, stays as it is; see `SCHEDULED`.
    """

    initialise: bool = False
    drop: bool = False
    optimizer_states: Literal["restore", "keep", "reset"] = "restore"
    strict: bool = True
    reshape: bool = False
    rounded: bool = False
    differing: OnDiffering = "error"
    keep_settings: bool = False
    scheduled: frozenset[str] = frozenset()


SCHEDULED = frozenset(("lr", "initial_lr", "min_lr", "max_lr", "base_momentum", "max_momentum"))
"""Keys of parameter groups that schedulers of learning rates make or set; some set ``betas`` or ``momentum`` too."""


@dataclass(frozen=True)
class Matching:
    """The outcome, by logical name, in the order of the side that has them.

    Attributes:
        restored: parameters and buffers on both sides.
        initialised: parameters and buffers that only the model has; they keep its values.
        dropped: parameters and buffers that only the checkpoint has.
        unfrozen: trained in the model and not in the checkpoint: the weight is restored, the optimizer state starts at zero.
        frozen: trained in the checkpoint and not in the model: the master weight is restored, the optimizer state is dropped.
    """

    restored: tuple[str, ...]
    initialised: tuple[str, ...]
    dropped: tuple[str, ...]
    unfrozen: tuple[str, ...]
    frozen: tuple[str, ...]


Source = Mapping[str, Parameter]
"""The checkpoint's parameters and buffers, by logical name."""

Target = Mapping[str, ModelTensor]
"""The model's, by logical name."""


def match(source: Source, target: Target) -> Matching:
    """Pair both sides' parameters and buffers."""
    both = [name for name in target if name in source]
    return Matching(
        tuple(both),
        tuple(name for name in target if name not in source),
        tuple(name for name in source if name not in target),
        tuple(name for name in both if _unfrozen(source[name], target[name])),
        tuple(name for name in both if _frozen(source[name], target[name])),
    )


def _unfrozen(saved: Parameter, live: ModelTensor) -> bool:
    """Return whether only the model trains it. A parameter that needs no gradient for now needs no states either."""
    return (saved.kind, live.kind) == ("frozen", "trainable") and not live.idle


def _frozen(saved: Parameter, live: ModelTensor) -> bool:
    """Return whether only the checkpoint trained it, and has states that would be lost."""
    lost = saved.kind == "trainable" != live.kind
    return lost and bool(saved.states.keys() - {MASTER} or saved.scalars or saved.refused)


UNRECORDED_HINT = "load_checkpoint(…, load_module_strict=False) keeps the model's own values of what isn't trained"
RENAMED_HINT = "if they are the same under other names, a spec can say so ('names' in docs/language.md)"
WARM_START_HINT = (
    "to begin anew with the weights that match, call load_checkpoint(…, load_module_strict=False, "
    "load_optimizer_states=False)"
)
UNFROZEN_HINT = '; the checkpoint has no optimizer state of it: "on_missing": "init" starts that at zero'
FROZEN_HINT = (
    "; to keep its optimizer state, have it in the optimizer before the load: build the engine with requires_grad on and switch "
    "it off afterwards, or add its parameter group first; "
    '"on_extra": "drop" leaves the state out'
)


def check_recorded(unrecorded: Mapping[str, str], policies: Policies, obstacles: Obstacles) -> None:
    """Refuse a load that leaves parameters of the model as they are, since their values are in no file.

    Args:
        unrecorded: these parameters, with the reason.
    """
    if unrecorded and policies.strict and not policies.initialise:
        for name, why in unrecorded.items():
            obstacles.add(name, why)
        obstacles.add_remedy(UNRECORDED_HINT)


def check_matching(source: Source, target: Target, policies: Policies, obstacles: Obstacles) -> None:
    """Refuse every parameter that is missing, extra or of another kind, unless a policy allows it or it is refused already."""
    missing, extra = [], []
    for name in sorted((source.keys() | target.keys()).difference(obstacles.names)):
        reason = _reason(source.get(name), target.get(name), policies)
        if reason is not None:
            obstacles.add(name, reason)
            missing += [name] if name not in source else []
            extra += [name] if name not in target else []
    ways = [RENAMED_HINT] if missing and extra else []
    ways += ['"on_missing": "init" lets what is missing keep the model\'s values'] if missing else []
    ways += ['"on_extra": "drop" leaves out what is extra'] if extra else []
    if ways:
        obstacles.add_remedy(renaming_hint(source, target) or "; ".join(ways))


def _reason(saved: Parameter | None, live: ModelTensor | None, policies: Policies) -> str | None:
    """Return what is wrong with one name; None when it is on both sides, or a policy allows that it isn't."""
    if saved is None or live is None:
        held, allowed = (live, policies.initialise) if saved is None else (saved, policies.drop)
        assert held is not None, "one side has it"
        if allowed or (held.kind != "trainable" and not policies.strict):
            return None
        shape = some_shape(held.local_shapes)
        if saved is None:
            return f"missing in the checkpoint; the model expects {shape}"
        return f"extra in the checkpoint ({held.kind}, local shape {shape})"
    if saved.may_be_buffer and live.kind == "buffer":
        return None
    if "buffer" in (saved.kind, live.kind) and saved.kind != live.kind:
        return f"{saved.kind} in the checkpoint, {live.kind} in the model"
    if policies.optimizer_states != "restore":
        return None  # parameters' kinds differ in optimizer states alone
    if _unfrozen(saved, live) and not policies.initialise:
        return f"frozen in the checkpoint, trainable in the model{UNFROZEN_HINT}"
    if _frozen(saved, live) and not policies.drop:
        return f"trainable in the checkpoint, frozen in the model{FROZEN_HINT}"
    return None


def no_schedule(checkpoint: object, step: int, way: str) -> str:
    """Return the words for a model with a scheduler, and a checkpoint without the state of one.

    Args:
        way: the setting or argument that lets the live one begin anew.
    """
    return (
        f"{checkpoint} holds no state of a learning rate scheduler, and the engine has one, which would begin anew at step "
        f"{step}. Make optimizer and scheduler where the run that saved made them (in the DeepSpeed config, or in the script or "
        f"framework); or let the live one begin anew: {way}"
    )


ANEW_WAY = '"scheduler": "keep" in "universal_checkpoint"'


def check_any(
    source: Source, target: Target, matching: Matching, policies: Policies, obstacles: Obstacles, where: object
) -> None:
    """Refuse a load that would only seem to be one: it restores nothing, or resumes with nothing that is trained.

    Args:
        where: the checkpoint, for messages.
    """
    held = [name for name, tensor in source.items() if tensor.kind != "buffer"]
    wanted = [name for name, tensor in target.items() if tensor.kind != "buffer"]
    trained = [name for name in wanted if target[name].kind == "trainable"]
    found = frozenset(held).intersection(matching.restored)
    if wanted and not found.intersection(wanted):
        obstacles.add(
            None,
            f"{where} holds no parameter of the model: it has {some_names(held)}, and the model {some_names(wanted)}; "
            f"{RENAMED_HINT}",
        )
        obstacles.add_remedy(renaming_hint(source, target))
    elif trained and policies.optimizer_states != "keep" and not found.intersection(trained):
        obstacles.add(
            None,
            f"{where} holds none of the parameters that the model trains ({some_names(trained)}), and so nothing to go on "
            f"with; it has {some_names(held)}; {RENAMED_HINT}; {WARM_START_HINT}",
        )


def some_names(names: Sequence[str], most: int = 3) -> str:
    """List the first names, and count the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "") or "no parameters"


NOTHING_IS_CUT = 'family: renamed\nrules:\n  - {match: "**", pattern: replicate}\n'
"""The rest of a spec for a model without tensor parallelism."""


def renaming_hint(source: Source, target: Target) -> str:
    """Return what to write into a spec, where names that only one side has differ only in their beginnings; else nothing."""
    held = [{name: tensor.local_shapes for name, tensor in side.items()} for side in (source, target)]
    common = source.keys() & target.keys()
    # Where local sizes differ, the number of dimensions is all that both sides have in common.
    same_degree = len({len(shapes) for side in held for shapes in side.values()}) == 1
    shapes = [{name: some_shape(side[name]) for name in side if name not in common} for side in held]
    if not same_degree:
        shapes = [{name: shape and (0,) * len(shape) for name, shape in side.items()} for side in shapes]
    extra, missing = shapes
    renamings = suggest_renamings(extra, missing, common)
    if not renamings:
        return ""
    uncut = same_degree and all(len(shapes) == 1 for side in held for shapes in side.values())
    return (
        f"they may be the same under other names; a spec with these lines{'' if uncut else ' beside its rules'} says so "
        f'("universal_checkpoint": {{"spec": "path.yaml"}}, or --spec on the command line):\n'
        f"{NOTHING_IS_CUT if uncut else ''}{as_lines(renamings)}"
    )


def some_shape(shapes: HeldShapes) -> Shape | None:
    """Return the local shape on the first rank that holds the parameter."""
    return next((shape for shape in shapes if shape is not None), None)
