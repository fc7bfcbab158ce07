"""Distributed checkpoints that Megatron-Core has saved: what they hold, and engines that resume from them.

The oracle is Megatron-Core's own load, into a model of its own and its own optimizer.
"""

from __future__ import annotations

import gc
import os
import pickle
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from checkpoints import differences
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from test_export_megatron import check_logits, configured

import ucp_deepspeed
from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.torch_dist.output import TorchDistOutput
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.errors import (
    DamagedCheckpointError,
    FormatError,
    MismatchError,
    UniversalCheckpointError,
    UnsupportedError,
)
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.testing.megatron_training import (
    STEPS_AT_SAVE,
    MegatronRun,
    Training,
    cuda_is_the_cpu,
    loaded,
    resumed,
    save,
)
from ucp_deepspeed.testing.ranks import RankError, RankPool, reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, _build_model, batch_of, train
from ucp_deepspeed.transfer.compare import compare

Ranks = Callable[[int], RankPool]

ADAM = ("exp_avg", "exp_avg_sq")

RUNS = {
    "tp2": MegatronRun(tp=2, size={"vocabulary_multiple": 7}),
    "dp2": MegatronRun(precision="fp32"),
    "plain": MegatronRun("gpt", optimizer="plain", size={"tied": True}),
    "fp32": MegatronRun("gpt", optimizer="plain", precision="fp32", tp=2),
    "single": MegatronRun(tp=2, metadata={"singleton_local_shards": True}),
    "experts": MegatronRun(tp=2, size={"experts": 3}),
    "buckets-dp2": MegatronRun(precision="fp32", sharding="dp_reshardable"),
    "buckets-tp2": MegatronRun(sharding="dp_reshardable", tp=2),
    "unsharded": MegatronRun(sharding="dp_zero_gather_scatter"),
}

LOSSES: dict[str, list[list[float]]] = {}
"""Losses of the runs that have saved, by rank and step; they took two steps more than are saved."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of each run, which two ranks save once."""
    made: dict[str, Path] = {}

    def get(ranks: Ranks, title: str) -> Path:
        if title not in made:
            made[title] = folder = tmp_path_factory.mktemp("megatron") / title / "iter_0000003"
            LOSSES[title] = ranks(2).run(save, RUNS[title], str(folder))
        return made[title]

    return get


