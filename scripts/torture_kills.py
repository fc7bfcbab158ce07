"""Kills live engines and commands while they save, load and convert, and counts what the next run finds.

A case begins with a run's folder that has two tags, ``b`` of step 1 and ``a`` of step 2 (`torture_lab.Base`). Something
that saves step 3, loads or converts is killed (`torture_killed`). Then a user resumes: what ``latest`` names, or the older tag;
and saves again. Right outcomes:

- *before*: the checkpoint from before, bit for bit;
- *after*: the new one, bit for bit;
- *told*: an error of the package that names the folder and the way on, where a save wrote straight into the tag's folder.

All else is wrong: *silent* other values, a *foreign* error, something *late* that waits for ever, or *leftovers* after the next
save or conversion. A case whose moment comes only after the end is *not killed*.
"""

from __future__ import annotations

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from torture_killed import Kill, go_on, resume_meanwhile
from torture_lab import (
    FORMS,
    NEW,
    NOTES,
    RIGHT,
    WRONG,
    Base,
    Lab,
    WrongError,
    content_of,
    fingerprint,
    leftovers,
    other_job,
    read,
    run_converts,
    run_ranks,
    workplace,
)
from torture_report import report

from ucp_deepspeed.checkpoint.opening import open_checkpoint
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.ranks import RankError
from ucp_deepspeed.testing.runs import Run
from ucp_deepspeed.transfer.verification import Verification, verify_tags


@dataclass(frozen=True)
class Case:
    """A case; its choices follow from the seed, and from how long what is killed takes."""

    lab: Lab
    kind: str
    form: str
    seed: int

    @property
    def base(self) -> Base:
        """The folder from before."""
        return self.lab.base(self.form)

    def dice(self) -> random.Random:
        """Return the case's random choices, from their beginning."""
        return random.Random(f"{self.kind} {self.seed}")


NO_OTHER_TAG = {"enabled": True, "fallback": "none"}
"""A load tells what it finds; no other tag takes its place."""


def _run(base: Base, dice: random.Random, asynchronous: bool) -> Run:
    save = {"async": asynchronous, "checksums": dice.random() < 0.7, "timeout": 2.0}
    return replace(base.run, universal=NO_OTHER_TAG | {"save": save})


def _kill(dice: random.Random, seconds: float, extents: Sequence[tuple[float, int, int]], only: bool = False) -> Kill:
    """Choose a moment and who dies, by what an undisturbed run took: the seconds, events and archives of each rank."""
    ranks = (
        (*range(len(extents)),)
        if only
        else dice.choice([*((rank,) for rank in range(len(extents))), (*range(len(extents)),)])
    )
    how = dice.choice(["event", "event", "time", "torn"])
    signum = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    events = max(extents[rank][1] for rank in ranks)
    archives = max(extents[rank][2] for rank in ranks)
    if how == "torn" and archives:
        return Kill(ranks, how, dice.randint(1, archives), signum, dice.random())
    if how == "time" or not events:
        return Kill(ranks, "time", dice.uniform(0, 1.05 * seconds), signum)
    return Kill(ranks, "event", dice.randint(1, events), signum)


def _save_kill(case: Case, run: Run, dice: random.Random, tag: str, only: bool = False) -> Kill:
    """Choose the moment of a save; measure first how long one takes."""

    def measure() -> Any:
        with workplace(case.lab) as place:
            shutil.copytree(case.base.folder, place / "run")
            return run_ranks(place, None, "save", run, NEW, place / "run", tag).extent

    extents = case.lab.extent((case.form, str(run.universal), tag), measure)
    return _kill(dice, max(each[0] for each in extents), extents, only)


def _check_tags(folder: Path, content: Mapping[int, Any], committed: bool) -> None:
    """Check each tag on its own, and that `verify_tags` calls none whole that isn't, and none damaged that was committed."""
    for name, found in verify_tags(folder).tags.items():
        step = read(folder, name, content)
        verdict = found.verdict if isinstance(found, Verification) else "told"
        if isinstance(step, str) and verdict in ("whole", "unproven"):
            raise WrongError("silent", f"ucp verify calls {name} {verdict}, and reading it says: {step}")
        if (committed or name == "b") and (isinstance(step, str) or verdict not in ("whole", "unproven")):
            raise WrongError("silent", f"{name} isn't whole, though nothing was written into it: {step}; {found}")


