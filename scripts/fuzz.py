"""Fuzz the readers: small sound files of every format are altered at random, and must open or raise an error of the package's.

    python scripts/fuzz.py --cases 20000 --seed 1

prints a table with a line for each target, and lists foreign exceptions by type and innermost frame. Each target has a process
of its own. What crashes, hangs or raises such an exception is kept in ``--corpus``, if that is given. A case is a function of the
target, the seed and its number.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import multiprocessing
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "unit")]

import torch  # noqa: E402
from fuzz_alterations import (  # noqa: E402
    alter_archive,
    alter_bytes,
    alter_header,
    alter_json,
    alter_lines,
    alter_pickle,
    alter_words,
)
from native_files import NativeRun, add_manifest, as_version_1, write_native  # noqa: E402
from spec_models import RIGHT, model_of  # noqa: E402

import ucp_deepspeed  # noqa: E402
from ucp_deepspeed.checkpoint import open_checkpoint  # noqa: E402
from ucp_deepspeed.checkpoint.dcp.metadata import FILES_ENDING, METADATA_NAME  # noqa: E402
from ucp_deepspeed.checkpoint.dcp.output import OBJECTS_NAME, DcpOutput  # noqa: E402
from ucp_deepspeed.checkpoint.encoding import decode  # noqa: E402
from ucp_deepspeed.checkpoint.export.huggingface import HuggingFaceOutput  # noqa: E402
from ucp_deepspeed.checkpoint.export.weights import Choice  # noqa: E402
from ucp_deepspeed.checkpoint.random_files import RANDOM_STATES_NAME, joined, parse_state, read_state  # noqa: E402
from ucp_deepspeed.checkpoint.safetensors_files import WEIGHTS_INDEX_NAME  # noqa: E402
from ucp_deepspeed.checkpoint.view import UniversalView  # noqa: E402
from ucp_deepspeed.cli.inspect import inspect_checkpoint  # noqa: E402
from ucp_deepspeed.errors import UniversalCheckpointError  # noqa: E402
from ucp_deepspeed.language import load_spec  # noqa: E402
from ucp_deepspeed.transfer.compare import compare  # noqa: E402
from ucp_deepspeed.transfer.conversion import convert  # noqa: E402

SECONDS = 20
"""Seconds of the processor's time after which a case counts as a hang. A sound one takes a few hundredths."""

MORE_NUMBYTES = 6 << 30
"""Memory that a case may take beside what the process has."""

Alter = Callable[[bytes, random.Random], bytes]


class HangError(BaseException):
    """A case takes too long. No handler of errors catches it."""


def use_checkpoint(path: Path) -> None:
    """Open, inspect and compare the checkpoint that a file belongs to."""
    opened = open_checkpoint(path if path.is_dir() else path.parent)
    opened.check_sizes()
    json.dumps(inspect_checkpoint(opened, None, None))
    opened.client_state()
    opened.extra_states()
    view = UniversalView.of(opened)
    compare(view, view)


def use_weights(path: Path) -> None:
    """Open and inspect a folder of weights alone, and read them."""
    with ucp_deepspeed.open_checkpoint(path.parent) as opened:
        dict(opened.state_dict())
        for name in opened.parameters:
            opened.read(name)
    json.dumps(inspect_checkpoint(open_checkpoint(path.parent), None, None))


def use_latest(path: Path) -> None:
    """Open the checkpoint that it names."""
    open_checkpoint(path.parent)


def use_spec(path: Path) -> None:
    """Load a spec, and match names and shapes with it."""
    spec, shapes = load_spec(str(path)), {each.name: tuple(each.fp32.shape) for each in model_of().parameters}
    found = {name: spec.matches(name) for name in shapes}
    str(spec.misfit("head.weight", found["embed.weight"]))
    spec.check_shapes(shapes)
    spec.check_local_shapes({name: [shape, shape] for name, shape in shapes.items()})
    spec.unused(shapes)


def use_random_states(path: Path) -> None:
    """Read the states of all ranks."""
    for rank in range(3):
        content = read_state(path, rank)
        if content is not None:
            decode(dict(parse_state(content, path, rank).streams), {})


@dataclass(frozen=True)
class Target:
    """A file to alter, the way to alter it, and the use of it."""

    path: Path
    alter: Alter
    use: Callable[[Path], None]


