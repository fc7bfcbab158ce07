"""Match a checkpoint's parameters with a model's, and decide what happens to those that differ.

Everything that isn't a plain restore is an error, unless a policy allows it by name.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from ucp_deepspeed.checkpoint.checkpoint import MASTER, HeldShapes, Kind, Parameter
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language.renames import as_lines, suggest_renamings
from ucp_deepspeed.layout import Shape


class Held(Protocol):
    """The properties that either side knows of a parameter or buffer."""

    @property
    def kind(self) -> Kind:
        """See `ucp_deepspeed.checkpoint.checkpoint.Kind`."""

    @property
    def local_shapes(self) -> HeldShapes:
        """See `ucp_deepspeed.checkpoint.checkpoint.HeldShapes`."""

    @property
    def idle(self) -> bool:
        """Return whether it is trained, and needs neither gradient nor states for now."""


def _unfrozen(saved: Parameter, live: Held) -> bool:
    """Return whether it is trained in the model and not in the checkpoint. A parameter that needs no gradient for now needs no
    states either."""
    return (saved.kind, live.kind) == ("frozen", "trainable") and not live.idle


def _frozen(saved: Parameter, live: Held) -> bool:
    """Return whether it is trained in the checkpoint and not in the model, and has states that would be lost."""
    if not saved.kind == "trainable" != live.kind:
        return False
    return bool(saved.states.keys() - {MASTER} or saved.scalars or saved.refused)


@dataclass(frozen=True)
class Policies:
    """The policies of a load: what it may do beside restoring.

    Attributes:
        initialise: a trained parameter, or a part of one, that the checkpoint lacks keeps the model's value, with zero state.
        drop: a trained parameter or an optimizer state that the model has no place for is left out.
        optimizer_states: ``restore`` them; ``keep`` the live ones; ``reset`` them to zero, as before a first step.
        strict: frozen parameters and buffers must be the same on both sides too.
        reshape: parameters of another shape keep the model's value.
        differing: how numbers of the optimizer that differ over partitions become one, where the partitions change.
        rounded: masters begin as the source's low-precision weights (``zero_optimization.load_from_fp32_weights: false``).
    """

    initialise: bool = False
    drop: bool = False
    optimizer_states: Literal["restore", "keep", "reset"] = "restore"
    strict: bool = True
    reshape: bool = False
    rounded: bool = False
    differing: OnDiffering = "error"


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


def match(source: Mapping[str, Parameter], target: Mapping[str, Held]) -> Matching:
    """Pair both sides' parameters and buffers, by logical name."""
    both = [name for name in target if name in source]
    return Matching(
        tuple(both),
        tuple(name for name in target if name not in source),
        tuple(name for name in source if name not in target),
        tuple(name for name in both if _unfrozen(source[name], target[name])),
        tuple(name for name in both if _frozen(source[name], target[name])),
    )


def check_matching(
    source: Mapping[str, Parameter], target: Mapping[str, Held], policies: Policies, heading: str
) -> None:
    """Refuse every difference that no policy allows.

    Raises:
        MismatchError: lists every parameter that is missing, extra or of another kind.
    """
    names = sorted(source.keys() | target.keys())
    problems = [problem for name in names for problem in _problems(name, source, target, policies)]
    if problems:
        raise MismatchError(
            heading, problems, renaming_hint(source, target) or _policies_hint(source, target, problems)
        )


RENAMED_HINT = "if they are the same under other names, a spec can say so ('names' in docs/language.md)"


UNRECORDED_HINT = "load_checkpoint(…, load_module_strict=False) keeps the model's own values of what isn't trained"


def check_recorded(unrecorded: Mapping[str, str], policies: Policies, where: str) -> None:
    """Refuse a load that leaves parameters of the model as they are, since their values are in no file.

    Args:
        unrecorded: these parameters, with the reason.
        where: the checkpoint, for messages.

    Raises:
        MismatchError: lists them.
    """
    if unrecorded and policies.strict and not policies.initialise:
        problems = [f"{name}: {why}" for name, why in unrecorded.items()]
        raise MismatchError(f"{where} doesn't hold all of the model", problems, UNRECORDED_HINT)


SHOWN = 3
"""Names of each side in the message of a load that would restore nothing."""

WARM_START_HINT = (
    "to begin anew with the weights that match, call load_checkpoint(…, load_module_strict=False, "
    "load_optimizer_states=False)"
)


