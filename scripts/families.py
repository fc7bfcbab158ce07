"""The table in ``docs/families.md``, from the spec files in ``configs/`` and the tests that are marked as covering them."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import click
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "families.md"
BEGIN, END = "<!-- families: scripts/families.py -->\n", "<!-- end -->\n"
MARK = "covers"


@functools.cache
def covered(tests: Path = ROOT / "tests") -> dict[str, dict[str, str]]:
    """Family → what a test shows of it → that test, from ``@pytest.mark.covers("family", …, shows="…")``."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted(tests.rglob("test_*.py")):
        for mark in _marks(ast.parse(path.read_text(encoding="utf-8"))):
            [shown] = [ast.literal_eval(keyword.value) for keyword in mark.keywords if keyword.arg == "shows"]
            for family in map(ast.literal_eval, mark.args):
                found.setdefault(family, {})[shown] = path.relative_to(ROOT).as_posix()
    return found


def _marks(tree: ast.Module) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == f"pytest.mark.{MARK}":
                yield decorator


def table() -> str:
    """One row for each spec file, in Markdown."""
    shown = covered()
    rows = ["| family | models | tested in engines |", "| --- | --- | --- |"]
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        spec = yaml.safe_load(path.read_text(encoding="utf-8"))
        tests = "; ".join(f"[{what}](../{where})" for what, where in shown.get(spec["family"], {}).items())
        rows.append(f"| [`{spec['family']}`](../configs/{path.name}) | {spec['description']} | {tests} |")
    return "\n".join(rows) + "\n"


def written(text: str) -> str:
    """The page with the table as it should be."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END, 1)[1]


@click.command(help=__doc__)
@click.option("--write", is_flag=True, help="Put it into docs/families.md.")
def main(write: bool) -> None:
    """Print or write the table."""
    if write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        click.echo(table(), nl=False)


if __name__ == "__main__":
    main()
