"""Disturbs saves, loads and commands by faults of the environment, and counts what becomes of them.

Each outcome is one of these:

- *done*: success, and what was saved, loaded or said is right to the bit;
- *told*: an error of the package, on all ranks, which names file and cause;
- *DeepSpeed's*: an error that DeepSpeed's own code raised, passed on to all ranks;
- *not met*: success, and no call failed: it made fewer of them than the time before;
- *ended*: the limit on the size of files ended the process by its signal, and others were told;
- *silent*: success with other values; or a checkpoint before it is harmed; or a half-written one is read;
- *foreign*: another exception; *vague*: an error that doesn't name file and cause; *alone*: not on all ranks;
- *died*: a process died; *late*: no answer in time;
- *lasting*: what comes after the fault isn't right: the next save or command fails, or something is left over.

The first five are right. The command prints a table, and each case that isn't right with the seed that makes it again.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import shutil
import signal
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import click
from torture_disk_cases import COMMANDS, LOADS, SAVES, Case, can_mount, cases_of, choose
from torture_environment import COUNT, CUTS, Fault, Met, preload
from torture_faults import Content, content_of
from torture_operations import FORMS, NEW, OLD, Answer, attempt, command, prepare
from torture_report import report

from ucp_deepspeed.checkpoint.opening import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing import ranks
from ucp_deepspeed.testing.runs import warnings_of
from ucp_deepspeed.transfer.conversion import convert

MOST_TOLD = 300
"""Characters of an error that the report shows."""

SECONDS = 40
"""Time for one operation."""

DONE = ("done", "not met")
RIGHT = ("done", "told", "DeepSpeed's", "ended", "not met")
WRONG = ("silent", "foreign", "vague", "alone", "died", "late", "lasting")


@dataclass
class Form:
    """A form's checkpoints from before any fault, and what they hold."""

    folder: Path
    expected: dict[str, Content]
    names: set[str]
    said: dict[str, tuple[int, str]] = field(default_factory=dict)
    met: dict[str, list[Met]] = field(default_factory=dict)


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


