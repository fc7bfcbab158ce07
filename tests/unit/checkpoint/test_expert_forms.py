"""Experts in other tensors, against torch's own cutting and joining: every element of the new tensors comes from its place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, Parameter, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.deepspeed.autoep import AutoEpLayers, read_autoep_layers
from ucp_deepspeed.checkpoint.expert_forms import in_form_of
from ucp_deepspeed.checkpoint.versions import FileVersions
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.layout import Shape, Topology
from ucp_deepspeed.plan import Fragment

LAYER, OLD = "model.layers.0.mlp", "model.layers.0.block_sparse_moe"
EXPERTS, INNER, HIDDEN = 3, 5, 4

FORMS: dict[str, dict[str, Shape]] = {
    "autoep": {
        f"{LAYER}.router.gate.weight": (EXPERTS, HIDDEN),
        f"{LAYER}.experts.w1": (EXPERTS, INNER, HIDDEN),
        f"{LAYER}.experts.w2": (EXPERTS, HIDDEN, INNER),
        f"{LAYER}.experts.w3": (EXPERTS, INNER, HIDDEN),
        f"{LAYER}.shared_experts.up_proj.weight": (7, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    },
    "fused": {
        f"{LAYER}.gate.weight": (EXPERTS, HIDDEN),
        f"{LAYER}.experts.gate_up_proj": (EXPERTS, 2 * INNER, HIDDEN),
        f"{LAYER}.experts.down_proj": (EXPERTS, HIDDEN, INNER),
        f"{LAYER}.shared_expert.up_proj.weight": (7, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    },
    "single": {
        f"{LAYER}.gate.weight": (EXPERTS, HIDDEN),
        **{f"{LAYER}.experts.{i}.gate_proj.weight": (INNER, HIDDEN) for i in range(EXPERTS)},
        **{f"{LAYER}.experts.{i}.up_proj.weight": (INNER, HIDDEN) for i in range(EXPERTS)},
        **{f"{LAYER}.experts.{i}.down_proj.weight": (HIDDEN, INNER) for i in range(EXPERTS)},
        f"{LAYER}.shared_experts.up_proj.weight": (7, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    },
    "old": {
        f"{OLD}.gate.weight": (EXPERTS, HIDDEN),
        **{f"{OLD}.experts.{i}.w{j}.weight": (INNER, HIDDEN) for i in range(EXPERTS) for j in (1, 3)},
        **{f"{OLD}.experts.{i}.w2.weight": (HIDDEN, INNER) for i in range(EXPERTS)},
        f"{LAYER}.shared_experts.up_proj.weight": (7, HIDDEN),
        "model.norm.weight": (HIDDEN,),
    },
}


class Held(Checkpoint):
    """A checkpoint in memory, whose fragments are short and tell which elements they hold."""

    def __init__(self, shapes: Mapping[str, Shape], tp: int = 1, **changes: Any) -> None:
        self.path, self.form, self.topology = Path("held"), "held", Topology(tp=tp)
        self.run, self.versions = RunState("fp32", 1, 1, 0, None, None, ""), FileVersions()
        steps: Mapping[str, float] = changes.get("steps", {})
        kinds: Mapping[str, Any] = changes.get("kinds", {})
        self.parameters = {
            name: Parameter(
                name, kinds.get(name, "trainable"), (shape,) * tp, {"fp32": "F32"}, {"step": steps.get(name, 1)}
            )
            for name, shape in shapes.items()
        }
        decayed = changes.get("decayed", shapes.keys())
        groups = [(name in decayed, name) for name in shapes]
        self.groups = tuple(
            ParameterGroup(tuple(name for held, name in groups if held is which), {"weight_decay": float(which)})
            for which in (True, False)
        )
        self.patterns, self.recorded_shapes, self.logical_names, self.vocabulary_size = {}, {}, {}, None

    def fragments(
        self, name: str, state: str, rank: int, local_start: int, local_stop: int
    ) -> Iterator[Fragment[FileExtent]]:
        for start in range(local_start, local_stop, 3):
            numel = min(3, local_stop - start)
            yield Fragment(start, numel, FileExtent(name, 0, "F32", prod(self.shapes[name])), start)

    @property
    def shapes(self) -> dict[str, Shape]:
        return {name: shape for name, entry in self.parameters.items() if (shape := entry.local_shapes[0]) is not None}

    def client_state(self, rank: int = 0) -> tuple[str, dict[str, Any]]:
        return "", {}

    def extra_states(self) -> tuple[dict[str, Any], ...]:
        return ({},)


def matrices(form: str, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gate, up and down of all experts, and the rest, by names of their own."""
    if form == "autoep":
        gate, down, up = (values[f"{LAYER}.experts.{name}"] for name in ("w1", "w2", "w3"))
    elif form == "fused":
        gate, up = values[f"{LAYER}.experts.gate_up_proj"].chunk(2, dim=1)
        down = values[f"{LAYER}.experts.down_proj"]
    else:
        layer, names = (OLD, ("w1", "w3", "w2")) if form == "old" else (LAYER, ("gate_proj", "up_proj", "down_proj"))
        gate, up, down = (
            torch.stack([values[f"{layer}.experts.{i}.{name}.weight"] for i in range(EXPERTS)]) for name in names
        )
    router = next(value for name, value in values.items() if name.endswith("gate.weight"))
    shared = next(value for name, value in values.items() if ".shared_expert" in name)
    return {
        "gate": gate,
        "up": up,
        "down": down,
        "router": router,
        "shared": shared,
        "norm": values["model.norm.weight"],
    }