def start(run: Run) -> Any:
    """An engine of the model, with Megatron-Core's schedule, and groups as Megatron-Core makes them."""
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    reset_parallel_state()
    model, mpu = _build_model(run)
    parameters = list(model.parameters())
    groups = [
        {"params": [each for each in parameters if each.ndim > 1], "weight_decay": 0.1},
        {"params": [each for each in parameters if each.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1.0)
    schedule = OptimizerParamScheduler(optimizer, 0.0, 4e-3, 0.0, 10, 100, "linear", 0.1, 0.1, 100, "constant")
    config: dict[str, Any] = {"train_micro_batch_size_per_gpu": 1, "zero_allow_untested_optimizer": True}
    config |= {
        "zero_optimization": dict(run.zero),
        "universal_checkpoint": {"enabled": True, "vocabulary_size": VOCABULARY},
    }
    if run.precision != "fp32":
        config[run.precision] = {"enabled": True}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, lr_scheduler=schedule, mpu=mpu, config=config)
    return engine


def resume(run: Run, folder: str, save: str) -> dict[str, Any]:
    """On a rank: load into an engine, save again; all that it then holds, by DeepSpeed's own functions."""
    engine = start(run)
    path, client_state = engine.load_checkpoint(folder)
    assert path is not None
    engine.save_checkpoint(save, tag="again")
    held = {}
    for name, parameter in engine.module.named_parameters() if run.tp == 1 else ():
        held[name, "fp32"] = safe_get_full_fp32_param(parameter)
        held |= {(name, state): safe_get_full_optimizer_state(parameter, state) for state in ADAM}
    report = engine.universal_checkpoint_report
    found = {
        "held": {key: value.clone() for key, value in held.items()},
        "rates": [group["lr"] for group in engine.optimizer.param_groups],
        "decays": [group["weight_decay"] for group in engine.optimizer.param_groups],
        "client_state": client_state,
        "steps": engine.global_steps,
        "read": (report.bytes_read, report.bytes_needed),
        "schedule": engine.lr_scheduler.state_dict(),
    }
    engine.destroy()
    del engine
    gc.collect()
    return found


def check_equal(found: Mapping[Any, torch.Tensor], wanted: Mapping[Any, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert torch.equal(found[key], value), key


TARGETS = {
    "tp2": (1, 3),
    "dp2": (2, 1),
    "plain": (1, 2),
    "fp32": (1, 1),
    "single": (1, 2),
    "experts": (1, 1),
    "buckets-dp2": (1, 3),
    "buckets-tp2": (1, 2),
}
"""Tensor-parallel size and ZeRO stage of the engine that resumes, on two ranks."""

EQUAL = {"buckets-dp2": "dp2", "buckets-tp2": "single"}
"""Runs whose buffers Megatron-Core loads on their own topology alone → those of the same steps that it loads on any."""

ROWS = {"tp2": 49}
"""Rows of the vocabulary, with the padding that both sides have, where there is some."""


@pytest.mark.parametrize("title", TARGETS)
def test_an_engine_of_another_topology_has_what_megatron_core_loads(
    title: str, saved: Callable[..., Path], ranks: Ranks, tmp_path: Path
) -> None:
    folder, source = saved(ranks, title), RUNS[title]
    tp, stage = TARGETS[title]
    target = Run(source.model, source.size, tp=tp, zero={"stage": stage}, precision=source.precision)  # type: ignore[arg-type]
    found, other = ranks(2).run(resume, target, str(folder), str(tmp_path))
    if tp == 1:
        same = EQUAL.get(title, title)
        wanted = ranks(1).run(loaded, replace(RUNS[same], tp=1), str(saved(ranks, same)))[0]
        check_equal(found["held"], wanted)
        check_equal(other["held"], wanted)
    assert found["rates"] == [4e-3 * (1 - 14 / 90)] * 2 and found["decays"] == [0.1, 0.0]
    assert found["steps"] == STEPS_AT_SAVE and found["schedule"]["num_steps"] == 24
    assert found["client_state"]["checkpoint_version"] == 3.0 and "args" not in found["client_state"]
    rows = ROWS.get(title, VOCABULARY)
    spec = load_spec("megatron_core_llama") if title in ROWS else None
    first, again = (UniversalView.of(open_checkpoint(path), spec, rows) for path in (folder, tmp_path / "again"))
    assert [each.name for each in compare(first, again.under_names_of(first))] == [
        "global_samples"
    ]  # nothing counts them


def test_the_tools_take_it(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path, capsys: Any) -> None:
    folder = saved(ranks, "single")
    for number, form in enumerate(("universal", "dcp")):
        place = tmp_path / str(number)
        assert left_by("convert", folder, place, "--to", form, "--quiet") == 0
        assert differences(folder, place) == []
    (folder.parent / "latest_checkpointed_iteration.txt").write_text("3")
    assert open_checkpoint(folder.parent).path == folder
    assert left_by("inspect", folder) == 0 and "megatron-core torch_dist" in capsys.readouterr().out
    assert left_by("plan", folder, "--dp", "3", "--tp", "2", "--zero", "1") == 0
    assert left_by("verify", folder) == 2 and "unproven" in capsys.readouterr().out


def test_megatron_core_loads_what_was_converted(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    """From its own buffers, which it can't cut anew, and from a plain optimizer and an engine: the run goes on as it was."""
    for title in ("buckets-dp2", "buckets-tp2"):
        assert left_by("convert", saved(ranks, title), tmp_path / title, "--to", "torch_dist", "--quiet") == 0
        assert differences(saved(ranks, title), tmp_path / title / "iter_0000003") == []
    for title, run in (("buckets-dp2", RUNS["dp2"]), ("buckets-tp2", replace(RUNS["single"], metadata={}))):
        losses = ranks(2).run(resumed, run, str(tmp_path / title / "iter_0000003"))
        assert losses == [each[STEPS_AT_SAVE:] for each in LOSSES[title]]
    assert left_by("convert", saved(ranks, "plain"), tmp_path / "b", "--to", "torch_dist", "--quiet") == 0
    wanted = ranks(1).run(loaded, RUNS["plain"], str(saved(ranks, "plain")))[0]
    other = replace(RUNS["plain"], optimizer="distributed")
    check_equal(ranks(1).run(loaded, other, str(tmp_path / "b" / "iter_0000003"))[0], wanted)
    source = Run("llama", tp=2, precision="bf16", groups="decay")
    ranks(2).run(train, source, STEPS_AT_SAVE, save=str(tmp_path / "engine"))
    assert left_by("convert", tmp_path / "engine", tmp_path / "c", "--to", "torch_dist", "--quiet") == 0
    found = ranks(1).run(masters, MegatronRun(), str(tmp_path / "c" / f"global_step{STEPS_AT_SAVE}"))[0]
    with ucp_deepspeed.open_checkpoint(tmp_path / "engine") as checkpoint:
        check_equal(found, {key: checkpoint.read(*key) for key in found})


def masters(run: MegatronRun, folder: str) -> dict[tuple[str, str], torch.Tensor]:
    """On a rank: what Megatron-Core loads of a folder without its schedule."""
    with cuda_is_the_cpu():
        training = Training(run)
        training.load(folder, with_schedule=False)
        return training.values()


def test_what_megatron_core_has_no_place_for_is_refused(
    saved: Callable[..., Path], ranks: Ranks, tmp_path: Path
) -> None:
    view = UniversalView.of(open_checkpoint(saved(ranks, "experts")))
    with pytest.raises(UnsupportedError, match="isn't of a dense GPTModel"):
        TorchDistOutput().plan(view)


def test_buffers_that_nothing_tells_are_refused(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    """Two layers with the same weights, and buffers that are no tensors."""
    folder = Path(shutil.copytree(saved(ranks, "buckets-tp2"), tmp_path / "copy"))
    metadata, key = metadata_of(folder), "decoder.layers.mlp.linear_fc2.weight"
    places = [index for index in metadata.storage_data if index.fqn == key]
    metadata.storage_data[places[0]] = metadata.storage_data[places[1]]
    write_metadata(folder, metadata)
    for place, told in (
        (folder, "2 parameters may be what .*fully_reshardable"),
        (saved(ranks, "unsharded"), "they aren't tensors"),
    ):
        lacking = open_checkpoint(place).lacking
        assert isinstance(lacking, MismatchError)
        with pytest.raises(RankError, match=told):
            ranks(1).run(resume, Run("llama", precision="bf16"), str(place), str(tmp_path / "none"))


def left_by(*arguments: object) -> Any:
    with pytest.raises(SystemExit) as left:
        main([str(each) for each in arguments])
    return left.value.code


def test_transformers_computes_the_same(saved: Callable[..., Path], ranks: Ranks, tmp_path: Path) -> None:
    folder = saved(ranks, "dp2")
    config = configured(tmp_path / "config", "LlamaConfig", num_hidden_layers=2)
    with ucp_deepspeed.open_checkpoint(folder) as checkpoint:
        checkpoint.export(tmp_path / "hf", config_from=config)
    check_logits(tmp_path / "hf", ranks(1).run(logits_of, RUNS["dp2"], str(folder))[0], RUNS["dp2"].as_run)


def logits_of(run: MegatronRun, folder: str) -> torch.Tensor:
    """On a rank: what the model computes that Megatron-Core has loaded."""
    from ucp_deepspeed.testing.megatron_models import causal_mask

    with cuda_is_the_cpu():
        training = Training(run)
        training.load(folder)
    with torch.no_grad():
        tokens = batch_of(run.as_run, 0)[:, :-1]
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return training.model.eval()(tokens, positions, causal_mask(tokens.shape[1]))[..., :VOCABULARY].clone()


class Evil:
    """An object whose pickle makes a folder, if it is read with its code."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def metadata_of(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def write_metadata(folder: Path, metadata: Any) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def with_code_in_metadata(folder: Path) -> None:
    metadata = metadata_of(folder)
    metadata.mcore_data = Evil()
    write_metadata(folder, metadata)


def with_code_in_common(folder: Path) -> None:
    held = torch.load(folder / "common.pt", weights_only=False)
    torch.save({**held, "optimizer": Evil()}, folder / "common.pt")


def with_a_short_file(folder: Path) -> None:
    path = folder / "__0_0.distcp"
    os.truncate(path, path.stat().st_size - 1)


def with_a_layer_elsewhere(folder: Path) -> None:
    metadata = metadata_of(folder)
    (chunk, *_) = metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks
    index = type(next(iter(metadata.storage_data)))("decoder.layers.mlp.linear_fc2.weight", chunk.offsets)
    metadata.state_dict_metadata["decoder.layers.mlp.linear_fc2.weight"].chunks.remove(chunk)
    del metadata.storage_data[index]
    write_metadata(folder, metadata)


def without_a_master(folder: Path) -> None:
    metadata = metadata_of(folder)
    del metadata.state_dict_metadata["optimizer.state.param.output_layer.weight"]
    write_metadata(folder, metadata)


def of_another_form(folder: Path) -> None:
    (folder / "metadata.json").write_text('{"sharded_backend": "zarr"}')


def without_a_part_of_a_buffer(folder: Path) -> None:
    metadata = metadata_of(folder)
    key = next(key for key in metadata.state_dict_metadata if key.endswith("bucket_idx_0.param"))
    del metadata.state_dict_metadata[key].chunks[0]
    write_metadata(folder, metadata)


DAMAGES: Mapping[str, tuple[Callable[[Path], Any], type[UniversalCheckpointError], str]] = {
    "metadata": (with_code_in_metadata, DamagedCheckpointError, r"names posix\.mkdir, which isn't part"),
    "common": (with_code_in_common, DamagedCheckpointError, r"common\.pt .*posix\.mkdir"),
    "truncated": (with_a_short_file, DamagedCheckpointError, r"__0_0\.distcp is truncated"),
    "no file": (lambda folder: (folder / "__0_1.distcp").unlink(), DamagedCheckpointError, r"__0_1\.distcp is missing"),
    "no common": (lambda folder: (folder / "common.pt").unlink(), DamagedCheckpointError, r"common\.pt is missing"),
    "unfinished": (lambda folder: (folder / "metadata.json").unlink(), DamagedCheckpointError, "was never finished"),
    "no layer": (with_a_layer_elsewhere, DamagedCheckpointError, "doesn't list the chunks of a whole tensor"),
    "no master": (without_a_master, DamagedCheckpointError, "has no master of output_layer.weight, which others have"),
    "no part": (
        without_a_part_of_a_buffer,
        DamagedCheckpointError,
        r"no chunk of .*bucket_idx_0\.param holds element 0",
    ),
    "zarr": (of_another_form, FormatError, "names the form 'zarr'"),
}


@pytest.mark.parametrize("title", DAMAGES)
def test_damage_is_named(
    title: str, saved: Callable[..., Path], ranks: Ranks, tmp_path: Path, monkeypatch: Any
) -> None:
    damage, kind, told = DAMAGES[title]
    monkeypatch.chdir(tmp_path)
    folder = Path(shutil.copytree(saved(ranks, "buckets-dp2" if title == "no part" else "tp2"), tmp_path / "copy"))
    damage(folder)
    with pytest.raises(kind, match=told):
        UniversalView.of(open_checkpoint(folder))
    assert not (tmp_path / "evil").exists()