class Torture:
    """Runs cases in a folder."""

    def __init__(self, scratch: Path) -> None:
        self._scratch, self._mounts = scratch, can_mount(scratch)
        self.how_full = "a small tmpfs" if self._mounts else "writes that fail (no mount is allowed)"
        self._pool = ranks.RankPool(2, most_runs=10**9)
        self._forms: dict[str, Form] = {}
        self._ready = ""
        self._context = ranks._context()

    def close(self) -> None:
        """End the ranks."""
        self._pool.close()

    def outcome_of(self, case: Case) -> tuple[str, str]:
        """Run a case; return its outcome, and what there is to say."""
        form = self._form(case.form)
        folder = self._scratch / f"case{case.seed}"
        shutil.copytree(form.folder, folder)
        try:
            self._plan(case, form, folder)
            case.begin(folder)
            try:
                if case.operation in COMMANDS:
                    return self._command(case, form, folder)
                if case.operation in SAVES:
                    return self._save(case, form, folder)
                return self._load(case, form, folder)
            finally:
                with suppress(Exception):
                    case.end(folder)
        finally:
            ctypes.CDLL(None).umount2(os.fsencode(folder), 2)
            shutil.rmtree(folder, ignore_errors=True)

    def _form(self, name: str) -> Form:
        """Have the ranks ready with an engine of a form."""
        if name not in self._forms:
            place = self._scratch / name.replace(" ", "_")
            self._pool.run(prepare, name, str(place / "run"))
            for tag in (OLD, NEW):
                convert(UniversalView.of(open_checkpoint(place / "run", tag)), place / "universal" / tag)
            (place / "universal" / "latest").write_text(OLD)
            expected = {tag: content_of(place / "run" / tag) for tag in (OLD, NEW)}
            if name == "pipeline":  # its streams aren't all seeded here
                expected = {tag: _without_streams(content) for tag, content in expected.items()}
            names = {path.name for path in (place / "run" / NEW).iterdir()}
            shutil.move(place / "run" / NEW, self._scratch / f"{place.name}_{NEW}")
            (place / "run" / "latest").write_text(OLD)
            self._forms[name], self._ready = Form(place, expected, names), name
        form = self._forms[name]
        if self._ready != name:
            self._pool.run(prepare, name, str(form.folder / "run"))
            self._reload(form)
            self._ready = name
        return form

    def _reload(self, form: Form) -> None:
        """Put the engine into the state in which it saves."""
        self._pool.run(attempt, "load of universal", str(self._case_like(form)), NEW, None)

    def _case_like(self, form: Form) -> Path:
        link = self._scratch / f"case_{form.folder.name}"
        if not link.exists():
            link.symlink_to(form.folder)
        return link / "universal"

    def _plan(self, case: Case, form: Form, folder: Path) -> None:
        """Choose the fault."""
        met = self._met(case, form)
        choose(case, met, self._scratch / f"{form.folder.name}_{NEW}", folder, self._mounts)

    def _met(self, case: Case, form: Form) -> list[Met]:
        """Return the calls of an undisturbed operation."""
        if case.operation not in form.met:
            folder = self._scratch / "case_counted"
            shutil.copytree(form.folder, folder)
            fault = Fault(how=COUNT)
            if case.operation in COMMANDS:
                status, said, met = self._run_command(case, folder, fault)
                assert status == 0, said
                form.said[case.operation] = status, said
                form.met[case.operation] = [met]
            else:
                answers = self._run(replace(case, place="run", tag=None), folder, fault)
                assert all(not answer.kind for answer in answers), answers
                form.met[case.operation] = [answer.met for answer in answers]
                if case.operation in LOADS:
                    self._reload(form)
            shutil.rmtree(folder)
        return form.met[case.operation]

    def _run(self, case: Case, folder: Path, fault: Fault | None) -> list[Answer]:
        """Save or load on all ranks."""
        if case.operation in SAVES:
            tag = case.tag or (OLD if case.operation.endswith("over") else NEW)
            return self._pool.run(attempt, case.operation, str(folder / case.place), tag, fault, timeout=SECONDS)
        place = "universal" if case.operation == "load of universal" else "run"
        return self._pool.run(attempt, case.operation, str(folder / place), None, fault, timeout=SECONDS)

    def _answered(self, case: Case, folder: Path) -> tuple[str, str]:
        """Disturb an operation of the ranks; return how it ended."""
        try:
            answers = self._run(case, folder, case.fault)
        except ranks.RankError as error:
            self._ready = ""
            if "the process died" in str(error):
                return ("ended" if case.may_end else "died"), str(error)
            return "late", str(error)
        failed = [answer for answer in answers if answer.kind]
        if not failed:
            return _done(case, [answer.met for answer in answers]), ""
        if len(failed) < len(answers):
            return "alone", failed[0].text
        told = failed[0].text
        for answer in failed:
            if not answer.is_ours:
                ours = case.operation == "load left to DeepSpeed" and answer.is_deepspeeds
                if not ours:
                    return "foreign", f"{answer.kind}: {answer.text}"
                return "DeepSpeed's", answer.text
        vague = [answer.text for answer in failed if not _is_clear(case, answer.text)]
        return ("vague", vague[0]) if vague else ("told", told)

    def _save(self, case: Case, form: Form, folder: Path) -> tuple[str, str]:
        outcome, told = self._answered(case, folder)
        root = folder / case.place
        tag = case.tag or (OLD if case.operation.endswith("over") else NEW)
        if case.fault.umask is not None:
            for path in (root, *root.rglob("*")):
                with suppress(OSError):
                    path.chmod(0o777)
        with suppress(Exception):
            case.end(folder)
        wrong = self._harmed(case, form, folder, tag, outcome)
        if wrong:
            return "silent", f"{wrong} [{outcome}: {told}]"
        if outcome == "told" and case.kind == "odd names":
            case.place, case.tag = "run", None
            root, tag = folder / "run", OLD if case.operation.endswith("over") else NEW
        self._form(case.form)
        again = replace(case, fault=Fault(), operation=case.operation)
        try:
            answers = self._run(again, folder, None)
        except ranks.RankError as error:
            self._ready = ""
            return "lasting", f"next save: {error} [{outcome}: {told}]"
        if any(answer.kind for answer in answers):
            return "lasting", f"next save: {answers[0].text} [{outcome}: {told}]"
        if (wrong := _differences(root, tag, form.expected[NEW])) or (wrong := _left(root, tag, form)):
            return "lasting", f"after the next save: {wrong} [{outcome}: {told}]"
        return outcome, told

    def _harmed(self, case: Case, form: Form, folder: Path, tag: str, outcome: str) -> str:
        """Say what is wrong with the checkpoints that are there."""
        root = folder / case.place
        over = case.operation.endswith("over")
        kept = not (over and case.place == "run" and tag == OLD)
        if kept and _files(folder / "run" / OLD) != _files(form.folder / "run" / OLD):
            return "the older checkpoint isn't as it was"
        if outcome in DONE:
            return _differences(root, tag, form.expected[NEW])
        try:
            found = _read(root / tag)
        except UniversalCheckpointError:
            return ""
        except Exception as error:
            return f"reading the tag: {type(error).__name__}: {error}"
        wrong = [_wrong(found, form.expected[each]) for each in ((NEW, OLD) if over else (NEW,))]
        return f"a half-written checkpoint is read: {wrong}" if all(wrong) else ""

    def _load(self, case: Case, form: Form, folder: Path) -> tuple[str, str]:
        outcome, told = self._answered(case, folder)
        with suppress(Exception):
            case.end(folder)
        self._form(case.form)
        again = replace(case)
        if case.fault.how == CUTS:  # from the whole files
            shutil.rmtree(folder)
            shutil.copytree(form.folder, folder)
        if outcome not in DONE:
            answers = self._run(again, folder, None)
            if any(answer.kind for answer in answers):
                return "lasting", f"next load: {answers[0].text} [{outcome}: {told}]"
        answers = self._pool.run(attempt, "save what was loaded", str(folder / "check"), "check", None)
        if any(answer.kind for answer in answers):
            return "lasting", f"next save: {answers[0].text} [{outcome}: {told}]"
        expected = form.expected[OLD]
        if case.operation == "load of universal":
            expected = _without_streams(expected)  # it has one rank's
        wrong = _differences(folder / "check", "check", expected)
        self._reload(form)
        if wrong:
            return ("silent" if outcome in DONE else "lasting"), f"{wrong} [{outcome}: {told}]"
        return outcome, told

    def _run_command(self, case: Case, folder: Path, fault: Fault) -> tuple[int | None, str, Met]:
        """Run a command; return its status (None: not in time), what it said, and what it met."""
        source, target = str(folder / "run"), str(folder / "out")
        arguments = {
            "convert": ["convert", source, target, "--quiet"],
            "verify": ["verify", source],
            "inspect": ["inspect", source, "--all"],
            "diff": ["diff", source, str(folder / "universal")],
        }[case.operation]
        output = f"{folder}.output"
        process = self._context.Process(target=command, args=(arguments, fault, str(folder), output))
        process.start()
        process.join(SECONDS)
        status = process.exitcode
        if status is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
        said = Path(output).read_text(errors="replace") if Path(output).exists() else ""
        met = Met()
        with suppress(Exception):
            met = pickle.loads(Path(output + ".met").read_bytes())
        return status, said.replace(str(folder), "FOLDER"), met

    def _command(self, case: Case, form: Form, folder: Path) -> tuple[str, str]:
        outcome, told = self._said(case, form, folder, *self._run_command(case, folder, case.fault))
        case.end(folder)
        if case.fault.umask is not None:
            for path in (folder, *folder.rglob("*")):
                path.chmod(0o777)
        if case.fault.how == CUTS:
            shutil.rmtree(folder)
            shutil.copytree(form.folder, folder)
        elif _files(folder / "run") != _files(form.folder / "run"):
            return "silent", f"the source isn't as it was [{outcome}: {told}]"
        elif case.operation == "convert":
            if outcome in DONE:
                wrong = _differences(folder / "out", OLD, form.expected[OLD], universal=form.folder / "universal" / OLD)
                return ("silent", wrong) if wrong else (outcome, told)
            if (folder / "out" / OLD).exists():  # whole, and ``latest`` couldn't be written
                if content_of(folder / "out" / OLD) != content_of(form.folder / "universal" / OLD):
                    return "silent", f"a conversion failed and left something that is read [{outcome}: {told}]"
                shutil.rmtree(folder / "out")
        status, said, _ = self._run_command(case, folder, Fault())
        if case.operation == "convert" and status == 0:
            wrong = _differences(folder / "out", OLD, form.expected[OLD], universal=form.folder / "universal" / OLD)
            hidden = [path.name for path in folder.rglob("*") if path.name.startswith(".")]
            if wrong or hidden:
                return "lasting", f"{wrong} {hidden} [{outcome}: {told}]"
        elif (status, said) != form.said[case.operation] or status:
            return "lasting", f"the next command: {status} {said} [{outcome}: {told}]"
        return outcome, told

    def _said(self, case: Case, form: Form, folder: Path, status: int | None, said: str, met: Met) -> tuple[str, str]:
        """Judge what a command said."""
        if status is None:
            return "late", said
        if status < 0:
            return ("ended" if case.may_end and status == -signal.SIGXFSZ else "died"), f"signal {-status}: {said}"
        if "Traceback" in said or "this should not have happened" in said or status == 99:
            return "foreign", said
        if status == 0:
            usual = form.said[case.operation][1]
            if case.operation == "inspect" and case.fault.how == CUTS:  # it tells how large the files are now
                usual, said = _without_sizes(usual), _without_sizes(said)
            if case.operation == "convert" or said == usual or "warning" in said.lower():
                return _done(case, [met]), said
            return "silent", f"said other than usual: {said}"
        if (case.operation == "verify" and status == 1) or _is_clear(case, said):
            return "told", said
        return "vague", said


