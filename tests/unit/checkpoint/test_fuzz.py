"""Altered files of each format open, or are refused by an error of the package, in bounded time. `scripts/fuzz.py` alters them.

``fuzz_corpus`` holds what was found: ``<target>.<seed>.<number>``, each a file that once raised another exception.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import fuzz

CORPUS = sorted((Path(__file__).parent / "fuzz_corpus").iterdir())

TARGETS = (
    *("plain model_states", "fp16 model_states", "zero2 model_states", "zero2 optim_states", "zero3 model_states"),
    *(
        "zero3 optim_states",
        "manifest",
        "older format",
        "layer file",
        "index",
        "atoms",
        "dcp metadata",
        "dcp objects",
        "dcp chunks",
        "hugging face index",
        "hugging face weights",
        "spec",
        "latest",
        "random states",
    ),
)


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, fuzz.Target]:
    return fuzz.make_targets(tmp_path_factory.mktemp("fuzz"))


def test_all_targets_are_sound(targets: dict[str, fuzz.Target]) -> None:
    assert tuple(targets) == TARGETS
    for target in targets.values():
        assert fuzz.run_case(target, target.path.read_bytes()) == ("opened", "")


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.integers(0, 2**32))
def test_altered_files(name: str, targets: dict[str, fuzz.Target], number: int) -> None:
    target = targets[name]
    content = fuzz.altered(target, target.path.read_bytes(), 0, name, number)
    outcome, where = fuzz.run_case(target, content)
    assert outcome in ("opened", "refused"), where


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_found_cases(path: Path, targets: dict[str, fuzz.Target]) -> None:
    target = targets[path.name.split(".")[0].replace("-", " ")]
    outcome, where = fuzz.run_case(target, path.read_bytes())
    assert outcome in ("opened", "refused"), where
