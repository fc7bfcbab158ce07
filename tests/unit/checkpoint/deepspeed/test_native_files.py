"""The oracle writer against reality: its files hold what real DeepSpeed engines write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from native_files import Cut, NativeModel, NativeParameter, NativeRun
from native_files.described import held_by
from native_files.files import model_states, rank_files

from ucp_deepspeed.testing.models import build_mlp
from ucp_deepspeed.testing.ranks import fp16_on_cpu, get_pool, reset_parallel_state
from ucp_deepspeed.testing.runs import VOCABULARY, Run, build_engine

STATES = ("exp_avg", "exp_avg_sq")
LOSS_SCALING = ("cur_iter", "cur_scale", "last_overflow_iter", "scale_window")
FREE_VALUES = frozenset(["ds_config", "lr_scheduler", "global_samples", "clip_grad", "overflow", *LOSS_SCALING])
"""Keys whose values depend on settings and not on the layout; only their types are compared."""

CUTS: dict[str, Cut] = {
    "word_embeddings.weight": "rows",
    "output_layer.weight": "rows",
    "linear_qkv.weight": "rows",
    "linear_qkv.bias": "rows",
    "linear_fc1.weight": "gate_up",
    "linear_fc1.bias": "gate_up",
    "linear_proj.weight": "columns",
    "linear_fc2.weight": "columns",
}


@dataclass(frozen=True)
class Case:
    """A real run, and the same one as the oracle is told about it."""

    ranks: int
    run: Run
    native: Mapping[str, Any] = field(default_factory=dict)

    @property
    def donor(self) -> Run:
        """The run in a layout of which DeepSpeed's own accessors read whole optimizer states correctly."""
        zero = {key: value for key, value in self.run.zero.items() if key != "round_robin_gradients"}
        return replace(self.run, zero=zero, groups="one")


def mlp(**changes: Any) -> Run:
    return Run(**{"universal": None, **changes})


def llama(**changes: Any) -> Run:
    return Run(**{"model": "llama", "universal": None, **changes})


def pipeline(**changes: Any) -> Run:
    """Two stages, the first of which has one layer more if they are odd; the word embedding is tied to the output."""
    return Run(**{"model": "gpt", "pp": 2, "partition": "uniform", "universal": None, **changes})


CASES = {
    "tp2dp2 zero-1": Case(4, llama(tp=2, precision="bf16")),
    "tp4 zero-2": Case(4, llama(tp=4, zero={"stage": 2}, precision="bf16")),
    "zero-3": Case(2, llama(zero={"stage": 3, "sub_group_size": 3000}, precision="bf16"), {"sub_group_size": 3000}),
    "zero-3 tp2": Case(4, llama(tp=2, zero={"stage": 3})),
    "plain tp2": Case(2, llama(tp=2, zero={"stage": 0})),
    "unfused": Case(1, llama(zero={"stage": 0}, precision="bf16")),
    "tied": Case(2, Run(model="gpt", universal=None, zero={"stage": 2}, precision="bf16")),
    "round robin": Case(2, mlp(zero={"stage": 2, "round_robin_gradients": True}), {"round_robin": True}),
    "round robin on 4": Case(
        4, mlp(zero={"stage": 1, "round_robin_gradients": True}, precision="bf16"), {"round_robin": True}
    ),
    "alignment": Case(
        2, mlp(zero={"stage": 1, "parameter_alignment": True}, precision="bf16"), {"parameter_alignment": True}
    ),
    "two groups": Case(2, mlp(groups="decay")),
    "two groups zero-3": Case(2, mlp(zero={"stage": 3}, groups="decay", precision="bf16")),
    "elastic": Case(2, mlp(zero={"stage": 1, "elastic_checkpoint": True}), {"elastic": True}),
    "bf16 optimizer": Case(
        2, mlp(precision="bf16", config={"data_types": {"grad_accum_dtype": "fp32"}}), {"optimizer": "bf16"}
    ),
    "frozen zero-2": Case(2, mlp(zero={"stage": 2}, precision="bf16", frozen=("embedding.weight",))),
    "frozen zero-3": Case(2, mlp(zero={"stage": 3}, precision="bf16", frozen=("odd_offset", "gain"))),
    "fp16": Case(2, mlp(precision="fp16")),
    "fp16 unfused": Case(1, mlp(zero={"stage": 0}, precision="fp16")),
    "pipeline": Case(2, pipeline(size={"layers": 3}, precision="bf16")),
    "pipeline tp2": Case(4, pipeline(tp=2)),
    "pipeline bf16 optimizer": Case(4, pipeline(zero={"stage": 0}, precision="bf16")),
    "pipeline stage 0": Case(2, pipeline(zero={"stage": 0})),
}


