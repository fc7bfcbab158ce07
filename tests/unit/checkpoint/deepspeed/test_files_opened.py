"""A rank opens the files that it needs something from, however many there are."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed import files as deepspeed_files
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer.planning.targeting import RankPlan, plan_target

LAYERS = 4
CUTS: Mapping[str, tuple[tuple[int, ...], Cut]] = {
    "norm": ((8,), "replicated"),
    "up": ((16, 8), "gate_up"),
    "down": ((8, 16), "columns"),
}


def cut_model(layers: int = LAYERS) -> NativeModel:
    generator = torch.Generator().manual_seed(3)
    parameters = []
    for name, (shape, cut) in {f"{n}.{part}": held for n in range(layers) for part, held in CUTS.items()}.items():
        master, moment, square = (torch.randn(shape, generator=generator) for _ in range(3))
        parameters.append(NativeParameter(name, master, {"exp_avg": moment, "exp_avg_sq": square.square()}, cut))
    return NativeModel(tuple(parameters), layers=layers)


def opened_by(
    folder: Path, target: Topology, rank: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> tuple[set[str], RankPlan]:
    """Names of the files that planning one rank opens, and the plan."""
    names: list[str] = []
    real = deepspeed_files.open_torch_file
    with monkeypatch.context() as patched:
        noted = lambda path, **options: names.append(path.name) or real(path, **options)  # noqa: E731
        patched.setattr(deepspeed_files, "open_torch_file", noted)
        plan = plan_target(open_checkpoint(folder), target, only={rank})
    assert plan.possible, plan.obstacles
    assert len(names) == len(set(names)), "a file is opened once"
    [only] = plan.ranks
    assert only.bytes_read == only.bytes_held > 0
    return set(names), only


METADATA = ("mp_rank_{:02d}_model_states.pt", "zero_pp_rank_0_mp_rank_{:02d}_optim_states.pt")
"""The files with a model-parallel rank's metadata."""


def saved(path: Path, run: NativeRun, model: NativeModel | None = None) -> Path:
    model = model or cut_model()
    folder = write_native(path, model, run)
    add_manifest(folder, model, run, layouts=True)
    return folder


def model_parallel_rank(name: str) -> int | None:
    found = re.search(r"mp_rank_(\d+)_", name)
    return int(found[1]) if found else None


SOURCE = NativeRun(tp=4, pp=2, dp=4, stage=1)


