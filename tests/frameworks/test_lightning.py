"""Lightning's ``Trainer`` on CPU ranks: a run that resumes on other ranks against one that was never interrupted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lightning")

SCRIPT = Path(__file__).with_name("lightning_run.py")

NETWORK = {"layers": True, "interval": "epoch"}

CHECKED = {"interval": 0.5, "validates": True, "epochs": 2}

TWO = [
    {
        "name": "whole",
        "block": {},
        "saving": [
            {"dirpath": "steps", "save_top_k": -1, "every_n_train_steps": 4},
            {"dirpath": "epochs", "save_top_k": -1, "every_n_epochs": 1},
        ],
    },
    {"name": "own", "block": {}, "own": "sampler", "epochs": 1, "save_at": 4},
    {"name": "accumulated", "block": {}, "batch": 2, "accumulate": 2, "epochs": 2, "save_at": 7},
    {
        "name": "network",
        "block": {},
        "stage": 3,
        "validates": True,
        "model": NETWORK,
        "epochs": 2,
        "saving": [
            {"dirpath": "network", "save_top_k": -1, "every_n_train_steps": 4},
            {"dirpath": "network_epochs", "save_top_k": -1, "every_n_epochs": 1},
        ],
    },
    {"name": "network_within", "ckpt": "network/epoch=0-step=4.ckpt"},
    {"name": "network_ended", "ckpt": "network_epochs/epoch=0-step=6.ckpt"},
    {"name": "tested", "do": ["test"], "ckpt": "steps/epoch=1-step=12.ckpt"},
    {
        "name": "best",
        "block": {"save": {"async": True}},
        "validates": True,
        "saving": [{"dirpath": "best", "save_top_k": 2, "monitor": "score", "save_last": True}],
        "do": ["fit", "spoil", "best"],
    },
    {
        "name": "uploads",
        "block": {"save": {"async": True}},
        "epochs": 2,
        "uploads": True,
        "saving": [{"dirpath": "uploads"}],
    },
    {
        "name": "killed",
        "block": {"save": {"async": True}},
        "saving": [{"dirpath": "killed", "save_last": "link", "every_n_train_steps": 4, "die_at": 12}],
    },
]
"""Jobs on two ranks. The last one ends by SIGKILL, while its third checkpoint is being written."""

for job in TWO[4:6]:
    job |= {key: TWO[3][key] for key in ("block", "stage", "validates", "model", "epochs")}

SCORED = {"dirpath": "checked", "monitor": "score", "save_top_k": -1}
TWO.insert(0, {"name": "checked", "block": {}, **CHECKED, "saving": [SCORED]})

ONE = [
    {"name": "one_checked", "block": {}, **CHECKED, "ckpt": "checked/epoch=0-step=3.ckpt"},
    {"name": "one_within", "block": {}, "ckpt": "steps/epoch=0-step=4.ckpt", "save_at": 5},
    {"name": "one_ended", "block": {}, "ckpt": "epochs/epoch=0-step=6.ckpt"},
    {"name": "one_last_batch", "block": {}, "ckpt": "steps/epoch=1-step=12.ckpt", "workers": 1},
    {"name": "one_steps", "block": {}, "epochs": -1, "steps": 18, "ckpt": "steps/epoch=1-step=8.ckpt"},
    {"name": "one_steps_ended", "block": {}, "epochs": -1, "steps": 18, "ckpt": "epochs/epoch=0-step=6.ckpt"},
    {"name": "one_killed", "block": {}, "ckpt": "last", "saving": [{"dirpath": "killed", "save_last": "link"}]},
    {"name": "one_passed", "block": {}, "ckpt": "last", "saving": [{"dirpath": "passed", "save_last": True}]},
    {"name": "one_batch", "block": {}, "epochs": 1, "batch": 12, "workers": 1, "ckpt": "steps/epoch=0-step=4.ckpt"},
    {"name": "one_seed", "block": {}, "epochs": 1, "seed": 9, "ckpt": "steps/epoch=0-step=4.ckpt"},
    {"name": "one_own", "block": {}, "epochs": 1, "own": "sampler", "ckpt": "own.ckpt"},
    {"name": "one_longer", "block": {}, "epochs": 1, "samples": 56, "ckpt": "steps/epoch=0-step=4.ckpt"},
    {"name": "one_batches", "block": {}, "epochs": 1, "own": "batches", "ckpt": "steps/epoch=0-step=4.ckpt"},
    {
        "name": "one_twice",
        "strategy": "deepspeed_stage_2",
        "block": {},
        "epochs": 1,
        "save_at": 5,
        "do": ["fit", "again"],
    },
    {"name": "one_bare", "ckpt": "one_within.ckpt"},
    {"name": "one_plain", "epochs": 1, "saving": [{"dirpath": "plain"}]},
    {"name": "one_since", "block": {}, "ckpt": "plain/epoch=0-step=6.ckpt"},
    {"name": "one_tested", "block": {}, "do": ["validate", "test"], "ckpt": "steps/epoch=1-step=12.ckpt"},
    *(
        {
            "name": f"one_network_{seed}",
            "block": {},
            "stage": 2,
            "model": NETWORK,
            "seed": seed,
            "epochs": 1,
            "ckpt": "network/epoch=0-step=4.ckpt",
        }
        for seed in (7, 9)
    ),
]

FOUR = [
    {"name": "four_within", "block": {}, "stage": 3, "ckpt": "one_within.ckpt"},
    {"name": "four_ended", "block": {}, "ckpt": "epochs/epoch=0-step=6.ckpt"},
    {"name": "four_accumulated", "block": {}, "batch": 1, "accumulate": 2, "epochs": 2, "ckpt": "accumulated.ckpt"},
    {
        "name": "four_tested",
        "block": {},
        "bare": True,
        "stage": 3,
        "model": NETWORK,
        "do": ["validate", "test"],
        "ckpt": "network/epoch=1-step=12.ckpt",
    },
]


def launch(folder: Path, ranks: int, jobs: list[dict[str, Any]], package: str = "lightning.pytorch") -> int:
    """Do jobs on so many ranks; the status of the launcher."""
    path = folder / f"jobs_{ranks}.json"
    path.write_text(json.dumps(jobs))
    command = ["torch.distributed.run", "--standalone", "--nproc-per-node", ranks, SCRIPT, folder, path]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"LIGHTNING": package, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    with (folder / f"log_{ranks}.txt").open("w") as log:
        done = subprocess.run(
            [sys.executable, "-m", *map(str, command)],
            env=environment,
            stdout=log,
            stderr=log,
            timeout=240,
            check=False,
        )
    return done.returncode


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder, with what the jobs on two ranks have left."""
    folder = tmp_path_factory.mktemp("lightning")
    assert launch(folder, 2, TWO) != 0  # killed
    assert (folder / "uploads_1.json").is_file(), (folder / "log_2.txt").read_text()[-4000:]
    (folder / "left").mkdir()
    for path in (folder / "killed").iterdir():
        (folder / "left" / path.name).symlink_to(path.readlink() if path.is_symlink() else path)
    return folder


