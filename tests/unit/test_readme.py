"""What the README says of families is what there is."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import yaml

ROOT = Path(__file__).resolve().parents[2]


def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_table_of_families_is_up_to_date() -> None:
    """``python scripts/families.py --write`` makes it anew."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert families().written(readme) == readme


def test_every_family_is_covered_by_an_engine_test() -> None:
    named = {yaml.safe_load(path.read_text())["family"] for path in (ROOT / "configs").glob("*.yaml")}
    assert set(families().covered()) == named
