"""``ucp plan``: bytes that the ranks of another topology would read and hold, without starting them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ucp_deepspeed import tunables
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.differing import OnDiffering
from ucp_deepspeed.checkpoint.opening import warn_of_sums_alone
from ucp_deepspeed.cli.options import NO
from ucp_deepspeed.cli.printing import Row, echo, in_words, print_json, print_labelled, print_lines, print_rows
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.errors import ConfigError, listed
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.remote import located
from ucp_deepspeed.transfer.planning.policies import SCHEDULED, Policies
from ucp_deepspeed.transfer.planning.targeting import RankPlan, TargetPlan, plan_target

FIGURES = ("bytes_read", "bytes_held", "bytes_of_weights", "copies")

MOST_ROWS = 16
"""Ranks that the table shows; of more ranks it shows half as many with the fewest bytes, and half as many with the most."""


def show(
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
    hyperparameters: Literal["restore", "keep"],
    scheduler: Literal["restore", "keep"],
    as_json: bool,
    plot: Path | None,
) -> int:
    """Do what ``ucp plan`` says."""
    if tp * pp * dp > tunables.MOST_RANKS:
        raise ConfigError(
            f"TP{tp}·PP{pp}·DP{dp} has {tp * pp * dp:,} ranks; at most {tunables.MOST_RANKS:,} are planned"
        )
    opened = open_checkpoint(checkpoint, tag)
    warn_of_sums_alone(opened)
    policies = Policies(
        on_missing == "init",
        on_extra == "drop",
        optimizer_states,
        differing=on_differing,
        keep_settings=hyperparameters == "keep",
        scheduled=SCHEDULED if scheduler == "keep" else frozenset(),
    )
    target = None if model is None else open_checkpoint(model)
    own_spec = None if spec is None else load_spec(spec)
    topology = Topology(tp, pp, dp, zero, ep)
    with shown_progress("ranks planned", in_bytes=False) as progress:
        plan = plan_target(opened, topology, own_spec, vocabulary_size, target, policies, progress=progress)
    if as_json:
        source = {"path": str(opened.path), "form": opened.form, "source": asdict(opened.topology)}
        print_json(source | _report(plan, opened.path))
    else:
        _print(plan, f"{opened.path}", f"{opened.form}, {opened.topology}")
    if plot is not None and not plan.possible:
        echo(f"{plot} isn't written: the topology is impossible", err=True)
    elif plot is not None:
        from ucp_deepspeed.cli.plots import draw_plan

        draw_plan(plan, opened.path, plot)
    return 0 if plan.possible else NO


def _report(plan: TargetPlan, folder: Path) -> dict[str, Any]:
    """Return the part of the object that ``--json`` prints beside the source's; ``docs/json.md`` lists its keys."""
    return {
        "target": asdict(plan.topology),
        "possible": plan.possible,
        "reasons": [
            {"parameter": name, "reason": obstacle.reason}
            for obstacle in plan.obstacles
            for name in (obstacle.name, *obstacle.others)
        ],
        **{key: list(getattr(plan, key)) for key in ("remarks", "restored", "initialised", "dropped")},
        "reset": plan.reset,
        "total": _total(plan.ranks),
        "ranks": [
            {key: getattr(rank, key) for key in ("model_parallel_rank", "data_parallel_rank", *FIGURES)}
            | {"files": sorted(str(located(file).relative_to(folder)) for file in rank.files)}
            for rank in plan.ranks
        ],
    }


def _total(ranks: Sequence[RankPlan]) -> dict[str, int]:
    files = {file for rank in ranks for file in rank.files}
    return {key: sum(getattr(rank, key) for rank in ranks) for key in FIGURES} | {"files": len(files)}


def _print(plan: TargetPlan, path: str, source: str) -> None:
    total = _total(plan.ranks)
    lines = [("path", path), ("source", source), ("target", f"{plan.topology}: {_verdict(plan)}")]
    if plan.possible:
        reset = ", with all optimizer states reset" if plan.reset else ""
        names = {"kept": plan.initialised, "dropped": plan.dropped}
        lines += [
            ("restored", f"{len(plan.restored)} parameters and buffers{reset}"),
            *((what, ", ".join(found)) for what, found in names.items() if found),
            ("read", f"{in_words(total['bytes_read'])} by {len(plan.ranks)} ranks from {total['files']} files"),
            ("held", f"{in_words(total['bytes_held'])} of master weights and optimizer states"),
            ("weights", f"{in_words(total['bytes_of_weights'])} beside these in the module, buffers included"),
        ]
    print_labelled(lines)
    print_lines(*listed(plan.obstacles))
    if plan.possible:
        shown = plan.ranks
        if len(shown) > MOST_ROWS:
            ordered = sorted(shown, key=lambda rank: rank.bytes_read)
            shown = (*ordered[: MOST_ROWS // 2], *ordered[-(MOST_ROWS // 2) :])
        rows = [_row(rank.model_parallel_rank, rank.data_parallel_rank, _total([rank])) for rank in shown]
        if len(shown) < len(plan.ranks):
            rows.append(
                dict.fromkeys(rows[0], "") | {"mp rank": "…", "dp rank": f"{len(plan.ranks) - len(shown)} more"}
            )
        rows.append(_row("all", "", total))
        print_rows(rows, justify="right")
    print_lines(*(f"note: {remark}" for remark in plan.remarks))


def _row(model_parallel: object, data_parallel: object, total: dict[str, int]) -> Row:
    read, held = in_words(total["bytes_read"]), in_words(total["bytes_held"])
    places = {"mp rank": str(model_parallel), "dp rank": str(data_parallel)}
    return places | {"reads": read, "files": str(total["files"]), "copies": str(total["copies"]), "holds": held}


def _verdict(plan: TargetPlan) -> str:
    if plan.possible:
        return "possible"
    count = len(plan.obstacles)
    restored = f" ({len(plan.restored)} parameters and buffers could be restored)" if plan.matching else ""
    return f"impossible, {count} reason{'s' if count > 1 else ''}{restored}"
