"""Topologies that are chosen for a checkpoint, against a search over all of them that counts elements by itself."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native
from torch.distributed import HashStore

from ucp_deepspeed.elastic import topologies
from ucp_deepspeed.elastic.job import Job, Place
from ucp_deepspeed.elastic.launch import run
from ucp_deepspeed.elastic.rounds import MOST_FRUITLESS, Round
from ucp_deepspeed.elastic.sizes import Auto, Sizes
from ucp_deepspeed.elastic.topologies import NothingFitsError, choose
from ucp_deepspeed.errors import ConfigError, DamagedCheckpointError
from ucp_deepspeed.layout import Topology

LAYERS, ROWS, SAME = 2, (8, 10), (5,)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[[int], str]:
    """Writes a run's folder, with one checkpoint of two tensor-parallel ranks in bf16, at a ZeRO stage."""

    def save(stage: int) -> str:
        shapes = {
            f"layers.{layer}.{kind}": shape
            for layer in range(LAYERS)
            for kind, shape in zip("ab", (ROWS, SAME), strict=True)
        }
        model = NativeModel(
            tuple(
                NativeParameter(
                    name,
                    torch.ones(shape),
                    {"exp_avg": torch.ones(shape), "exp_avg_sq": torch.ones(shape)},
                    cut="rows" if shape == ROWS else "replicated",
                )
                for name, shape in shapes.items()
            )
        )
        native = NativeRun(tp=2, dp=2, stage=stage, precision="bf16")
        tag = write_native(tmp_path / f"run-{stage}", model, native)
        add_manifest(tag, model, native, layouts=True)
        return str(tag.parent)

    return save


