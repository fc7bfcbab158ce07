"""Every form that keeps optimizer states, converted into every other: nothing of a run's state is lost on the way."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import pytest
from checkpoints import Source
from click.testing import CliRunner

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.testing.runs import Run
from ucp_deepspeed.transfer.compare import compare

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
    "torch_dist": (),
}
"""Forms, and the options that each needs. The last is for Megatron-Core's models alone."""

NOT_KEPT = "global_samples", "lr_scheduler"
"""Things that Megatron-Core's form has no place for."""


def converted(source: Path, destination: Path, form: str) -> Path:
    done = CliRunner().invoke(main, ["convert", str(source), str(destination), "--to", form, *FORMS[form]])
    assert done.exit_code == 0, done.output
    return destination


def differences(first: Path, second: Path) -> list[str]:
    """As ``ucp diff`` says: norms of Megatron-Core have two names."""
    one, other = (UniversalView.of(open_checkpoint(path)) for path in (first, second))
    return [f"{each.name} {each.state or ''} {each.detail}" for each in compare(one, other.under_names_of(one))]


@pytest.mark.parametrize("name", RUNS)
def test_every_pair(name: str, source: Callable[[str, Run, int], Source], tmp_path: Path) -> None:
    run, size = RUNS[name]
    first = source(f"forms {name}", run, size).folder
    forms = [form for form in FORMS if form != "torch_dist" or run.model == "gpt"]
    whole = {form: converted(first, tmp_path / form, form) for form in forms}
    for form, folder in whole.items():
        differing = differences(first, folder)
        if form == "torch_dist":  # it adds hyper-parameters of its own
            differing = [each for each in differing if not each.endswith("only in B") and not each.startswith(NOT_KEPT)]
        assert differing == [], form
    for one, other in permutations(forms, 2):
        expected = whole["torch_dist"] if "torch_dist" in (one, other) else first
        assert differences(expected, converted(whole[one], tmp_path / f"{one} {other}", other)) == [], (one, other)
