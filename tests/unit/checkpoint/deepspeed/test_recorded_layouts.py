"""A spec, and what the run that saved recorded of its own files: where they differ, all of it is listed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest, write_native
from native_models import whole

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError
from ucp_deepspeed.language import Spec

RECORDED = {
    "fused": {"pattern": {"pattern": "shard", "dim": 0, "parts": [1, 1]}, "logical_shape": [8, 6]},
    "rows": {"pattern": {"pattern": "shard", "dim": 0}, "logical_shape": [6, 4]},
    "same": {"pattern": {"pattern": "replicate"}, "logical_shape": [5]},
}

CUTS: dict[str, Cut] = {"fused": "gate_up", "rows": "rows", "same": "replicated"}


def saved(root: Path, tp: int, recorded: Mapping[str, Any]) -> Checkpoint:
    """A checkpoint with a manifest that says ``recorded``; its files don't tell ``fused`` from a plain shard."""
    shapes = {"fused": (8, 6), "rows": (6, 4), "same": (5,)}
    parameters = tuple(
        NativeParameter(
            name,
            torch.arange(float(torch.Size(shape).numel())).view(shape),
            {"exp_avg": torch.ones(shape)},
            cut=CUTS[name],
        )
        for name, shape in shapes.items()
    )
    model, run = NativeModel(parameters), NativeRun(tp=tp, stage=1)
    folder = write_native(root, model, run)
    add_manifest(folder, model, run)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    manifest["parameters"] |= recorded
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))
    return open_checkpoint(folder)


def spec_of(**patterns: Mapping[str, Any]) -> Spec:
    rules = [{"match": name, **RECORDED[name]["pattern"], **patterns.get(name, {})} for name in RECORDED]
    return Spec.parse({"family": "mine", "rules": rules}, "mine.yaml")


@pytest.mark.parametrize("tp", [1, 2])
def test_a_spec_that_contradicts_is_refused(tp: int, tmp_path: Path) -> None:
    """Also where nothing is cut: what a spec says is kept, and serves when the checkpoint is cut later."""
    checkpoint = saved(tmp_path, tp, RECORDED)
    with pytest.raises(
        MismatchError, match=r"the layouts contradict ucp_manifest\.json in .*; if that is wrong"
    ) as caught:
        UniversalView.of(checkpoint, spec_of(fused={"parts": [1]}, same={"pattern": "partial"}))
    assert caught.value.problems == (
        "fused: shard on dimension 0; recorded was shard on dimension 0 in parts 1:1",
        "same: partial; recorded was replicate",
    )


@pytest.mark.parametrize("tp", [1, 2])
def test_a_whole_shape_of_another_size_is_refused(tp: int, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, tp, RECORDED | {"rows": {**RECORDED["rows"], "logical_shape": [12, 4]}})
    for spec in (None, spec_of()):
        with pytest.raises(MismatchError) as caught:
            UniversalView.of(checkpoint, spec)
        assert caught.value.problems == ("rows: logical shape (6, 4); recorded was (12, 4)",)


@pytest.mark.parametrize("tp", [1, 2])
def test_a_spec_that_agrees(tp: int, tmp_path: Path) -> None:
    """It may add that rows are a vocabulary's, some of them padding."""
    checkpoint = saved(tmp_path, tp, RECORDED)
    view = UniversalView.of(checkpoint, spec_of(rows={"vocabulary": True}), vocabulary_size=5)
    assert torch.equal(whole(view, "rows", "fp32"), torch.arange(20.0).view(5, 4))
    assert view.logical_shape("fused") == (8, 6)
