"""Runs that ``torture_kills.py`` harms: their folders from before, the ranks that resume them, and what is right to find then."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torture_faults import content_of as read_all
from torture_killed import Kill, act, convert_here, save_bases
from xxhash import xxh3_64_hexdigest

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, MARK_NAME
from ucp_deepspeed.checkpoint.universal.index import PARTIAL_MARK
from ucp_deepspeed.errors import UniversalCheckpointError
from ucp_deepspeed.testing import ranks as pools
from ucp_deepspeed.testing.ranks import RankError, RankPool, free_port
from ucp_deepspeed.testing.runs import Run

RANKS = 2

FORMS: Mapping[str, Run] = {
    "no ZeRO": Run("mlp", zero={"stage": 0}),
    "ZeRO-1": Run("mlp", zero={"stage": 1}, precision="bf16"),
    "ZeRO-3": Run("mlp", zero={"stage": 3}),
    "pipeline": Run("gpt", pp=2, zero={"stage": 1}),
}

SECONDS = 40
"""Bound of what is killed."""

OURS = ("wait_until", "is_seen", "_await_ranks", "give_up", "_settle", "put_back")
"""Functions of the package that wait for something else than a collective."""

NOTES = ("a/notes.txt", "a/logs/one", "a/logs/two")
"""Files that somebody else has put into a tag's folder, and that stay whatever happens."""

NEW, OTHER = 3, 4
"""Keys of `Base.content` for what is saved at step 3, and for what another job saves."""

RIGHT, WRONG = ("before", "after", "told", "not killed"), ("silent", "foreign", "late", "leftovers")

Content = dict[str, str]
Found = tuple[str, str]
"""An outcome, and what there is to say."""


class WrongError(Exception):
    """A case isn't right.

    Args:
        outcome: one of `WRONG`.
    """

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


@dataclass(frozen=True)
class Base:
    """A run's folder from before, and a universal checkpoint of its tag ``a``.

    Attributes:
        content: step (or `NEW`, `OTHER`) → all that its checkpoint says; compared with what the runs recorded.
    """

    run: Run
    folder: Path
    universal: Path
    content: Mapping[int, Content]
    of_universal: Mapping[str, Content]


@dataclass
class Ended:
    """The end of ranks.

    Attributes:
        killed: those that died of the kill.
        errors: of those that lived and failed.
    """

    killed: list[int]
    errors: list[str] = field(default_factory=list)
    extent: Any = None


def content_of(folder: Path, tag: str | None = None) -> Content:
    """Return digests of all that a checkpoint says, but for the client state: the configuration in it isn't the run's state."""
    found = read_all(folder if tag is None else folder / tag)
    found.pop("client state")
    return found


def read(folder: Path, tag: str | None, content: Mapping[int, Content], streams: bool = True) -> int | str:
    """Return the step whose content a tag has, or what the package told.

    Args:
        streams: whether random streams, where there are any, are the step's too.
    """
    try:
        found = content_of(folder, tag)
    except UniversalCheckpointError as error:
        return f"{type(error).__name__}: {error}"
    except Exception as error:
        raise WrongError("foreign", f"reading {tag or 'latest'}: {type(error).__name__}: {error}") from error
    for step, expected in content.items():
        if all(found.get(key) == expected[key] for key in expected if not key.startswith("random")):
            if not any(key.startswith("random") for key in found) and (folder / (tag or "") / MANIFEST_NAME).is_file():
                raise WrongError("silent", f"{tag} has step {step}, and no random streams")
            drawn = {key: value for key, value in found.items() if key.startswith("random") and streams}
            if any(expected[key] != value for key, value in drawn.items()):
                raise WrongError("silent", f"{tag or 'latest'} has step {step}, and other random streams")
            return step
    closest = min(content.values(), key=lambda each: sum(found.get(key) != each[key] for key in each))
    differ = [key for key in closest if found.get(key) != closest[key]]
    raise WrongError("silent", f"{tag or 'latest'} has none of the contents saved; nearest but for {differ[:4]}")


def leftovers(root: Path, tag: str | None = None) -> list[str]:
    """Return hidden partial entries and marks in a run's folder; also in that tag's folder."""
    found = [entry for entry in root.iterdir() if PARTIAL_MARK in entry.name]
    if tag is not None:
        inside = [*(root / tag).rglob("*"), *(root / tag).rglob(".*")]
        found += [entry for entry in {*inside} if entry.name.startswith(".") or entry.name == MARK_NAME]
    return sorted(str(entry.relative_to(root)) for entry in found)


def fingerprint(folder: Path) -> dict[str, Any]:
    """Return time and content of each file."""
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


