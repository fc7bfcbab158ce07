"""``ucp diff``: whether two checkpoints, of whatever forms and topologies, hold the same state bit for bit."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from math import isfinite, prod
from pathlib import Path
from typing import Any

import click

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.expert_forms import in_form_of_other
from ucp_deepspeed.checkpoint.retied import with_copies
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli.options import CHECKPOINT, command, spec_option, view_of, vocabulary_option
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.dtypes import ITEMSIZE
from ucp_deepspeed.transfer.compare import Difference, compare

DIFFERENT = 1
"""Exit status for checkpoints that differ."""


@command(
    "diff",
    examples=[
        "ucp diff runs/a runs/a-universal",
        "ucp diff runs/a runs/a-universal --json",
        "ucp diff runs/a runs/a --tag-a global_step100 --tag-b global_step200",
    ],
)
@click.argument("a", type=CHECKPOINT)
@click.argument("b", type=CHECKPOINT)
@click.option("--tag-a", help="Tag folder of A to take; by default the one that its file 'latest' names.")
@click.option("--tag-b", help="The same for B.")
@spec_option
@click.option("--spec-a", metavar="NAME|PATH", help="Family or spec file for A alone.")
@click.option("--spec-b", metavar="NAME|PATH", help="Family or spec file for B alone.")
@vocabulary_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with all differences.")
@click.option("--limit", type=click.IntRange(min=0), default=20, show_default=True, help="Differences to print.")
@click.option(
    "--chunk", type=click.IntRange(min=1), default=16, show_default=True, metavar="MIB", help="Memory for each side."
)
def diff_command(
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
) -> None:
    """Compare the whole parameters, optimizer states and counters of checkpoints A and B, bit for bit.

    Experts that B keeps in other tensors are compared in the form of A. A weight that only one side ties is compared under each
    of its names.

    Exit status: 0 when they are equal, 1 when they differ, 2 when they can't be compared.
    """
    first, second = open_checkpoint(a, tag_a), open_checkpoint(b, tag_b)
    second = in_form_of_other(second, first)
    view_a = view_of(with_copies(first, second.parameters), spec_a or spec, vocabulary_size)
    view_b = view_of(with_copies(second, first.parameters), spec_b or spec, vocabulary_size)
    view_b = view_b.under_names_of(view_a)
    with shown_progress("diff") as progress:
        differences = compare(view_a, view_b, chunk_numbytes=chunk << 20, progress=progress)
    if as_json:
        click.echo(json.dumps(_report(first, second, view_a, differences), indent=1))
    elif not differences:
        click.echo(f"equal: {', '.join(f'{count} {what}' for what, count in _extent(view_a).items())}")
    else:
        _print(differences, limit)
    if differences:
        raise click.exceptions.Exit(DIFFERENT)


def _report(a: Checkpoint, b: Checkpoint, view: UniversalView, differences: Sequence[Difference]) -> dict[str, Any]:
    """The object that ``--json`` prints.

    Keys:
        a, b: ``path`` and ``form`` of each side.
        equal: whether there is no difference.
        held: what A holds: the number of ``parameters``, ``states`` and ``bytes``.
        differences: see `Difference`; a ``max_abs`` that is no finite number is text.
    """
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
    click.echo(f"different: {len(differences)} differences ({kinds})")
    for difference in differences[:limit]:
        click.echo(f"  {difference}")
    if len(differences) > limit:
        click.echo(f"  … and {len(differences) - limit} more")
