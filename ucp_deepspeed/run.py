"""Run an unmodified training script with the hooks set, and with ``UCP_DEEPSPEED=1``: its engines need no block.

    torchrun -m ucp_deepspeed.run train.py …
    accelerate launch -m ucp_deepspeed.run train.py …
    deepspeed --module ucp_deepspeed.run train.py …

``-m package.train`` in the place of the script runs a module. Some launchers add ``--local_rank=N``, at which a strict parser
ends the script: only scripts that take the option get it (`LocalRank`); all find ``LOCAL_RANK`` in the environment.
"""

from __future__ import annotations

import argparse
import os
import re
import runpy
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import wrapt

from ucp_deepspeed.arming import arm
from ucp_deepspeed.environment import VARIABLE

USAGE = """usage: torchrun [OPTION …] -m ucp_deepspeed.run SCRIPT [ARGUMENT …]
       accelerate launch [OPTION …] -m ucp_deepspeed.run SCRIPT [ARGUMENT …]
       deepspeed [OPTION …] --module ucp_deepspeed.run SCRIPT [ARGUMENT …]
-m MODULE in the place of SCRIPT runs a module."""

OPTIONS = "--local_rank", "--local-rank"
"""Forms of the option: the first is that of DeepSpeed's launcher, the second that of ``torch.distributed.launch``."""

_NAMES = re.compile(r"--local[_-]rank\b|^\s*(?:def .*[(,]\s*)?local_rank\s*:", re.MULTILINE)
"""The look of a script that takes the option without `argparse`: in its text, or as a field or argument of a function, of which
some libraries make options."""


@dataclass(frozen=True)
class LocalRank:
    """The option that a launcher has added. Scripts that name it find it in ``sys.argv``, and parsers that have it get it. A
    parser that doesn't have it, and that refuses what it doesn't know, never sees it."""

    name: str
    number: str

    @property
    def word(self) -> str:
        """The option as one word."""
        return f"{self.name}={self.number}"

    def give(self, text: str) -> None:
        """Give it to the script with this text, whose arguments are in ``sys.argv``."""
        os.environ.setdefault("LOCAL_RANK", self.number)
        if _NAMES.search(text):
            sys.argv.insert(1, self.word)
        wrapt.wrap_function_wrapper(argparse, "ArgumentParser.parse_args", self._parsing(strictly=True))
        wrapt.wrap_function_wrapper(argparse, "ArgumentParser.parse_known_args", self._parsing(strictly=False))

    def _parsing(self, strictly: bool) -> Callable[..., Any]:
        def parse(wrapped: Callable[..., Any], parser: Any, given: tuple[Any, ...], named: dict[str, Any]) -> Any:
            def call(args: Sequence[str] | None = None, *rest: Any, **others: Any) -> Any:
                return wrapped(self._seen_by(parser, args, strictly), *rest, **others)

            return call(*given, **named)

        return parse

    def _seen_by(self, parser: argparse.ArgumentParser, args: Sequence[str] | None, strictly: bool) -> Any:
        """Return what a parser reads in place of these arguments. Only those of the process change."""
        own = sys.argv[1:]
        if args is not None and not (own and list(args) == own):
            return args
        known = [name for name in OPTIONS if name in parser._option_string_actions]
        if not known:
            return [word for word in own if word != self.word] if strictly and self.word in own else args
        given = any(word.split("=")[0] in known for word in own)
        others = [word for word in own if word != self.word]
        return args if given else [f"{known[0]}={self.number}", *others]


def main() -> None:
    """Run what the arguments name as ``__main__``, with the arguments after it."""
    rank, words = _without_rank(sys.argv[1:])
    os.environ.setdefault(VARIABLE, "1")
    arm()
    if words[:1] == ["-m"] and len(words) > 1:
        _run_module(words[1], words[2:], rank)
    elif words and not words[0].startswith("-"):
        _run_script(Path(words[0]), words, rank)
    elif words[:1] in (["-h"], ["--help"]):
        print(USAGE)
    else:
        _refuse("no script is named")


def _without_rank(words: list[str]) -> tuple[LocalRank | None, list[str]]:
    """Return what the launcher has put before the script, and the rest."""
    name, equals, number = words[0].partition("=") if words else ("", "", "")
    if name not in OPTIONS or not (equals or len(words) > 1):
        return None, words
    return (LocalRank(name, number), words[1:]) if equals else (LocalRank(name, words[1]), words[2:])


def _run_script(script: Path, words: list[str], rank: LocalRank | None) -> None:
    if not script.is_file():
        _refuse(f"no script at {script}")
    sys.argv = list(words)
    if rank is not None:
        rank.give(script.read_text(encoding="utf-8", errors="replace"))
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


def _run_module(name: str, arguments: list[str], rank: LocalRank | None) -> None:
    try:
        spec = find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = find_spec(f"{name}.__main__")
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # an import within the packages around it
        spec = None
    except ValueError:  # such as an empty name
        spec = None
    if spec is None or spec.origin is None:
        _refuse(f"no module {name} to run, seen from {Path.cwd()}")
    sys.argv = [spec.origin, *arguments]
    if rank is not None:
        rank.give(Path(spec.origin).read_text(encoding="utf-8", errors="replace"))
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def _refuse(reason: str) -> NoReturn:
    print(f"ucp_deepspeed.run: {reason}\n{USAGE}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    main()
