"""``ucp export``: what it writes of a real engine's checkpoint, what it says, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import Result
from native_files import NativeModel, NativeParameter, NativeRun, write_native
from safetensors.torch import load_file

import ucp_deepspeed
from ucp_deepspeed.errors import ConfigError
from ucp_deepspeed.testing.ranks import get_pool
from ucp_deepspeed.testing.runs import Run, train

Ucp = Callable[..., Result]

LEFT_OUT = (
    "left out: optimizer states (exp_avg, exp_avg_sq, step), hyper-parameters, counters of steps and samples, "
    "the scheduler, the client state (epoch), states of random numbers"
)


def configured(folder: Path, **changes: object) -> Path:
    folder.mkdir()
    told = {"model_type": "mlp", "dtype": "float32", "text_config": {"torch_dtype": "float32"}, **changes}
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"not this one")
    return folder


def test_masters_are_rounded_once_and_the_configuration_says_so(ucp: Ucp, saved: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "base")
    with ucp_deepspeed.open_checkpoint(saved) as checkpoint:
        masters = {name: checkpoint.read(name) for name in checkpoint.parameters}
        kinds = {name: held.kind for name, held in checkpoint.parameters.items()}
    for title, options, dtype in (
        ("usual", [], torch.bfloat16),
        ("weights", ["--source", "weights"], torch.bfloat16),
        ("masters", ["--source", "master"], torch.float32),
        ("fp32", ["--dtype", "fp32"], torch.float32),
        ("fp16", ["--dtype", "fp16"], torch.float16),
    ):
        done = ucp("export", saved, tmp_path / title, "--config-from", config, *options)
        assert done.exit_code == 0 and LEFT_OUT in done.stderr, done.output
        assert f"{tmp_path / title}: read" in done.stdout
        found = load_file(tmp_path / title / "model.safetensors")
        for name, master in masters.items():
            kept = kinds[name] != "trainable" and "--dtype" not in options
            expected = master if kept or not master.is_floating_point() else master.to(dtype)
            assert torch.equal(found[name], expected) and found[name].dtype == expected.dtype, (title, name)
        told = json.loads((tmp_path / title / "config.json").read_text())
        assert told["dtype"] == told["text_config"]["torch_dtype"] == str(dtype).removeprefix("torch.")
        assert told["model_type"] == "mlp"
        assert {path.name for path in (tmp_path / title).iterdir()} == {
            "model.safetensors",
            "config.json",
            "tokenizer.json",
        }


def test_without_a_configuration_a_line_says_so(ucp: Ucp, saved: Path, tmp_path: Path) -> None:
    done = ucp("export", saved, tmp_path / "hf")
    assert done.exit_code == 0 and "no config.json was found" in done.stderr and "--config-from" in done.stderr
    assert [path.name for path in (tmp_path / "hf").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--adapter", "--to", "torch"], "--adapter writes what PEFT loads"),
        (["--adapter"], "holds no LoRA adapter of PEFT with the name 'default'"),
        (["--max-shard-size", "five"], "expected a size, such as 5GB, 500MB or 1GiB (found 'five')"),
        (["--max-shard-size", "0"], "expected a size"),
        (
            ["--source", "weights", "--dtype", "fp32"],
            "the weights of this run are bf16: fp32 is written from the masters",
        ),
        (["--config-from", "nowhere"], "nowhere has no config.json"),
        (["--to", "torch", "--config-from", "nowhere"], "a file for torch has no configuration beside it"),
    ],
)
def test_what_is_refused_leaves_nothing(options: list[str], told: str, ucp: Ucp, saved: Path, tmp_path: Path) -> None:
    done = ucp("export", saved, tmp_path / "out", *options)
    assert done.exit_code == 2 and told in done.stderr, done.output
    assert list(tmp_path.iterdir()) == []


def test_places_that_are_taken(ucp: Ucp, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    done = ucp("export", saved, tmp_path / "taken")
    assert done.exit_code == 2 and "taken exists already; nothing was written" in done.stderr
    done = ucp("export", saved, saved / "step3" / "hf")
    assert done.exit_code == 2 and "lies in the checkpoint that is read" in done.stderr


def checkpoint_of(folder: Path, **tensors: torch.Tensor) -> Path:
    parameters = [
        NativeParameter(name, tensor, {"exp_avg": torch.ones_like(tensor)}) for name, tensor in tensors.items()
    ]
    return write_native(folder, NativeModel(tuple(parameters)), NativeRun(dp=2, stage=1))


def test_what_fp16_cannot_hold_is_an_error(ucp: Ucp, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "run", **{"a.weight": torch.tensor([1.0, 7e4, 3.0]), "b.weight": torch.ones(4)})
    for to in ("hf", "torch"):
        done = ucp("export", source, tmp_path / to, "--dtype", "fp16", "--to", to)
        assert done.exit_code == 2 and "a.weight: 1 of 3 numbers" in done.stderr and "b.weight" not in done.stderr
        assert not (tmp_path / to).exists()
        assert ucp("export", source, tmp_path / to, "--dtype", "bf16", "--to", to).exit_code == 0


def test_layers_of_a_pipeline_are_no_names_of_a_model(ucp: Ucp, tmp_path: Path) -> None:
    source = checkpoint_of(tmp_path / "run", **{"0.weight": torch.ones(3), "1.weight": torch.ones(4)})
    done = ucp("export", source, tmp_path / "hf")
    assert done.exit_code == 2 and "names of a pipeline's layers" in done.stderr and "--spec FILE" in done.stderr
    assert ucp("export", source, tmp_path / "torch", "--to", "torch").exit_code == 0
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        'family: flat\nnames:\n  pipeline:\n    - {from: "{n}.**", to: "model.layers.{n}.**"}\n'
        "rules:\n  - {match: model.layers.*.weight, pattern: replicate}\n"
    )
    assert ucp("export", source, tmp_path / "hf", "--spec", spec).exit_code == 0
    assert set(load_file(tmp_path / "hf" / "model.safetensors")) == {"model.layers.0.weight", "model.layers.1.weight"}


def test_without_the_frozen_parameters_there_is_no_whole_model(ucp: Ucp, tmp_path: Path) -> None:
    """At ZeRO-1 DeepSpeed's own files say nothing of them; the manifest does."""
    run = Run(zero={"stage": 1}, frozen=("linear_in.bias",))
    options = {"exclude_frozen_parameters": True}
    get_pool(1).run(train, run, 1, save=str(tmp_path / "run"), save_options=options, timeout=280)
    for to in ("hf", "torch"):
        done = ucp("export", tmp_path / "run", tmp_path / to, "--to", to)
        assert done.exit_code == 2 and "linear_in.bias: the save left it out" in done.stderr, done.output
        assert "save without exclude_frozen_parameters" in done.stderr and not (tmp_path / to).exists()


