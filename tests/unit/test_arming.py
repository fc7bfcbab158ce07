"""Arming without code: the variable ``UCP_DEEPSPEED``, and the option that launchers add to the arguments of a script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ucp_deepspeed.config import SaveConfig, UniversalCheckpointConfig, parse_config
from ucp_deepspeed.environment import VARIABLE
from ucp_deepspeed.errors import ConfigError

STOCK = {"checkpoint": {"load_universal": True}}
"""A config that asks for DeepSpeed's own universal load."""


@pytest.mark.parametrize("value", [None, "", "0", "1", "yes"])
@pytest.mark.parametrize(
    ("config", "armed"),
    [
        ({}, True),
        ({"universal_checkpoint": None}, True),
        ({"universal_checkpoint": {}}, True),
        ({"universal_checkpoint": {"on_missing": "init"}}, True),
        ({"universal_checkpoint": {"enabled": False}}, False),
        (STOCK, False),
        (STOCK | {"universal_checkpoint": {"load": "never"}}, True),
        (STOCK | {"universal_checkpoint": {"enabled": False}}, False),
    ],
)
def test_the_variable_stands_in_for_a_block(
    config: dict[str, Any], armed: bool, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(VARIABLE, value)
    assert parse_config(config).enabled is (armed and value not in (None, "", "0"))
    assert parse_config({"universal_checkpoint": {"enabled": True}}).enabled


def test_with_the_variable_the_defaults_apply(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    assert parse_config({}) == UniversalCheckpointConfig(enabled=True)
    found = parse_config({"universal_checkpoint": {"save": {"async": True}}})
    assert found == UniversalCheckpointConfig(enabled=True, save=SaveConfig.model_validate({"async": True}))
    with pytest.raises(ConfigError, match="are two ways to load"):
        parse_config(STOCK | {"universal_checkpoint": {}})
    with pytest.raises(ConfigError, match="known keys: enabled"):
        parse_config({"universal_checkpoint": {"enbaled": True}})


STRICT = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int)
found = vars(parser.parse_args())
"""
"""A parser that ends the script with status 2 at what it doesn't know."""

TAKING = """
import argparse
parser = argparse.ArgumentParser()
parser.add_argument("--{option}", type=int, default=-1)
parser.add_argument("--steps", type=int)
found = vars(parser.{parse})
"""

ELSEWHERE = """
import elsewhere
found = elsewhere.parsed()
"""
"""A script whose parser another module makes, as Megatron's do."""

PACKAGE = """
import argparse, sys
def parsed():
    parser = argparse.ArgumentParser()
    parser.add_argument("--local" + "-rank", type=int)
    parser.add_argument("--steps")
    return vars(parser.parse_args(sys.argv[1:]))
"""

FIELD = """
class Settings:
    local_rank: int
found = {}
"""
"""A class of which another library makes options."""

TOLD = "\nimport json, os, sys; print(json.dumps([found, sys.argv[1:], os.environ['LOCAL_RANK'], os.environ['UCP_DEEPSPEED']]))\n"


def run(arguments: list[str], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start Python in a folder, without a launcher."""
    own = {name: value for name, value in os.environ.items() if name not in (VARIABLE, "LOCAL_RANK")}
    root = Path(__file__).parents[2]
    own |= {"PYTHONPATH": str(root), **environment}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=60, env=own, cwd=folder, check=False
    )


RANK = {"local_rank": 3}
WORD = "--local_rank=3"


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize(
    ("script", "launcher", "found", "argv"),
    [
        (STRICT, [WORD], {}, []),
        (STRICT + "# not --local_rank\n", [WORD], {}, [WORD]),
        (STRICT, ["--local-rank", "3"], {}, []),
        (TAKING.format(option="local_rank", parse="parse_args()"), [WORD], RANK, [WORD]),
        (TAKING.format(option="local-rank", parse="parse_args()"), [WORD], RANK, [WORD]),
        (TAKING.format(option="local_rank", parse="parse_known_args()[0]"), [WORD], RANK, [WORD]),
        (TAKING.format(option="local_rank", parse="parse_args(['--steps', '5'])"), [WORD], {"local_rank": -1}, [WORD]),
        (ELSEWHERE, [WORD], RANK, []),
        (FIELD, [WORD], None, [WORD]),
    ],
)
def test_scripts_that_take_the_option_get_it(
    script: str, launcher: list[str], found: dict[str, int] | None, argv: list[str], as_module: bool, tmp_path: Path
) -> None:
    """A launcher has put it before the script. Without it a parser sees what it always saw."""
    (tmp_path / "elsewhere.py").write_text(PACKAGE)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "train.py").write_text(script + TOLD)
    named = ["-m", "package.train"] if as_module else ["package/train.py"]
    own = ["--steps", "5"]
    path = os.pathsep.join((str(tmp_path), str(Path(__file__).parents[2])))
    done = run(["-m", "ucp_deepspeed.run", *launcher, *named, *own], tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    parsed, seen, local_rank, variable = json.loads(done.stdout)
    if found is not None:
        parsed.pop("steps", None)
        assert parsed == found
    assert (seen, local_rank, variable) == ([*argv, *own], "3", "1")


@pytest.mark.parametrize("value", ["0", "", "1"])
def test_a_variable_that_is_set_stays(value: str, tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text("import os, sys; print([os.environ['UCP_DEEPSPEED'], sys.argv, sys.path[0]])")
    done = run(["-m", "ucp_deepspeed.run", "train.py", WORD], tmp_path, UCP_DEEPSPEED=value)
    assert done.stdout == f"{[value, ['train.py', WORD], str(tmp_path.resolve())]}\n", done.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["nosuch.py"], 2, "ucp_deepspeed.run: no script at nosuch.py"),
        (["-m", "nosuch.train"], 2, "ucp_deepspeed.run: no module nosuch.train to run, seen from "),
        (["-m", "json"], 2, "ucp_deepspeed.run: no module json to run, seen from "),
        (["-m", ""], 2, "ucp_deepspeed.run: no module  to run, seen from "),
        (["-m"], 2, "ucp_deepspeed.run: no script is named"),
        ([WORD], 2, "ucp_deepspeed.run: no script is named"),
        ([], 2, "ucp_deepspeed.run: no script is named"),
        (["--help"], 0, "usage: torchrun [OPTION …] -m ucp_deepspeed.run SCRIPT [ARGUMENT …]"),
    ],
)
def test_a_run_of_nothing(arguments: list[str], status: int, line: str, tmp_path: Path) -> None:
    done = run(["-m", "ucp_deepspeed.run", *arguments], tmp_path)
    told = done.stdout + done.stderr
    assert done.returncode == status and told.startswith(line) and "usage: torchrun" in told


def test_a_module_whose_own_import_fails(tmp_path: Path) -> None:
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("import nosuch")
    (tmp_path / "package" / "train.py").write_text("")
    done = run(["-m", "ucp_deepspeed.run", "-m", "package.train"], tmp_path)
    assert done.returncode == 1 and "No module named 'nosuch'" in done.stderr
