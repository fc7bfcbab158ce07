"""``ucp prune``: remove old checkpoints, and never the last whole one."""

from __future__ import annotations

from pathlib import Path

from ucp_deepspeed.checkpoint.retention import Fate, Keep
from ucp_deepspeed.cli.printing import print_json, print_lines, print_rows
from ucp_deepspeed.transfer.pruning import prune


def remove(root: Path, last: int, every: int | None, dry_run: bool, as_json: bool) -> int:
    """Do what ``ucp prune`` says."""
    found = prune(root, Keep(last=last, every=every), remove=not dry_run)
    if as_json:
        print_json({"path": str(root), "dry_run": dry_run, "checkpoints": [_object(fate) for fate in found]})
        return 0
    gone = "would go" if dry_run else "removed"
    print_rows([_row(fate, gone) for fate in found], ("why",))
    count = sum(fate.stays is None for fate in found)
    print_lines(f"{count} {gone}, {len(found) - count} {'would ' if dry_run else ''}stay")
    return 0


def _object(fate: Fate) -> dict[str, object]:
    checkpoint = fate.checkpoint
    return {
        "name": checkpoint.path.name,
        "global_steps": checkpoint.step if checkpoint.step >= 0 else None,
        "whole": checkpoint.problem is None,
        "problem": checkpoint.problem,
        "stays": fate.stays,
    }


def _row(fate: Fate, gone: str) -> dict[str, str]:
    checkpoint = fate.checkpoint
    return {
        "checkpoint": checkpoint.path.name,
        "step": str(checkpoint.step) if checkpoint.step >= 0 else "",
        "whole": "whole" if checkpoint.problem is None else "not whole",
        "": "stays" if fate.stays else gone,
        "why": fate.stays or checkpoint.problem or "newer ones are whole",
    }