def _resumed(
    case: Case,
    folder: Path,
    tag: str,
    content: Mapping[int, Any],
    committed: bool,
    dice: random.Random,
    mixed: bool = False,
) -> str:
    """Resume as a user would, save again, and return the outcome.

    Args:
        committed: a tag is whole, whatever was killed.
        mixed: two jobs wrote the tag, and the package knows only that the files aren't of one save.
    """
    if (step := read(folder, "b", content)) != 1:
        raise WrongError("silent", f"the older tag: {step}")
    _check_tags(folder, content, committed)
    found = read(folder, None, content)
    if isinstance(found, str) and (committed or str(folder / tag) not in found or not ("tag='b'" in found or mixed)):
        raise WrongError("foreign", f"no way on is told: {found}")
    next_tag, asynchronous = dice.choice([tag, "next"]), dice.random() < 0.5
    told = _go_on(case, folder, None, asynchronous, folder, next_tag, content, found)
    if told:
        _go_on(case, folder, "b", asynchronous, folder, next_tag, content, 1)
    if missing := [path for path in NOTES if not (folder / path).is_file() or (folder / path).read_text() != "mine"]:
        raise WrongError("silent", f"what others had put into the tag is gone: {missing}")
    if left := leftovers(folder, next_tag):
        raise WrongError("leftovers", f"after a save of {next_tag!r} ({asynchronous=}): {left}")
    return "told" if isinstance(found, str) else "before" if found == 2 else "after"


def _go_on(
    case: Case,
    folder: Path,
    tag: str | None,
    asynchronous: bool,
    target: Path,
    next_tag: str,
    content: Mapping[int, Any],
    expected: int | str,
) -> str:
    """Load into a live engine and save what it has then; check that it is what was expected. Returns what was told."""
    pool = case.lab.follower(case.form)
    run = replace(case.base.run, universal=NO_OTHER_TAG)
    try:
        [(told, step), *_] = pool.run(go_on, run, str(folder), tag, asynchronous, str(target), next_tag, timeout=60.0)
    except RankError as error:
        raise WrongError("foreign", f"an engine loads {tag or 'latest'}: {error}") from error
    if isinstance(expected, str):
        if not told:
            raise WrongError("silent", f"an engine loads step {step}, and reading says: {expected}")
        return str(told)
    if told:
        raise WrongError("silent", f"an engine says {told}, and reading gives step {expected}")
    if (saved := read(target, next_tag, {expected: content[expected]}, streams=False)) != expected:
        raise WrongError("silent", f"saved after loading: {saved}")
    return ""


def kill_a_save(case: Case, asynchronous: bool) -> str:
    """Kill ranks while they save a new tag, or one that is there."""
    dice = case.dice()
    run, tag = _run(case.base, dice, asynchronous), dice.choice(["a", "new"])
    kill = _save_kill(case, run, dice, tag)
    content = {key: case.base.content[key] for key in (1, 2, NEW)}
    with workplace(case.lab) as place:
        folder = place / "run"
        shutil.copytree(case.base.folder, folder)
        ended = run_ranks(place, kill, "save", run, NEW, folder, tag)
        outcome = _resumed(case, folder, tag, content, asynchronous, dice)
    return outcome if ended.killed else "not killed"


def kill_a_load(case: Case, universal: bool) -> str:
    """Kill ranks while they load; reading changes nothing."""
    dice, base = case.dice(), case.base
    source = base.universal if universal else base.folder
    run = replace(base.run, universal=NO_OTHER_TAG | {"load": dice.choice(["auto", "always"])})
    before = case.lab.extent(("files", source), lambda: fingerprint(source))
    with workplace(case.lab) as place:
        extents = case.lab.extent(
            ("load", case.form, universal, str(run.universal)),
            lambda: run_ranks(place, None, "load", run, 1, source, None).extent,
        )
        kill = _kill(dice, max(each[0] for each in extents), extents)
        ended = run_ranks(place, kill, "load", run, 1, source, None)
        if fingerprint(source) != before or leftovers(source):
            raise WrongError("silent", "a load that was killed has changed files")
        if dice.random() < 0.25:
            _go_on(case, source, None, False, place / "next", "next", base.content, 2)
    return "before" if ended.killed else "not killed"


