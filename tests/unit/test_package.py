"""The package as a whole: who may import whom, what importing it costs, and the surface that users rely on."""

from __future__ import annotations

import ast
import inspect
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

import ucp_deepspeed
from ucp_deepspeed.config import UniversalCheckpointConfig, parse_config
from ucp_deepspeed.engine import NEWEST_DEEPSPEED, OLDEST_DEEPSPEED, check_version
from ucp_deepspeed.engine.loading import load
from ucp_deepspeed.engine.saving import save
from ucp_deepspeed.errors import ConfigError, MismatchError, UnsupportedError

PACKAGE = Path(ucp_deepspeed.__file__).parent

MAY_IMPORT = {
    "layout": set(),
    "plan": {"layout"},
    "language": {"layout"},
    "checkpoint": {"layout", "plan", "language", "remote"},
    "transfer": {"layout", "plan", "language", "checkpoint", "remote"},
    "megatron": {"layout", "parallel"},
}
"""Sub-package → those that it may import, besides itself, ``errors``, ``dtypes`` and ``tunables``."""

OUTSIDE = {
    "layout": {"torch", "numpy", "deepspeed", "megatron"},
    "plan": {"torch", "deepspeed", "megatron"},
    "language": {"torch", "deepspeed", "megatron"},
    "checkpoint": {"deepspeed", "megatron"},
    "transfer": {"deepspeed", "megatron"},
}
"""Sub-package → libraries that it must not import."""


def imports_of(folder: Path) -> set[str]:
    """Names of the modules that the files of a folder import."""
    found: set[str] = set()
    for path in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module == "ucp_deepspeed":
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return found


@pytest.mark.parametrize("name", MAY_IMPORT)
def test_imports_point_one_way(name: str) -> None:
    inside = {module.split(".")[1] for module in imports_of(PACKAGE / name) if module.startswith("ucp_deepspeed.")}
    assert inside <= MAY_IMPORT[name] | {name, "errors", "dtypes", "tunables"}


@pytest.mark.parametrize("name", OUTSIDE)
def test_pure_layers_stay_pure(name: str) -> None:
    assert not {module.split(".")[0] for module in imports_of(PACKAGE / name)} & OUTSIDE[name]


def imports_between_modules() -> dict[str, set[str]]:
    """For each module of the package those that it imports, also within functions and for types alone."""
    paths = {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    modules = {name.removesuffix(".__init__"): path for name, path in paths.items()}
    found: dict[str, set[str]] = {name: set() for name in modules}
    for name, path in modules.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names if alias.name in modules}
            elif isinstance(node, ast.ImportFrom) and node.module in modules:
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= {member if member in modules else node.module for member in members}
    return found


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = imports_between_modules()
    assert len(left) > 100 and "ucp_deepspeed.layout.box" in left["ucp_deepspeed.layout.layout"]
    while left:
        imported = set().union(*left.values())
        within = {name: left[name] & left.keys() for name in left if name in imported and left[name] & left.keys()}
        assert within != left, f"circles: {within}"
        left = within


