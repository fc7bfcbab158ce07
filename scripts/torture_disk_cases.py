"""Cases of ``scripts/torture_disks.py``: kinds of faults, the operations that they disturb, and the choice of one by a seed."""

from __future__ import annotations

import ctypes
import errno
import os
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torture_environment import ALWAYS, CUTS, FULL, SHORT, Fault, Met
from torture_operations import FORMS, OLD

SAVES = ("save", "save over", "async save", "async save over")
LOADS = ("load", "load left to DeepSpeed", "load of universal")
COMMANDS = ("convert", "verify", "inspect", "diff")
OPERATIONS = SAVES + LOADS + COMMANDS

NUMBERS: Mapping[str, tuple[str, ...]] = {
    "open": ("EIO", "ENOMEM", "ESTALE", "EMFILE", "EACCES", "EINTR", "ENOSPC"),
    "read": ("EIO", "ESTALE", "ENOMEM", "EINTR"),
    "write": ("EIO", "ENOSPC", "EDQUOT", "ESTALE", "EINTR", "ENOMEM"),
    "sync": ("EIO", "ENOSPC", "EDQUOT", "ESTALE"),
    "rename": ("EIO", "ENOSPC", "EACCES", "ESTALE"),
    "close": ("EIO", "ENOSPC", "EDQUOT"),
    "map": ("ENOMEM", "EIO", "EACCES"),
    "stat": ("EIO", "ESTALE", "EACCES", "ENOMEM"),
    "list": ("EIO", "ESTALE", "ENOMEM", "EACCES"),
    "make": ("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES"),
    "remove": ("EIO", "EACCES", "EROFS", "ESTALE"),
    "truncate": ("EIO", "ENOSPC", "ENOMEM"),
    "lock": ("EIO", "ENOSYS", "ESTALE"),
}
"""Errors with which each kind of call fails."""


@dataclass
class Case:
    """One case.

    Attributes:
        causes: texts of which an error has one.
        begin, end: make what the fault needs in the case's folder, and take it away.
        place: folder to save into, below the case's; and the tag.
        may_end: whether the fault may end a process.
    """

    seed: int
    kind: str
    operation: str
    form: str
    dice: random.Random
    fault: Fault = field(default_factory=Fault)
    causes: tuple[str, ...] = ()
    begin: Callable[[Path], None] = lambda folder: None
    end: Callable[[Path], None] = lambda folder: None
    place: str = "run"
    tag: str | None = None
    may_end: bool = False

    def meets(self, name: str, **settings: Any) -> None:
        """Set the errno of the fault, and what an error has to say of it."""
        number = getattr(errno, name)
        self.fault = replace(self.fault, number=number, **settings)
        # torch's writer and reader lose the number of a call that fails once
        torchs = (
            "iostream error",
            "write failed",
            "failed writing",
            "read failed",
            "failed reading",
            "failed finding",
            "unexpected pos",
        )
        self.causes = (os.strerror(number), "became shorter", *torchs)
        if name == "ESTALE":  # so network file systems tell of a file that was replaced
            self.causes += ("was changed",)
        if self.kind == "call fails: read" and self.fault.first == self.fault.last:
            self.causes += ("not a zip file",)  # zipfile doesn't tell why, and when it is asked again the read succeeds


def _numbytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file())


def call_fails(case: Case, met: Sequence[Met], call: str) -> None:
    """Let one call of a kind fail, or all from one on; of another kind if the operation makes no such calls."""
    made = [each for each in NUMBERS if any(rank.calls.get(each) for rank in met)]
    if call not in made:
        call = case.dice.choice(made)
        case.kind = f"call fails: {call}"
    case.fault = Fault(calls=(call,), ranks=case.dice.choice([(0,), (1,), (0, 1)]))
    rank = case.fault.ranks[0] if len(met) > 1 else 0
    first = case.dice.randint(1, max(met[rank].calls.get(call, 0), 1))
    name, last = case.dice.choice(NUMBERS[call]), case.dice.choice([first, first, first + 2, ALWAYS])
    # Python tries a call again and again that a signal has interrupted.
    case.meets(name, first=first, last=min(last, first + 2) if name == "EINTR" else last)


def calls_are_short(case: Case, met: Sequence[Met], call: str) -> None:
    """Let reads or writes do half of what they should."""
    call_fails(case, met, call)
    case.fault, case.causes = replace(case.fault, how=SHORT, last=case.dice.choice([case.fault.first, ALWAYS])), ()


