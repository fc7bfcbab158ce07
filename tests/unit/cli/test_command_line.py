"""Shared by all commands: imports, errors and options."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import click
import pytest
from click.testing import Result

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.cli.options import Command
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.transfer.conversion import convert

Ucp = Callable[..., Result]

OPTIONS = {
    "inspect": {"--tag", "--spec", "--vocabulary-size", "--match", "--all", "--json", "--plot"},
    "convert": {
        "--to",
        "--tp",
        "--pp",
        "--dp",
        "--ep",
        "--zero",
        "--layers",
        "--config",
        "--tag",
        "--spec",
        "--vocabulary-size",
        "--workers",
        "--drop-client-state",
        "--on-unreadable",
        "--on-differing",
        "--quiet",
    },
    "export": {
        "--to",
        "--adapter",
        "--dtype",
        "--source",
        "--max-shard-size",
        "--config-from",
        "--tag",
        "--spec",
        "--vocabulary-size",
        "--on-differing",
        "--workers",
        "--quiet",
    },
    "diff": {
        "--tag-a",
        "--tag-b",
        "--spec",
        "--spec-a",
        "--spec-b",
        "--vocabulary-size",
        "--json",
        "--limit",
        "--chunk",
    },
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_are_what_is_documented(name: str) -> None:
    options = {opt for param in main.commands[name].params if isinstance(param, click.Option) for opt in param.opts}
    assert options == OPTIONS[name]


def test_importing_the_command_line_imports_no_engine(tmp_path: Path) -> None:
    code = """
import sys
from ucp_deepspeed.cli import main
from ucp_deepspeed.cli import convert, diff, export, inspect, plan, plots, spec
print({'deepspeed', 'megatron'} & {m.split('.')[0] for m in sys.modules})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert run.stdout == "set()\n", run.stderr


def test_a_conversion_imports_what_it_needs(saved: Path, tmp_path: Path) -> None:
    """Imports are most of what a short command takes."""
    code = """
import sys
from ucp_deepspeed.cli import main
main(sys.argv[1:], standalone_mode=False)
print([m for m in %s if m in sys.modules])
"""
    others = ["deepspeed", "megatron", "ucp_deepspeed.engine", "rich.progress", "transformers"]
    others += [f"ucp_deepspeed.cli.{name}" for name in main.commands if name != "convert"]
    command = [sys.executable, "-c", code % others, "convert", str(saved), str(tmp_path / "u"), "--quiet"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.stdout == "[]\n", run.stderr


def test_help_and_completion_import_no_torch(tmp_path: Path) -> None:
    code = """
import os, sys
from ucp_deepspeed.cli import main
sys.argv[1:] or os.environ.update(_UCP_COMPLETE="bash_complete", COMP_WORDS="ucp in", COMP_CWORD="1")
try:
    main(prog_name="ucp")
finally:
    print({'torch'} & sys.modules.keys())
"""
    lines = {
        "inspect": "--match GLOB",
        "convert": "--workers INTEGER RANGE",
        "diff": "--chunk MIB",
        "plan": "--ep INTEGER RANGE",
    }
    cases = [(["--help"], "inspect  Show what a checkpoint holds."), ([], "plain,inspect"), (["spec", "-h"], "schema ")]
    cases += [([name, "--help"], line) for name, line in lines.items()]
    cases += [(["spec", name, "--help"], f"ucp spec {name} ") for name in main.commands["spec"].commands]
    for args, line in cases:
        run = subprocess.run(
            [sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=60, cwd=tmp_path
        )
        assert line in run.stdout and run.stdout.endswith("set()\n"), (args, run.stdout, run.stderr)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (["inspct", "x"], "No such command 'inspct'. Did you mean 'inspect'?"),
        (
            ["./xyz"],
            "No such command './xyz'. The commands: inspect, convert, export, diff, verify, prune, plan, spec, run, store, arm.",
        ),
        (["spec", "checks"], "No such command 'checks'. Did you mean 'check'?"),
    ],
)
def test_a_mistyped_command_gets_a_suggestion(args: list[str], hint: str, ucp: Ucp) -> None:
    result = ucp(*args)
    assert result.exit_code == 2 and hint in result.stderr