@pytest.fixture(scope="module")
def one(two: Path) -> Path:
    """Folder of `two`, after the jobs on one rank. In ``passed`` the last checkpoint isn't whole."""
    for name in ("last.ckpt", "epoch=0-step=4.ckpt"):
        shutil.copytree(two / "steps/epoch=0-step=4.ckpt", two / "passed" / name)
    (two / "passed/last.ckpt/checkpoint/mp_rank_00_model_states.pt").unlink()
    assert launch(two, 1, ONE) == 0, (two / "log_1.txt").read_text()[-4000:]
    return two


@pytest.fixture(scope="module")
def four(one: Path) -> Path:
    """Folder of `one`, after the jobs on four ranks, by the package's other name."""
    assert launch(one, 4, FOUR, "pytorch_lightning") == 0, (one / "log_4.txt").read_text()[-4000:]
    return one


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def told(folder: Path, name: str, rank: int = 0) -> Any:
    return json.loads((folder / f"{name}_{rank}.json").read_text())


def steps(folder: Path, name: str) -> list[tuple[Any, ...]]:
    """Each step of all ranks: epoch, step, samples, rate and loss."""
    found: dict[tuple[int, int], tuple[list[int], set[float], list[float]]] = {}
    for path in folder.glob(f"{name}_[0-9].json"):
        for epoch, step, samples, rate, loss in json.loads(path.read_text())["seen"]:
            indices, rates, losses = found.setdefault((epoch, step), ([], set(), []))
            indices += samples
            rates.add(rate)
            losses.append(loss)
    return [
        (*key, sorted(indices), *rates, sum(losses) / len(losses)) for key, (indices, rates, losses) in found.items()
    ]


