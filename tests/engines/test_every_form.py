"""Every form that keeps optimizer states, converted into every other: nothing of a run's state is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from checkpoints import Source, differences
from click.testing import CliRunner

from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.runs import Run

RUNS = {
    "groups, frozen": (Run(groups="shuffled", frozen=("first.bias",), zero={"stage": 2}), 2),
    "ZeRO-3 bf16": (Run("huggingface", {"family": "llama"}, zero={"stage": 3}, precision="bf16"), 2),
    "tied, tensor-parallel": (Run("gpt", {"layers": 1}, tp=2), 2),
}

FORMS = {
    "universal": (),
    "dcp": (),
    "deepspeed": ("--dp", "3", "--zero", "1"),
    "deepspeed-universal": (),
}
"""Forms, and the options that each needs."""


def converted(source: Path, destination: Path, form: str) -> Path:
    done = CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", form, *FORMS[form]])
    assert done.exit_code == 0, done.output
    return destination


@pytest.mark.parametrize("name", RUNS)
def test_every_pair(name: str, source: Callable[[str, Run, int], Source], tmp_path: Path) -> None:
    run, size = RUNS[name]
    first = source(f"forms {name}", run, size).folder
    whole = {form: converted(first, tmp_path / form, form) for form in FORMS}
    for form, folder in whole.items():
        assert differences(first, folder) == [], form
    for one, other in permutations(FORMS, 2):
        assert differences(first, converted(whole[one], tmp_path / f"{one} {other}", other)) == [], (one, other)