def kill_a_conversion(case: Case, count: int) -> str:
    """Kill the command, or one of its ranks, while it converts; then convert again."""
    dice, base = case.dice(), case.base
    workers = dice.choice([1, 2])
    arguments = [str(base.folder), "--tag", "a", "--workers", str(workers)]
    with workplace(case.lab) as place:
        extents = case.lab.extent(
            ("convert", case.form, workers, count), lambda: _measured(place, [*arguments, str(place / "first")], count)
        )
        kill = _kill(dice, max(each[0] for each in extents), extents)
        target = place / "universal"
        statuses, ends = run_converts(place, [*arguments, str(target)], kill, count, target)
        killed = len(ends) < count or any(statuses)
        outcome = _converted(case, target, statuses, kill)
        again = "b" if outcome == "after" else "a"
        arguments[2] = again
        statuses, _ = run_converts(place, [*arguments, str(target)])
        if statuses != [0]:
            raise WrongError("foreign", f"converting again: {(place / 'log').read_text()[-500:]}")
        if content_of(target, again) != base.of_universal[again]:
            raise WrongError("silent", "what was converted again is something else")
        if left := leftovers(target, again):
            raise WrongError("leftovers", f"after converting {again!r} again: {left}")
    return outcome if killed else "not killed"


def _measured(place: Path, arguments: Sequence[str], count: int) -> list[tuple[float, int, int]]:
    statuses, ends = run_converts(place, arguments, None, count, Path(arguments[-1]))
    assert set(statuses) == {0}, (place / "log").read_text()
    return [(end["seconds"], end["events"], 0) for end in ends]


def _converted(case: Case, target: Path, statuses: Sequence[int | None], kill: Kill) -> str:
    """Return whether a whole checkpoint is there after a killed conversion; there is nothing else to load."""
    hidden = [target / name for name in leftovers(target)] if target.exists() else []
    for entry in hidden:
        if entry.is_dir():
            try:
                open_checkpoint(entry)
            except UniversalCheckpointError:
                continue
            raise WrongError("silent", f"{entry.name} opens")
    if hidden and kill.signum == signal.SIGTERM and kill.ranks != (1,) and statuses[0] != -signal.SIGTERM:
        raise WrongError("leftovers", f"after SIGTERM (status {statuses}): {[entry.name for entry in hidden]}")
    if not (target / "a").exists():
        return "before"
    if content_of(target, "a") != case.base.of_universal["a"]:
        raise WrongError("silent", "the converted checkpoint is something else")
    return "after"


def resume_during_a_save(case: Case, asynchronous: bool) -> str:
    """Read, and resume on live ranks, while another job saves and is killed."""
    dice = case.dice()
    run, tag = _run(case.base, dice, asynchronous), dice.choice(["a", "a", "new"])
    kill = _save_kill(case, run, dice, tag)
    content = {key: case.base.content[key] for key in (1, 2, NEW)}
    pool = case.lab.follower(case.form)
    reader = replace(case.base.run, universal=NO_OTHER_TAG)
    with workplace(case.lab) as place, ThreadPoolExecutor(2) as threads:
        folder, seen = place / "run", place / "seen"
        shutil.copytree(case.base.folder, folder)
        saving = threads.submit(run_ranks, place, kill, "save", run, NEW, folder, tag)
        resuming = threads.submit(
            pool.run, resume_meanwhile, reader, str(folder), str(seen), str(place / "stop"), timeout=90.0
        )
        while not saving.done():
            read(folder, None, content)
            time.sleep(0.01)
        (place / "stop").touch()
        try:
            resuming.result()
        except RankError as error:
            raise WrongError("foreign", f"an engine that resumes during a save: {error}") from error
        for entry in sorted(seen.iterdir()) if seen.exists() else ():
            if entry.is_dir() and read(seen, entry.name, content, streams=False) not in (2, NEW):
                raise WrongError("silent", f"an engine resumed with something else: {entry.name}")
        outcome = _resumed(case, folder, tag, content, asynchronous, dice)
        return outcome if saving.result().killed else "not killed"