def make_targets(root: Path) -> dict[str, Target]:
    """Write small sound files of each format into a folder."""
    found: dict[str, Target] = {}
    client = {"epoch": 3, "seen": [1, (2, None)], "tensor": torch.ones(2)}
    runs = {
        "plain": NativeRun(),
        "fp16": NativeRun(precision="fp16"),
        "zero2": NativeRun(dp=2, stage=2),
        "zero3": NativeRun(dp=2, stage=3, precision="bf16"),
    }
    for name, run in runs.items():
        folder = write_native(root / name, model_of(), run, client_state=client)
        model = next(path for path in sorted(folder.iterdir()) if path.name.endswith("model_states.pt"))
        found[f"{name} model_states"] = Target(model, alter_archive, use_checkpoint)
        if run.stage:
            optimizer = next(path for path in sorted(folder.iterdir()) if "optim_states" in path.name)
            found[f"{name} optim_states"] = Target(optimizer, alter_archive, use_checkpoint)
    described = write_native(root / "manifest", model_of(), runs["zero2"])
    add_manifest(described, model_of(), runs["zero2"], layouts=True)
    found["manifest"] = Target(described / "ucp_manifest.json", alter_json, use_checkpoint)
    older = write_native(root / "older", model_of(), runs["plain"], client_state=client)
    [path] = older.glob("*.pt")
    torch.save(torch.load(path, weights_only=False), path, _use_new_zipfile_serialization=False)
    found["older format"] = Target(path, alter_bytes, use_checkpoint)
    pipeline = root / "pipeline"
    shutil.copytree(ROOT / "tests" / "golden" / "0.16.9" / "ppz1bf16-Adam" / "t", pipeline / "t")
    layer = sorted((pipeline / "t").glob("layer_*"))[0]
    found["layer file"] = Target(layer, alter_archive, use_checkpoint)
    for name in ("index", "atoms"):
        source = open_checkpoint(write_native(root / f"for {name}", model_of(), runs["zero2"], client_state=client))
        convert(UniversalView.of(source), root / name / "t")
        as_version_1(root / name / "t")  # version 2 has sums, which hide what comes behind them
    found["index"] = Target(root / "index" / "t" / "ucp_index.json", alter_json, use_checkpoint)
    atoms = next((root / "atoms" / "t").glob("atoms-*.safetensors"))
    found["atoms"] = Target(atoms, alter_header, use_checkpoint)
    found |= make_foreign_targets(root, UniversalView.of(open_checkpoint(root / "zero2")))
    (root / "spec.yaml").write_text(RIGHT)
    found["spec"] = Target(root / "spec.yaml", alter_words, use_spec)
    (older.parent / "latest").write_text("global_step5")
    found["latest"] = Target(older.parent / "latest", alter_bytes, use_latest)
    (root / RANDOM_STATES_NAME).write_text(random_states())
    found["random states"] = Target(root / RANDOM_STATES_NAME, alter_lines, use_random_states)
    return found


def random_states() -> str:
    """Return the states of two ranks' random streams, as a save writes them."""
    ranks = ["world_size", "rank", "data_parallel_rank", "sequence_parallel_rank", "stage", "tensor_parallel_rank"]
    place = {**dict.fromkeys(ranks, 0), "accelerator": "cpu"}
    state = {
        "format_version": 1,
        "place": place,
        "global_steps": 1,
        "seed": 7,
        "streams": {
            "a": {"$tuple": [1, {"$bytes": "AA=="}]},
            "curriculum": {
                "bit_generator": "PCG64",
                "state": {"state": 5, "inc": 7},
                "has_uint32": 0,
                "uinteger": 0,
            },
        },
    }
    return joined([json.dumps(state), json.dumps(state | {"place": place | {"rank": 1}})])


def make_foreign_targets(root: Path, view: UniversalView) -> dict[str, Target]:
    """Write a checkpoint into folders of a PyTorch distributed checkpoint, and of a Hugging Face model."""
    convert(view, root / "dcp", DcpOutput())
    convert(view, root / "hugging face", HuggingFaceOutput(Choice(), shard_numbytes=1))
    index, weights = root / "hugging face" / WEIGHTS_INDEX_NAME, next((root / "hugging face").glob("*.safetensors"))
    return {
        "dcp metadata": Target(root / "dcp" / METADATA_NAME, alter_pickle, use_checkpoint),
        "dcp objects": Target(root / "dcp" / OBJECTS_NAME, alter_bytes, use_checkpoint),
        "dcp chunks": Target(root / "dcp" / f"__1_0{FILES_ENDING}", alter_bytes, use_checkpoint),
        "hugging face index": Target(index, alter_json, use_weights),
        "hugging face weights": Target(weights, alter_header, use_weights),
    }


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise a HangError if the block takes more of the processor's time, or waits for something: ten times as long in all."""

    def tell(*_: Any) -> None:
        raise HangError

    alarms = {signal.ITIMER_PROF: (signal.SIGPROF, seconds), signal.ITIMER_REAL: (signal.SIGALRM, 10 * seconds)}
    former = {alarm: signal.signal(alarm, tell) for alarm, _ in alarms.values()}
    for timer, (_, after) in alarms.items():
        signal.setitimer(timer, after)
    try:
        yield
    finally:
        for timer in alarms:
            signal.setitimer(timer, 0)
        for alarm, handler in former.items():
            signal.signal(alarm, handler)


