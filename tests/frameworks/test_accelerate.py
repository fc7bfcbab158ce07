"""Accelerate on CPU ranks: runs that stop on two processes and go on on four and then on one are the uninterrupted run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp_deepspeed import last_checkpoint
from ucp_deepspeed.checkpoint.whole import problem_of
from ucp_deepspeed.integrations import accelerate_data

pytest.importorskip("accelerate")

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = Path(__file__).with_name("accelerate_jobs.py")
KINDS: dict[str, tuple[str, ...]] = {"cosine": ("lambda", "scaled", "onecycle"), "config": ()}
"""The optimizer's schedule, and others beside it."""

Seen = dict[str, Any]

UNSET: Seen = {"sets": False, "batch": 2, "epoch": 1, "epochs": 3}

DRAWN: Seen = {"seedable": False, "gas": 2, "batch": 2, "epochs": 3}
"""Accelerate's default: a generator, from which each epoch's order is drawn."""

LOADERS: dict[str, Seen] = {
    "stream": {"stream": True},
    "stream-split": {"stream": True, "split": True, "batch": 8},
    "stream-of-each": {"stream": True, "dispatch": False},
    "dispatched": {"dispatch": True},
    "dispatched-split": {"dispatch": True, "split": True, "batch": 8},
    "split": {"split": True, "batch": 8},
}
"""Ways in which Accelerate deals batches to processes. With ``split`` a batch is one of all processes."""


def launched(ranks: int, folder: Path, jobs: list[Seen]) -> dict[str, Seen]:
    """Run jobs in one launch. Return what each has seen."""
    path = folder / f"jobs{ranks}.json"
    path.write_text(json.dumps(jobs))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    finished([*command, str(SCRIPT), str(path)], {"ACCELERATE_USE_DEEPSPEED": "true"})
    return dict(json.loads(path.with_suffix(".out.json").read_text()))


def finished(command: list[str], more: dict[str, str]) -> str:
    """Run a command to its end. Return what it wrote."""
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | more,
        cwd=ROOT,
        start_new_session=True,
    )
    try:
        out, _ = process.communicate(timeout=280)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, out[-6000:]
    return out


SIDED: Seen = {"schedule": "cosine", "sides": KINDS["cosine"]}

Place = Callable[[str], str]
"""Gives the path of a checkpoint or project by its name."""


def jobs_of_two(place: Place) -> list[Seen]:
    """Jobs on two ranks. An epoch has 64 samples; 16 make a step, unless a job says otherwise."""
    whole = [
        {
            "name": kind,
            "schedule": kind,
            "sides": sides,
            "gas": 2,
            "epochs": 3,
            "draws": True,
            "saves": {"12": place(f"{kind}-2")},
        }
        for kind, sides in KINDS.items()
    ]
    whole[0]["saves"] |= {"13": place("half")}
    return [
        *whole,
        {"name": "one-batch", "epochs": 1, "saves": {"3": place("three")}},
        {"name": "two-models", "models": 2, "stage": 3, "micro": 4, "keep": {"last": 1}, "saves": {"2": place("both")}},
        {"name": "odd", "schedule": "odd", "micro": 4, "saves": {"2": place("odd-2")}},
        {"name": "without", "block": False, "gas": 2, "micro": 6, "saves": {"4": place("stock")}},
        SIDED | {"name": "same-half", "gas": 2, "epochs": 3, "load": place("half"), "epoch": 1, "skip": 5},
        SIDED
        | {"name": "same", "gas": 2, "epochs": 3, "load": place("cosine-2"), "epoch": 1, "skip": 4, "draws": True},
        *(
            [
                {
                    "name": "stateful",
                    "gas": 2,
                    "stateful": True,
                    "saves": {"3": place("stateful-half"), "4": place("stateful")},
                },
                {"name": "stateful-on", "gas": 2, "stateful": True, "load": place("stateful"), "skip": 4},
                {"name": "stateful-half", "gas": 2, "stateful": True, "load": place("stateful-half"), "skip": 3},
            ]
        ),
        *({"name": name, "saves": {"3": place(name)}} | how for name, how in LOADERS.items()),
        {
            "name": "drawn",
            "seedable": False,
            "gas": 2,
            "epochs": 3,
            "saves": {"8": place("drawn-end"), "12": place("drawn-2"), "13": place("drawn-half")},
        },
        {"name": "unset", "sets": False, "epochs": 3, "saves": {"8": place("unset-end"), "10": place("unset")}},
        LOADERS["dispatched"] | {"name": "dispatched-on", "load": place("dispatched"), "skip": 3, "dispatch": True},
        {"name": "stock-rotation", "block": False, "project": place("stocks"), "limit": 1, "saves": {"1": "", "2": ""}},
        {"name": "rotation", "project": place("runs"), "limit": 2, "async": True, "saves": dict.fromkeys("2468", "")},
        {"name": "dies", "project": place("dead"), "limit": 1, "async": True, "saves": {"2": "", "4": ""}, "dies": 4},
    ]


