"""Trainer's checkpoints: which it resumes from, which it removes, and when, while saves go on in the background."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from trainer_runs import ASYNC, Job, Recorded, in_order, train, train_or_error, trainer_of

from ucp_deepspeed.testing.ranks import RankError, RankPool

Ranks = Callable[[int], RankPool]

EVERY_SECOND = {"save_steps": 2, "save_total_limit": 1, "num_train_epochs": 1}


def folders(run: Path) -> list[str]:
    return sorted(entry.name for entry in run.iterdir() if entry.is_dir())


def train_until_killed(job: Job, step: int) -> None:
    """All ranks die when Trainer has called for a save and rotated; nothing of that save is on disk."""
    from ucp_deepspeed.engine.saving.snapshot import FileSnapshot

    write = FileSnapshot.write

    def stuck(self: Any, partial: Path, *rest: Any) -> Any:
        if f"global_step{step}" in partial.name:
            time.sleep(600)
        return write(self, partial, *rest)

    FileSnapshot.write = stuck  # type: ignore[method-assign]
    trainer, watch = trainer_of(job)

    def die(args: Any, state: Any, control: Any, **rest: Any) -> None:
        if state.global_step == step:
            os._exit(9)

    watch.on_save = die  # type: ignore[method-assign]
    trainer.train()


def test_killed_right_after_rotation(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", universal=ASYNC, arguments=EVERY_SECOND)
    pool = RankPool(2)
    with pytest.raises(RankError, match="died"):
        pool.run(train_until_killed, job, 4)
    pool.close()
    assert folders(job.folder) == ["checkpoint-2", "checkpoint-4"]
    resumed = ranks(1).run(
        train, replace(job, resume=True, arguments=EVERY_SECOND | {"per_device_train_batch_size": 4})
    )[0]
    whole = ranks(2).run(train, replace(job, folder=tmp_path / "whole"))[0]
    assert min(resumed.samples) == 3
    assert in_order(resumed, 1, 4) == {step: taken for step, taken in in_order(whole, 2, 2).items() if step > 2}
    [told] = [message for message in resumed.messages if "newer checkpoints aren't whole" in message]
    assert "checkpoint-2;" in told and "checkpoint-4" in told.partition(";")[2]
    assert folders(job.folder) == folders(tmp_path / "whole") == ["checkpoint-10"]


@pytest.mark.parametrize("universal", [ASYNC, {"enabled": True}], ids=["background", "foreground"])
def test_only_the_best_is_left(universal: dict[str, Any], ranks: Ranks, tmp_path: Path) -> None:
    arguments = EVERY_SECOND | {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
    }
    job = Job(tmp_path / "run", universal=universal, arguments=arguments, zero=3)
    found = ranks(2).run(train, job)[0]
    assert folders(job.folder) == ["checkpoint-2"]
    first = ranks(2).run(train, Job(tmp_path / "two", zero=3, arguments={"num_train_epochs": 1}, stop=2))[0]
    assert all(found.weights[name].equal(weight) for name, weight in first.weights.items())


def train_with_failing_save(job: Job, step: int) -> Any:
    """Rank 1 can't write one of the saves."""
    from ucp_deepspeed.engine.saving.snapshot import FileSnapshot

    write = FileSnapshot.write

    def failing(self: Any, partial: Path, *rest: Any) -> Any:
        if f"global_step{step}" in partial.name and os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        return write(self, partial, *rest)

    FileSnapshot.write = failing  # type: ignore[method-assign]
    try:
        return train(job)
    finally:
        FileSnapshot.write = write  # type: ignore[method-assign]


