"""A share of ``scripts/torture.py``: faults and kills are told, or do no harm; no reader raises an error of another kind."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.testing import ranks

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture
def torture(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("torture_faults")


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.setattr(ranks, "GRACE_SECONDS", ranks.GRACE_SECONDS)  # which a lab changes
    return importlib.import_module("torture_kills")


UNTOLD = {
    "bit anywhere",
    "bit in a record",
    "page of zeros",
    "digit in a text",
    "file of another step",
    "file of another run",
}
"""Kinds that may be silent where there are no sums: a record is read in part, or nothing in a file tells of its save."""


@pytest.mark.parametrize("form", ["experts, ZeRO-1", "experts, no ZeRO"])
def test_faults_are_told_or_do_no_harm(form: str, torture: Any, tmp_path: Path) -> None:
    sources = torture.make_sources(tmp_path, [form])
    expected = {name: torture.content_of(folder) for name, folder in sources.items()}
    told = 0
    for seed, (name, kind) in enumerate((name, kind) for name in sources for kind in [*torture.KINDS] * 3):
        fault = torture.Fault(name, kind, seed)
        outcome, why = torture.outcome_of(fault, sources[name], expected[name])
        assert outcome not in torture.WRONG[1:], (fault, why)
        assert outcome != "silent" or (name.endswith(torture.STOCK) and kind in UNTOLD), (fault, why)
        told += outcome == "told"
    assert told > 40


def test_faults_of_the_environment_are_told_or_do_no_harm(tmp_path: Path) -> None:
    """In a process of its own: the library that lets calls fail has to be loaded first."""
    arguments = ["disks", "--count", "16", "--seed", "16", "--form", "ZeRO-1", "--json"]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    command = [sys.executable, SCRIPTS / "torture.py", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["wrong"] == [] and sum(found["total"].values()) == 16


def test_kills_leave_the_checkpoint_before_or_the_new_one(kills: Any, tmp_path: Path) -> None:
    """Saves of both kinds, a conversion, a resume meanwhile and a second job, killed at calls that the seeds choose."""
    kinds = (
        "save",
        "save in the background",
        "convert, two ranks",
        "resume during a save",
        "two jobs on one tag",
        "load",
    )
    lab = kills.Lab(tmp_path)
    try:
        found = list(kills.outcomes(lab, range(4), kinds))
    finally:
        lab.close()
    assert [each for each in found if each[2] in kills.WRONG] == []
    assert sum(each[2] != "not killed" for each in found) >= 3