def jobs_of_four(place: Place) -> list[Seen]:
    """Jobs on four ranks, that resume what two have saved."""
    return [
        *(
            {
                "name": kind,
                "schedule": kind,
                "sides": sides,
                "gas": 2,
                "batch": 2,
                "epochs": 3,
                "load": place(f"{kind}-2"),
                "epoch": 1,
                "skip": 4,
                "saves": {"12": place(f"{kind}-4")},
            }
            for kind, sides in KINDS.items()
        ),
        SIDED
        | {"name": "other-batch", "gas": 1, "batch": 4, "epochs": 3, "load": place("half"), "epoch": 1, "skip": 5},
        *([{"name": "stateful", "gas": 2, "batch": 2, "stateful": True, "load": place("stateful"), "skip": 4}]),
        *({"name": name, "load": place(name), "skip": 3} | how for name, how in LOADERS.items()),
        UNSET | {"name": "unset", "load": place("unset"), "skip": 2},
        UNSET | {"name": "unset-end", "load": place("unset-end")},
        {"name": "within", "batch": 4, "load": place("three"), "skip": 3, "function": True},
        {"name": "wrong-skip", "batch": 4, "load": place("three"), "skip": 2, "micro": 1},
        {"name": "seedable-before", "seedable": False, "batch": 4, "load": place("three"), "skip": 3, "micro": 1},
        {
            "name": "seedable-since",
            "batch": 4,
            "load": place("drawn-2"),
            "epoch": 1,
            "epochs": 2,
            "skip": 4,
            "micro": 1,
        },
        DRAWN | {"name": "drawn", "load": place("drawn-2"), "epoch": 1, "skip": 4, "saves": {"12": place("drawn-4")}},
        DRAWN | {"name": "drawn-half", "load": place("drawn-half"), "epoch": 1, "skip": 5},
        DRAWN | {"name": "drawn-end", "load": place("drawn-end"), "epoch": 1},
        SIDED
        | {"name": "right-skip", "batch": 4, "load": place("half"), "epoch": 1, "epochs": 2, "skip": 2, "micro": 1},
        {"name": "two-models", "models": 2, "stage": 3, "batch": 2, "micro": 0, "load": place("both")},
        {"name": "odd", "schedule": "odd", "batch": 2, "micro": 0, "load": place("odd-2")},
        {"name": "stock", "gas": 2, "batch": 2, "load": place("stock"), "skip": 4},
        *jobs_in_projects(place),
    ]


def jobs_in_projects(place: Place) -> list[Seen]:
    """Jobs on four ranks in folders whose checkpoints Accelerate names."""
    return [
        {"name": "dead", "batch": 2, "project": place("dead"), "load": "", "micro": 0},
        {"name": "newest", "batch": 2, "project": place("runs"), "load": "", "saves": {"1": ""}, "micro": 1},
        {
            "name": "spoiled",
            "batch": 2,
            "project": place("runs"),
            "load": "",
            "micro": 0,
            "spoil": [place("runs/checkpoints/checkpoint_4/random_states_0.pkl")],
        },
        {
            "name": "named",
            "batch": 2,
            "load": place("runs/checkpoints/checkpoint_3"),
            "spoil": [place("runs/checkpoints/checkpoint_3/pytorch_model/zero_pp_rank_1_mp_rank_00_optim_states.pt")],
            "fails": True,
        },
        {"name": "older", "batch": 2, "project": place("runs"), "load": "", "micro": 0},
        {
            "name": "none",
            "batch": 2,
            "project": place("runs"),
            "load": "",
            "spoil": [place("runs/checkpoints/checkpoint_2/latest")],
            "fails": True,
        },
    ]