def _is_clear(case: Case, text: str) -> bool:
    """Return whether an error names a file and the cause."""
    plain = "".join(text.split())
    names = (f"case{case.seed}", "FOLDER", ".pt", ".json", ".safetensors")
    causes = any("".join(cause.split()).lower() in plain.lower() for cause in case.causes)
    named = case.kind == "little memory" or any(name in plain for name in names)
    return named and (causes or not case.causes)


def _done(case: Case, met: Sequence[Met]) -> str:
    """Return the outcome of a success: calls of a save in the background differ from time to time."""
    counted = case.fault.calls and not any(each.failed for each in met)
    return "not met" if counted else "done"


def _without_sizes(said: str) -> str:
    return "".join(line for line in said.splitlines(True) if not line.startswith("on disk"))


def _read(folder: Path) -> Content:
    """Read everything; random states that are missing count as there if a warning said so."""
    with warnings_of() as warned:
        found = content_of(folder)
    return found | ({"warned": warned[0]} if warned else {})


def _wrong(found: Content, wanted: Content) -> list[str]:
    """Return the keys of what was read wrong."""
    keys = {*found, *wanted} - {"warned"}
    lacking = {key for key in wanted if key.startswith("random") and "warned" in found and key not in found}
    streams = any(key.startswith("random") for key in wanted)
    keys = {key for key in keys - lacking if streams or not key.startswith("random")}
    return sorted(key for key in keys if found.get(key) != wanted.get(key))