def two_jobs_on_one_tag(case: Case, asynchronous: bool) -> str:
    """Let two jobs save the same tag at the same time, of which one is killed."""
    dice = case.dice()
    run, beside = _run(case.base, dice, asynchronous), dice.random() < 0.7
    other = other_job(_run(case.base, dice, asynchronous == beside))
    kill = _save_kill(case, run, dice, "a", only=dice.random() < 0.7)
    with workplace(case.lab) as place, ThreadPoolExecutor(2) as threads:
        folder = place / "run"
        shutil.copytree(case.base.folder, folder)
        first = threads.submit(run_ranks, place, kill, "save", run, NEW, folder, "a")
        second = threads.submit(run_ranks, place, None, "save", other, NEW, folder, "a")
        killed = first.result().killed
        second.result()
        outcome = _resumed(case, folder, "a", case.base.content, asynchronous and beside, dice, mixed=True)
    return outcome if killed else "not killed"


KINDS: Mapping[str, tuple[Callable[[Case, Any], str], Any]] = {
    "save": (kill_a_save, False),
    "save in the background": (kill_a_save, True),
    "load": (kill_a_load, False),
    "convert": (kill_a_conversion, 1),
    "resume during a save": (resume_during_a_save, False),
    "save (2)": (kill_a_save, False),
    "save in the background (2)": (kill_a_save, True),
    "load of a universal checkpoint": (kill_a_load, True),
    "convert, two ranks": (kill_a_conversion, 2),
    "resume during a save in the background": (resume_during_a_save, True),
    "two jobs on one tag": (two_jobs_on_one_tag, False),
    "two jobs on one tag in the background": (two_jobs_on_one_tag, True),
}
"""Kind → function and its argument; one seed after another takes the next kind. Saves come twice."""


def outcomes(lab: Lab, seeds: Sequence[int], kinds: Sequence[str] = (*KINDS,)) -> Iterator[tuple[str, str, str, str]]:
    """Yield kind, form, outcome and what there is to say of each seed's case."""
    for seed in seeds:
        kind = kinds[seed % len(kinds)]
        case = Case(lab, kind, [*FORMS][seed // len(kinds) % len(FORMS)], seed)
        function, argument = KINDS[kind]
        try:
            yield kind.removesuffix(" (2)"), case.form, function(case, argument), ""
        except WrongError as error:
            yield kind.removesuffix(" (2)"), case.form, error.outcome, str(error)
        except Exception as error:
            yield kind.removesuffix(" (2)"), case.form, "foreign", f"{type(error).__name__}: {error}"


@click.command("kills")
@click.option("--count", default=60, show_default=True, help="kills in all")
@click.option("--seed", default=0, show_default=True, help="seed of the first case; the others follow")
@click.option("--kind", "kinds", multiple=True, type=click.Choice([*KINDS]), help="these alone; else all in turn")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def kills_command(count: int, seed: int, kinds: tuple[str, ...], as_json: bool) -> None:
    """Kill ranks and commands, and count what the next run finds. Exit with 1 if something isn't right; Ctrl-C ends early."""
    table: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as scratch, closing(Lab(Path(scratch))) as lab, suppress(KeyboardInterrupt):
        seeds = range(seed, seed + count)
        for number, (kind, form, outcome, text) in zip(seeds, outcomes(lab, seeds, kinds or (*KINDS,)), strict=True):
            table.setdefault(kind, Counter())[outcome] += 1
            if outcome in WRONG:
                wrong.append(f"{outcome}: {kind}, {form}, seed {number}: {text[:600]}")
                click.echo(wrong[-1], err=True)
    report(table, (*RIGHT, *WRONG), wrong, as_json)
    raise SystemExit(bool(wrong))
