"""Pickles that somebody crafted: none crashes the process, or makes more of its memory and time than its size justifies."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp_deepspeed.checkpoint.bounds import MOST_DEEP, misshapen
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.errors import UniversalCheckpointError

READ = """
import sys, resource
from pathlib import Path
from ucp_deepspeed.checkpoint.torch_files.safe_load import open_torch_file
from ucp_deepspeed.errors import UniversalCheckpointError
resource.setrlimit(resource.RLIMIT_AS, (12 << 30, 12 << 30))
for path in sys.argv[1:]:
    try:
        open_torch_file(Path(path), owned=())
        print("read")
    except UniversalCheckpointError as error:
        print(str(error).splitlines()[0])
"""
"""Opens files in a process of its own, which may crash."""


def found(module: str, name: str) -> bytes:
    """The step that finds a global."""
    return f"c{module}\n{name}\n".encode()


def number(value: int) -> bytes:
    """The step that makes a number."""
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def text(value: str) -> bytes:
    """The step that makes a text."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


MANY = found("builtins", "range") + number(10**11) + b"\x85R"
ONE_BY_ONE = {
    "list": found("builtins", "list") + MANY + b"\x85R",
    "tuple": found("builtins", "tuple") + MANY + b"\x85R",
    "set": found("builtins", "set") + MANY + b"\x85R",
    "deque": found("collections", "deque") + MANY + b"\x85R",
    "Counter": found("collections", "Counter") + MANY + b"\x85R",
    "Size": found("torch", "Size") + MANY + b"\x85R",
    "bytes": found("builtins", "bytes") + number(10**13) + b"\x85R",
    "bytearray": found("builtins", "bytearray") + number(10**13) + b"\x85R",
    "Fraction": found("fractions", "Fraction") + text("1e1000000000") + b"\x85R",
    "encoding": found("_codecs", "encode") + text("é" * 100_000) + text("punycode") + b"\x86R",
}
DEPTH = 200_000
DEEP = {
    "tuples as a key": b"}" + b")" + b"\x85" * DEPTH + b"Ns",
    "tuples in a set": b"\x8f(" + b")" + b"\x85" * DEPTH + b"\x90",
    "tuples in a frozen set": b"()" + b"\x85" * DEPTH + b"\x91",
    "tuples for a set": found("builtins", "set") + b"](" + b")" + b"\x85" * DEPTH + b"e\x85R",
    "slices": (found("builtins", "slice") + b"q\x00") + b"N\x85R" + b"".join([b"q\x010h\x00h\x01\x85R"] * DEPTH),
    "deques": found("collections", "deque") + b"q\x000h\x00)R" + b"q\x010h\x00]h\x01a\x85R" * DEPTH,
    "defaultdicts": (found("collections", "defaultdict") + b"q\x000h\x00)R" + b"q\x010h\x00N}Nh\x01s\x86R" * DEPTH),
    "lists": b"]" * DEPTH + b"a" * (DEPTH - 1),
    "dictionaries": b"N" + b"q\x010}Nh\x01s" * DEPTH,
}


def write(path: Path, value: bytes) -> Path:
    """Write an archive with such a value in a dictionary."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + text("a") + value + b"s.")
        archive.writestr("a/version", "3")
    return path


def test_no_pickle_crashes_or_grows(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{index}.pt", value) for index, value in enumerate([*ONE_BY_ONE.values(), *DEEP.values()])
    ]
    done = subprocess.run([sys.executable, "-c", READ, *map(str, paths)], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout.count("\n")) == (0, len(paths)), done.stderr[-2000:]
    for path in paths[: len(ONE_BY_ONE)]:  # made harmless in a client state, refused elsewhere
        with pytest.raises(UniversalCheckpointError, match=path.name):
            open_torch_file(path)


@pytest.mark.parametrize(
    "value",
    [
        *(
            range(3, 10**6, 7),
            b"",
            b"\0\xff",
            bytearray(b"\xff"),
            bytearray(),
            Fraction(-1, 3),
            Fraction(7),
            slice(1, None, 2),
        ),
        *(
            {(1, (2, (3,))): 4},
            {frozenset({(1, 2)})},
            defaultdict(list, {1: deque([defaultdict(int)])}),
            Counter("aab"),
        ),
        OrderedDict(a=1),
    ],
    ids=repr,
)
def test_what_programs_save_is_read(value: Any, tmp_path: Path) -> None:
    for zipped in (True, False):
        torch.save({"value": value}, tmp_path / "file.pt", _use_new_zipfile_serialization=zipped)
        again = open_torch_file(tmp_path / "file.pt")["value"]
        assert again == value and type(again) is type(value)


def nested(depth: int, wrap: Callable[[Any], Any]) -> Any:
    """Wrap a value so often."""
    value: Any = 0
    for _ in range(depth):
        value = wrap(value)
    return value


def test_values_that_nobody_could_walk() -> None:
    circle: list[Any] = [[]]
    circle[0].append(circle)
    assert misshapen(circle) == "it holds itself"
    assert "more than 2**63" in str(misshapen(nested(100, lambda value: [value, value])))
    assert "repeats" in str(misshapen(nested(40, lambda value: {1: value, 2: value})))
    assert "one inside the other" in str(misshapen(nested(MOST_DEEP + 1, lambda value: (value,))))
    shared = [1, 2, 3]
    for sound in (
        nested(MOST_DEEP, lambda value: [value]),
        [shared] * 1000,
        list(range(10**5)),
        {"a": [{}, {}]},
        5,
        None,
    ):
        assert misshapen(sound) is None


@pytest.mark.parametrize("key", ["lr_scheduler", "ds_config", "module"])
def test_such_a_value_of_deepspeeds_is_refused(key: str, tmp_path: Path) -> None:
    torch.save({key: {"x": nested(40, lambda value: [value, value])}}, tmp_path / "file.pt")
    with pytest.raises(
        UniversalCheckpointError, match=rf"file.pt holds something else than DeepSpeed writes as '{key}'"
    ):
        open_torch_file(tmp_path / "file.pt")
