"""A checkpoint to damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import ZERO_2
from native_files import write_native
from native_models import SHAPES, model_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_native(tmp_path, model_of(SHAPES), ZERO_2)
