"""``ucp prune``: old checkpoints go, and never the last whole one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from native_files import NativeRun, write_native
from spec_models import model_of

from ucp_deepspeed.checkpoint.deepspeed.manifest import MARK_NAME
from ucp_deepspeed.checkpoint.retention import PIN_NAME, Keep, fates
from ucp_deepspeed.checkpoint.tags import mark_of
from ucp_deepspeed.checkpoint.whole import FoundCheckpoint
from ucp_deepspeed.errors import CheckpointNotFoundError
from ucp_deepspeed.transfer.commit import hold, release
from ucp_deepspeed.transfer.pruning import prune, reading

Ucp = Callable[..., Result]


def saved(root: Path, *steps: int) -> list[Path]:
    return [write_native(root, model_of(), NativeRun(dp=2, stage=2, steps=step), f"step{step}") for step in steps]


def mark(tag: Path) -> None:
    (tag / MARK_NAME).write_text(mark_of(tag, "0123456789abcdef").model_dump_json())


def there(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir())


def test_what_goes_and_what_stays(tmp_path: Path, ucp: Ucp) -> None:
    tags = saved(tmp_path, 100, 150, 200, 250, 300, 350)
    (tags[1] / PIN_NAME).touch()
    mark(tags[3])
    (tmp_path / "latest").write_text("step300")
    mark(tags[5])
    dry = ucp("prune", tmp_path, "--keep-last", 1, "--keep-every", 200, "--dry-run", "--json")
    assert len(there(tmp_path)) == 6
    listed = {each["name"]: each["stays"] for each in json.loads(dry.stdout)["checkpoints"]}
    assert listed == {
        "step350": "it isn't whole, and no newer one is",
        "step300": "latest names it",
        "step250": None,
        "step200": "step 200 is a multiple of 200",
        "step150": "it is pinned",
        "step100": None,
    }
    done = ucp("prune", tmp_path, "--keep-last", 1, "--keep-every", 200)
    assert there(tmp_path) == ["step150", "step200", "step300", "step350"]
    assert done.exit_code == 0 and "2 removed, 4 stay" in done.stdout
    assert "newer ones are whole" in done.stdout and "was not finished" in done.stdout


def test_none_is_whole(tmp_path: Path) -> None:
    for tag in saved(tmp_path, 1, 2):
        mark(tag)
    prune(tmp_path, Keep(last=1))
    assert there(tmp_path) == ["step1", "step2"]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="no folder at"):
        prune(tmp_path / "missing", Keep(last=1))


def test_what_is_read_or_written_stays(tmp_path: Path) -> None:
    first, second, _, newest = saved(tmp_path, 1, 2, 3, 4)
    assert hold(second)
    with reading(first), reading(newest):
        found = {fate.checkpoint.path.name: fate.stays for fate in prune(tmp_path, Keep(last=1), remove=False)}
        assert found["step1"] == found["step4"] == "it is being read" and found["step2"] == "it is being written"
        assert found["step3"] is None or found["step3"] == "it is the newest whole one"
    release(second)
    prune(tmp_path, Keep(last=1))
    assert there(tmp_path) == ["step4"]


def test_a_removal_that_was_killed_leaves_nothing_for_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next removal takes the rest away, once the process is gone."""
    saved(tmp_path, 1, 2)

    def killed(path: Path) -> None:
        (path / "latest").unlink(missing_ok=True)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("ucp_deepspeed.transfer.commit._remove", killed)
        prune(tmp_path, Keep(last=1))
    hidden = next(entry for entry in tmp_path.iterdir() if entry.name.startswith("."))
    assert [fate.checkpoint.path.name for fate in prune(tmp_path, Keep(last=1))] == ["step2"]
    gone = hidden.with_name(hidden.name.replace(f"-{os.getpid()}.", "-999999999."))
    hidden.rename(gone)
    saved(tmp_path, 3)
    prune(tmp_path, Keep(last=1))
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


@pytest.mark.parametrize("last", [1, 2, 3, 5])
@pytest.mark.parametrize("every", [None, 1, 2, 3])
@pytest.mark.parametrize("whole", range(16))
def test_every_choice_against_its_rule(whole: int, every: int | None, last: int) -> None:
    """Steps 1 to 4, of which any are whole: each that goes is older than a whole one that stays, and beyond what is kept."""
    steps = [4, 3, 2, 1]
    found = [FoundCheckpoint(Path(f"/x/{s}"), s, 0.0, None if whole >> s - 1 & 1 else "cut") for s in steps]
    gone = {fate.checkpoint.step for fate in fates(found, Keep(last=last, every=every)) if fate.stays is None}
    sound = [each.step for each in found if each.problem is None]
    kept = {*sound[:last], *(step for step in sound if every and step % every == 0)}
    expected = {step for step in steps if sound and step < sound[0] and step not in kept}
    assert gone == expected