def test_a_type_of_model_that_is_no_text(ucp: Ucp, saved: Path, tmp_path: Path) -> None:
    config = configured(tmp_path / "base", model_type=["mlp"])
    assert ucp("export", saved, tmp_path / "hf", "--config-from", config).exit_code == 0


def test_from_python(saved: Path, tmp_path: Path) -> None:
    with ucp_deepspeed.open_checkpoint(saved) as checkpoint:
        left_out = checkpoint.export(tmp_path / "torch", "torch")
        state = checkpoint.state_dict()
        assert LEFT_OUT.removeprefix("left out: ") in ", ".join(left_out)
        found = torch.load(tmp_path / "torch" / "pytorch_model.bin", weights_only=True)
        assert list(state) == list(found) and all(torch.equal(state[name], held) for name, held in found.items())
        assert {held.dtype for held in found.values()} == set(state.dtypes.values())
        wide = checkpoint.state_dict(torch.float32)
        assert state["linear_in.weight"].dtype == torch.bfloat16
        assert torch.equal(wide["linear_in.weight"], checkpoint.read("linear_in.weight"))
        assert "nothing" not in state and len(state) == len(found)
        with pytest.raises(ConfigError, match=r"dtype: expected one of fp32, bf16, fp16 \(found 'torch.int8'\)"):
            checkpoint.state_dict(torch.int8)
        with pytest.raises(ConfigError, match="to: expected one of hf, torch, adapter"):
            checkpoint.export(tmp_path / "other", "gguf")  # type: ignore[arg-type]


def test_other_adapters_are_told(ucp: Ucp, tmp_path: Path) -> None:
    """PEFT's ``default`` is exported; one that is trained beside it is named, and so are those of a run without a ``default``."""
    config = tmp_path / "config"
    config.mkdir()
    (config / "adapter_config.json").write_text("{}")
    for title, adapters in (("both", ("default", "second")), ("other", ("second",))):
        names = [f"q.lora_{matrix}.{adapter}.weight" for adapter in adapters for matrix in "AB"]
        checkpoint_of(tmp_path / title, **dict.fromkeys(names, torch.ones(2, 3)))
    done = ucp("export", tmp_path / "both", tmp_path / "a", "--adapter", "--config-from", config)
    assert done.exit_code == 0 and "the adapters second, trained too, are left out" in done.stderr, done.output
    with ucp_deepspeed.open_checkpoint(tmp_path / "both") as checkpoint:
        assert "second" in checkpoint.export(tmp_path / "c", "adapter", config_from=config)[-1]
    done = ucp("export", tmp_path / "other", tmp_path / "b", "--adapter", "--config-from", config)
    assert done.exit_code == 2 and "it holds 'second'" in done.stderr and "save_pretrained" in done.stderr, done.output