@pytest.mark.parametrize(("rank", "others"), [((0, 0), {0}), ((2, 1), {0}), ((4, 0), {0, 4}), ((5, 0), {0, 4})])
def test_own_model_parallel_rank_and_the_first_of_its_stage(
    tmp_path: Path, rank: tuple[int, int], others: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    names, plan = opened_by(saved(tmp_path, SOURCE), Topology(4, 2, 2, 1), rank, monkeypatch)
    data = {Path(path).name for path in plan.files}
    assert data < names and {model_parallel_rank(name) for name in data} == {rank[0]}
    assert names - data == {name.format(place) for place in {rank[0], *others} for name in METADATA} - data


def test_more_ranks_open_no_more_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tp, pp, dp in ((2, 2, 4), (4, 2, 4), (2, 4, 4), (2, 2, 16)):
        folder = saved(tmp_path / f"{tp}-{pp}-{dp}", replace(SOURCE, tp=tp, pp=pp, dp=dp))
        target = Topology(tp, pp, dp // 2, 1)
        names, plan = opened_by(folder, target, (pp * tp - 1, dp // 2 - 1), monkeypatch)
        assert len(names - {Path(path).name for path in plan.files}) == 6 and len(plan.files) <= 3


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("recorded", [False, True])
def test_data_parallel_alone(tmp_path: Path, stage: int, recorded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    run = NativeRun(dp=8, stage=stage)
    folder = write_native(tmp_path, cut_model(), run)
    if recorded:
        add_manifest(folder, cut_model(), run, layouts=True)
    names, plan = opened_by(folder, Topology(1, 1, 4, stage), (0, 2), monkeypatch)
    prefix = "zero_pp_rank_0_" if stage == 3 else ""
    constant = {f"{prefix}mp_rank_00_model_states.pt", "zero_pp_rank_0_mp_rank_00_optim_states.pt"}
    others = set() if recorded else {f"zero_pp_rank_{part}_mp_rank_00_optim_states.pt" for part in range(8)}
    assert names == constant | {Path(path).name for path in plan.files} | others  # for numbers that may differ


def test_layers_of_which_something_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers and frozen parameters are in the layers' files."""
    model = replace(cut_model(), buffers={"1.calls": torch.tensor(17)})
    names, _ = opened_by(saved(tmp_path, SOURCE, model), Topology(4, 2, 2, 1), (7, 0), monkeypatch)
    layers = {name for name in names if name.startswith("layer_")}
    assert layers == {f"layer_01-model_{rank:02d}-model_states.pt" for rank in (0, 3)}


def edit_manifest(folder: Path, name: str, **changes: object) -> None:
    path = folder / MANIFEST_NAME
    manifest = json.loads(path.read_text())
    manifest["parameters"][name] |= changes
    path.write_text(json.dumps(manifest))


def test_other_shapes_than_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found when the rank's file is opened; what other ranks need isn't touched by it."""
    folder = saved(tmp_path, SOURCE)
    edit_manifest(folder, "1.down", local_shapes=[[8, 4], [8, 4], [8, 5], [8, 3]])
    opened_by(folder, Topology(4, 2, 2, 1), (5, 0), monkeypatch)
    with pytest.raises(
        DamagedCheckpointError, match=r"1\.down has local shape \(8, 4\) on model-parallel rank 2; ucp_man"
    ):
        opened_by(folder, Topology(4, 2, 2, 1), (2, 0), monkeypatch)


def test_other_parameters_than_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = saved(tmp_path, SOURCE)
    path = folder / "mp_rank_06_model_states.pt"
    states = torch.load(path, weights_only=False)
    states["param_shapes"][0]["3.strange"] = states["param_shapes"][0].pop("3.up")
    torch.save(states, path)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["files"][path.name] = path.stat().st_size
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    opened_by(folder, Topology(4, 2, 2, 1), (7, 0), monkeypatch)
    with pytest.raises(
        DamagedCheckpointError, match=r"rank 6 has other parameters than ucp_manifest\.json says: \['3\.strange"
    ):
        opened_by(folder, Topology(4, 2, 2, 1), (6, 1), monkeypatch)


@pytest.mark.parametrize(
    "changes", [{"local_shapes": []}, {"local_shapes": [[4, 8]] * 3}, {"stages": []}, {"stages": [2]}], ids=str
)
def test_a_record_of_another_topology(tmp_path: Path, changes: dict[str, object]) -> None:
    folder = saved(tmp_path, SOURCE)
    edit_manifest(folder, "1.up", **changes)
    with pytest.raises(DamagedCheckpointError, match=next(iter(changes))):
        open_checkpoint(folder)


def test_groups_of_another_number(tmp_path: Path) -> None:
    folder = saved(tmp_path, SOURCE)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest | {"group_numbers": [[0], [0, 1]]}))
    with pytest.raises(DamagedCheckpointError, match="group_numbers of other groups than parameter_groups"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("lacking", "layers", "ranks"),
    [("local_shapes", 0, set(range(8))), ("stages", 0, {0, 4, 7}), ("kind", 8, {0, 4, 7})],
)
def test_manifests_that_tell_less_are_read(
    tmp_path: Path, lacking: str, layers: int, ranks: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Then the metadata of each model-parallel rank is read, of each stage's first, or of each layer."""
    folder = saved(tmp_path, SOURCE)
    edit_manifest(folder, "1.up", **{lacking: None})
    names, _ = opened_by(folder, Topology(4, 2, 2, 1), (7, 0), monkeypatch)
    held = {name for name in names if name.startswith("layer_")}
    assert len(held) == layers and {model_parallel_rank(name) for name in names - held} == ranks
