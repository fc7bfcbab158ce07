"""Random numbers, over changes of the topology: DeepSpeed saves no stream but the curriculum's, and loses that one."""

from __future__ import annotations

import base64
import json
import logging
import random
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import resumed

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.encoding import with_sum
from ucp_deepspeed.checkpoint.random_files import joined
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine import random_state
from ucp_deepspeed.errors import DamagedCheckpointError, UniversalCheckpointError, UnsupportedError
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import Run, build_engine
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

Drawn = dict[str, list[float]]


def drawn() -> Drawn:
    """Next numbers of each stream of this process."""
    found = {
        "python": [random.random(), random.gauss(0, 1)],
        "numpy": [*np.random.random(2).tolist(), float(np.random.standard_normal())],
        "torch": torch.rand(3).tolist(),
    }
    for name, state in trackers().items():
        generator = torch.Generator()
        generator.set_state(state)
        found[name] = torch.rand(3, generator=generator).tolist()
    return found


def trackers() -> Mapping[str, torch.Tensor]:
    """States of Megatron-Core's tracker."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    states: Mapping[str, torch.Tensor] = get_cuda_rng_tracker().get_states()
    return states


def seed_all(seed: int) -> None:
    """As training scripts do; an odd number of normal draws leaves one in reserve, which belongs to the state."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    random.gauss(0, 1), np.random.standard_normal()


def seeded_engine(run: Run, seed: int, by_rank: bool) -> Any:
    """An engine in a script that seeds all ranks alike or not, and Megatron-Core's tracker where it is used."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed

    engine = build_engine(run)
    get_cuda_rng_tracker().reset()
    if run.model != "mlp":
        model_parallel_cuda_manual_seed(seed)
    seed_all(seed + 100 * torch.distributed.get_rank() * by_rank)
    return engine


def save_and_draw(run: Run, folder: str, by_rank: bool = True) -> Drawn:
    """On a rank: draw, save, and return what is drawn next."""
    with resumed(seeded_engine(run, 1, by_rank), None) as engine:
        drawn()
        engine.save_checkpoint(folder)
        found = drawn()
        ucp_deepspeed.wait_for_save()
        return found


def load_and_draw(
    run: Run, folder: str, by_rank: bool = True, seed: int = 50, options: Mapping[str, Any] | None = None
) -> tuple[Drawn, list[str]]:
    """On a rank: load in another script, and return what is drawn next, and what is logged of it."""
    lines: list[str] = []
    handler = logging.Handler(logging.DEBUG)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("ucp_deepspeed")
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    try:
        with resumed(seeded_engine(run, seed, by_rank), None) as engine:
            engine.load_checkpoint(folder, **(options or {}))
            return drawn(), [line for line in lines if "random" in line]
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


@pytest.mark.nccl_like
@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("model", ["mlp", "llama"])
def test_streams_go_on_exactly_on_the_same_ranks(model: Any, stage: int, ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed saves no random state. Stage 1 is left to DeepSpeed's own load, stage 3 is not."""
    run = Run(model, tp=2 if model == "llama" else 1, zero={"stage": 1})
    expected = ranks(2).run(save_and_draw, run, str(tmp_path))
    found = ranks(2).run(load_and_draw, replace(run, zero={"stage": stage}), str(tmp_path))
    assert [streams for streams, _ in found] == expected
    assert expected[0]["torch"] != expected[1]["torch"]
    assert found[1][1] == []
    assert found[0][1] == ["random state: each rank's streams go on where they stood at step 0"]


