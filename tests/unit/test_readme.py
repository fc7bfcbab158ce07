"""README and docs: what they say of families, settings, commands and names is what there is, and their links lead somewhere."""

from __future__ import annotations

import ast
import dataclasses
import functools
import importlib.util
import json
import re
import shlex
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import click
import pytest
import torch
import yaml
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native

from ucp_deepspeed import errors
from ucp_deepspeed.cli import main
from ucp_deepspeed.config import SaveConfig, UniversalCheckpointConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.glob("*.md")])

FENCED = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:^    .*\n)+", re.MULTILINE)
LINK = re.compile(r"\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^)\s]+)\)")


@functools.cache
def families() -> ModuleType:
    spec = importlib.util.spec_from_file_location("families", ROOT / "scripts" / "families.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_table_of_families_is_up_to_date() -> None:
    """``python scripts/families.py --write`` makes it anew."""
    page = text_of("docs/families.md")
    assert families().written(page) == page


def test_every_family_is_covered_by_an_engine_test() -> None:
    named = {yaml.safe_load(path.read_text())["family"] for path in (ROOT / "configs").glob("*.yaml")}
    assert set(families().covered()) == named


def prose(page: Path) -> str:
    """A page without its code."""
    return FENCED.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Return the names of a page's headings in links, by the rule of the common viewers of Markdown."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    kept = string.ascii_lowercase + string.digits + "-_"
    return {"".join(char for char in heading.lower().replace(" ", "-") if char in kept) for heading in headings}


def links(page: Path) -> Iterator[str]:
    for target in LINK.findall(re.sub(r"`[^`\n]*`", "", prose(page))):
        if not target.startswith("https://"):
            yield target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    """To a file of the repository, and to a heading in it."""
    broken = []
    for target in links(page):
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        if not (path.exists() and path.is_relative_to(ROOT)) or (anchor and anchor not in anchors(path)):
            broken.append(target)
    assert broken == []


def test_links_are_found() -> None:
    """The one kind that hides is a picture or code in a link's text."""
    found = [target for page in PAGES for target in links(page)]
    assert {"docs/quickstart.png", "../configs/hf_llama.yaml", "language.md"} <= set(found)
    assert any("#" in target for target in found) and len(found) > 120


def test_index_names_every_page() -> None:
    named = {target.partition("#")[0] for target in links(DOCS / "index.md")}
    assert {page.name for page in DOCS.glob("*.md")} - {"index.md"} <= named


def test_readme_can_be_read_in_five_minutes() -> None:
    assert len(text_of("README.md").splitlines()) <= 200


def test_readme_quotes_the_error_of_deepspeed() -> None:
    """Read from the source of the installed one: the constant parts of the message, in their order."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    tree = ast.parse((Path(spec.origin).parent / "runtime" / "engine.py").read_text(encoding="utf-8"))
    raised = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and "used a DP" in ast.unparse(node)]
    call = min(raised, key=lambda node: len(ast.unparse(node)))
    constants = [
        node for node in ast.walk(call.args[0]) if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    parts = [node.value for node in sorted(constants, key=lambda node: (node.lineno, node.col_offset))]
    quoted = " ".join(text_of("README.md").split())
    assert len(parts) >= 3 and re.search(r"\d+".join(map(re.escape, _joined(parts))), quoted)


def _joined(parts: list[str]) -> list[str]:
    """Parts of a message between its numbers: a number stands where one part ends with ``of`` or ``is``."""
    joined = [""]
    for part in parts:
        joined[-1] += part
        if part.endswith((" of ", " is ")):
            joined.append("")
    return joined


def table_under(name: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a heading, without its head."""
    after = text_of(name).split(f"\n{heading}\n", 1)[1]
    rows = re.search(r"(?:^\|.*\n)+", after, re.MULTILINE)
    assert rows is not None
    lines = rows[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def test_table_of_settings() -> None:
    """Each key with its default, in the order of the block's fields; those of ``save`` are named in its row."""
    rows = table_under("docs/configuration.md", "## Settings")
    told = {key.strip("`"): json.loads(default.strip("`")) for key, default, _ in rows}
    settings = UniversalCheckpointConfig().model_dump(by_alias=True) | {"save": {}}
    assert told == settings
    for field in SaveConfig.model_fields.values():
        assert f'"{field.alias or "timeout"}"' in rows[-1][2]


def test_tables_of_the_python_interface() -> None:
    from ucp_deepspeed.engine.loading.load import LoadReport

    told = {name for row in table_under("docs/python.md", "### The report of a load") for name in _code(row[0])}
    assert told == {field.name for field in dataclasses.fields(LoadReport)}
    told = {name for row in table_under("docs/python.md", "## Errors") for name in _code(row[0])}
    base = errors.UniversalCheckpointError
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, base)}
    assert told == kinds - {"UniversalCheckpointError", "ListingError"}


