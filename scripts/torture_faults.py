"""Damages small checkpoints of every form, one fault at a time, and counts what readers say.

Each outcome is one of these:

- *told*: an error of the package, or a warning, which names what is wrong;
- *harmless*: no error, and all values, counts, states of random streams and client state are those that were saved;
- *none*: the fault changed nothing, as where two equal files change places;
- *silent*: no error, and something else was read;
- *foreign*: another exception; *late*: no answer in time; *dead*: the process died.

The first three are right.
"""

from __future__ import annotations

import multiprocessing
import random
import shutil
import tempfile
import time
import zipfile
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.connection import Connection, wait
from pathlib import Path

import click
import torch
from torture_report import report
from xxhash import xxh3_64_hexdigest

import ucp_deepspeed
from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.opening import open_checkpoint
from ucp_deepspeed.checkpoint.random_files import (
    committed_path,
    description_of,
    parse_state,
    read_state,
    warn_of_uncommitted,
)
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train, warnings_of
from ucp_deepspeed.transfer.conversion import convert

WRONG = ("silent", "foreign", "late", "dead")

STEPS = 2
"""Steps of the run when it saves; the step before is saved too, since files are exchanged with it."""

SECONDS = 20
"""Time for one reader of one damaged checkpoint."""

FORMS: Mapping[str, tuple[int, Run]] = {
    "plain fp32": (2, Run("mlp", zero={"stage": 0})),
    "plain bf16": (2, Run("mlp", zero={"stage": 0}, precision="bf16")),
    "ZeRO-1": (4, Run("mlp", zero={"stage": 1})),
    "ZeRO-2 bf16": (2, Run("mlp", zero={"stage": 2}, precision="bf16", groups="decay")),
    "ZeRO-3": (2, Run("mlp", zero={"stage": 3})),
    "tensor parallel, ZeRO-1": (2, Run("llama", tp=2, zero={"stage": 1}, precision="bf16")),
    "pipeline": (2, Run("gpt", pp=2, zero={"stage": 1})),
    "experts, no ZeRO": (2, Run("moe", zero={"stage": 0})),
    "frozen, ZeRO-2 fp16": (
        2,
        Run("mlp", zero={"stage": 2}, precision="fp16", frozen=("norm.bias", "layers.0.weight")),
    ),
    "frozen, ZeRO-3, momentum": (
        2,
        Run("mlp", zero={"stage": 3}, frozen=("linear_in.weight",), optimizer=("SGD", {"lr": 0.05, "momentum": 0.9})),
    ),
    "AutoTP, ZeRO-1": (2, Run("huggingface", {"family": "llama"}, tp=2, zero={"stage": 1})),
    "tied pipeline, ZeRO-1": (2, Run("tied", pp=2, zero={"stage": 1})),
    "experts, ZeRO-1": (2, Run("moe", zero={"stage": 1}, precision="bf16")),
}

USUAL = ("pipeline stages hold different values",)
"""Beginnings of warnings that sound checkpoints of these forms give."""

STOCK, UNIVERSAL = "stock", "universal"
"""Sources beside ours: saved without the package, and converted."""

OTHER_RUN = "_of_another_run"
"""Ending of the folder with the checkpoint of a run that has other weights."""

Content = dict[str, str]
"""Digests of all that a checkpoint says, by name."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        source: name of the checkpoint.
        kind: name in `KINDS`.
        seed: chooses file and place.
    """

    source: str
    kind: str
    seed: int