@pytest.mark.parametrize("name", main.commands)
def test_help_ends_with_examples_that_are_right(name: str) -> None:
    found = main.commands[name]
    for command in found.commands.values() if isinstance(found, click.Group) else [found]:
        assert isinstance(command, Command) and command.name and command.examples
        shown = command.get_help(click.Context(command, info_name=command.name))
        for example in command.examples:
            assert example in shown and len(example) < 80
            words = shlex.split(example.partition(" > ")[0])
            place = words.index("ucp_deepspeed.convert" if words[0] == "torchrun" else command.name)
            command.make_context(command.name, words[place + 1 :])


@pytest.mark.parametrize("args", [["inspect"], ["inspect", "--json"]])
def test_a_reader_that_goes_away(args: list[str], saved: Path) -> None:
    """As ``head`` does. The command ends quietly, and its status is no answer."""
    command = [sys.executable, "-m", "ucp_deepspeed.cli", *args, saved]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        assert run.stdout is not None and run.stderr is not None
        run.stdout.close()
        assert (run.stderr.read(), run.wait(60)) == (b"", 128 + signal.SIGPIPE)


def test_a_command_runs_without_an_engine(saved: Path, tmp_path: Path) -> None:
    """deepspeed and megatron can't even be imported here."""
    code = "import sys; sys.modules.update(deepspeed=None, megatron=None); from ucp_deepspeed.cli import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code]
    for args in (["inspect", saved], ["convert", saved, tmp_path / "u"], ["diff", saved, tmp_path / "u"]):
        run = subprocess.run([*command, *map(str, args)], capture_output=True, text=True, timeout=60)
        assert run.returncode == 0, run.stderr


def test_as_a_module_and_as_a_script(saved: Path, tmp_path: Path) -> None:
    script = Path(__file__).parents[3] / "scripts" / "convert.py"
    run = subprocess.run([sys.executable, script, saved, tmp_path / "u"], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and run.stdout.startswith(str(tmp_path / "u" / "step3"))
    run = subprocess.run(
        [sys.executable, "-m", "ucp_deepspeed.cli", "diff", saved, tmp_path / "u"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert run.returncode == 0 and run.stdout.startswith("equal: ")


@pytest.mark.parametrize(
    ("command", "status", "line"),
    [
        (["-m", "ucp_deepspeed.run", "nosuch.py"], 2, "ucp_deepspeed.run: no script at nosuch.py"),
        ([Path(__file__).parents[3] / "scripts" / "convert.py", "-h"], 0, "Usage: convert.py [OPTIONS] SRC DST"),
    ],
    ids=["run", "convert.py"],
)
def test_scripts_say_how_they_are_called(command: list[str | Path], status: int, line: str) -> None:
    run = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=60)
    assert (run.returncode, (run.stdout + run.stderr).splitlines()[0]) == (status, line)
    assert "Traceback" not in run.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["inspect", "nowhere"], "no checkpoint folder at nowhere"),
        (["convert", "nowhere", "to"], "no checkpoint folder at nowhere"),
        (["diff", "nowhere", "there"], "no checkpoint folder at nowhere"),
        (["inspect", "SAVED", "--tag", "step9"], "no tag 'step9' in"),
        (["inspect", "SAVED", "--spec", "unknown"], "no family or spec file 'unknown'"),
        (["diff", "SAVED", "SAVED", "--tag-b", "step9"], "tags there: step2, step3"),
    ],
)
def test_errors_are_one_message_and_status_2(args: list[str], message: str, saved: Path, ucp: Ucp) -> None:
    result = ucp(*[saved if arg == "SAVED" else arg for arg in args])
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.startswith("error: ") and message in result.stderr


