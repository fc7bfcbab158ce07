"""``ucp verify``: is each byte of a checkpoint the one that was saved?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ucp_deepspeed.cli.options import FAILED, NO
from ucp_deepspeed.cli.printing import in_words, print_json, print_labelled, print_lines, print_rows
from ucp_deepspeed.cli.progress import shown_progress
from ucp_deepspeed.errors import ConfigError, listed
from ucp_deepspeed.transfer.planning.policies import some_names
from ucp_deepspeed.transfer.verification import Verification, VerifiedTags, verify, verify_tags

STATUS = {"whole": 0, "damaged": NO, "unproven": FAILED}
"""Exit status by verdict."""


def tell(checkpoint: Path, tag: str | None, every: bool, threads: int | None, as_json: bool) -> int:
    """Do what ``ucp verify`` says."""
    if every and tag is not None:
        raise ConfigError("--all verifies all tags: name one with --tag, or none")
    with shown_progress("verify") as progress:
        if every:
            tags = verify_tags(checkpoint, threads=threads, progress=progress)
        else:
            found = verify(checkpoint, tag, threads=threads, progress=progress)
    if every:
        return _tell_tags(checkpoint, tags, as_json)
    if as_json:
        print_json(report_of(found))
    else:
        _print(found)
    return STATUS[found.verdict]


def report_of(found: Verification) -> dict[str, Any]:
    """Return the object that ``--json`` prints; ``docs/json.md`` lists its keys."""
    return {
        "path": str(found.path),
        "form": found.form,
        "global_steps": found.global_steps,
        "verdict": found.verdict,
        "bytes": found.numbytes,
        "unchecked": found.unchecked,
        "files": {file.name: {"bytes": file.numbytes, "unchecked": file.unchecked} for file in found.files},
        "problems": [problem._asdict() for problem in found.problems],
        "doubts": list(found.doubts),
        "others": list(found.others),
        "random_states": found.random_states,
    }


def _print(found: Verification) -> None:
    step = "" if found.global_steps is None else f", step {found.global_steps}"
    print_labelled(
        [
            ("path", str(found.path)),
            ("form", f"{found.form or 'unknown'}{step}"),
            ("read", f"{in_words(found.numbytes)} in {len(found.files)} files"),
            ("unchecked", ", ".join(_unchecked(found)) or "nothing: each byte has a checksum"),
            (
                "random",
                f"states of {found.random_states} ranks" if found.random_states else "no states of random numbers",
            ),
            ("verdict", _verdict(found)),
        ],
        11,
    )
    print_lines(*listed([problem.detail for problem in found.problems]))
    print_lines(*(f"note: {doubt}" for doubt in found.doubts))
    if found.others:
        print_lines(f"note: no part of the checkpoint, and not verified: {some_names(found.others)}")


def _verdict(found: Verification) -> str:
    if found.verdict == "damaged":
        return f"damaged: {len(found.problems)} problem{'s' if len(found.problems) > 1 else ''}"
    if found.verdict == "unproven":
        return "unproven: nothing wrong was found, and not all can be checked"
    return "whole: all is as it was saved"


def _unchecked(found: Verification) -> Iterator[str]:
    """Yield what no checksum covers."""
    if lacking := [file for file in found.files if file.unchecked]:
        names = some_names([file.name for file in lacking], 4)
        yield f"{in_words(found.unchecked)} in {len(lacking)} files have no checksum: {names}"


def _tell_tags(root: Path, found: VerifiedTags, as_json: bool) -> int:
    """Print the verdict of each tag."""
    if as_json:
        tags = {name: each if isinstance(each, str) else report_of(each) for name, each in found.tags.items()}
        print_json({"path": str(root), "latest": found.latest, "tags": tags})
    else:
        print_rows(
            [
                {
                    "tag": name,
                    "step": "" if isinstance(each, str) or each.global_steps is None else str(each.global_steps),
                    "verdict": "damaged" if isinstance(each, str) else each.verdict,
                    "latest": "latest" if name == found.latest else "",
                    "first problem": _first(each),
                }
                for name, each in found.tags.items()
            ],
            ("first problem",),
        )
        if found.latest not in (None, *found.tags):
            print_lines(f"note: latest names {found.latest}, which isn't there")
    verdicts = {"damaged" if isinstance(each, str) else each.verdict for each in found.tags.values()}
    if found.latest not in (None, *found.tags):
        verdicts.add("damaged")  # a resume finds nothing
    return max((STATUS[verdict] for verdict in verdicts), key=lambda status: (status == NO, status))


def _first(found: Verification | str) -> str:
    """Return what a person looks into first."""
    if isinstance(found, str):
        return found
    told = [*(problem.detail for problem in found.problems), *found.doubts, *_unchecked(found), ""]
    return told[0]
