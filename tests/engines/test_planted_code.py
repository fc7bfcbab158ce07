"""No code in a checkpoint's files runs, whoever loads them: the package, or DeepSpeed, which unpickles whatever there is."""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import STEP

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.catalog import DeepSpeedCheckpoint
from ucp_deepspeed.engine.loading.native import files_to_unpickle
from ucp_deepspeed.testing.ranks import RankError, RankPool, fp16_on_cpu
from ucp_deepspeed.testing.runs import Run, build_engine, train

Ranks = Callable[[int], RankPool]


class Touching:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


def plant(folder: Path, name: str, mark: Path) -> None:
    """Add it to a file, and leave nothing in the manifest that would tell."""
    [path] = folder.rglob(name)
    saved = torch.load(path, map_location="cpu", weights_only=False)
    torch.save({**saved, "planted": Touching(mark)}, path)
    manifest = path.parent / "ucp_manifest.json"
    text = manifest.read_text().replace(f'"{name}": ', f'"not {name}": ').replace('"sum": ', '"no sum": ')
    manifest.write_text(text.replace('"checksums": ', '"no checksums": '))


MOE = Run("moe", groups="decay")


@pytest.mark.parametrize(
    ("run", "name", "resumes"),
    [
        (Run("gpt", pp=2), "layer_03-model_00-model_states.pt", True),
        (Run("gpt", pp=2), "zero_pp_rank_0_mp_rank_01_optim_states.pt", False),
        (Run("mlp", zero={"stage": 3}), "zero_pp_rank_1_mp_rank_00_model_states.pt", False),
        (Run("mlp", zero={"stage": 1}), "zero_pp_rank_1_mp_rank_00_optim_states.pt", False),
        (Run("mlp"), "mp_rank_00_model_states.pt", False),
        (MOE, "layer_1_expert_3_mp_rank_00_model_states.pt", False),
    ],
    ids=lambda value: f"{value.model} {value.zero['stage']}" if isinstance(value, Run) else str(value),
)
def test_planted_code_never_runs(run: Run, name: str, resumes: bool, ranks: Ranks, tmp_path: Path) -> None:
    """A run that doesn't need the file resumes from the others; else the refusal names the file and its content."""
    whole = ranks(2).run(train, run, STEP + 1, save=str(tmp_path / "a"), save_at=STEP)
    plant(tmp_path / "a", name, tmp_path / "mark")
    try:
        found = ranks(2).run(train, run, STEP + 1, load=str(tmp_path / "a"))
        assert resumes and found[0].losses[STEP + 1] == whole[0].losses[STEP + 1]
        assert all(outcome.report is not None for outcome in found)
    except RankError as error:
        assert not resumes and name in str(error) and "of class posix.system" in str(error)
    assert not (tmp_path / "mark").exists()


class Noting:
    """A class of the script's own that is on no list. It leaves a file behind when it is made."""

    def __init__(self, path: str) -> None:
        self.path = path
        Path(path).touch()

    def __reduce__(self) -> tuple[Any, ...]:
        return Noting, (self.path,)


@pytest.mark.parametrize("what", ["error", "drop"])
def test_a_class_of_the_scripts_own_is_made_by_deepspeed_alone(what: str, ranks: Ranks, tmp_path: Path) -> None:
    """As without the package; not where it is said to be left out, which goes for the same topology too."""
    mark = tmp_path / "mark"
    run = Run("mlp", universal={"enabled": True, "on_unreadable": what})
    ranks(2).run(train, run, 1, save=str(tmp_path / "a"), client_state={"own": Noting(str(mark)), "epoch": 7})
    mark.unlink()
    for outcome in ranks(2).run(train, run, 2, load=str(tmp_path / "a")):
        assert outcome.client_state["epoch"] == 7
        assert (outcome.report is not None and outcome.report.unread == ("own",)) == (what == "drop")
    assert mark.exists() == (what == "error")


class Timing:
    """Is pickled as a call of a function of Python's own, which runs a text as code."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return timeit.timeit, (f"open({str(self.path)!r}, 'w')", "pass", timeit.default_timer, 1)


@pytest.mark.parametrize("block", [{}, {"on_unreadable": "drop"}, {"load": "never", "verify": "off"}], ids=str)
def test_a_call_of_a_librarys_function_is_left_to_deepspeed_only_when_asked_to(
    block: dict[str, Any], ranks: Ranks, tmp_path: Path
) -> None:
    """On the topology that saved it too; the refusal names key, function and ways on."""
    mark = tmp_path / "mark"
    ranks(2).run(train, Run("mlp"), 1, save=str(tmp_path / "a"), client_state={"epoch": 7})
    [path] = (tmp_path / "a").rglob("mp_rank_00_model_states.pt")
    saved = torch.load(path, map_location="cpu", weights_only=False)
    torch.save({**saved, "mine": Timing(mark)}, path)
    for name in ("ucp_manifest.json", "ucp_checksums.jsonl", "ucp_random_states.jsonl"):
        (path.parent / name).unlink()
    run = Run("mlp", universal={"enabled": True, **block})
    if block:
        found = ranks(2).run(train, run, 2, load=str(tmp_path / "a"))[0]
        assert found.client_state["epoch"] == 7
    else:
        with pytest.raises(RankError, match=r"mine: timeit\.timeit") as caught:
            ranks(2).run(train, run, 2, load=str(tmp_path / "a"))
        assert all(way in str(caught.value) for way in ('"on_unreadable": "drop"', '"load": "never"'))
    assert mark.exists() == ("load" in block)


def compare_reads(run: Run, folder: str) -> tuple[set[str], set[str]]:
    """On a rank: files that DeepSpeed reads when it loads alone, and those that were to be looked at before."""
    with fp16_on_cpu():
        engine = build_engine(run)
        checkpoint = open_checkpoint(folder)
        assert isinstance(checkpoint, DeepSpeedCheckpoint)
        listed = {path.name for path in files_to_unpickle(checkpoint.path, checkpoint.files.names, engine)}
        read: set[str] = set()
        load = engine.checkpoint_engine.load

        def noting(path: Any, *args: Any, **kwargs: Any) -> Any:
            read.add(Path(path).name)
            return load(path, *args, **kwargs)

        engine.checkpoint_engine.load = noting
        engine.universal_checkpoint_config = engine.universal_checkpoint_config.model_copy(update={"load": "never"})
        assert engine.load_checkpoint(folder)[0] is not None
        engine.destroy()
    return read, listed


@pytest.mark.parametrize(
    "run",
    [
        Run("mlp", zero={"stage": 0}, precision="bf16"),
        Run("mlp", zero={"stage": 2, "elastic_checkpoint": True}, precision="fp16", fused=True),
        Run("mlp", zero={"stage": 3}, precision="bf16"),
        Run("gpt", pp=2, zero={"stage": 1}),
        Run("llama", tp=2, zero={"stage": 1}),
        MOE,
        Run("moe", groups="decay", zero={"stage": 0}),
    ],
    ids=lambda run: f"{run.model} {run.zero['stage']}",
)
def test_each_file_is_looked_at_before_deepspeed_reads_it(run: Run, ranks: Ranks, tmp_path: Path) -> None:
    ranks(2).run(train, run, 1, save=str(tmp_path))
    for read, listed in ranks(2).run(compare_reads, run, str(tmp_path)):
        assert read == listed