def ends(folder: Path, name: str) -> dict[str, Any]:
    """The end of a run."""
    return {key: told(folder, name)[key] for key in ("weights", "step", "epoch", "scheduler")}


def check_goes_on(folder: Path, name: str, after: int, whole: str = "whole") -> None:
    """The run went on as if it had never been interrupted after so many steps."""
    assert steps(folder, name) == steps(folder, whole)[after:]
    assert ends(folder, name) == ends(folder, whole)


@pytest.mark.parametrize("name", ["one_within", "one_killed"])
def test_within_an_epoch_on_one_rank(one: Path, name: str) -> None:
    after = {"one_within": 4, "one_killed": 8}[name]
    check_goes_on(one, name, after)
    assert any("the epoch goes on after" in line for line in told(one, name)["lines"])


def test_validation_within_an_epoch(one: Path) -> None:
    """The run goes on after a validation in the middle of an epoch, and validates where the uninterrupted one does."""
    check_goes_on(one, "one_checked", 3, "checked")
    whole = told(one, "checked")["validated"]
    assert whole == [[0, 3], [0, 6], [1, 9], [1, 12]] and told(one, "one_checked")["validated"] == whole[1:]


def test_a_callback_has_its_state(one: Path) -> None:
    assert told(one, "one_within")["batches"] == told(one, "whole")["batches"] == 18


def test_at_the_end_of_an_epoch_on_one_rank(one: Path) -> None:
    check_goes_on(one, "one_ended", 6)


def test_after_the_last_batch_of_an_epoch_with_workers(one: Path) -> None:
    check_goes_on(one, "one_last_batch", 12)


@pytest.mark.parametrize(("name", "after"), [("one_steps", 8), ("one_steps_ended", 6)])
def test_with_a_number_of_steps(one: Path, name: str, after: int) -> None:
    """By itself Lightning begins the ended epoch again, and leaves out the next one."""
    check_goes_on(one, name, after)


def test_another_batch_sees_each_sample_of_the_epoch_once(one: Path) -> None:
    rest = [step[2] for step in steps(one, "one_batch")]
    assert [len(samples) for samples in rest] == [12, 4]
    before = [step[2] for step in steps(one, "whole")[:4]]
    assert sorted(sample for samples in before + rest for sample in samples) == list(range(48))


def test_another_seed_keeps_the_order_of_the_epoch(one: Path) -> None:
    assert steps(one, "one_seed") == steps(one, "whole")[4:6]


def test_a_sampler_of_ones_own_goes_on_if_its_order_is_the_same(one: Path) -> None:
    assert steps(one, "one_own") == steps(one, "own")[4:]
    assert any("gives the order of the interrupted run again" in line for line in told(one, "one_own")["lines"])


@pytest.mark.parametrize(
    ("name", "reason", "samples"),
    [
        ("one_longer", "the epoch had 48 samples when it was saved", "its first 24 samples are used again, after 32"),
        ("one_batches", "the loader has a batch sampler of its own", "its first 16 samples are used again, after 32"),
    ],
)
def test_a_place_that_cannot_be_kept(one: Path, name: str, reason: str, samples: str) -> None:
    warned = [line for line in told(one, name)["lines"] if line.startswith("WARNING")]
    assert len(warned) == 1 and reason in warned[0] and samples in warned[0]
    seen = [sample for step in steps(one, name) for sample in step[2]]
    assert len(seen) == int(samples.split()[2])


def test_a_run_that_began_without_the_block(one: Path) -> None:
    check_goes_on(one, "one_since", 6)
    assert [line for line in told(one, "one_since")["lines"] if line.startswith("WARNING")] == []


def test_a_second_fit_and_a_checkpoint_by_hand(one: Path) -> None:
    seen = [
        (epoch, step, sorted(samples), rate, loss)
        for epoch, step, samples, rate, loss in told(one, "one_twice")["seen"]
    ]
    assert seen == steps(one, "whole")[:6] + steps(one, "whole")[5:]


def test_without_the_block_nothing_changes(one: Path) -> None:
    """Lightning takes the rest of an epoch from its beginning."""
    whole, bare = steps(one, "whole"), steps(one, "one_bare")
    assert bare[0][2] == whole[0][2] and len(bare) == 13
    assert told(one, "one_bare")["lines"] == []