def test_a_failed_save_takes_no_other_checkpoint_with_it(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", universal=ASYNC, arguments=EVERY_SECOND, stop=4)
    with pytest.raises(RankError, match="No space left"):
        ranks(2).run(train_with_failing_save, job, 4)
    assert folders(job.folder) == ["checkpoint-2", "checkpoint-4"]
    assert min(ranks(2).run(train, replace(job, resume=True, stop=6))[0].samples) == 3


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three checkpoints, of steps 2, 4 and 6."""
    from ucp_deepspeed.testing.ranks import get_pool

    job = Job(tmp_path_factory.mktemp("three") / "run", arguments={"save_steps": 2, "num_train_epochs": 1}, stop=6)
    get_pool(2).run(train, job)
    return job.folder


def test_the_newest_whole_one(three: Path, ranks: Ranks, tmp_path: Path) -> None:
    """An explicit path is taken as it is, and if none is whole each is named."""
    run = tmp_path / "run"
    shutil.copytree(three, run)
    job = Job(run, arguments={"num_train_epochs": 1}, resume=True, stop=7)
    assert min(ranks(1).run(train, job)[0].samples) == 7
    next((run / "checkpoint-6").rglob("*_optim_states.pt")).unlink()
    (run / "checkpoint-4" / "trainer_state.json").unlink()
    found = ranks(1).run(train, job)[0]
    assert min(found.samples) == 3
    assert any("checkpoint-6" in text and "checkpoint-4 lacks trainer_state.json" in text for text in found.messages)
    shutil.rmtree(run)
    shutil.copytree(three, run)
    shutil.rmtree(run / "checkpoint-2")
    for path in run.rglob("*_optim_states.pt"):
        path.unlink()
    problem = ranks(2).run(train_or_error, job)
    assert [text.split(":")[0] for text in problem] == ["CheckpointNotFoundError", "CheckpointNotFoundError"]
    assert "checkpoint-6" in problem[0] and "checkpoint-4" in problem[0] and "resume_from_checkpoint" in problem[0]
    named = ranks(1).run(train_or_error, replace(job, resume=str(run / "checkpoint-6")))[0]
    assert "optim_states.pt" in named


def test_models_alone_are_counted_and_not_resumed(ranks: Ranks, tmp_path: Path) -> None:
    arguments = {"save_steps": 2, "save_total_limit": 2, "save_only_model": True, "num_train_epochs": 1}
    job = Job(tmp_path / "run", universal=ASYNC, arguments=arguments)
    ranks(2).run(train, job)
    assert folders(job.folder) == ["checkpoint-10", "checkpoint-8"]
    problem = ranks(2).run(train_or_error, replace(job, resume=True))[0]
    assert "holds a model without its optimizer (save_only_model)" in problem


class Hub:
    """Takes uploads, and notes what they hold."""

    def __init__(self) -> None:
        self.uploads: list[tuple[str, bool]] = []

    def create_repo(self, *args: Any, **kwargs: Any) -> Any:
        return type("Repo", (), {"repo_id": "somebody/model"})()

    def upload_folder(self, folder_path: str, **kwargs: Any) -> Any:
        from concurrent.futures import Future

        from ucp_deepspeed.checkpoint.whole import problem_of

        folder = Path(folder_path)
        if folder.name.startswith("checkpoint-"):
            self.uploads.append((folder.name, problem_of(folder) is None))
        done: Future[None] = Future()
        done.set_result(None)
        return done


def uploads(job: Job) -> list[tuple[str, bool]]:
    import transformers.trainer as module

    hub, real = Hub(), module.hf_api
    module.hf_api = lambda: hub
    try:
        train(job)
    finally:
        module.hf_api = real
    return hub.uploads


def test_whole_checkpoints_are_uploaded(ranks: Ranks, tmp_path: Path) -> None:
    arguments = EVERY_SECOND | {"push_to_hub": True, "hub_strategy": "all_checkpoints"}
    job = Job(tmp_path / "run", universal=ASYNC, arguments=arguments)
    assert ranks(2).run(uploads, job)[0] == [(f"checkpoint-{step}", True) for step in (2, 4, 6, 8, 10)]


def saved_model(trainer: Recorded) -> None:
    model = Path(trainer.args.output_dir) / "model"
    trainer.save_model(str(model))
    assert trainer.args.process_index or (model / "latest").is_file() or (model / "model.safetensors").is_file()


@pytest.mark.parametrize("gather", [True, False])
def test_a_saved_model_of_zero_3(gather: bool, ranks: Ranks, tmp_path: Path) -> None:
    """With gathered weights it is one of Hugging Face's; without, a checkpoint of DeepSpeed's that is on disk."""
    from safetensors.torch import load_file

    import ucp_deepspeed

    config = {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": gather}}
    job = Job(tmp_path / "run", universal=ASYNC, config=config, arguments={"num_train_epochs": 1}, stop=2)
    found = ranks(2).run(train, job, saved_model)[0]
    model = job.folder / "model"
    if gather:
        held = load_file(model / "model.safetensors")
        assert all(held[name].equal(weight) for name, weight in found.weights.items())
    else:
        saved = ucp_deepspeed.open_checkpoint(model)
        assert all(saved.read(name).equal(weight) for name, weight in found.weights.items())


def test_trainer_without_the_block_is_left_alone(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", universal=None, arguments=EVERY_SECOND)
    assert ranks(2).run(train, job)[0].messages == []
    assert folders(job.folder) == ["checkpoint-10"]
    (job.folder / "checkpoint-11").mkdir()
    problem = ranks(1).run(train_or_error, replace(job, resume=True))[0]
    assert problem.startswith("FileNotFoundError")


DROPOUT = {"num_train_epochs": 2, "save_steps": 1}


def test_streams_of_random_numbers(ranks: Ranks, tmp_path: Path) -> None:
    """Mid-epoch and between epochs they go on as if nothing had happened. On more ranks they are derived, the same each time."""
    job = Job(tmp_path / "run", dropout=0.5, samples=16, arguments=DROPOUT)
    whole = ranks(2).run(train, job)[0]
    for step in (2, 4):
        resumed = replace(job, folder=tmp_path / "again", resume=str(job.folder / f"checkpoint-{step}"))
        found = ranks(2).run(train, resumed)[0]
        assert found.losses == {at: loss for at, loss in whole.losses.items() if at > step}
    wider = replace(job, folder=tmp_path / "wide", arguments=DROPOUT | {"per_device_train_batch_size": 1})
    wider = replace(wider, resume=str(job.folder / "checkpoint-2"))
    one, two = (ranks(4).run(train, wider)[0] for _ in range(2))
    assert one.losses == two.losses and one.losses[3] != whole.losses[3]
    assert len([text for text in one.messages if "as the load has set them" in text]) == 1


def test_no_rank_takes_a_random_file_if_others_lack_theirs(ranks: Ranks, tmp_path: Path) -> None:
    job = Job(tmp_path / "run", dropout=0.5, samples=16, arguments=DROPOUT, stop=2)
    ranks(2).run(train, job)
    keeps = {"enabled": True, "random_state": "keep"}
    fewer = DROPOUT | {"per_device_train_batch_size": 1}
    resumed = replace(job, universal=keeps, stop=4, resume=str(job.folder / "checkpoint-2"), arguments=fewer)
    found = ranks(4).run(train, resumed)
    [told] = [text for text in found[0].messages if "random streams stay" in text]
    assert "ranks [2, 3]" in told
    assert [text for text in found[1].messages if "random streams stay" in text] == []


def foretold(trainer: Recorded) -> None:
    """Note what the model foretells."""
    from trainer_runs import Numbers

    metrics = trainer.predict(Numbers(8)).metrics
    (Path(trainer.args.output_dir) / f"foretold-{trainer.args.process_index}").write_text(repr(metrics["test_loss"]))


def test_folders_of_each_node_and_a_prediction_after_a_resume(ranks: Ranks, tmp_path: Path) -> None:
    """From two ranks to one; sums are exact."""
    config = {"optimizer": {"type": "SGD", "params": {"lr": "auto", "momentum": 0.5}}}
    more = {"save_on_each_node": True, "learning_rate": 0.25, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    job = Job(tmp_path / "run", zero=3, config=config, sums=True, arguments=EVERY_SECOND | more, stop=6)
    ranks(2).run(train, job)
    assert folders(job.folder) == ["checkpoint-6"]
    whole = ranks(2).run(train, replace(job, folder=tmp_path / "whole", stop=None), foretold)[0]
    alone = replace(job, resume=True, stop=None, arguments=job.arguments | {"per_device_train_batch_size": 4})
    found = ranks(1).run(train, alone, foretold)[0]
    assert found.losses == {step: loss for step, loss in whole.losses.items() if step > 6} and len(found.losses) == 4
    told = [(folder / "foretold-0").read_text() for folder in (job.folder, tmp_path / "whole")]
    assert told[0] == told[1] and folders(job.folder) == ["checkpoint-10"]