def content_of(folder: Path) -> Content:
    """Read everything; each state of each parameter whole."""
    found: Content = {}
    with ucp_deepspeed.open_checkpoint(folder) as held:
        if held.lacking is not None:
            raise UniversalCheckpointError(held.lacking)
        for name, info in held.parameters.items():
            if info.differing:
                raise UniversalCheckpointError(f"{name}: {info.differing}")
            for state in info.states:
                values = held.read(name, state)
                found[f"{name}/{state}"] = xxh3_64_hexdigest(values.view(-1).view(torch.uint8).numpy())
            found[f"{name} numbers"] = repr(sorted(info.scalars.items()))
        found |= {"run": repr(held.run), "groups": repr(held.groups), "client state": repr(held.client_state)}
        ranks = held.saved_by.dp * held.saved_by.tp * held.saved_by.pp
        folder = held.path
    found |= _random_states(open_checkpoint(folder), folder, ranks)
    return found


def _random_states(checkpoint: Checkpoint, folder: Path, ranks: int) -> Content:
    """Read the states of the random streams as a load does, and what the checkpoint says of them."""
    listing = description_of(checkpoint)
    found = {}
    for rank in range(ranks):
        path = committed_path(folder, rank, listing)
        if path is None:
            warn_of_uncommitted(folder, "its streams begin anew")
        else:
            state = read_state(path, rank, getattr(listing, "save_id", None))
            found[f"random streams of rank {rank}"] = "" if state is None else repr(parse_state(state, path, rank))
    return found


def _any_file(folder: Path, dice: random.Random) -> Path:
    return dice.choice([path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size])


def _records(path: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(path) as archive:
        return [record for record in archive.infolist() if record.file_size]


def _flip(path: Path, place: int, dice: random.Random) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << dice.randrange(8)]))


def flip_anywhere(folder: Path, other: Path, dice: random.Random) -> None:
    """Flip one bit of any file."""
    path = _any_file(folder, dice)
    _flip(path, dice.randrange(path.stat().st_size), dice)