class Lab:
    """Folders, pools and lengths that cases share."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._bases: dict[str, Base] = {}
        self._extents: dict[Any, Any] = {}
        self._followers: dict[str, RankPool] = {}
        pools.GRACE_SECONDS = 12.0

    def close(self) -> None:
        """End all ranks."""
        for pool in self._followers.values():
            pool.close()

    def base(self, form: str) -> Base:
        """Return the folder from before of a form; make it first."""
        if form not in self._bases:
            self._bases[form] = self._make_base(FORMS[form], self.scratch / form.replace(" ", "_"))
        return self._bases[form]

    def _make_base(self, run: Run, folder: Path) -> Base:
        pool = RankPool(RANKS)
        run = replace(run, universal={"enabled": True})
        content = {}
        for key, tag, step, of in (
            (1, "b", 1, run),
            (2, "a", 2, run),
            (NEW, "c", 3, run),
            (OTHER, "d", 3, other_job(run)),
        ):
            place = folder / "run" if key < NEW else folder / tag
            [recorded, *more] = pool.run(save_bases, of, str(place), {tag: step})
            for each in more:
                recorded[tag].update(each[tag])
            content[key] = content_of(place, tag)
            _check_recorded(recorded[tag], content[key])
        pool.close()
        with workplace(self) as place:
            for tag in ("b", "a"):
                codes, _ = run_converts(place, [str(folder / "run"), str(folder / "universal"), "--tag", tag])
                assert codes == [0], (place / "log").read_text()
        for path in NOTES:
            (folder / "run" / path).parent.mkdir(exist_ok=True)
            (folder / "run" / path).write_text("mine")
        of_universal = {tag: content_of(folder / "universal", tag) for tag in ("a", "b")}
        return Base(run, folder / "run", folder / "universal", content, of_universal)

    def extent(self, key: Any, measure: Callable[[], Any]) -> Any:
        """Return what was measured once under a key."""
        if key not in self._extents:
            self._extents[key] = measure()
        return self._extents[key]

    def follower(self, form: str) -> RankPool:
        """Return the ranks that resume: their engine lives from case to case."""
        return self._followers.setdefault(form, RankPool(RANKS, most_runs=10**9))


def other_job(run: Run) -> Run:
    """Return a run with other values."""
    return replace(run, seed=run.seed + 7)


def _check_recorded(recorded: Mapping[str, bytes], content: Content) -> None:
    """Check that a checkpoint's content is what the run recorded before it saved, under whatever names."""
    states = {value for key, value in content.items() if key.endswith(("/fp32", "/exp_avg", "/exp_avg_sq"))}
    assert states == {xxh3_64_hexdigest(value) for value in recorded.values()}


@contextmanager
def workplace(lab: Lab) -> Iterator[Path]:
    """Yield a new folder of a case, with a folder ``told`` in it."""
    with tempfile.TemporaryDirectory(dir=lab.scratch, prefix="case-") as name:
        (Path(name) / "told").mkdir()
        yield Path(name)


def run_ranks(
    place: Path, kill: Kill | None, operation: str, run: Run, steps: int, folder: Path, tag: str | None
) -> Ended:
    """Start ranks that save or load, and may be killed in it; return what became of them.

    Raises:
        WrongError: one that wasn't killed waits for something of the package's, or has an error of another kind though none died.
    """
    pool, told, text, extent = RankPool(RANKS), Path(tempfile.mkdtemp(dir=place / "told")), "", None
    try:
        extent = pool.run(act, operation, run, steps, str(folder), tag, kill, str(told), timeout=SECONDS)
    except RankError as error:
        text = str(error)
    finally:
        pool.close()
    ends = {rank: told / f"rank{rank}.json" for rank in range(RANKS)}
    found = {rank: json.loads(path.read_text()) for rank, path in ends.items() if path.exists()}
    missing = [rank for rank in ends if rank not in found]
    killed = [rank for rank in missing if kill is not None and rank in kill.ranks]
    for rank in missing:
        if rank not in killed and (not killed or any(f"in {name}" in text for name in OURS)):
            raise WrongError("late", f"rank {rank} doesn't end: {text[-1500:]}")
    for rank, end in found.items():
        if end["late"]:
            raise WrongError("late", f"rank {rank}: {end['late']} doesn't end")
        if not end["ours"] and not killed:
            raise WrongError("foreign", f"rank {rank}: {end['error']}")
    return Ended(killed, [end["error"] for end in found.values() if end["error"]], extent)


def run_converts(
    place: Path, arguments: Sequence[str], kill: Kill | None = None, count: int = 1, watch: Path | None = None
) -> tuple[list[int | None], Any]:
    """Run ``ucp convert`` in processes of their own; return their exit statuses, and the seconds and events of each.

    Raises:
        WrongError: one doesn't end, or leaves a process behind.
    """
    told, port = Path(tempfile.mkdtemp(dir=place / "told")), free_port()
    processes = []
    for rank in range(count):
        places = {"RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        args = ([*arguments], places, kill, str(watch or place), str(told), str(place / "log"))
        processes.append(pools._context().Process(target=convert_here, args=args))
        processes[-1].start()
    deadline = time.monotonic() + SECONDS
    for process in processes:
        process.join(max(deadline - time.monotonic(), 0))
    late = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        process.kill()
        process.join()
    if late:
        raise WrongError("late", f"ranks {late} of a conversion don't end")
    if strays := [each for process in processes for each in _session(process.pid)]:
        raise WrongError("leftovers", f"processes {strays} are left")
    ends = [json.loads(path.read_text()) for path in sorted(told.iterdir())]
    return [process.exitcode for process in processes], ends


def _session(leader: int) -> list[int]:
    """Return the processes of a session that live."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError, ValueError):
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == leader and fields[0] != "Z":
                found.append(int(entry.name))
    return found