@pytest.mark.parametrize("by_rank", [True, False])
def test_another_topology_derives_new_streams(by_rank: bool, ranks: Ranks, tmp_path: Path) -> None:
    """From the saved seed alone, whatever the new script's own; ranks that it seeds alike, and that may have to decide alike,
    stay alike. HF Trainer and Accelerate find no file for further ranks and go on without a word."""
    run = Run("mlp", zero={"stage": 1})
    before = ranks(2).run(save_and_draw, run, str(tmp_path), by_rank)
    first, again = (ranks(4).run(load_and_draw, run, str(tmp_path), by_rank, seed) for seed in (50, 60))
    assert first == again
    assert len(first[0][1]) == 1 and "saved at step 0 by 2 ranks" in first[0][1][0] and "its seed 1" in first[0][1][0]
    assert not any(lines for _, lines in first[1:])
    for stream in ("python", "numpy", "torch"):
        values = [tuple(streams[stream]) for streams, _ in first]
        assert len(set(values)) == (4 if by_rank else 1)
        assert not set(values) & {tuple(streams[stream]) for streams in before}
    convert(UniversalView.of(open_checkpoint(tmp_path)), tmp_path / "b" / "step")
    fewer = ranks(1).run(load_and_draw, run, str(tmp_path / "b" / "step"), by_rank)
    assert fewer[0][0] == first[0][0]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_one_file_for_all_ranks(asynchronous: bool, ranks: Ranks, tmp_path: Path) -> None:
    """Files of single ranks, as earlier releases wrote them, are read as before, and a save into their folder removes them."""
    run = Run("mlp", zero={"stage": 1})
    saving = replace(run, universal={"enabled": True, "save": {"async": asynchronous}})
    expected = ranks(2).run(save_and_draw, saving, str(tmp_path))
    folder = tmp_path / "global_step0"
    assert {path.name for path in folder.glob("ucp_random*")} == {"ucp_random_states.jsonl"}
    _, *states = (folder / "ucp_random_states.jsonl").read_text(encoding="ascii").splitlines()
    (folder / "ucp_random_states.jsonl").unlink()
    manifest = json.loads((folder / "ucp_manifest.json").read_text(encoding="utf-8"))
    del manifest["files"]["ucp_random_states.jsonl"]
    for rank, state in enumerate([*states, states[1]]):
        (folder / f"ucp_random_state_rank_{rank:05d}.json").write_text(state, encoding="ascii")
        manifest["files"] |= {f"ucp_random_state_rank_{rank:05d}.json": len(state)}
    (folder / "ucp_manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert [streams for streams, _ in ranks(2).run(load_and_draw, run, str(tmp_path))] == expected
    ranks(2).run(save_and_draw, saving, str(tmp_path))
    assert {path.name for path in folder.glob("ucp_random*")} == {"ucp_random_states.jsonl"}
    listed = json.loads((folder / "ucp_manifest.json").read_text(encoding="utf-8"))["files"]
    assert "ucp_random_states.jsonl" in listed


def save_where_rank_1_cant_tell(run: Run, folder: str) -> str:
    """On a rank: save when rank 1 can't read one of its streams."""
    with resumed(seeded_engine(run, 1, True), None) as engine:
        engine.save_checkpoint(folder, tag="a")
        with pytest.MonkeyPatch.context() as patch:
            if torch.distributed.get_rank() == 1:
                patch.setattr(random, "getstate", lambda: object())
            with pytest.raises(UniversalCheckpointError) as caught:
                engine.save_checkpoint(folder, tag="b")
        return str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_state_that_one_rank_cant_tell(asynchronous: bool, ranks: Ranks, tmp_path: Path) -> None:
    """All ranks raise it, and ``latest`` stays."""
    run = Run("mlp", zero={"stage": 1}, universal={"enabled": True, "save": {"async": asynchronous}})
    told = ranks(2).run(save_where_rank_1_cant_tell, run, str(tmp_path))
    assert told == ["rank 1: python is a builtins.object, which has no universal form", told[1]]
    assert (tmp_path / "latest").read_text() == "a" and not (tmp_path / "b" / "ucp_manifest.json").exists()


def test_megatrons_streams_on_another_topology(ranks: Ranks, tmp_path: Path) -> None:
    """Tensor-parallel ranks share the default stream and differ in the tracker's; data-parallel ranks share those."""
    run = Run("llama", tp=2, zero={"stage": 1})
    ranks(2).run(save_and_draw, run, str(tmp_path), False)
    found = [streams for streams, _ in ranks(4).run(load_and_draw, run, str(tmp_path), False)]
    regions = [streams["model-parallel-rng"] for streams in found]
    assert regions[0] == regions[2] != regions[1] == regions[3]
    assert all(streams["torch"] == found[0]["torch"] for streams in found)
    assert all(streams["data-parallel-rng"] == found[0]["data-parallel-rng"] for streams in found)
    unloaded = ranks(4).run(load_and_draw, run, str(tmp_path / "none"), False)
    assert unloaded[0][0]["model-parallel-rng"] != regions[0]


@pytest.mark.parametrize("how", ["keep", "module-only", "never", "saved-by-deepspeed", "not-committed"])
def test_streams_that_are_left_alone(how: str, ranks: Ranks, tmp_path: Path) -> None:
    """When asked to, when only weights are loaded, and where nothing was saved."""
    run = Run("mlp", zero={"stage": 2})
    saving = replace(run, universal=None) if how == "saved-by-deepspeed" else run
    ranks(2).run(save_and_draw, saving, str(tmp_path))
    if how == "not-committed":
        (tmp_path / "global_step0" / "ucp_manifest.json").unlink()
    block = {"keep": {"random_state": "keep"}, "never": {"load": "never"}}.get(how, {})
    loading = replace(run, universal={"enabled": True, **block})
    options = {"load_module_only": True} if how == "module-only" else {}
    found = ranks(2).run(load_and_draw, loading, str(tmp_path), options=options)
    expected = ranks(2).run(load_and_draw, loading, str(tmp_path / "none"))
    assert [streams for streams, _ in found] == [streams for streams, _ in expected]
    nothing = "the checkpoint holds no random state: the streams stay as the script has seeded them"
    left = f"{tmp_path / 'global_step0' / 'ucp_random_states.jsonl'} is left out, since no ucp_manifest.json tells that it is "
    left += "of this save: random streams stay as the script has seeded them"
    never = f'"load": "never" leaves out {tmp_path / "global_step0" / "ucp_random_states.jsonl"}: random streams stay as the '
    never += "script has seeded them"
    told = {"saved-by-deepspeed": [nothing], "not-committed": [left, nothing], "never": [never]}
    assert found[0][1] == told.get(how, [])


def test_damaged_random_state(ranks: Ranks, tmp_path: Path) -> None:
    """Found on every rank, and not in the way of who doesn't want it."""
    run = Run("mlp", zero={"stage": 2})
    ranks(2).run(save_and_draw, run, str(tmp_path))
    path = tmp_path / "global_step0" / "ucp_random_states.jsonl"
    text = path.read_text(encoding="utf-8")
    header, first, second = text.splitlines(keepends=True)
    save_id = json.loads(header)["save_id"]

    def with_sums(*states: str) -> str:
        return joined([state.rstrip() for state in states], save_id)

    assert with_sums(first, second) == text
    for damaged, error in {
        text[:-100]: DamagedCheckpointError,
        "x" * len(text): DamagedCheckpointError,
        header.replace("]", ", 1]") + (first + second)[:-3]: DamagedCheckpointError,
        header.replace('"format_version": 1', '"format_version": 2') + first + second: UnsupportedError,
        header + first + "x" * len(second): DamagedCheckpointError,
        header + first + second.replace('"MT19937"', '"MT19938"'): DamagedCheckpointError,
        header.replace(save_id, "0123456789abcdef") + first + second: DamagedCheckpointError,
        header.replace(save_id, "").replace('"save_id"', '"ignored_by_all_releases"')
        + first
        + second: DamagedCheckpointError,
        with_sums(first, second.replace('"format_version": 1', '"format_version": 0')): UnsupportedError,
        with_sums(first, second.replace('"format_version": 1', '"format_version": 2')): UnsupportedError,
        with_sums(first, second.replace('"MT19937"', '"MT19938"')): DamagedCheckpointError,
    }.items():
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(RankError) as caught:
            ranks(2).run(load_and_draw, run, str(tmp_path))
        assert isinstance(caught.value.original, error), caught.value
        assert error is UnsupportedError or '"random_state": "keep"' in str(caught.value.original)
    path.unlink()
    with pytest.raises(RankError, match=r"ucp_random_states\.jsonl, which ucp_manifest\.json lists, is missing"):
        ranks(2).run(load_and_draw, run, str(tmp_path))
    kept = replace(run, universal={"enabled": True, "random_state": "keep"})
    assert ranks(2).run(load_and_draw, kept, str(tmp_path))


def refused(run: Run, folder: str) -> str:
    """On a rank: the error of a load, which changes neither the model nor the streams."""
    with resumed(seeded_engine(run, 3, True), None) as engine:
        before = [parameter.detach().clone() for parameter in engine.module.parameters()]
        streams = repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
        with pytest.raises(DamagedCheckpointError) as caught:
            engine.load_checkpoint(folder)
        assert all(map(torch.equal, before, engine.module.parameters()))
        assert streams == repr((random.getstate(), np.random.get_state(), torch.get_rng_state().tolist()))
        return str(caught.value)


def write_as_if_saved(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change the streams of the last rank, and all that tells of them: checksums are no signature."""
    path = folder / "ucp_random_states.jsonl"
    header, *states = path.read_text(encoding="ascii").splitlines()
    last = json.loads(states[-1])
    change(last["streams"])
    path.write_text(joined([*states[:-1], json.dumps(last)], json.loads(header)["save_id"]), encoding="ascii")
    manifest = json.loads((folder / "ucp_manifest.json").read_text(encoding="utf-8"))
    manifest["files"][path.name] = path.stat().st_size
    del manifest["sum"]
    (folder / "ucp_manifest.json").write_text(with_sum(json.dumps(manifest, indent=1)), encoding="utf-8")


def test_a_state_that_would_be_taken_over_wrongly(ranks: Ranks, tmp_path: Path) -> None:
    """numpy took any position, and read behind its words."""
    run = Run("mlp", zero={"stage": 1})
    ranks(2).run(save_and_draw, run, str(tmp_path / "whole"))
    zeros = base64.b64encode(bytes(5055)).decode()
    changes: dict[str, Callable[[dict[str, Any]], None]] = {
        "'numpy' is damaged: 'pos' can't be": lambda streams: streams["numpy"]["state"].update(pos=1 << 30),
        "'numpy' is damaged: 'key' can't be": lambda streams: streams["numpy"]["state"]["key"].pop(),
        "'python' is damaged": lambda streams: streams["python"]["$tuple"][1]["$tuple"].__setitem__(0, 1 << 70),
        "5055 bytes, and the live one 5056": lambda streams: streams.update(torch={"$bytes": zeros}),
    }
    for number, (told, change) in enumerate(changes.items()):
        shutil.copytree(tmp_path / "whole", tmp_path / str(number))
        write_as_if_saved(tmp_path / str(number) / "global_step0", change)
        for error in ranks(2).run(refused, run, str(tmp_path / str(number))):
            assert told in error and '"random_state": "keep"' in error, error


class OwnGenerator(np.random.PCG64):
    """A bit generator that nobody else knows."""

    @property
    def state(self) -> Any:
        return super().state | {"bit_generator": "Own"}


def other_generator(run: Run, folder: str, kind: str, seed: int, save: bool) -> tuple[list[float], list[str]]:
    """On a rank: numbers of numpy's global functions with another bit generator, after a save or a load, and the warnings."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    before = np.random.get_bit_generator()
    random_state._warn_of_unknown.cache_clear()
    logging.getLogger("ucp_deepspeed").addHandler(handler)
    try:
        with resumed(build_engine(run), None) as engine:
            np.random.set_bit_generator(OwnGenerator(seed) if kind == "Own" else getattr(np.random, kind)(seed))
            np.random.standard_normal(), np.random.randint(9, dtype=np.int32)
            engine.save_checkpoint(folder) if save else engine.load_checkpoint(folder)
            found = [*np.random.random(3).tolist(), float(np.random.standard_normal()), *np.random.bytes(9)]
            return found, lines
    finally:
        logging.getLogger("ucp_deepspeed").removeHandler(handler)
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("kind", ["PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_other_generators_behind_numpys_functions(kind: str, ranks: Ranks, tmp_path: Path) -> None:
    """They go on as numpy's own does; a run that has another one begins anew, and is told."""
    run = Run("mlp", zero={"stage": 1})
    [saved] = ranks(1).run(other_generator, run, str(tmp_path), kind, 1, True)
    [again] = ranks(1).run(other_generator, run, str(tmp_path), kind, 2, False)
    assert again == saved and saved[1] == []
    if kind == "Philox":
        two = [ranks(2).run(other_generator, run, str(tmp_path), kind, seed, False) for seed in (3, 4)]
        assert two[0] == two[1] and two[0][0][0] != saved[0]
        [(other, lines)] = ranks(1).run(other_generator, run, str(tmp_path), "MT19937", 3, False)
        assert other != saved[0] and lines == [
            "the random stream numpy isn't in the checkpoint, and begins anew",
            "the random stream numpy/Philox is in the checkpoint alone, and isn't restored",
        ]


def test_a_generator_that_nobody_knows(ranks: Ranks, tmp_path: Path) -> None:
    """It is told on both sides, and all else goes on."""
    run = Run("mlp", zero={"stage": 1})
    for save in (True, False):
        [(_, [line])] = ranks(1).run(other_generator, run, str(tmp_path), "Own", 1, save)
        assert line.startswith("the random stream numpy has a form that isn't known here") and "'Own'" in line