def numbered(shapes: Mapping[str, Shape]) -> dict[str, torch.Tensor]:
    """Tensors no two elements of which are equal."""
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("wanted", FORMS)
@pytest.mark.parametrize("held", FORMS)
def test_every_form_from_every_other(held: str, wanted: str) -> None:
    values = numbered(FORMS[held])
    seen = in_form_of(Held(FORMS[held]), FORMS[wanted])
    found: dict[str, torch.Tensor] = {}
    for name, shape in FORMS[wanted].items():
        assert seen.parameters[name].local_shapes == (shape,)
        whole = torch.full((prod(shape),), torch.nan)
        middle = prod(shape) // 2
        for part in (
            *seen.fragments(name, "fp32", 0, middle, prod(shape)),
            *seen.fragments(name, "fp32", 0, 0, middle),
        ):
            source = values[part.buffer.path].flatten()[part.buffer_start : part.buffer_start + part.numel]
            whole[part.local_start : part.local_start + part.numel] = source
        found[name] = whole.view(shape)
    assert seen.parameters.keys() == FORMS[wanted].keys()
    assert {name for group in seen.groups for name in group.names} == FORMS[wanted].keys()
    expected = matrices(held, values)
    for name, value in matrices(wanted, found).items():
        assert value.equal(expected[name]), name


def test_other_experts_are_named() -> None:
    fewer = {name: shape for name, shape in FORMS["single"].items() if ".experts.2." not in name}
    with pytest.raises(MismatchError, match=r"experts\.w1: of 3 experts, in the checkpoint there are 2"):
        in_form_of(Held(fewer), FORMS["autoep"])
    transposed = FORMS["fused"] | {f"{LAYER}.experts.gate_up_proj": (EXPERTS, HIDDEN, 2 * INNER)}
    with pytest.raises(
        MismatchError, match=r"experts\.w1: expects matrices of shape \(5, 4\), in the checkpoint they are"
    ):
        in_form_of(Held(transposed), FORMS["autoep"])
    with pytest.raises(UnsupportedError, match="on 2 model-parallel ranks"):
        in_form_of(Held(FORMS["fused"], tp=2), FORMS["autoep"])


def test_what_one_tensor_cannot_hold_is_named() -> None:
    last = f"{LAYER}.experts.2.up_proj.weight"
    apart = in_form_of(Held(FORMS["single"], steps={last: 2.0}), FORMS["autoep"]).parameters
    assert "different numbers of steps" in apart[f"{LAYER}.experts.w3"].refused["step"]
    assert not apart[f"{LAYER}.experts.w1"].refused
    with pytest.raises(MismatchError, match=r"(?s)some that weren't.*experts\.w3"):
        in_form_of(Held(FORMS["single"], kinds={last: "frozen"}), FORMS["autoep"])
    with pytest.raises(MismatchError, match=r"(?s)different hyper-parameters.*experts\.w3"):
        in_form_of(Held(FORMS["single"], decayed=FORMS["single"].keys() - {last}), FORMS["autoep"])


def test_a_model_without_experts_is_left_alone() -> None:
    held = Held(FORMS["fused"])
    assert in_form_of(held, FORMS["fused"]) is held
    assert in_form_of(held, {"model.norm.weight": (HIDDEN,)}) is held
    other = Held({"model.norm.weight": (HIDDEN,)})
    assert in_form_of(other, FORMS["autoep"]) is other


def entry(**changes: Any) -> dict[str, Any]:
    """A layer as DeepSpeed records it, as far as it is read."""
    dealt = [{"rank": 0, "experts": [0, 1]}, {"rank": 1, "experts": [2, 3]}]
    layer = {"module_path": LAYER, "num_experts": 4, "ep_size": 2, "expert_placement": {"ranks": dealt}}
    return layer | changes


def test_recorded_layers() -> None:
    layers = read_autoep_layers([entry()], Path("x"))
    part = layers.part(f"{LAYER}.experts.w1", 1, (2, INNER, HIDDEN))
    assert part == ((4, INNER, HIDDEN), 2 * INNER * HIDDEN)
    assert layers.expert_of(f"{LAYER}.experts.w2.3") == (f"{LAYER}.experts.w2", 3)
    assert layers.expert_of(f"{LAYER}.gate.weight") is None
    assert not read_autoep_layers(None, Path("x")) and AutoEpLayers().ep == 1
    crossed = [{"rank": 0, "experts": [0, 2]}, {"rank": 1, "experts": [1, 3]}]
    for strange in (entry(expert_placement={"ranks": crossed}), entry(num_experts=5), {"a": 1}):
        with pytest.raises(UnsupportedError, match="AutoEP"):
            read_autoep_layers([strange], Path("x"))


def test_a_router_is_saved_under_two_names() -> None:
    layers = read_autoep_layers([entry()], Path("x"))
    keys = ["router.gate.weight", "router.bias", "gate.gate.weight", "gate.bias", "shared_experts_gate.weight"]
    assert layers.second_names([f"{LAYER}.{key}" for key in keys]) == {
        f"{LAYER}.gate.gate.weight": f"{LAYER}.router.gate.weight",
        f"{LAYER}.gate.bias": f"{LAYER}.router.bias",
    }