def check_any(
    source: Mapping[str, Parameter], target: Mapping[str, Held], matching: Matching, policies: Policies, where: str
) -> None:
    """Refuse a load that would only seem to be one: it restores nothing, or resumes with nothing that is trained.

    Args:
        where: the checkpoint, for messages.

    Raises:
        MismatchError: names what the two sides have.
    """
    held = [name for name, tensor in source.items() if tensor.kind != "buffer"]
    wanted = [name for name, tensor in target.items() if tensor.kind != "buffer"]
    trained = [name for name in wanted if target[name].kind == "trainable"]
    found = frozenset(held).intersection(matching.restored)
    if wanted and not found.intersection(wanted):
        raise MismatchError(
            f"{where} holds no parameter of the model: it has {_some(held)}, and the model {_some(wanted)}; "
            + RENAMED_HINT,
            remedy=renaming_hint(source, target),
        )
    if trained and policies.optimizer_states != "keep" and not found.intersection(trained):
        raise MismatchError(
            f"{where} holds none of the parameters that the model trains ({_some(trained)}), and so nothing to go on "
            f"with; it has {_some(held)}; {RENAMED_HINT}; {WARM_START_HINT}"
        )


def _some(names: Sequence[str]) -> str:
    return (
        ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "") or "no parameters"
    )


def _policies_hint(source: Mapping[str, Held], target: Mapping[str, Held], problems: Sequence[str]) -> str:
    """Name the settings that take the model as it is; problems of kinds have hints of their own."""
    concerned = {problem.partition(": ")[0] for problem in problems}
    missing, extra = concerned - source.keys(), concerned - target.keys()
    ways = [RENAMED_HINT] if missing and extra else []
    ways += ['"on_missing": "init" lets what is missing keep the model\'s values'] if missing else []
    ways += ['"on_extra": "drop" leaves out what is extra'] if extra else []
    return "; ".join(ways)


def renaming_hint(source: Mapping[str, Held], target: Mapping[str, Held]) -> str:
    """Return what to write into a spec, where names that only one side has differ only in their beginnings; else nothing."""
    common = source.keys() & target.keys()
    sides = (
        {name: tensor.local_shapes for name, tensor in side.items() if name not in common} for side in (source, target)
    )
    extra, missing = ({name: some_shape(shapes) for name, shapes in side.items()} for side in sides)
    degrees = {len(tensor.local_shapes) for side in (source, target) for tensor in side.values()}
    if len(degrees) > 1:  # local sizes differ: the number of dimensions is all that both sides have in common
        extra, missing = (
            {name: shape and (0,) * len(shape) for name, shape in side.items()} for side in (extra, missing)
        )
    renamings = suggest_renamings(extra, missing, common)
    if not renamings:
        return ""
    return (
        "they may be the same under other names; a spec with these lines beside its rules says so "
        f'("universal_checkpoint": {{"spec": "path.yaml"}}, or --spec on the command line):\n{as_lines(renamings)}'
    )


def _problems(
    name: str, source: Mapping[str, Parameter], target: Mapping[str, Held], policies: Policies
) -> Iterator[str]:
    """Yield what is wrong with one name; nothing when it is on both sides, or a policy allows that it isn't."""
    if name not in source:
        live = target[name]
        if not (policies.initialise or (live.kind != "trainable" and not policies.strict)):
            yield f"{name}: missing in the checkpoint; the model expects {some_shape(live.local_shapes)}"
    elif name not in target:
        saved = source[name]
        if not (policies.drop or (saved.kind != "trainable" and not policies.strict)):
            yield f"{name}: extra in the checkpoint ({saved.kind}, local shape {some_shape(saved.local_shapes)})"
    else:
        saved, live = source[name], target[name]
        if saved.may_be_buffer and live.kind == "buffer":
            return
        if "buffer" in (saved.kind, live.kind) and saved.kind != live.kind:
            yield f"{name}: {saved.kind} in the checkpoint, {live.kind} in the model"
        elif policies.optimizer_states != "restore":
            return  # parameters' kinds differ in optimizer states alone
        elif _unfrozen(saved, live) and not policies.initialise:
            yield f"{name}: frozen in the checkpoint, trainable in the model{UNFROZEN_HINT}"
        elif _frozen(saved, live) and not policies.drop:
            yield f"{name}: trainable in the checkpoint, frozen in the model{FROZEN_HINT}"


UNFROZEN_HINT = '; the checkpoint has no optimizer state of it: "on_missing": "init" starts that at zero'
FROZEN_HINT = (
    "; to keep its optimizer state, have it in the optimizer before the load: build the engine with requires_grad on and switch "
    "it off afterwards, or add its parameter group first; "
    '"on_extra": "drop" leaves the state out'
)


def some_shape(shapes: HeldShapes) -> Shape | None:
    """Return the local shape on the first rank that holds the parameter."""
    return next((shape for shape in shapes if shape is not None), None)


def is_grown(found: Shape, expected: Shape) -> bool:
    """Return whether a model has further rows and is the same otherwise: a vocabulary, or a layer's outputs, that grew."""
    return len(found) == len(expected) > 0 and found[0] < expected[0] and found[1:] == expected[1:]