@pytest.mark.parametrize(("name", "after"), [("four_within", 5), ("four_ended", 6)])
def test_from_one_rank_to_four_and_another_stage(four: Path, name: str, after: int) -> None:
    check_goes_on(four, name, after)


def test_within_an_accumulation_the_step_begins_anew(four: Path) -> None:
    """The checkpoint is of the seventh micro-batch: the fourth step has it again."""
    check_goes_on(four, "four_accumulated", 3, "accumulated")


@pytest.mark.parametrize(("name", "after"), [("network_within", 4), ("network_ended", 6)])
def test_on_the_same_ranks_dropout_goes_on_under_zero_3(two: Path, name: str, after: int) -> None:
    for rank in (0, 1):
        whole, resumed = told(two, "network", rank), told(two, name, rank)
        assert resumed["seen"] == whole["seen"][after:]
        assert resumed["weights"] == whole["weights"]


def test_on_other_ranks_streams_are_derived_from_the_checkpoint(one: Path) -> None:
    seeds = [told(one, f"one_network_{seed}") for seed in (7, 9)]
    assert seeds[0]["seen"] == seeds[1]["seen"] and seeds[0]["weights"] == seeds[1]["weights"]


def test_validate_and_test_on_one_rank(one: Path) -> None:
    """Lightning and DeepSpeed alone do it on the two ranks that saved. The sums are exact."""
    found, expected = told(one, "one_tested"), told(one, "tested")
    assert found["weights"] == expected["weights"]
    assert found["results"][1] == expected["results"][0]
    assert found["results"][0][0].keys() == {"score"}


def test_validate_and_test_under_zero_3_on_four_ranks(four: Path) -> None:
    """DeepSpeed alone doesn't do it on any number."""
    found = told(four, "four_tested")
    assert found["weights"] == told(four, "network")["weights"]
    assert [result[0].keys() for result in found["results"]] == [{"score"}, {"tested"}]


def test_the_best_are_kept_while_saves_go_on(two: Path) -> None:
    found = told(two, "best")
    noted, (kept,) = found["noted"][0], found["results"][0]
    assert all(whole is not None for *_, whole in noted[1:])
    assert {Path(path).name for path in kept} | {"last.ckpt"} == set(names_in(two / "best"))
    other, spoiled = sorted(kept)  # the score falls
    warned = [line for line in found["lines"] if "takes whole checkpoints only" in line]
    assert len(warned) == 1 and f"taking {other}" in warned[0] and f"passed over: {spoiled}" in warned[0]


def test_an_upload_meets_whole_checkpoints(two: Path) -> None:
    assert told(two, "uploads")["uploads"] == [None, None]
    assert names_in(two / "uploads") == ["epoch=1-step=12.ckpt"]


def test_killed_after_the_save_call_leaves_a_whole_checkpoint(two: Path) -> None:
    assert names_in(two / "left") == ["epoch=1-step=12.ckpt", "epoch=1-step=8.ckpt", "last.ckpt"]
    assert str((two / "left/last.ckpt").readlink()) == "epoch=1-step=8.ckpt"


def test_last_passes_over_what_is_not_whole(one: Path) -> None:
    check_goes_on(one, "one_passed", 4)
    warned = [line for line in told(one, "one_passed")["lines"] if line.startswith("WARNING")]
    assert len(warned) == 1 and "epoch=0-step=4.ckpt; passed over: " in warned[0] and "passed/last.ckpt (" in warned[0]


def test_the_example_goes_on_with_one_rank(tmp_path: Path) -> None:
    """Lightning starts the second rank by itself."""
    script = Path(__file__).parents[2] / "examples/lightning_train.py"
    environment = {
        name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    }
    found = []
    for options in (["--devices", "2", "--epochs", "1"], ["--devices", "1", "--epochs", "2", "--resume"]):
        command = [sys.executable, str(script), "--folder", str(tmp_path / "runs"), *options]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        found += [line for line in done.stdout.splitlines() if "step" in line and not line.startswith("[")]
    assert [line.split(":")[0] for line in found] == ["begins at step 0", "step 16", "begins at step 16", "step 32"]
    assert "rate 0.005000" in found[3]  # half of the cosine