def jobs_of_one(place: Place) -> list[Seen]:
    """Jobs on one rank, that resume what four have saved."""
    return [
        {
            "name": kind,
            "schedule": kind,
            "sides": sides,
            "gas": 2,
            "batch": 8,
            "epochs": 3,
            "load": place(f"{kind}-4"),
            "epoch": 2,
            "skip": 4,
        }
        for kind, sides in KINDS.items()
    ] + [
        DRAWN | {"name": "drawn", "batch": 8, "load": place("drawn-4"), "epoch": 2, "skip": 4},
        DRAWN | {"name": "alone", "saves": {"2": place("alone")}, "micro": 2, "epochs": 1},
        DRAWN | {"name": "alone-on", "load": place("alone"), "skip": 2, "micro": 1, "epochs": 1},
    ]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All jobs of three launches, each under the number of its ranks and its name."""
    folder = tmp_path_factory.mktemp("accelerate")
    jobs = {2: jobs_of_two, 4: jobs_of_four, 1: jobs_of_one}
    found: dict[str, Any] = {"folder": folder}
    for ranks, of_ranks in jobs.items():
        done = launched(ranks, folder, of_ranks(lambda name: str(folder / name)))
        found |= {f"{ranks} {name}": each for name, each in done.items()}
    return found


def steps(seen: Seen, last: int = 4) -> list[list[Any]]:
    """Epoch, samples, rate and weights of each step."""
    return [step[:last] for step in seen["steps"]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_the_uninterrupted_one_on_other_numbers_of_processes(seen: dict[str, Seen], kind: str) -> None:
    whole = steps(seen[f"2 {kind}"])
    rates = list(zip(*(rates for _, _, rates, _ in whole), strict=True))
    assert len(whole) == 12 and all(len(set(each)) > 3 for each in rates)
    assert steps(seen[f"4 {kind}"]) == whole[6:]
    assert steps(seen[f"1 {kind}"]) == whole[10:]


def test_registered_objects_are_restored(seen: dict[str, Seen]) -> None:
    assert seen["4 cosine"]["noted"] == seen["1 cosine"]["noted"] == 12


def test_the_same_processes_go_on_to_the_last_random_number(seen: dict[str, Seen]) -> None:
    assert steps(seen["2 same"], 5) == steps(seen["2 cosine"], 5)[6:]


def test_an_unfinished_accumulation_begins_anew(seen: dict[str, Seen]) -> None:
    whole = steps(seen["2 cosine"])
    assert steps(seen["2 same-half"]) == whole[6:]
    assert seen["2 same-half"]["step"] == [4, 4]
    assert any("middle of an accumulation" in line for line in seen["2 same-half"]["said"])
    # Four processes, another accumulation, and a batch of twice the size.
    assert steps(seen["4 other-batch"]) == whole[6:]
    assert len(set(seen["4 other-batch"]["step"])) == 1


def test_a_position_within_a_batch_is_kept(seen: dict[str, Seen]) -> None:
    before = [samples for _, samples, _, _ in steps(seen["2 one-batch"])]
    after = [samples for _, samples, _, _ in steps(seen["4 within"])]
    assert after[:2] == [sorted(before[3] + before[4]), sorted(before[5] + before[6])]
    assert set(before[7]) <= set(after[2]) and len(after) == 3
    assert seen["4 within"]["gathered"] == [16, 16, 8]
    assert seen["2 one-batch"]["gathered"] == [8] * 8


def test_an_order_drawn_from_a_generator_is_drawn_again(seen: dict[str, Seen]) -> None:
    """Accelerate alone draws the rest of an epoch anew, and every later epoch."""
    whole = steps(seen["2 drawn"])
    assert len(whole) == 12 and len({str(samples) for _, samples, _, _ in whole}) == 12
    assert steps(seen["4 drawn"]) == steps(seen["4 drawn-half"]) == whole[6:]
    assert steps(seen["4 drawn-end"]) == whole[4:]
    assert steps(seen["1 drawn"]) == whole[10:]


def test_a_sampler_whose_generator_is_its_own() -> None:
    """It isn't torch's, and has no state to keep."""

    class Drawn(torch.utils.data.Sampler[int]):
        generator = random.Random(1)

        def __iter__(self) -> Iterator[int]:
            return iter(self.generator.sample(range(4), 4))

    loader = torch.utils.data.DataLoader(list(range(4)), sampler=Drawn())
    assert accelerate_data._drawing(loader) is None and accelerate_data._order(loader) is None
    drawn = torch.utils.data.DataLoader(list(range(4)), shuffle=True)
    assert accelerate_data._drawing(drawn) is drawn.sampler


@pytest.mark.parametrize("name", ["4 seedable-before", "4 seedable-since", "1 alone-on"])
def test_an_order_that_cannot_be_drawn_again_is_told(seen: dict[str, Seen], name: str) -> None:
    assert len([line for line in seen[name]["said"] if "can't be drawn again" in line]) == 1
    others = {
        other: found["said"]
        for other, found in seen.items()
        if other.startswith(("4 drawn", "1 drawn", "4 within", "4 stream"))
    }
    assert len(others) == 8 and not any("can't be drawn again" in str(said) for said in others.values())


def test_a_skip_that_is_at_another_sample_is_told(seen: dict[str, Seen]) -> None:
    said = "\n".join(seen["4 wrong-skip"]["said"])
    assert "skips 32 samples" in said and "at sample 24 of epoch 0: 8 samples are skipped" in said
    assert "skip_first_batches(loader, 3)" in said
    assert not any("samples are" in line for line in seen["4 right-skip"]["said"])


def test_a_stateful_loader_goes_on_by_itself(seen: dict[str, Seen]) -> None:
    whole = steps(seen["2 stateful"])
    assert steps(seen["2 stateful-on"]) == whole[2:]
    assert steps(seen["2 stateful-half"]) == whole[1:]
    assert steps(seen["4 stateful"]) == whole[2:]


@pytest.mark.parametrize("kind", LOADERS)
def test_every_way_to_deal_batches(seen: dict[str, Seen], kind: str) -> None:
    """Three batches of eight samples were handed out. Four processes take sixteen at once, unless the batch is one of all."""
    before = [samples for _, samples, _, _ in steps(seen[f"2 {kind}"])]
    after = [samples for _, samples, _, _ in steps(seen[f"4 {kind}"])]
    told = [line for line in seen[f"4 {kind}"]["said"] if "samples are repeated" in line]
    if "split" in kind:
        assert len(before) == 8 and after == before[3:] and told == []
    elif "stream" in kind:
        assert after == [sorted(before[place] + before[place + 1]) for place in (2, 4, 6)]
        assert len(told) == 1 and "8 samples are repeated" in told[0]
    else:
        assert after[:2] == [sorted(before[3] + before[4]), sorted(before[5] + before[6])] and told == []
        assert set(before[7]) <= set(after[2]) and len(after) == 3


def test_a_script_that_never_sets_the_epoch(seen: dict[str, Seen]) -> None:
    """Accelerate alone begins again with the order of the first epoch."""
    whole = steps(seen["2 unset"])
    assert len({str(samples) for _, samples, _, _ in whole}) == 24
    assert steps(seen["4 unset"]) == whole[10:] and steps(seen["4 unset-end"]) == whole[8:]


def test_dispatched_batches_on_the_same_processes(seen: dict[str, Seen]) -> None:
    """Accelerate alone skips batches of one process."""
    assert steps(seen["2 dispatched-on"]) == steps(seen["2 dispatched"])[3:]


def test_two_models_of_one_script(seen: dict[str, Seen]) -> None:
    """A checkpoint without one of the models isn't whole."""
    assert seen["4 two-models"]["second"] == seen["2 two-models"]["second"]
    runs, both = seen["folder"] / "killed", seen["folder"] / "both"
    assert problem_of(both) is None
    for name, model in {"checkpoint_0": "", "checkpoint_1": "pytorch_model_1", "checkpoint_2": "pytorch_model"}.items():
        shutil.copytree(both, runs / name)
        if model:
            shutil.rmtree(runs / name / model)
    assert last_checkpoint(runs) == str(runs / "checkpoint_0")
    assert "lacks pytorch_model:" in str(problem_of(runs / "checkpoint_2"))