def _code(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_python_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All parse; those that look into a checkpoint run."""
    blocks = [code for page in PAGES for _, kind, code in FENCED.findall(page.read_text()) if kind == "python"]
    for code in blocks:
        ast.parse(_dedented(code))
    parameter = NativeParameter("head.weight", torch.arange(96.0).view(12, 8), {"exp_avg": torch.ones(12, 8)})
    write_native(tmp_path / "runs" / "a", NativeModel((parameter,)), NativeRun(dp=2, stage=2))
    monkeypatch.chdir(tmp_path)
    looking = [code for code in blocks if 'open_checkpoint("runs/a")' in code]
    assert len(looking) == 2
    names: dict[str, object] = {}
    for code in looking:
        exec(code, names)
    assert torch.equal(torch.load("weights/pytorch_model.bin")["head.weight"], parameter.fp32)


def _dedented(code: str) -> str:
    lines = code.splitlines(keepends=True)
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "".join(line[margin:] or "\n" for line in lines)


def command_lines(page: Path) -> Iterator[list[str]]:
    """Yield the commands of a page, as words, without comments. A line that ends with a backslash goes on."""
    text = page.read_text(encoding="utf-8")
    code = [block for _, kind, block in FENCED.findall(text) if kind in ("console", "bash", "")]
    code += [block[0] for block in INDENTED.finditer(FENCED.sub("", text))]
    for line in "\n".join(code).replace("\\\n", " ").splitlines():
        try:
            words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        except ValueError:  # prose in a list
            continue
        yield words


PROGRAMS = [(page, words) for page in PAGES for words in command_lines(page) if words[:1] == ["ucp"]]


def test_commands_are_found() -> None:
    assert {words[1] for _, words in PROGRAMS} >= main.commands.keys()


@pytest.mark.parametrize("words", [words for _, words in PROGRAMS], ids=" ".join)
def test_commands_exist_with_their_options(words: list[str]) -> None:
    words = words[: words.index(">")] if ">" in words else words
    words = words[: words.index("&&")] if "&&" in words else words
    command, rest = main.commands[words[1]], words[2:]
    if isinstance(command, click.Group):
        found = command.get_command(click.Context(command), rest[0])
        assert found is not None, words
        command, rest = found, rest[1:]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in rest if word.startswith("--")} <= known


JSON = {
    "inspect": "inspect TWO --spec SPEC",
    "diff": "diff TWO ONE --spec SPEC",
    "plan": "plan TWO --dp 1 --zero 1 --spec SPEC",
    "spec list": "spec list --against TWO",
    "spec check": "spec check SPEC --against TWO",
    "spec explain": "spec explain norm.weight --spec SPEC --against TWO",
}


@pytest.mark.parametrize("name", JSON)
def test_tables_of_json(name: str, two: Path, one: Path, right: Path, ucp: Callable[..., Result]) -> None:
    paths = {"TWO": two, "ONE": one, "SPEC": right}
    printed = json.loads(ucp(*(paths.get(word, word) for word in JSON[name].split()), "--json").stdout)
    assert printed.keys() == {key for row in table_under("docs/json.md", f"## {name}") for key in _code(row[0])}


@functools.cache
def definitions() -> dict[str, set[str]]:
    """Names that modules define, by dotted module without the package's name; and members of each class, by its name."""
    found: dict[str, set[str]] = {}
    for path in (ROOT / "ucp_deepspeed").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "ucp_deepspeed").with_suffix("").parts).removesuffix(".__init__")
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        named = (ast.FunctionDef, ast.ClassDef)
        found[module] = {node.name for node in nodes if isinstance(node, named)}
        found[module] |= {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        found[module] |= {alias.name for node in nodes if isinstance(node, ast.ImportFrom) for alias in node.names}
        for kind in (node for node in nodes if isinstance(node, ast.ClassDef)):
            within = list(ast.walk(kind))
            members = {node.name for node in within if isinstance(node, named)}
            members |= {
                node.target.id for node in within if isinstance(node, ast.AnnAssign) and hasattr(node.target, "id")
            }
            members |= {
                node.attr for node in within if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            }
            found.setdefault(kind.name, set()).update(members)
    return found


OF_OTHERS = re.compile(r"deepspeed\.|torch\.|engine\.(checkpoint_engine|universal_checkpoint_report)$|ucp_deepspeed\.")
"""Names of DeepSpeed and torch, and attributes of engines."""


def is_there(name: str) -> bool:
    """Tell whether a name in the page about the architecture names a file, a module, or something that one defines."""
    if name.endswith((".py", "/")) or name.startswith("tests/"):
        return any((ROOT / base / name).exists() for base in ("", "ucp_deepspeed")) or (
            "/" not in name and any((ROOT / "ucp_deepspeed").rglob(name))
        )
    *places, last = name.split(".")
    place, known = ".".join(places), definitions()
    owners = [key for key in known if not place or key == place or key.endswith(f".{place}")]
    if place and any(last in known[key] or f"{key}.{last}" in known for key in owners):
        return True
    if place and places[-1] in known:
        return last in known[places[-1]]
    return not place and any(name in names or name == key for key, names in known.items())


def test_architecture_names_what_there_is() -> None:
    """Files, dotted names and classes. A name of one word may be DeepSpeed's, unless it is a class's."""
    coded = set(re.findall(r"`([^`\n]+)`", FENCED.sub("", text_of("docs/architecture.md"))))
    names = {name.partition("(")[0] for name in coded if not OF_OTHERS.match(name)}
    names = {name for name in names if re.fullmatch(r"[A-Za-z_][\w./]*", name) and not name.endswith(".json")}
    checked = {name for name in names if re.search(r"[./]", name) or re.match(r"[A-Z]+[a-z]", name)}
    checked -= {"tied_modules.embedding.word_embeddings.weight", "configs/"}
    assert len(checked) > 80 and sorted(name for name in checked if not is_there(name)) == []


def test_scripts_exist() -> None:
    scripts = {word for page in PAGES for words in command_lines(page) for word in words if word.startswith("scripts/")}
    scripts |= {script for page in PAGES for script in re.findall(r"`(?:python |bash )?(scripts/[\w./]+)", prose(page))}
    assert len(scripts) > 5 and [script for script in scripts if not (ROOT / script).exists()] == []


def test_options_of_deepspeeds_tools_exist() -> None:
    """The page about migrating names options that the installed tools have."""
    spec = importlib.util.find_spec("deepspeed")
    assert spec is not None and spec.origin is not None
    package = Path(spec.origin).parent
    for heading, tool in (
        ("## From `ds_to_universal` and `load_universal`", "checkpoint/ds_to_universal.py"),
        ("## From `zero_to_fp32`", "utils/zero_to_fp32.py"),
    ):
        source = (package / tool).read_text(encoding="utf-8")
        cells = [row[0] for row in table_under("docs/migrating.md", heading)]
        options = {option for cell in cells for option in re.findall(r"(?<![\w-])--?[a-z]\w*", cell)}
        assert options and [option for option in options if not re.search(rf"['\"]{option}['\"]", source)] == []