def trained(run: Run) -> Any:
    """On a rank: an engine after one step."""
    engine = build_engine(run)
    batch = torch.randint(0, VOCABULARY, (8, 13), generator=torch.Generator().manual_seed(5))
    group = engine.data_parallel_group
    share = batch.chunk(dist.get_world_size(group=group))[dist.get_rank(group=group)]
    if run.pp is not None:
        micro = share.split(engine.train_micro_batch_size_per_gpu())
        engine.train_batch(iter([(part[:, :-1], part[:, 1:]) for part in micro]))
        return engine
    if run.model == "mlp":
        loss = engine(share[:, :-1], share[:, 1:])
    else:
        from ucp_deepspeed.testing.megatron_models import mean_loss

        loss = mean_loss(engine, share)
    engine.backward(loss)
    engine.step()
    return engine


def local_tensors(engine: Any, states: tuple[str, ...]) -> dict[str, dict[str, torch.Tensor]]:
    """On a rank: master weight and states of each parameter on this tensor-parallel rank, as the live engine gives them."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    optimizer = engine.optimizer
    for name, param in engine.module.named_parameters():
        if not param.requires_grad:
            if hasattr(param, "ds_id"):
                param.all_gather()
            found[name] = {"fp32": param.detach().clone()}
            if hasattr(param, "ds_id"):
                param.partition()
        elif engine.zero_optimization_stage() or hasattr(optimizer, "bf16_groups"):
            found[name] = {"fp32": safe_get_full_fp32_param(param).clone()}
            found[name] |= {state: safe_get_full_optimizer_state(param, state).clone() for state in states}
        else:
            found[name] = _stage0_tensors(optimizer, param)
    return found


def _stage0_tensors(optimizer: Any, param: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the states of one parameter of a one-group optimizer."""
    if hasattr(optimizer, "fp32_groups_flat"):
        position = next(i for i, other in enumerate(optimizer.fp16_groups[0]) if other is param)
        numels = [other.numel() for other in optimizer.fp16_groups[0]]
        flat = optimizer.fp32_groups_flat[0]
        tensors = {"fp32": flat} | {state: optimizer.optimizer.state[flat][state] for state in STATES}
        return {
            key: tensor.detach().split(numels)[position].view(param.shape).clone() for key, tensor in tensors.items()
        }
    master, base = param, optimizer
    if hasattr(optimizer, "fp32_groups"):
        position = next(i for i, other in enumerate(optimizer.fp16_groups[0]) if other is param)
        master, base = optimizer.fp32_groups[0][position], optimizer.optimizer
    return {"fp32": master.detach().clone()} | {state: base.state[master][state].clone() for state in STATES}


def save(run: Run, donor: Run, folder: str) -> dict[str, dict[str, torch.Tensor]]:
    """On a rank: train a step, save, and tell this rank's whole (along data parallelism) tensors."""
    with fp16_on_cpu():
        engine = trained(run)
        engine.save_checkpoint(folder, tag="saved")
        told = local_tensors(engine, STATES if run == donor else ())
        engine.destroy()
        if run != donor:
            engine = trained(donor)
            of_donor = local_tensors(engine, STATES)
            # Another grouping trains with other hyper-parameters, so only the moments are the same; round robin only moves.
            own = told if run.groups != donor.groups else {}
            told = {name: tensors | own.get(name, {}) for name, tensors in of_donor.items()}
            engine.destroy()
        return told


