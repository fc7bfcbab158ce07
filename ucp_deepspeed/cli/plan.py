"""``ucp plan``: what the ranks of another topology would read and hold, without starting them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import click
from rich.table import Table

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.cli.options import (
    CHECKPOINT,
    command,
    degrees,
    in_words,
    read_spec,
    spec_option,
    tag_option,
    vocabulary_option,
)
from ucp_deepspeed.cli.plots import draw_plan, plot_option
from ucp_deepspeed.cli.tables import new_console, new_table, print_lines, print_plain
from ucp_deepspeed.errors import MAX_LISTED, ConfigError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.policies import Policies
from ucp_deepspeed.transfer.planning.targeting import RankPlan, TargetPlan, plan_target

IMPOSSIBLE = 1
"""Exit status for a topology on which the checkpoint can't be resumed."""

MOST_ROWS = 16
"""Ranks that the table shows; of more ranks it shows half as many with the fewest bytes, and half as many with the most."""


@command(
    "plan",
    examples=[
        "ucp plan runs/a --tp 2 --pp 2 --dp 4 --zero 1",
        "ucp plan runs/a --dp 64 --zero 3 --plot plan.svg",
        "ucp plan runs/a --dp 8 --zero 3 --model runs/changed --on-missing init",
    ],
)
@click.argument("checkpoint", metavar="CKPT", type=CHECKPOINT)
@click.option("--tp", type=click.IntRange(min=1), default=1, show_default=True, help="Tensor-parallel size.")
@click.option("--pp", type=click.IntRange(min=1), default=1, show_default=True, help="Pipeline-parallel size.")
@click.option("--dp", type=click.IntRange(min=1), required=True, help="Data-parallel size.")
@click.option("--zero", type=click.IntRange(0, 3), required=True, help="ZeRO stage.")
@click.option("--ep", type=click.IntRange(min=1), default=1, show_default=True, help="Expert-parallel size.")
@tag_option
@spec_option
@vocabulary_option
@click.option(
    "--model",
    type=CHECKPOINT,
    metavar="CKPT",
    help="A checkpoint of the model to load into, where its parameters aren't CKPT's: one saved before the first step, say.",
)
@click.option("--on-missing", type=click.Choice(["error", "init"]), default="error", help="As in the config block.")
@click.option("--on-extra", type=click.Choice(["error", "drop"]), default="error", help="As in the config block.")
@click.option(
    "--on-differing",
    type=click.Choice(["error", "first", "last", "mean", "max"]),
    default="error",
    help="As in the config block.",
)
@click.option(
    "--optimizer-states", type=click.Choice(["restore", "reset"]), default="restore", help="As in the config block."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead, with all ranks.")
@plot_option
def plan_command(
    checkpoint: Path,
    tp: int,
    pp: int,
    dp: int,
    zero: int,
    ep: int,
    tag: str | None,
    spec: str | None,
    vocabulary_size: int | None,
    model: Path | None,
    on_missing: str,
    on_extra: str,
    on_differing: OnDiffering,
    optimizer_states: Literal["restore", "reset"],
    as_json: bool,
    plot: Path | None,
) -> None:
    """Show what each rank of another topology would read of checkpoint CKPT, and hold. Reads no tensors.

    DeepSpeed's default settings are assumed. Exit status: 0 when the topology is possible, 1 when it isn't, 2 when nobody
    can tell.
    """
    if tp * pp * dp > tunables.MOST_RANKS:
        raise ConfigError(
            f"TP{tp}·PP{pp}·DP{dp} has {tp * pp * dp:,} ranks; at most {tunables.MOST_RANKS:,} are planned"
        )
    opened = open_checkpoint(checkpoint, tag)
    policies = Policies(on_missing == "init", on_extra == "drop", optimizer_states, differing=on_differing)
    target = None if model is None else open_checkpoint(model)
    plan = plan_target(opened, Topology(tp, pp, dp, zero, ep), read_spec(spec), vocabulary_size, target, policies)
    source = {"path": str(opened.path), "form": opened.form, "source": degrees(opened.topology)}
    if as_json:
        click.echo(json.dumps(source | _report(plan, opened.path), indent=1))
    else:
        _print(plan, f"{opened.path}", f"{opened.form}, {opened.topology}")
    if not plan.possible:
        raise click.exceptions.Exit(IMPOSSIBLE)
    if plot is not None:
        draw_plan(plan, opened.path, plot)


def _report(plan: TargetPlan, folder: Path) -> dict[str, Any]:
    """The part of the object that ``--json`` prints beside ``path``, ``form`` and the ``source``'s topology.

    Keys:
        target: ``tp``, ``pp``, ``dp``, ``zero_stage``, ``ep``.
        possible: whether a load would succeed.
        reasons: why it would not: ``parameter`` (null when it is the whole model) and ``reason``.
        remarks: what the figures rest on.
        restored: logical names of the parameters and buffers that nothing stands against.
        initialised: of those that keep the model's values: in whole, in further rows, or in their optimizer states alone.
        dropped: of those that the model has no place for, or no place for their optimizer states.
        reset: whether all optimizer states start afresh.
        total: ``bytes_read``, ``bytes_held`` and ``copies`` of all ranks, and the number of ``files`` that they read from.
        ranks: for each ``model_parallel_rank``, ``data_parallel_rank``, ``bytes_read``, ``bytes_held`` (master weights and
            optimizer states in fp32, padding included), ``copies``, and the names of its ``files``. Empty when impossible.
    """
    return {
        "target": degrees(plan.topology),
        "possible": plan.possible,
        "reasons": [{"parameter": obstacle.name, "reason": obstacle.reason} for obstacle in plan.obstacles],
        "remarks": list(plan.remarks),
        "restored": list(plan.restored),
        "initialised": list(plan.initialised),
        "dropped": list(plan.dropped),
        "reset": plan.reset,
        "total": _total(plan),
        "ranks": [
            {
                "model_parallel_rank": rank.model_parallel_rank,
                "data_parallel_rank": rank.data_parallel_rank,
                "bytes_read": rank.bytes_read,
                "bytes_held": rank.bytes_held,
                "copies": rank.copies,
                "files": sorted(str(Path(file).relative_to(folder)) for file in rank.files),
            }
            for rank in plan.ranks
        ],
    }


def _total(plan: TargetPlan) -> dict[str, int]:
    summed = {key: sum(getattr(rank, key) for rank in plan.ranks) for key in ("bytes_read", "bytes_held", "copies")}
    return summed | {"files": len(plan.files)}


def _print(plan: TargetPlan, path: str, source: str) -> None:
    console = new_console()
    lines = [("path", path), ("source", source), ("target", f"{plan.topology}: {_verdict(plan)}")]
    if plan.possible:
        total = _total(plan)
        lines += [
            ("restored", f"{len(plan.restored)} parameters and buffers" + _except_states(plan)),
            *((what, ", ".join(names)) for what, names in _others(plan) if names),
            ("read", f"{in_words(total['bytes_read'])} by {len(plan.ranks)} ranks from {total['files']} files"),
            ("held", f"{in_words(total['bytes_held'])} of master weights and optimizer states"),
        ]
    print_lines(console, lines)
    for obstacle in plan.obstacles[:MAX_LISTED]:
        print_plain(console, f"  {obstacle}")
    if len(plan.obstacles) > MAX_LISTED:
        console.print(f"  … and {len(plan.obstacles) - MAX_LISTED} more")
    if plan.possible:
        console.print(_table(plan))
    for remark in plan.remarks:
        print_plain(console, f"note: {remark}")


def _except_states(plan: TargetPlan) -> str:
    return ", with all optimizer states reset" if plan.reset else ""


def _others(plan: TargetPlan) -> list[tuple[str, tuple[str, ...]]]:
    return [("kept", plan.initialised), ("dropped", plan.dropped)]


def _verdict(plan: TargetPlan) -> str:
    if plan.possible:
        return "possible"
    count = len(plan.obstacles)
    return f"impossible, {count} reason{'s' if count > 1 else ''}" + (
        f" ({len(plan.restored)} parameters and buffers could be restored)" if plan.matching else ""
    )


def _table(plan: TargetPlan) -> Table:
    headings = ("model-parallel rank", "data-parallel rank", "reads", "from files", "in copies", "holds")
    table = new_table(*headings, justify="right")
    shown = _shown(plan.ranks)
    for rank in shown:
        table.add_row(str(rank.model_parallel_rank), str(rank.data_parallel_rank), *_cells(rank))
    total = _total(plan)
    if len(shown) < len(plan.ranks):
        table.add_row("…", f"{len(plan.ranks) - len(shown)} more")
    read, held = in_words(total["bytes_read"]), in_words(total["bytes_held"])
    table.add_row("all", "", read, str(total["files"]), str(total["copies"]), held)
    return table


def _shown(ranks: Sequence[RankPlan]) -> Sequence[RankPlan]:
    """All ranks, or, ordered by bytes read, those at both ends."""
    if len(ranks) <= MOST_ROWS:
        return ranks
    ordered = sorted(ranks, key=lambda rank: rank.bytes_read)
    return [*ordered[: MOST_ROWS // 2], *ordered[-(MOST_ROWS // 2) :]]


def _cells(rank: RankPlan) -> list[str]:
    return [in_words(rank.bytes_read), str(len(rank.files)), str(rank.copies), in_words(rank.bytes_held)]
