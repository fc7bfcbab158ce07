"""The command line in this process, and checkpoints of two ranks and of one with a spec that fits them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from native_files import NativeRun, write_native
from spec_models import RIGHT, model_of

from ucp_deepspeed.cli import main


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
    """The same state on one tensor-parallel rank."""
    return write_native(tmp_path / "one", model_of(), NativeRun(dp=2, stage=2))


@pytest.fixture
def right(tmp_path: Path) -> Path:
    path = tmp_path / "right.yaml"
    path.write_text(RIGHT)
    return path