def _without_streams(content: Content) -> Content:
    return {key: value for key, value in content.items() if not key.startswith("random")}


def _differences(root: Path, tag: str, expected: Content, universal: Path | None = None) -> str:
    """Say how a checkpoint that should be whole differs from what it should be."""
    try:
        named = (root / "latest").read_text()
        found, by_latest = _read(root / tag), _read(root)
        wanted = expected if universal is None else content_of(universal)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    wrong = _wrong(found, wanted) or _wrong(by_latest, wanted)
    return f"latest is {named!r}, and other values: {wrong[:3]}" if wrong else ""


def _left(root: Path, tag: str, form: Form) -> str:
    """Say what a save has left over."""
    hidden = [str(path.relative_to(root)) for path in root.rglob("*") if path.name.startswith(".") and path.name != tag]
    names = {path.name for path in (root / tag).iterdir()}
    return ", ".join(hidden or sorted(names ^ form.names))


@contextmanager
def torture(scratch: Path) -> Iterator[Torture]:
    """Yield what runs cases in a folder."""
    preload(scratch)
    found = Torture(scratch)
    try:
        yield found
    finally:
        found.close()


@click.command("disks")
@click.option("--count", default=300, show_default=True, help="cases in all")
@click.option("--seed", default=0, show_default=True, help="seed of the first case; the others follow")
@click.option("--only", default="", help="only kinds of faults whose names begin so")
@click.option("--form", "forms", multiple=True, type=click.Choice([*FORMS]), help="only this form; can be given again")
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
@click.option("--verbose", is_flag=True, help="print each case")
def disks_command(count: int, seed: int, only: str, forms: tuple[str, ...], as_json: bool, verbose: bool) -> None:
    """Fail disks, limits and system calls, and count outcomes; the exit status is 1 if one isn't right."""
    table: dict[str, Counter[str]] = defaultdict(Counter)
    wrong: list[tuple[Case, str, str]] = []
    with tempfile.TemporaryDirectory() as scratch, torture(Path(scratch)) as runs:
        how_full = runs.how_full
        for case in cases_of(range(seed, seed + count), only, forms or [*FORMS]):
            outcome, told = runs.outcome_of(case)
            table[case.kind][outcome] += 1
            if outcome not in RIGHT:
                wrong.append((case, outcome, told))
            if verbose:
                print(
                    f"{case.seed}: {outcome}: {case.form}, {case.operation}, {case.kind}, {case.fault}: {told}\n",
                    flush=True,
                )
    click.echo(f"a full disk was {how_full}", err=True)
    lines = [
        f"{outcome}: seed {case.seed}: {case.form}, {case.operation}, {case.kind}: {told[:MOST_TOLD]}"
        for case, outcome, told in wrong
    ]
    report(table, (*RIGHT, *WRONG), lines, as_json)
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    disks_command()
