"""The command line in this process, and checkpoints: of two ranks and of one with a spec that fits them, and of real engines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from native_files import NativeRun, write_native
from spec_models import RIGHT, model_of

from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train


@pytest.fixture
def ucp() -> Callable[..., Result]:
    """``ucp("inspect", path)``"""

    def invoke(*args: object) -> Result:
        result = CliRunner().invoke(main, [str(arg) for arg in args])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return invoke


@pytest.fixture
def two(tmp_path: Path) -> Path:
    return write_native(tmp_path / "two", model_of(), NativeRun(tp=2, dp=2, stage=1))


@pytest.fixture
def one(tmp_path: Path) -> Path:
    """A checkpoint of the common model, saved on one tensor-parallel rank."""
    return write_native(tmp_path / "one", model_of(), NativeRun(dp=2, stage=2))


@pytest.fixture
def right(tmp_path: Path) -> Path:
    path = tmp_path / "right.yaml"
    path.write_text(RIGHT)
    return path


@pytest.fixture(scope="session")
def engine_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tag folders that a real DeepSpeed engine on one rank wrote, by name of the run. Not to be changed."""
    root = tmp_path_factory.mktemp("engine")
    runs = {
        "zero0": Run(zero={"stage": 0}),
        "zero1": Run(zero={"stage": 1}, precision="bf16", groups="decay"),
        "zero3": Run(zero={"stage": 3}, precision="bf16"),
    }
    state = {"epoch": 3, "seen": [1, 2, 3]}
    for name, run in runs.items():
        get_pool(1).run(train, run, 3, save=str(root / name), save_tag="step3", client_state=state, timeout=280)
    return {name: root / name / "step3" for name in runs}
