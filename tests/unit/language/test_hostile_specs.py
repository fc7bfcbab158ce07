"""Specs that somebody else wrote: they read no other files, and no short one takes long."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp_deepspeed.errors import SpecError, UniversalCheckpointError
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.language.globs import Glob, compiled

RULES = 'family: x\nrules:\n  - {match: "**", pattern: replicate}\n'


@contextmanager
def soon(seconds: float = 10) -> Iterator[None]:
    """The block is over in time, on a busy machine too."""
    begun = time.process_time()
    yield
    assert time.process_time() - begun < seconds


def refused(path: Path, content: str | bytes) -> str:
    """Return the message for a spec with this content."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with soon(), pytest.raises(SpecError) as caught:
        load_spec(str(path))
    return str(caught.value)


def test_a_configuration_lies_in_the_specs_folder(tmp_path: Path) -> None:
    home = tmp_path / "home"
    (home / "inner").mkdir(parents=True)
    (tmp_path / "secret.json").write_text('{"n": "SECRET"}')
    (home / "link.json").symlink_to(tmp_path / "secret.json")
    (home / "circle.json").symlink_to("circle.json")
    (home / "zeros.json").symlink_to("/dev/zero")
    os.mkfifo(home / "pipe.json")
    (home / "text.json").write_text('{"n": "SECRET"}')
    (home / "broken.json").write_text("SECRET")
    (home / "bytes.json").write_bytes(b"\xffSECRET")
    with (home / "huge.json").open("wb") as file:
        file.truncate(1 << 40)
    (home / "inner" / "sound.json").write_text('{"n": 4}')
    dimensions = "dimensions:\n  d: {config: n}\n"
    for name in ("../secret.json", str(tmp_path / "secret.json"), "link.json", "zeros.json", "/etc/passwd"):
        assert "lies outside the folder of the spec" in refused(home / "s.yaml", f"{RULES}config: {name}\n{dimensions}")
    for name in (
        "circle.json",
        "pipe.json",
        "huge.json",
        "text.json",
        "broken.json",
        "bytes.json",
        '"a\\0b"',
        ".",
        "none",
    ):
        told = refused(home / "s.yaml", f"{RULES}config: {name}\n{dimensions}")
        assert "SECRET" not in told and ("config: " in told or "no integer" in told)
    (home / "s.yaml").write_text(f"{RULES}config: inner/sound.json\n{dimensions}")
    assert load_spec(str(home / "s.yaml")).matches("a")


def test_small_documents_stay_small(tmp_path: Path) -> None:
    laughs = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    laughs += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 20)]
    assert "aliases make" in refused(tmp_path / "s.yaml", "\n".join([*laughs, "b: *a19", RULES]))
    assert "unknown key" in (told := refused(tmp_path / "s.yaml", RULES + "".join(f"k{n}: 1\n" for n in range(20_000))))
    assert "more" in told and len(told) < 5_000
    for content in ("family: " + "[" * 20_000, b"\xff\xfe", "? [a]\n: b\n", "&a [*a]", "a: &a {b: *a}", "\0"):
        refused(tmp_path / "s.yaml", content)
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(1 << 40)
    for name in ("huge.yaml", "a\0b", "x" * 5000, "."):
        with soon(), pytest.raises(UniversalCheckpointError) as caught:
            load_spec(str(tmp_path / name))
        assert len(str(caught.value)) < 5_000


def test_numbers_side_by_side(tmp_path: Path) -> None:
    side = "".join(f"{{{letter}}}" for letter in "abcdefgh")
    told = refused(tmp_path / "s.yaml", f'{RULES}names:\n  n:\n    - {{from: "{side}.x", to: "{side}.y"}}\n')
    assert "side by side" in told
    (tmp_path / "s.yaml").write_text(f'{RULES}names:\n  n:\n    - {{from: "l.{{n}}.x", to: "m.{{n}}.x"}}\n')
    [renaming] = load_spec(str(tmp_path / "s.yaml")).names["n"]
    assert renaming.logical_name("l.7.x") == "m.7.x" and renaming.logical_name(f"l.{'9' * 5000}.x") is None


@pytest.mark.parametrize(
    ("glob", "fits"),
    [
        ("**a" * 40 + "b", False),
        ("*a" * 40 + "b", False),
        ("**" * 40 + "b", True),
        ("**.*" * 30 + "b", False),
        ("*" * 4001 + "b", True),
    ],
    ids=["parts", "pieces", "side by side", "dots", "many"],
)
def test_stars_are_matched_in_linear_time(glob: str, fits: bool) -> None:
    with soon():
        assert not compiled(glob).fullmatch("a" * 300)
        assert compiled(glob).fullmatch("a" * 300 + ".b") == fits


@given(st.text("*a.b", max_size=9), st.text("ab.", max_size=9))
def test_globs_mean_what_the_expression_means(glob: str, name: str) -> None:
    expression = re.sub(r"\*\*|[*.]", lambda found: {"**": ".*", "*": "[^.]*", ".": r"\."}[found[0]], glob)
    assert Glob(glob).fullmatch(name) == (re.fullmatch(expression, name) is not None)