def test_a_schedule_of_neither_habit_is_told(seen: dict[str, Seen]) -> None:
    assert any("step_scheduler_with_optimizer=False" in line for line in seen["4 odd"]["said"])


def test_a_checkpoint_without_a_record_resumes_too(seen: dict[str, Seen]) -> None:
    """It was saved without the block; its ranks agree, and its streams aren't mixed."""
    assert steps(seen["4 stock"])[0] == steps(seen["2 without"])[2]
    assert len(set(seen["4 stock"]["step"])) == 1
    assert len({str(drawn) for drawn in seen["4 stock"]["drawn"]}) == 1


def test_the_streams_of_more_processes_are_derived(seen: dict[str, Seen]) -> None:
    assert sum("random states of 2 processes" in line for line in seen["4 cosine"]["said"]) == 1
    assert len({str(drawn) for drawn in seen["4 cosine"]["drawn"]}) == 1  # the script seeds all alike


def test_rotation_counts_whole_checkpoints(seen: dict[str, Seen]) -> None:
    assert seen["2 rotation"]["left"] == ["checkpoint_2", "checkpoint_3"]
    assert all(len(found) >= 2 for found in seen["2 rotation"]["saved"][1:])
    assert seen["2 stock-rotation"]["saved"] == [["checkpoint_0"], ["checkpoint_1"]]  # Accelerate's own