def altered(target: Target, sound: bytes, seed: int, name: str, number: int) -> bytes:
    """Return the content of a case."""
    chance = random.Random(f"{name} {seed} {number}")
    try:
        return target.alter(sound, chance)
    except (RecursionError, ValueError, TypeError, AttributeError, MemoryError):  # what can't be written
        return alter_bytes(sound, chance)


def run_case(target: Target, content: bytes) -> tuple[str, str]:
    """Use a file with another content, and put its own back. Return what came of it, and where a foreign exception was raised."""
    sound = target.path.read_bytes()
    target.path.write_bytes(content)
    try:
        with limited(SECONDS):
            target.use(target.path)
        return "opened", ""
    except UniversalCheckpointError as error:
        return ("refused", "") if len(str(error)) < 34_000 else ("foreign", f"message of {len(str(error))} characters")
    except HangError:
        return "hang", ""
    except Exception as error:
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "ucp_deepspeed" in frame.filename]
        last = traceback.extract_tb(error.__traceback__)[-1]
        at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
        return (
            "foreign",
            f"{type(error).__name__} at {at}, {Path(last.filename).name}:{last.lineno}: {str(error)[:80]!r}",
        )
    finally:
        target.path.unlink(missing_ok=True)
        target.path.write_bytes(sound)


def run_target(name: str, seed: int, cases: range, corpus: Path | None, told: Any) -> None:
    """Run the cases of one target in this process."""
    logging.getLogger("ucp_deepspeed").setLevel(logging.CRITICAL)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        target = make_targets(Path(folder))[name]
        sound = target.path.read_bytes()
        assert run_case(target, sound) == ("opened", ""), run_case(target, sound)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MORE_NUMBYTES,) * 2)
        counts, seen = Counter[str](), Counter[str]()
        for number in cases:
            content = altered(target, sound, seed, name, number)
            told.send((number, dict(counts), dict(seen)))
            outcome, where = run_case(target, content)
            counts[outcome] += 1
            if outcome in ("foreign", "hang"):
                seen[where or "hang"] += 1
                if corpus is not None and seen[where or "hang"] == 1:
                    (corpus / f"{name.replace(' ', '-')}.{seed}.{number}").write_bytes(content)
            if number % 500 == 0:
                gc.collect()
        told.send((None, dict(counts), dict(seen)))


def main() -> int:
    """Run all targets, or some, and print what came of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, help="cases of each target")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--targets", nargs="*", help="by default all")
    parser.add_argument("--corpus", type=Path, help="folder for the cases that were found")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if given.corpus is not None:
        given.corpus.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        names = list(make_targets(Path(folder)))
    waiting = [name for name in names if not given.targets or name in given.targets]
    context, running, found = multiprocessing.get_context("fork"), {}, {}
    begun, last = time.monotonic(), {name: (0, {}, {}) for name in waiting}
    while waiting or running:
        while waiting and len(running) < given.processes:
            name, (mine, theirs) = waiting.pop(0), context.Pipe(duplex=False)
            process = context.Process(
                target=run_target, args=(name, given.seed, range(given.cases), given.corpus, theirs)
            )
            process.start()
            theirs.close()
            running[name] = process, mine
        for name, (process, mine) in list(running.items()):
            try:
                while mine.poll(0.05):
                    last[name] = mine.recv()
            except EOFError:
                process.join()
                number, counts, seen = last[name]
                if number is not None:
                    seen = {**seen, f"process ended with {process.exitcode} in case {number}": 1}
                    counts = {**counts, "crash": 1}
                found[name] = counts, seen
                del running[name]
                print(f"{name}: {counts} {seen}", file=sys.stderr, flush=True)
    kinds = ("opened", "refused", "foreign", "hang", "crash")
    print(f"{'target':22}{'cases':>9}" + "".join(f"{kind:>9}" for kind in kinds))
    total: Counter[str] = Counter()
    for name in names:
        counts, seen = found.get(name, ({}, {}))
        total.update(counts)
        if counts:
            print(f"{name:22}{sum(counts.values()):9}" + "".join(f"{counts.get(kind, 0):9}" for kind in kinds))
        for where, count in seen.items():
            print(f"    {count} × {where}")
    print(
        f"{'all':22}{total.total():9}"
        + "".join(f"{total[kind]:9}" for kind in kinds)
        + f"  {time.monotonic() - begun:.0f} s"
    )
    return 1 if total["foreign"] + total["hang"] + total["crash"] else 0


if __name__ == "__main__":
    sys.exit(main())