def held(stage: int, tensor: int, pipeline: int, data: int) -> int:
    """Bytes on the fullest rank: bf16 weights, and masters and two states in fp32."""
    rows = ROWS[0] // tensor * ROWS[1]
    numels = [numel for _ in range(LAYERS // pipeline) for numel in (rows, SAME[0])]
    if stage == 3:
        partition = sum(-(-numel // data) for numel in numels)
        return (2 + 12) * partition
    if stage == 0 and pipeline == 1:
        return (2 + 12) * sum(numels)
    return 2 * sum(numels) + 12 * (-(-sum(numels) // (2 * data)) * 2)  # also a bf16 pipeline without ZeRO


def expected(stage: int, sizes: Sizes, memory: int, ranks: int) -> Topology | None:
    for number in range(ranks, 0, -1):
        for tensor, pipeline in [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (4, 2)]:
            data, rest = divmod(number, tensor * pipeline)
            fits = not rest and data >= sizes.least and (sizes.batch or data) % max(data, 1) == 0
            if fits and not (pipeline > 1 and stage > 1) and held(stage, tensor, pipeline, data) <= memory:
                return Topology(tensor, pipeline, data, stage)
    return None


@pytest.mark.parametrize("stage", [0, 1, 3])
@pytest.mark.parametrize("sizes", [Sizes(None, 4, 2), Sizes(8, 4, 2, 2)], ids=str)
def test_the_choice_is_that_of_a_search(stage: int, sizes: Sizes, saved: Callable[[int], str]) -> None:
    folder, chosen = saved(stage), set()
    for memory in (10**9, 2400, 1300, 900, 400):
        for ranks in (1, 2, 3, 5, 8, 9):
            auto = Auto(folder, memory, (1, 2, 4), (1, 2), ranks)
            wanted = expected(stage, sizes, memory, ranks)
            if wanted is None:
                with pytest.raises(NothingFitsError, match=f"on up to {ranks} ranks:\n(  .*\n)+What would do: "):
                    choose(sizes, auto, ranks)
            else:
                choice = choose(sizes, auto, ranks)
                assert choice.topology == wanted, choice.reason
                assert f"TP{wanted.tp}·PP{wanted.pp}·DP{wanted.dp}" in choice.reason
                chosen.add((wanted.tp, wanted.pp))
    assert len(chosen) > 1 or stage == 3  # ZeRO-3 cuts the weights itself


def test_what_is_told(saved: Callable[[int], str]) -> None:
    folder, kib = saved(1), 1024
    choice = choose(Sizes(8, 2, 1), Auto(folder, kib + 300, (1, 2), (1,), 4), 3)
    assert choice.reason == (
        f"TP2·PP1·DP1 on 2 of them, from {folder}/global_step5: TP2·PP1·DP1 holds 1.2 KiB of 1.3 KiB per rank; TP1·PP1·DP2 holds "
        "1,372 B, more than 1,324 B per rank"
    )
    assert choose(Sizes(8, 2), Auto(folder, None, (1, 2), (1,), 4), 4).reason.startswith("TP1·PP1·DP4, from ")
    waits = choose(Sizes(8, 2, 1), Auto(folder, 800, (1, 2), (1,), 4), 2)
    assert waits.topology is None
    assert waits.reason.startswith(
        f"too few for {folder}/global_step5, wait for 4: TP2·PP1·DP2 holds 732 B of 800 B per rank; "
    )
    with pytest.raises(NothingFitsError) as refused:
        choose(Sizes(8, 2, 1), Auto(folder, 90, (1, 2), (1, 2), 2), 2)
    assert "What would do: --memory-per-rank 1MiB for TP1·PP2·DP1, more --nodes, or other --tp and --pp" in str(
        refused.value
    )


def test_an_impossible_size_is_passed_over(saved: Callable[[int], str]) -> None:
    """DeepSpeed has no pipelines at ZeRO-3, and two layers make no four stages."""
    for stage, pipeline, reason in ((3, 2, "DeepSpeed refuses ZeRO-3"), (1, 4, "4 pipeline stages are too many")):
        with pytest.raises(NothingFitsError, match=reason):
            choose(Sizes(None, 1, pipeline), Auto(saved(stage), None, (1,), (pipeline,), 4), 4)


def test_without_a_checkpoint_the_given_sizes_are_taken(tmp_path: Path) -> None:
    auto = Auto(str(tmp_path / "run"), 1, (1, 2), (1,), 4)
    choice = choose(Sizes(8, 2), auto, 3)
    assert choice.topology == Topology(2, 1, 1)
    assert choice.reason == f"TP2·PP1·DP1 on 2 of them: there is no whole checkpoint in {tmp_path / 'run'} yet"
    assert choose(Sizes(8, 2), auto, 1).topology is None


def test_few_plans_are_made(saved: Callable[[int], str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each takes time, in which no rank trains."""
    made: list[Topology] = []
    plan = topologies.plan_target

    def counted(checkpoint: Any, topology: Topology, only: Any) -> Any:
        made.append(topology)
        assert len(only) == topology.model_parallel
        return plan(checkpoint, topology, only=only)

    monkeypatch.setattr(topologies, "plan_target", counted)
    folder = saved(1)
    for memory, most in ((10**9, 1), (1, 2 * 3 * 2)):
        made.clear()
        try:
            choose(Sizes(None, 4, 2), Auto(folder, memory, (1, 2, 4), (1, 2), 1000), 999)
        except NothingFitsError:
            assert memory == 1
        assert 1 <= len(made) <= most


def test_all_ranks_of_a_round_take_what_the_first_has_chosen(
    saved: Callable[[int], str], capsys: pytest.CaptureFixture[str]
) -> None:
    auto = Auto(saved(1), None, (1, 2), (1,), 4)
    job, store = Job("mine.0", "host0:29400", "a", Sizes(8, 2), auto), HashStore()
    rounds = [Round(job, Place("host1:1", rank, 3, 0, 1, rank), store) for rank in range(3)]
    first = rounds[0].choose()
    assert first == Topology(1, 1, 2, 1)
    (Path(auto.checkpoint) / "latest").unlink()  # nobody else looks
    assert [each.choose() for each in rounds[1:]] == [first, first]
    assert capsys.readouterr().err.startswith("ucp run: 3 ranks are there; TP1·PP1·DP2 on 2 of them, from ")
    keys = store.num_keys()
    Round(job, Place("host1:2", 0, 1, 0, 1, 0), store).choose()
    assert store.num_keys() == keys  # what is left of a round would be taken by one with its port
    assert capsys.readouterr().err.startswith("ucp run: 1 rank is there; TP1·PP1·DP1, from ")


def test_a_run_for_which_nothing_fits_ends(saved: Callable[[int], str], capsys: pytest.CaptureFixture[str]) -> None:
    job, store = Job("mine.0", "host0:29400", "a", Sizes(8, 2), Auto(saved(1), 1, (1, 2), (1,), 4)), HashStore()
    with pytest.raises(SystemExit):
        Round(job, Place("host1:1", 0, 4, 0, 1, 0), store).choose()
    assert store.check([job.given_up]) and "finds no topology" in capsys.readouterr().err


def test_a_checkpoint_that_cannot_be_read_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It may have been removed meanwhile; and it isn't tried for ever."""

    def fail(*_: object) -> None:
        raise DamagedCheckpointError("gone")

    monkeypatch.setattr(topologies, "choose", fail)
    job, store = Job("mine.0", "host0:29400", "a", Sizes(8, 2), Auto("run", 1, (1, 2), (1,), 4)), HashStore()
    for _ in range(MOST_FRUITLESS + 1):
        assert not store.check([job.given_up])
        with pytest.raises(SystemExit):
            Round(job, Place("host1:1", 0, 4, 0, 1, 0), store).choose()
    assert store.check([job.given_up]) and "--topology auto: gone" in capsys.readouterr().err


def test_workers_know_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    for auto in (None, Auto("run", 10**12, (1, 2), (1,), 4), Auto("run", None, (1,), (1, 3), 4)):
        job = Job("mine.0", "host0:29400", "ä", Sizes(8, 2, 1, 3), auto)
        (text,) = job.to_environment().values()
        json.loads(text)
        monkeypatch.setenv("UCP_RUN", text)
        assert Job.from_environment() == job


@pytest.mark.parametrize(
    ("tensor", "settings", "reason"),
    [
        ("1:2", ("fixed", None, None), "--tp 1:2 is a range, which needs --topology auto"),
        ("2", ("fixed", "run", None), "--checkpoint and --memory-per-rank need --topology auto"),
        ("2", ("fixed", None, "8GB"), "--checkpoint and --memory-per-rank need --topology auto"),
        ("2", ("auto", None, None), "--topology auto needs --checkpoint, the folder in which the script saves"),
        (
            "4",
            ("auto", "run", None),
            "may choose --tp 1, 2, 4, and the script isn't told which: give it {tp} as an argument, or",
        ),
        ("2:4", ("auto", "run", None), "may choose --tp 2, 4, and the script isn't told which"),
        ("4:4", ("auto", "run", "much"), "--memory-per-rank takes a size such as 80GB or 74.5GiB, not 'much'"),
        ("0", ("auto", "run", None), "--tp takes a number or a range"),
        ("8", ("auto", "run", None), "TP8·PP1 fits no number of ranks up to 4"),
    ],
)
def test_settings_that_contradict_one_another(
    tensor: str, settings: tuple[str, str | None, str | None], reason: str
) -> None:
    topology, checkpoint, memory = settings
    folder = None if checkpoint is None else Path(checkpoint)
    with pytest.raises(ConfigError) as refused:
        run("1:4", 1, None, None, None, None, 0, None, tensor, "1", 1, topology, folder, memory, ("train.py",))
    assert reason in str(refused.value)
