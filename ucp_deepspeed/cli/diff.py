"""``ucp diff``: do two checkpoints, of whatever forms and topologies, hold the same state bit for bit?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite, prod
from pathlib import Path
from typing import Any

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.derived import with_copies
from ucp_deepspeed.checkpoint.expert_forms import in_form_of
from ucp_deepspeed.checkpoint.opening import warn_of_sums_alone
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli.options import NO
from ucp_deepspeed.cli.printing import echo, print_json, print_lines
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.errors import listed
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.transfer.compare import Difference, compare


def tell(
    a: Path,
    b: Path,
    tag_a: str | None,
    tag_b: str | None,
    spec: str | None,
    spec_a: str | None,
    spec_b: str | None,
    vocabulary_size: int | None,
    as_json: bool,
    limit: int,
    chunk: int,
) -> int:
    """Do what ``ucp diff`` says."""
    first, second = open_checkpoint(a, tag_a), open_checkpoint(b, tag_b)
    for opened in (first, second):
        warn_of_sums_alone(opened)
    if first.topology.model_parallel == 1:
        held = {name: parameter.local_shapes[0] for name, parameter in first.parameters.items()}
        second = in_form_of(second, {name: shape for name, shape in held.items() if shape is not None})
    own_a, own_b = (None if own is None else load_spec(own) for own in (spec_a or spec, spec_b or spec))
    view_a = UniversalView.of(with_copies(first, second.parameters), own_a, vocabulary_size)
    view_b = UniversalView.of(with_copies(second, first.parameters), own_b, vocabulary_size).under_names_of(view_a)
    with shown_progress("diff") as progress:
        differences = compare(view_a, view_b, chunk_numbytes=chunk << 20, progress=progress)
    if as_json:
        print_json(_report(first, second, view_a, differences))
    elif not differences:
        echo(f"equal: {', '.join(f'{count} {what}' for what, count in _extent(view_a).items())}")
    else:
        _print(differences, limit)
    return NO if differences else 0


def _report(a: Checkpoint, b: Checkpoint, view: UniversalView, differences: Sequence[Difference]) -> dict[str, Any]:
    """Return the object that ``--json`` prints; ``docs/json.md`` lists its keys."""
    found = [asdict(difference) for difference in differences]
    for entry in found:
        if entry["max_abs"] is not None and not isfinite(entry["max_abs"]):
            entry["max_abs"] = str(entry["max_abs"])
    return {
        "a": {"path": str(a.path), "form": a.form},
        "b": {"path": str(b.path), "form": b.form},
        "equal": not differences,
        "held": _extent(view),
        "differences": found,
    }


def _extent(view: UniversalView) -> dict[str, int]:
    """Count what there is to compare."""
    states = [
        prod(view.logical_shape(name)) * ITEMSIZE[dtype]
        for name, parameter in view.parameters.items()
        for dtype in parameter.states.values()
    ]
    return {"parameters": len(view.parameters), "states": len(states), "bytes": sum(states)}


def _print(differences: Sequence[Difference], limit: int) -> None:
    counts = Counter(difference.what for difference in differences)
    kinds = ", ".join(f"{count} {what}" for what, count in counts.items())
    print_lines(f"different: {len(differences)} differences ({kinds})", *listed(differences, limit))