def flip_in_a_record(folder: Path, other: Path, dice: random.Random) -> None:
    """Flip one bit inside a record of an archive, or anywhere in a file that is none."""
    path = _any_file(folder, dice)
    if not zipfile.is_zipfile(path):
        _flip(path, dice.randrange(path.stat().st_size), dice)
        return
    record = dice.choice(_records(path))
    with path.open("rb") as file:
        file.seek(record.header_offset + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    start = record.header_offset + 30 + name + extra
    _flip(path, start + dice.randrange(record.file_size), dice)


def zero_a_page(folder: Path, other: Path, dice: random.Random) -> None:
    """Write zeros over a page, as a lost write leaves it."""
    path = _any_file(folder, dice)
    with path.open("r+b") as file:
        start = dice.randrange(path.stat().st_size) // 512 * 512
        file.seek(start)
        file.write(bytes(min(512, path.stat().st_size - start)))


def cut(folder: Path, other: Path, dice: random.Random) -> None:
    """Cut a file short."""
    path = _any_file(folder, dice)
    with path.open("r+b") as file:
        file.truncate(dice.randrange(path.stat().st_size))


def append(folder: Path, other: Path, dice: random.Random) -> None:
    """Write more bytes behind a file."""
    with _any_file(folder, dice).open("ab") as file:
        file.write(dice.randbytes(dice.randrange(1, 100)))


def delete(folder: Path, other: Path, dice: random.Random) -> None:
    """Remove a file."""
    _any_file(folder, dice).unlink()


def exchange(folder: Path, other: Path, dice: random.Random) -> None:
    """Exchange two files of one size and ending."""
    first = _any_file(folder, dice)
    alike = [path for path in sorted(first.parent.iterdir()) if path.suffix == first.suffix and path != first]
    if alike:
        second, aside = dice.choice(alike), first.with_name("aside")
        first.rename(aside)
        second.rename(first)
        aside.rename(second)


def take_from_another_step(folder: Path, other: Path, dice: random.Random) -> None:
    """Put a file of the step before in the place of its namesake."""
    path = _any_file(folder, dice)
    relative = path.relative_to(folder)
    if (other / relative).is_file():
        shutil.copyfile(other / relative, path)


def take_from_another_run(folder: Path, other: Path, dice: random.Random) -> None:
    """Put the file of a run with other weights, at the same step, in the place of its namesake."""
    path = _any_file(folder, dice)
    source = other.parents[1] / f"{other.parent.name}{OTHER_RUN}" / folder.name / path.relative_to(folder)
    if source.is_file():
        shutil.copyfile(source, path)


def change_a_value(folder: Path, other: Path, dice: random.Random) -> None:
    """Change a digit in one of the files that are text."""
    texts = [path for path in sorted(folder.rglob("*")) if path.suffix in (".json", ".jsonl") and path.is_file()]
    if not texts:
        flip_anywhere(folder, other, dice)
        return
    path = dice.choice(texts)
    content = path.read_text(encoding="utf-8")
    digits = [place for place, letter in enumerate(content) if letter.isdigit()]
    place = dice.choice(digits)
    digit = dice.choice([each for each in "0123456789" if each != content[place]])
    path.write_text(content[:place] + digit + content[place + 1 :], encoding="utf-8")


KINDS: Mapping[str, Callable[[Path, Path, random.Random], None]] = {
    "bit anywhere": flip_anywhere,
    "bit in a record": flip_in_a_record,
    "page of zeros": zero_a_page,
    "cut short": cut,
    "bytes appended": append,
    "file removed": delete,
    "files exchanged": exchange,
    "file of another step": take_from_another_step,
    "file of another run": take_from_another_run,
    "digit in a text": change_a_value,
}


def make_sources(root: Path, forms: Iterable[str] = FORMS) -> dict[str, Path]:
    """Save each form with the package and without it, and convert it: at two steps, and at the later one by another run.

    Return the folders of the first run's later step.
    """
    found = {}
    for name, (world_size, run) in ((name, FORMS[name]) for name in forms):
        for how, universal in (("ours", {"enabled": True}), (STOCK, None)):
            place = root / f"{name} {how}".replace(" ", "_")
            for seed, step, ending in ((0, STEPS - 1, ""), (0, STEPS, ""), (1, STEPS, OTHER_RUN)):
                saved = replace(run, universal=universal, seed=seed)
                get_pool(world_size).run(train, saved, step, save=f"{place}{ending}")
            found[f"{name}, {how}"] = place / f"global_step{STEPS}"
        source, place = (root / f"{name} {how}".replace(" ", "_") for how in ("ours", UNIVERSAL))
        for step, ending in ((STEPS - 1, ""), (STEPS, ""), (STEPS, OTHER_RUN)):
            relative = f"{ending}/global_step{step}"
            convert(UniversalView.of(open_checkpoint(Path(f"{source}{relative}"))), Path(f"{place}{relative}"))
        found[f"{name}, {UNIVERSAL}"] = place / f"global_step{STEPS}"
    return found


def outcome_of(fault: Fault, folder: Path, expected: Content) -> tuple[str, str]:
    """Damage a copy and read it; return the outcome, and what there is to say."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        copy = Path(scratch) / folder.name
        shutil.copytree(folder, copy)
        KINDS[fault.kind](copy, folder.parent / f"global_step{STEPS - 1}", random.Random(fault.seed))
        if all(path.read_bytes() == (folder / path.relative_to(copy)).read_bytes() for path in _files(copy)) and len(
            _files(copy)
        ) == len(_files(folder)):
            return "none", ""
        try:
            with warnings_of() as warned:
                found = content_of(copy)
        except UniversalCheckpointError as error:
            return "told", f"{type(error).__name__}: {error}"
        except Exception as error:
            return "foreign", f"{type(error).__name__}: {error}"
    if warned := [text for text in warned if not any(text.startswith(start) for start in USUAL)]:
        return "told", warned[0]
    wrong = sorted(key for key in {*expected, *found} if expected.get(key) != found.get(key))
    return ("silent", ", ".join(wrong[:3])) if wrong else ("harmless", "")


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def _try(sources: Mapping[str, Path], expected: Mapping[str, Content], fault: Fault) -> tuple[Fault, str, str]:
    return fault, *outcome_of(fault, sources[fault.source], expected[fault.source])


@click.command("faults")
@click.option("--count", default=500, show_default=True, help="faults in all")
@click.option("--seed", default=0, show_default=True, help="seed of the first fault; the others follow")
@click.option("--processes", default=2, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print one JSON object")
def faults_command(count: int, seed: int, processes: int, as_json: bool) -> None:
    """Inject faults and count outcomes; the exit status is 1 if one is neither told nor harmless."""
    with tempfile.TemporaryDirectory() as scratch:
        sources = make_sources(Path(scratch))
        expected = {name: content_of(folder) for name, folder in sources.items()}
        pairs = [(name, kind) for name in sources for kind in KINDS]
        faults = [Fault(*pairs[each % len(pairs)], each) for each in range(seed, seed + count)]
        outcomes = _outcomes(partial(_try, sources, expected), faults, processes)
    table: dict[str, Counter[str]] = {}
    for fault, outcome, _ in outcomes:
        table.setdefault(f"{fault.source.rpartition(', ')[2]}: {fault.kind}", Counter())[outcome] += 1
    wrong = [
        f"{outcome}: {fault.source}, {fault.kind}, seed {fault.seed}: {told[:200]}"
        for fault, outcome, told in outcomes
        if outcome in WRONG
    ]
    report(table, ("told", "harmless", "none", *WRONG), wrong, as_json)
    raise SystemExit(bool(wrong))


def _outcomes(
    call: Callable[[Fault], tuple[Fault, str, str]], faults: list[Fault], processes: int
) -> list[tuple[Fault, str, str]]:
    """Return the outcome of each fault. A reader that dies, or gives no answer in time, is ended, and another goes on."""
    found: list[tuple[Fault, str, str]] = []
    left = deque(faults)
    readers = [_Reader(call) for _ in range(min(processes, len(faults)))]
    while left or any(reader.fault for reader in readers):
        for reader in readers:
            if reader.fault is None and left:
                reader.begin(left.popleft())
        busy = {reader.connection: reader for reader in readers if reader.fault}
        for connection in wait(busy, timeout=1):
            found.append(busy[connection].answer())
        found += [reader.end("late", f"no answer within {SECONDS} s") for reader in readers if reader.is_late]
    for reader in readers:
        reader.process.kill()
    return found


class _Reader:
    """A process that reads one damaged checkpoint after another."""

    def __init__(self, call: Callable[[Fault], tuple[Fault, str, str]]) -> None:
        self._call = call
        self.fault: Fault | None = None
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(self._call, theirs), daemon=True)
        self.process.start()
        theirs.close()
        self._deadline = time.monotonic() + 10 * SECONDS  # it imports torch first

    def begin(self, fault: Fault) -> None:
        self.fault = fault
        self._deadline = max(self._deadline, time.monotonic() + SECONDS)
        self.connection.send(fault)

    @property
    def is_late(self) -> bool:
        return self.fault is not None and time.monotonic() > self._deadline

    def answer(self) -> tuple[Fault, str, str]:
        try:
            outcome: tuple[Fault, str, str] = self.connection.recv()
        except (EOFError, ConnectionResetError):
            return self.end("dead", f"the reader died with exit status {self.process.exitcode}")
        self.fault, self._deadline = None, 0.0
        return outcome

    def end(self, outcome: str, why: str) -> tuple[Fault, str, str]:
        """Begin anew with another process."""
        assert self.fault is not None
        fault, self.fault = self.fault, None
        self.process.kill()
        self._start()
        return fault, outcome, why


def _serve(call: Callable[[Fault], tuple[Fault, str, str]], connection: Connection) -> None:
    with suppress(EOFError):
        while True:
            connection.send(call(connection.recv()))
