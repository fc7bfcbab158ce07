"""A model of no family, written by brute force, the spec that fits it, and what the commands say of both."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from click.testing import Result
from native_files import Cut, NativeModel, NativeParameter, NativeRun, add_manifest

from ucp_deepspeed.language import Spec, load_spec

SHAPES: dict[str, tuple[tuple[int, ...], Cut]] = {
    "embed.weight": ((10, 4), "rows"),
    "layers.{n}.up.weight": ((8, 4), "rows"),
    "layers.{n}.up.bias": ((8,), "rows"),
    "layers.{n}.gate_up.weight": ((12, 4), "gate_up"),
    "layers.{n}.down.weight": ((4, 6), "columns"),
    "layers.{n}.down.bias": ((4,), "replicated"),
    "norm.weight": ((4,), "replicated"),
}

DOWN = "down.weight, pattern: shard, dim: 1"
RIGHT = """\
family: mine
rules:
  - {match: [embed.weight, layers.*.up.*], pattern: shard, dim: 0}
  - match: layers.*.gate_up.weight
    pattern: shard
    dim: 0
    parts: [1, 1]
  - {match: layers.*.down.weight, pattern: shard, dim: 1}
  - {match: [layers.*.down.bias, norm.weight], pattern: replicate}
names:
  wrapped:
    - {from: "module.**", to: "**"}
"""


def model_of(seed: int = 3, scaled: int = 1, shapes: Mapping[str, tuple[tuple[int, ...], Cut]] = SHAPES) -> NativeModel:
    """Two layers of the shapes above; the biases that no rank cuts are divided by ``scaled``."""
    generator = torch.Generator().manual_seed(seed)
    names = [name.format(n=n) for name in shapes for n in (range(2) if "{n}" in name else (0,))]
    parameters = []
    for name in names:
        shape, cut = shapes[name.replace(".0.", ".{n}.").replace(".1.", ".{n}.")]
        value = torch.randn(shape, generator=generator) / (scaled if name.endswith("down.bias") else 1)
        states = {key: torch.randn(shape, generator=generator) for key in ("exp_avg", "exp_avg_sq")}
        parameters.append(NativeParameter(name, value, states, cut=cut))
    return NativeModel(tuple(parameters))


def findings(result: Result) -> list[dict[str, Any]]:
    return json.loads(result.stdout)["findings"]


def record(folder: Path, patterns: Mapping[str, Any]) -> None:
    """Add a manifest with patterns."""
    add_manifest(folder, model_of(), NativeRun(tp=2, dp=2, stage=1))
    path = folder / "ucp_manifest.json"
    manifest = json.loads(path.read_text())
    for name, pattern in patterns.items():
        manifest["parameters"][name] = {"pattern": pattern}
    path.write_text(json.dumps(manifest))


def inferred(result: Result, path: Path) -> Spec:
    path.write_text(result.stdout)
    return load_spec(str(path))