def test_importing_the_package_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, ucp_deepspeed; print([m for m in ('torch', 'deepspeed', 'megatron') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_hooks_keep_deepspeeds_signatures() -> None:
    from deepspeed import DeepSpeedEngine

    for name, hook in (("save_checkpoint", save.save_checkpoint), ("load_checkpoint", load.load_checkpoint)):
        wrapped = getattr(DeepSpeedEngine, name)
        theirs = list(inspect.signature(wrapped).parameters)
        assert theirs[1:] == list(inspect.signature(hook).parameters)[2:]
        assert wrapped.__wrapped__.__module__ == "deepspeed.runtime.engine"


def test_arming_twice_wraps_once() -> None:
    import wrapt
    from deepspeed import DeepSpeedEngine

    from ucp_deepspeed.arming import _wrap_engine

    before = vars(DeepSpeedEngine)["save_checkpoint"]
    assert isinstance(before, wrapt.FunctionWrapper)
    _wrap_engine(sys.modules["deepspeed.runtime.engine"])
    assert vars(DeepSpeedEngine)["save_checkpoint"] is before


def test_config_surface() -> None:
    block = {
        "enabled": True,
        "spec": "megatron_core_gpt",
        "load": "always",
        "vocabulary_size": 50257,
        "on_missing": "init",
        "on_extra": "drop",
        "on_differing": "mean",
        "optimizer_states": "reset",
        "hyperparameters": "keep",
        "scheduler": "keep",
        "random_state": "keep",
        "on_unreadable": "drop",
        "verify": "off",
        "fallback": "none",
        "batch": "keep",
        "shared_read_bytes": 0,
        "read_memory_bytes": 1 << 20,
        "save": {
            "async": True,
            "checksums": False,
            "keep": {"last": 3, "every": 1000},
            "timeout": 60.0,
            "on_signal": {"folder": "runs/a", "grace_seconds": 90.0, "exit_code": 3},
        },
    }
    assert set(UniversalCheckpointConfig.model_fields) == block.keys()
    assert parse_config({}).enabled is False
    assert parse_config({"universal_checkpoint": block}).model_dump(by_alias=True) == block
    short = parse_config({"universal_checkpoint": {"save": {"on_signal": "runs/a"}}}).save.on_signal
    assert short is not None and short.model_dump() == {"folder": "runs/a", "grace_seconds": 30.0, "exit_code": 75}


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"enbaled": True}, "universal_checkpoint.enbaled: unknown key; known keys: enabled, spec, load, "),
        ({"async": True}, "universal_checkpoint.async: unknown key; it belongs into 'save'; known keys: enabled, "),
        ({"enabled": 1}, "universal_checkpoint.enabled"),
        ({"vocabulary_size": 0}, "universal_checkpoint.vocabulary_size: expected a number above 0 (found 0)"),
        (
            {"read_memory_bytes": 1},
            "universal_checkpoint.read_memory_bytes: expected a number from 1024 on (found 1)",
        ),
        ({"load": "never", "on_extra": "drop"}, "universal_checkpoint: 'on_missing', 'on_extra', "),
        ({"load": "never", "scheduler": "keep"}, "'hyperparameters' and 'scheduler' need another 'load'"),
        ({"on_missing": "ignore"}, "universal_checkpoint.on_missing: expected 'error' or 'init' (found 'ignore')"),
        ({"save": {"async": "yes"}}, "universal_checkpoint.save.async: expected true or false (found 'yes')"),
        (
            {"save": {"asynchronous": True}},
            "universal_checkpoint.save.asynchronous: unknown key; known keys: async, check",
        ),
        (
            {"save": True},
            "universal_checkpoint.save: must be a block of settings (found True); known keys: async, checksums, keep, timeout",
        ),
        (
            {"save": {"keep": 3}},
            "universal_checkpoint.save.keep: must be a block of settings (found 3); known keys: last, every",
        ),
        (
            {"save": {"keep": {"first": 3}}},
            "universal_checkpoint.save.keep.first: unknown key; known keys: last, every",
        ),
        (
            {"save": {"on_signal": True}},
            "universal_checkpoint.save.on_signal: must be a folder, or a block of settings (found True); known keys: folder, ",
        ),
        ({"save": {"keep": {"every": 3}}}, "universal_checkpoint.save.keep.last: "),
        ({"save": {"on_signal": {"folder": "a", "exit_code": 0}}}, "universal_checkpoint.save.on_signal.exit_code: "),
        ({"save": {"on_signal": {}}}, "universal_checkpoint.save.on_signal.folder: "),
        ({"save": {"on_signal": ""}}, "universal_checkpoint.save.on_signal.folder: "),
        ({"keep": {"last": 3}}, "universal_checkpoint.keep: unknown key; it belongs into 'save'; known keys: enabled"),
        (True, "must be a block of settings"),
    ],
)
def test_config_errors_name_the_key(block: object, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_config({"universal_checkpoint": block})


@pytest.mark.parametrize("version", ["0.17.6", "0.20.0", "1.0.0"])
def test_versions_outside_the_tested_range(version: str) -> None:
    with pytest.raises(UnsupportedError, match=f"deepspeed {version} is outside the tested range"):
        check_version(version)


def test_version_of_today() -> None:
    check_version()


def test_a_version_outside_is_refused_before_anything_is_imported_that_it_may_lack() -> None:
    """A stand-in with a version and nothing else."""
    code = (
        "import sys, types; sys.modules['deepspeed'] = found = types.ModuleType('deepspeed'); found.__version__ = '0.20.1'\n"
        "from ucp_deepspeed.engine import load"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "UnsupportedError: deepspeed 0.20.1 is outside the tested range" in done.stderr


def test_setup_and_readme_state_the_same_range_of_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    stated: dict[str, Any] = {}
    monkeypatch.setattr("setuptools.setup", lambda **settings: stated.update(settings))
    runpy.run_path(str(PACKAGE.parent / "setup.py"))
    major, minor = Version(NEWEST_DEEPSPEED).release
    beyond = f"{major}.{minor + 1}"
    assert f"deepspeed>={OLDEST_DEEPSPEED},<{beyond}" in stated["install_requires"]
    readme = (PACKAGE.parent / "README.md").read_text(encoding="utf-8")
    assert f"DeepSpeed {OLDEST_DEEPSPEED} up to, not including, {beyond} is accepted" in readme


def test_mismatch_survives_a_trip_to_another_rank() -> None:
    import pickle

    error = MismatchError("two models", [f"p{number}: gone" for number in range(60)])
    again = pickle.loads(pickle.dumps(error))
    assert (str(again), again.problems) == (str(error), error.problems)
    assert "and 10 more" in str(error) and "(60)" in str(error)


def docstrings_of(path: Path) -> Iterator[str]:
    """Yield the docstrings of a file: of modules, classes and functions, and those below an attribute."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds):
            texts = [each.value for each in node.body if isinstance(each, ast.Expr)]
            yield from (each.value for each in texts if isinstance(each, ast.Constant) and isinstance(each.value, str))


def test_docstrings_begin_with_the_thing_or_a_verb() -> None:
    """Whoever reads them in a second language meets the subject first."""
    inverted, root = re.compile(r"(Of|What|Those|Whether|Where|Which|That|How)\b"), PACKAGE.parent
    paths = [path for folder in (PACKAGE, root / "scripts", root / "tests") for path in folder.rglob("*.py")]
    assert len(paths) > 250
    assert [f"{path}: {text}" for path in paths for text in docstrings_of(path) if inverted.match(text)] == []