def test_a_process_that_dies_after_a_save_leaves_one_to_resume_from(seen: dict[str, Seen]) -> None:
    assert seen["4 dead"]["noted"] in (2, 4)


def test_the_newest_whole_one_is_taken(seen: dict[str, Seen]) -> None:
    assert seen["4 newest"]["noted"] == 8 and seen["4 newest"]["left"][-1] == "checkpoint_4"
    assert seen["4 spoiled"]["noted"] == 8
    assert any("checkpoint_3; newer" in line and "checkpoint_4" in line for line in seen["4 spoiled"]["said"])
    assert "zero_pp_rank_1" in seen["4 named"]["error"]
    assert seen["4 older"]["noted"] == 6
    assert "is whole: " in seen["4 none"]["error"] and "checkpoint_2" in seen["4 none"]["error"]


def example(processes: int, *arguments: str, module: tuple[str, ...] = ()) -> list[tuple[str, str]]:
    """Run the example with the real launcher. Return the steps and rates that it prints."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "examples/accelerate.yaml"]
    command += ["--num_processes", str(processes), "--main_process_port", "0", *module, "examples/accelerate_train.py"]
    done = finished([*command, *arguments], {})
    return re.findall(r"^step (\d+): loss [\d.]+, rate ([\d.]+)$", done, re.MULTILINE)


def test_the_example_goes_on_with_one_process(tmp_path: Path) -> None:
    whole = example(2, "--out", str(tmp_path))
    folder = tmp_path / "checkpoints"
    assert [int(step) for step, _ in whole] == list(range(1, 13))
    assert sorted(entry.name for entry in folder.iterdir()) == ["checkpoint_2", "checkpoint_3"]
    shutil.rmtree(folder / "checkpoint_3")  # of step 12
    assert example(1, "--out", str(tmp_path), "--resume", module=("-m", "ucp_deepspeed.run")) == whole[9:]