def file_is_cut(case: Case, met: Sequence[Met], folder: Path) -> None:
    """Let a file become shorter at some call."""
    call = case.dice.choice([each for each in ("open", "read", "map", "stat", "close") if met[0].calls.get(each)])
    files = [path for path in sorted((folder / "run" / OLD).rglob("*")) if path.suffix in (".pt", ".json", ".jsonl")]
    if case.operation == "load of universal":
        files = [path for path in sorted((folder / "universal" / OLD).rglob("*")) if path.is_file()]
    case.fault = Fault((call,), ranks=(0,), how=CUTS, cut=str(case.dice.choice(files)))
    case.fault = replace(case.fault, first=case.dice.randint(1, met[0].calls[call]))
    case.fault = replace(case.fault, last=case.fault.first)
    case.causes = (
        "short",
        "truncated",
        "size",
        "damaged",
        "bytes",
        "JSON",
        "archive",
        "changed",
        "sum",
        "written again",
    )


def disk_is_full(case: Case, met: Sequence[Met], needed: int, mounts: bool) -> None:
    """Have a disk with too little room: a small file system of its own, or else writes that fail from some byte on."""
    room = case.dice.randrange(needed)
    case.meets("ENOSPC")
    case.causes += ("are free",)
    if not mounts:
        case.fault = Fault(("write",), how=FULL, room=room, number=errno.ENOSPC)
        return

    def begin(folder: Path) -> None:
        held = Path(f"{folder}.held")
        folder.rename(held)
        folder.mkdir()
        pages = sum(-(-path.stat().st_size // 4096) for path in held.rglob("*") if path.is_file())
        _mount(folder, pages * 4096 + room)
        shutil.copytree(held, folder, dirs_exist_ok=True)
        shutil.rmtree(held)

    case.begin, case.end = begin, lambda folder: _mount(folder, 1 << 30, again=True)


def size_is_limited(case: Case, met: Sequence[Met], largest: int) -> None:
    """Limit the size of files."""
    limit = case.dice.randrange(largest)
    case.fault = Fault(limits={"RLIMIT_FSIZE": limit}, kills=case.kind.endswith("signal"))
    case.causes = (os.strerror(errno.EFBIG),)
    case.fault = replace(case.fault, ranks=case.dice.choice([(0,), (1,), (0, 1)]))
    case.may_end = case.fault.kills


def descriptors_are_few(case: Case, met: Sequence[Met]) -> None:
    """Allow few descriptors more than are open."""
    case.fault = Fault(limits={"RLIMIT_NOFILE": case.dice.randrange(-1, 5)})
    case.fault = replace(case.fault, ranks=case.dice.choice([(0,), (1,), (0, 1)]))
    case.causes = (os.strerror(errno.EMFILE), "descriptors")


def memory_is_short(case: Case, met: Sequence[Met]) -> None:
    """Allow little more memory than is taken."""
    case.fault = Fault(limits={"RLIMIT_AS": case.dice.randrange(1 << case.dice.randrange(14, 28))}, ranks=(0,))
    case.causes = ("memory", "start new thread")


def modes_forbid(case: Case, met: Sequence[Met]) -> None:
    """Take away permissions of a folder or file."""
    case.fault, case.causes = Fault(modes=True), (os.strerror(errno.EACCES),)
    place = "universal" if case.operation == "load of universal" else "run"
    loads = case.operation not in SAVES
    choices: list[tuple[str, int]] = [(place, 0o555), (place, 0o600), (place, 0o444), (f"{place}/{OLD}", 0o555)]
    choices += [(f"{place}/{OLD}", 0o600), (f"{place}/{OLD}", 0o000), (f"{place}/latest", 0o000), ("file", 0o000)]
    choices += [("file", 0o444)] if not loads else []
    choices += [(".", 0o555)] if case.operation == "convert" else []
    path, mode = case.dice.choice(choices)
    number = case.dice.random()

    def place_of(folder: Path) -> Path:
        files = [each for each in sorted((folder / place / OLD).rglob("*")) if each.is_file()]
        return files[int(number * len(files))] if path == "file" else folder / path

    def begin(folder: Path) -> None:
        found = place_of(folder)
        kept.append((found, found.stat().st_mode))
        found.chmod(mode)

    kept: list[tuple[Path, int]] = []
    case.begin, case.end = begin, lambda folder: [found.chmod(before) for found, before in kept] and None


ODD_TAGS = (
    "new line\nin it",
    "ends\n",
    "línea ünd 名前",
    "\udc80surrogate",
    " spaces around ",
    ".hidden",
    "a/b",
    "q'\"$`*?[]{}",
)


def names_are_odd(case: Case, met: Sequence[Met]) -> None:
    """Use long or odd names, or names that files have."""
    case.causes = (os.strerror(errno.ENAMETOOLONG), "too long", os.strerror(errno.ENOTDIR), os.strerror(errno.EEXIST))
    case.causes += (
        "is a file",
        "can't be in a path",
        "no folder of its own",
        "UTF-8",
        "not a tag",
        "line",
        "space",
        "names",
    )
    what = case.dice.choice(["tag", "tag", "folder", "long tag", "long path", "missing parents", "file"])
    if what == "tag":
        case.tag = case.dice.choice(ODD_TAGS)
    elif what == "long tag":
        case.tag = "t" * case.dice.randint(150, 300)
    elif what == "folder":
        case.place = case.dice.choice(ODD_TAGS)
    elif what == "long path":
        case.place = "/".join(["d" * 200] * case.dice.randint(17, 22))
    elif what == "missing parents":
        case.place = "a/b/c"
    else:
        case.place = case.dice.choice(["file", "file/below"])
        case.begin = lambda folder: (folder / "file").write_text("") and None
        case.end = lambda folder: (folder / "file").unlink(missing_ok=True)


def clock_is_wrong(case: Case, met: Sequence[Met]) -> None:
    """Let the clock jump, or let new files have odd permissions."""
    years = case.dice.choice([-20, -1, 1, 20])
    case.fault = Fault(clock=years * 365 * 86400)


def umask_is_odd(case: Case, met: Sequence[Met]) -> None:
    """Let new files have odd permissions."""
    case.fault = Fault(umask=case.dice.choice([0, 0o077, 0o777, 0o222, 0o333, 0o444]), modes=True)
    case.causes = (os.strerror(errno.EACCES),)


def _mount(folder: Path, numbytes: int, again: bool = False) -> None:
    flags = 32 if again else 0  # MS_REMOUNT
    options = f"size={numbytes // 4096 * 4096}".encode()
    if ctypes.CDLL(None, use_errno=True).mount(b"none", os.fsencode(folder), b"tmpfs", flags, options):
        raise OSError(ctypes.get_errno(), "mount")


def can_mount(scratch: Path) -> bool:
    """Return whether this process may mount a file system."""
    place = scratch / "probe"
    place.mkdir()
    try:
        _mount(place, 1 << 20)
    except OSError:
        return False
    ctypes.CDLL(None).umount2(os.fsencode(place), 2)
    return True


KINDS: Mapping[str, Sequence[str]] = {
    **{f"call fails: {call}": OPERATIONS for call in NUMBERS},
    "short reads": OPERATIONS,
    "short writes": (*SAVES, "convert"),
    "disk full": (*SAVES, "convert"),
    "size of files limited": (*SAVES, "convert"),
    "size of files limited, with its signal": (*SAVES, "convert"),
    "no descriptors": OPERATIONS,
    "no permission": OPERATIONS,
    "odd names": SAVES,
    "little memory": (*LOADS, *COMMANDS),
    "wrong clock": (*SAVES, *LOADS, "convert"),
    "odd umask": (*SAVES, "convert"),
    "file gets shorter": (*LOADS, *COMMANDS),
}
WRITES = ("sync", "rename", "make", "truncate", "write", "remove", "lock")
"""Calls that only saves and conversions make."""


def cases_of(seeds: Sequence[int], only: str, forms: Sequence[str]) -> list[Case]:
    """Return the cases of these seeds, by form; ``only`` is the begin of the names of their kinds."""
    pairs = [
        (kind, operation)
        for kind, operations in KINDS.items()
        for operation in operations
        if kind.startswith(only) and not (kind.split(": ")[-1] in WRITES and operation not in (*SAVES, "convert"))
    ]
    found = []
    for seed in seeds:
        dice = random.Random(seed)
        found.append(Case(seed, *pairs[seed % len(pairs)], dice.choice([*forms]), dice))
    return sorted(found, key=lambda case: list(FORMS).index(case.form))


def choose(case: Case, met: Sequence[Met], new: Path, folder: Path, mounts: bool) -> None:
    """Choose the fault of a case by its dice.

    Args:
        met: the calls of an undisturbed operation, of each rank.
        new: the files that a save writes.
        folder: the case's folder.
        mounts: whether this process may mount a file system.
    """
    largest = max(path.stat().st_size for path in new.iterdir())
    what, _, call = case.kind.partition(": ")
    makers: Mapping[str, Callable[[], None]] = {
        "call fails": lambda: call_fails(case, met, call),
        "short reads": lambda: calls_are_short(case, met, "read"),
        "short writes": lambda: calls_are_short(case, met, "write"),
        "disk full": lambda: disk_is_full(case, met, _numbytes(new) + 40000, mounts),
        "size of files limited": lambda: size_is_limited(case, met, largest),
        "size of files limited, with its signal": lambda: size_is_limited(case, met, largest),
        "no descriptors": lambda: descriptors_are_few(case, met),
        "no permission": lambda: modes_forbid(case, met),
        "odd names": lambda: names_are_odd(case, met),
        "little memory": lambda: memory_is_short(case, met),
        "wrong clock": lambda: clock_is_wrong(case, met),
        "odd umask": lambda: umask_is_odd(case, met),
        "file gets shorter": lambda: file_is_cut(case, met, folder),
    }
    makers[what]()