def whole_model(case: Case, told: list[dict[str, dict[str, torch.Tensor]]], folder: Path) -> NativeModel:
    """The logical model, from the local tensors of each tensor-parallel rank; in a pipeline, of the ranks of each stage."""
    tp, stages = case.run.tp, case.run.pp or 1
    parameters: dict[str, NativeParameter] = {}
    for first in range(0, len(told), len(told) // stages):
        for name in told[first]:
            cut = cut_of(name, case.run)
            of_ranks = [told[first + rank][name] for rank in range(tp)]
            joined = {key: joined_tensor([tensors[key] for tensors in of_ranks], cut) for key in of_ranks[0]}
            master = joined.pop("fp32").float()
            frozen = name in case.run.frozen
            parameters.setdefault(name, NativeParameter(name, master, joined, cut, frozen=frozen))
    held = tuple(parameters.values())
    real = load(next(iter(sorted(folder.glob("*mp_rank_00_model_states.pt")))))
    if case.run.pp is not None:
        assert real["buffer_names"] == []
        layers = 4 + case.run.size.get("layers", 2)
        return NativeModel(
            held, extra_state=layers_without_value(folder), layers=layers, tied={"embedding": (0, layers - 1)}
        )
    buffers = {name: real["module"][name] for name in real["buffer_names"]}
    return NativeModel(held, buffers, extra_state=tuple(key for key, value in real["module"].items() if value is None))


def layers_without_value(folder: Path) -> tuple[str, ...]:
    """Keys of a pipeline's layer files whose value is None."""
    files = {int(path.name.split("-")[0].removeprefix("layer_")): load(path) for path in folder.glob("layer_*")}
    return tuple(f"{layer}.{key}" for layer, saved in files.items() for key, value in saved.items() if value is None)


def cut_of(name: str, run: Run) -> Cut:
    """Return the cut of a Megatron-Core model's parameter. A model without gates has a plain first feed-forward layer."""
    cut = next((cut for end, cut in CUTS.items() if name.endswith(end)), "replicated")
    if run.tp == 1:
        return "replicated"
    return "rows" if cut == "gate_up" and run.model == "gpt" else cut


def joined_tensor(locals_: list[torch.Tensor], cut: Cut) -> torch.Tensor:
    if cut == "replicated":
        return locals_[0]
    if cut == "gate_up":
        halves = [local.chunk(2, 0) for local in locals_]
        return torch.cat([gate for gate, _ in halves] + [up for _, up in halves], 0)
    return torch.cat(locals_, 0 if cut == "rows" else 1)


def native_run(case: Case, model: NativeModel) -> NativeRun:
    groups = None
    if case.run.groups == "decay":
        matrices = tuple(p.name for p in model.parameters if p.fp32.ndim > 1)
        groups = (matrices, tuple(p.name for p in model.parameters if p.fp32.ndim <= 1))
    dp, stage = case.ranks // case.run.tp // (case.run.pp or 1), case.run.zero["stage"]
    return NativeRun(case.run.tp, dp, stage, case.run.precision, groups=groups, steps=1, pp=case.run.pp, **case.native)


def differences(real: Any, ours: Any, place: str) -> list[str]:
    """List where two saved objects differ in type, keys, shape, dtype or bytes; NaN of ours stands for padding."""
    if type(real) is not type(ours) and not {type(real), type(ours)} <= {torch.Tensor, torch.nn.Parameter}:
        return [f"{place}: {type(real).__name__} in DeepSpeed's file, {type(ours).__name__} in ours"]
    if isinstance(real, torch.Tensor):
        if real.shape != ours.shape or real.dtype != ours.dtype:
            return [f"{place}: {real.dtype} {tuple(real.shape)}, ours {ours.dtype} {tuple(ours.shape)}"]
        held = ~ours.isnan()
        return [] if torch.equal(real.detach()[held], ours[held]) else [f"{place}: values differ"]
    if isinstance(real, dict):
        if real.keys() != ours.keys():
            return [f"{place}: keys differ: {sorted(map(str, real.keys() ^ ours.keys()))}"]
        compared = [key for key in real if key not in FREE_VALUES]
        return [line for key in compared for line in differences(real[key], ours[key], f"{place}.{key}")]
    if isinstance(real, (list, tuple)):
        if len(real) != len(ours):
            return [f"{place}: {len(real)} items, ours {len(ours)}"]
        return [
            line
            for index, pair in enumerate(zip(real, ours, strict=True))
            for line in differences(*pair, f"{place}[{index}]")
        ]
    if place.endswith("loss_scaler"):
        return [] if vars(real).keys() == vars(ours).keys() else [f"{place}: attributes differ"]
    if ".param_groups[" in place and ".params" not in place:
        return []
    return [] if real == ours else [f"{place}: {real!r}, ours {ours!r}"]


def load(path: Path) -> dict[str, Any]:
    """A file that this test wrote itself."""
    loaded: dict[str, Any] = torch.load(path, weights_only=False)
    return loaded


@pytest.mark.parametrize("name", CASES)
def test_files_are_those_of_a_real_engine(tmp_path: Path, name: str) -> None:
    """Same files; in each the same keys, types, dtypes, shapes, order of flat parameters, and bytes outside of padding."""
    case = CASES[name]
    told = get_pool(case.ranks).run(save, case.run, case.donor, str(tmp_path / "real"))
    real_folder = tmp_path / "real" / "saved"
    model = whole_model(case, told, real_folder)
    run = native_run(case, model)
    found: list[str] = []
    expected: set[str] = set()
    for stage in range(run.pp or 1):
        for tp_rank in range(run.tp):
            files = rank_files(model, run, stage, tp_rank)
            for file, ours in files.items():
                real = load(real_folder / file)
                found += differences(real, ours, file)
                found += order_differences(real, ours, file)
            expected |= files.keys()
    assert {path.name for path in real_folder.iterdir()} == expected
    assert not found, "\n".join(found[:30])


def order_differences(real: Mapping[str, Any], ours: Mapping[str, Any], file: str) -> list[str]:
    """Orders that carry meaning: of the module's parameters, and of the flat groups."""
    if "module" not in real:
        return []
    names = [
        [
            key
            for key, value in (saved["module"] or {}).items()
            if key not in saved["buffer_names"] and value is not None
        ]
        for saved in (real, ours)
    ]
    groups = [[list(named) for named in saved["param_shapes"] or ()] for saved in (real, ours)]
    return [
        f"{file}: order of {what} differs: {a} {b}"
        for what, (a, b) in {"names": names, "groups": groups}.items()
        if a != b
    ]


def fused_state(precision: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a rank: what the module and DeepSpeed's ``FP16_Optimizer`` save after a step by a torch optimizer.

    An engine only takes this class with an optimizer that has to be compiled first.
    """
    from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer

    model = build_mlp(dtype=getattr(torch, precision))
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = FP16_Optimizer(
        base, low_precision_dtype=getattr(torch, precision), dynamic_loss_scale=True, clip_grad=1.0, verbose=False
    )
    master = optimizer.fp32_groups_flat[0]
    master.grad = torch.randn(master.shape, generator=torch.Generator().manual_seed(2))
    base.step()
    saved: dict[str, Any] = optimizer.state_dict()
    return dict(model.state_dict()), saved


@pytest.mark.parametrize(("precision", "name"), [("bfloat16", "bf16"), ("float16", "fp16")])
def test_fused_state_is_that_of_the_real_class(precision: str, name: Any) -> None:
    """``FP16_Optimizer``: one flat buffer without padding, in the model's order."""
    [(module, real)] = get_pool(1).run(fused_state, precision)
    names = [key for key in module if key not in ("calibration", "calls")]
    base = real["optimizer_state_dict"]["state"][0]
    flat = {"fp32": real["fp32_groups_flat"][0].detach()} | {state: base[state] for state in STATES}
    parts = {state: tensor.split([module[key].numel() for key in names]) for state, tensor in flat.items()}
    parameters = []
    for index, key in enumerate(names):
        own = {state: tensors[index].view(module[key].shape) for state, tensors in parts.items()}
        parameters.append(NativeParameter(key, own["fp32"], {state: own[state] for state in STATES}))
        # The first wrapper step decayed the master weights once, and the second moved them: near the weights, not equal.
        assert (own["fp32"] - module[key].float()).abs().max() < 0.02
    model = NativeModel(tuple(parameters))
    run = NativeRun(precision=name, optimizer="fused", steps=1)
    ours = model_states(model, run, held_by(model, run, 0, 0), 0, 0)["optimizer"]
    found = differences(real, ours, "optimizer")
    assert not found, "\n".join(found)


class TiedModel(torch.nn.Module):
    """An embedding that is the output layer too, with a parameter of its own behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(7, 3)
        self.norm = torch.nn.LayerNorm(3)
        self.head = torch.nn.Linear(3, 7, bias=False)
        self.head.weight = self.embedding.weight


def save_tied(stage: int, folder: str) -> dict[str, torch.Tensor]:
    """On a rank: save an engine around a `TiedModel`; returns the whole master weights."""
    reset_parallel_state()
    config = {
        "train_batch_size": 2,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
        "scheduler": {"type": "WarmupLR", "params": {}},
        "zero_optimization": {"stage": stage},
    }
    model = TiedModel()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=list(model.parameters()), config=config)
    engine.save_checkpoint(folder, tag="saved")
    named = engine.module.named_parameters()
    whole = {name: (safe_get_full_fp32_param(param) if stage else param).detach().clone() for name, param in named}
    engine.destroy()
    return whole


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_tied_parameters_are_those_of_a_real_engine(tmp_path: Path, stage: int) -> None:
    """Stored once; the alias is in the module, and listed in the first rank's file under ZeRO. No step was taken."""
    told, *_ = get_pool(2).run(save_tied, stage, str(tmp_path))
    parameters = tuple(NativeParameter(name, tensor) for name, tensor in told.items())
    model = NativeModel(parameters, aliases={"head.weight": "embedding.weight"})
    run = NativeRun(dp=2, stage=stage, steps=0)
    for dp_rank in range(2 if stage == 3 else 1):
        name = f"zero_pp_rank_{dp_rank}_" * (stage == 3) + "mp_rank_00_model_states.pt"
        real = load(tmp_path / "saved" / name)
        ours = model_states(model, run, held_by(model, run, 0, dp_rank), 0, dp_rank)
        found = differences(real, ours, name) + order_differences(real, ours, name)
        assert not found, "\n".join(found)
    shared = real["module"]
    assert (shared["embedding.weight"].data_ptr() == shared["head.weight"].data_ptr()) or stage == 3