def test_errors_of_the_system_too(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    result = ucp("convert", saved, tmp_path / ("n" * 300))
    [line] = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith("error: ") and "File name too long" in line


def test_a_destination_in_a_file(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "file").write_text("kept")
    for destination in (tmp_path / "file", tmp_path / "file" / "below"):
        result = ucp("convert", saved, destination)
        [line] = result.stderr.splitlines()
        assert (result.exit_code, line) == (
            2,
            f"error: {tmp_path / 'file'} is a file; nothing was written; name another folder",
        )
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"family: 2020-13-45", b"a: 1\na: 2"])
def test_a_spec_that_cant_be_read_is_one_line(content: bytes, saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    result = ucp("convert", saved, tmp_path / "u", "--spec", tmp_path / "mine.yaml")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith(f"error: spec {tmp_path / 'mine.yaml'}")
    assert "is not YAML: " in line


@pytest.mark.parametrize("content", ["", "[]", "\xff", "{}", '{"format_version": 1}', "[" * 100_000])
def test_an_index_that_cant_be_read_is_one_line(content: str, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "ucp_index.json").write_bytes(content.encode("latin-1"))
    result = ucp("inspect", tmp_path / "u")
    [line] = result.stderr.splitlines()
    assert result.exit_code == 2 and line.startswith(f"error: {tmp_path / 'u' / 'ucp_index.json'} is not an index: ")


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (SystemExit(143), 143, "ended by SIGTERM"),
        (TypeError("a fault"), 2, "TypeError: a fault"),
        (MemoryError(), 2, "error: there is too little memory: MemoryError: \n"),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory"),
            2,
            "error: there is too little memory: RuntimeError: Def",
        ),
    ],
)
def test_no_accident_looks_like_an_answer(
    error: BaseException, status: int, message: str, saved: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr("ucp_deepspeed.cli.diff.compare", fail)
    result = ucp("diff", saved, saved)
    assert result.exit_code == status and message in result.stderr


@pytest.mark.parametrize(
    ("encoding", "command"), [("ascii", ["inspect"]), ("latin-1", ["diff", "--limit", "2", "--tag-b", "step2"])]
)
def test_an_output_that_lacks_characters(encoding: str, command: list[str], saved: Path) -> None:
    paths = [saved] * (2 if command[0] == "diff" else 1)
    run = subprocess.run(
        [sys.executable, "-m", "ucp_deepspeed.cli", *command, *paths],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert run.returncode == (1 if command[0] == "diff" else 0) and "Traceback" not in run.stderr
    assert "?" in run.stdout


def test_an_empty_path_is_refused(saved: Path, tmp_path: Path, ucp: Ucp, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for paths in ([saved, ""], ["", "u"]):
        result = ucp("convert", *paths)
        assert result.exit_code == 2 and "an empty path names no folder" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_link_that_leads_nowhere_is_in_the_way(saved: Path, tmp_path: Path, ucp: Ucp) -> None:
    (tmp_path / "u").mkdir()
    (tmp_path / "u" / "step3").symlink_to("nowhere")
    result = ucp("convert", saved, tmp_path / "u")
    [line] = result.stderr.splitlines()
    assert (result.exit_code, line) == (2, f"error: {tmp_path / 'u' / 'step3'} exists already; nothing was written")
    with pytest.raises(ConfigError, match="exists already"):
        convert(UniversalView.of(open_checkpoint(saved)), tmp_path / "u" / "step3")


def test_as_many_files_as_the_system_allows(saved: Path) -> None:
    code = """
import resource, sys
from ucp_deepspeed.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (100, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
main(sys.argv[1:], standalone_mode=False)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
assert soft == hard > 100
"""
    run = subprocess.run([sys.executable, "-c", code, "inspect", saved], capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
