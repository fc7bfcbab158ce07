"""Hugging Face models that DeepSpeed's automatic tensor parallelism (AutoTP) cuts, in real engines.

A wrong cut of a fused tensor keeps every byte and ruins the model. So the oracle is a plain model without DeepSpeed that is
given the whole weights, joined by the family's spec: it has to say the same about some tokens as the engines do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from checkpoints import differences
from safetensors.torch import load_file

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.errors import MismatchError, SpecError, UnsupportedError
from ucp_deepspeed.language import load_spec
from ucp_deepspeed.language.families import spec_folder
from ucp_deepspeed.layout.pattern import Shard
from ucp_deepspeed.testing.huggingface_models import FAMILIES, build_huggingface, causal_logits
from ucp_deepspeed.testing.ranks import RankError, RankPool
from ucp_deepspeed.testing.runs import VOCABULARY, Run, batch_of, build_engine, train_step
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

Ranks = Callable[[int], RankPool]

STEPS = 2
"""Trained before the source is saved."""

BOUND = 1e-5
"""Largest accepted difference of logits of about 1 to 5, in float32: sums over ranks run in another order."""

UNIVERSAL = {"enabled": True, "load": "always"}


def hugging_face(family: str, tp: int, stage: int = 1, **changes: Any) -> Run:
    """A run of a family; ``changes`` are to the model's configuration."""
    return Run("huggingface", {"family": family, **changes}, tp=tp, zero={"stage": stage}, universal=UNIVERSAL)


def save_after(run: Run, steps: int, save: str, tag: str, load: str | None = None) -> torch.Tensor:
    """On a rank: build, load if asked to, train, save; returns the engine's logits then."""
    engine = build_engine(run)
    if load is not None:
        engine.load_checkpoint(load)
        assert engine.universal_checkpoint_report is not None
    for step in range(1, steps + 1):
        train_step(engine, run, step)
    engine.save_checkpoint(save, tag=tag)
    with torch.no_grad():
        logits = causal_logits(engine, batch_of(run, 100)[:, :-1])
    engine.destroy()
    return logits


def whole_states(checkpoint: Path, folder: Path, spec: str | None = None) -> dict[str, torch.Tensor]:
    """A checkpoint's states, whole, by parameter and state; joined by a spec or by what is recorded."""
    convert(UniversalView.of(open_checkpoint(checkpoint), load_spec(spec) if spec else None), folder)
    return {key: atom for path in folder.glob("atoms-*") for key, atom in load_file(path).items()}


def logits_of_whole(run: Run, checkpoint: Path, folder: Path, spec: str | None) -> torch.Tensor:
    """Return the logits of a plain model that is given the checkpoint's whole weights, joined by a spec or by the record."""
    atoms = whole_states(checkpoint, folder, spec)
    model = build_huggingface(**{"vocabulary": VOCABULARY, "seed": 1, **run.size})
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(atoms[f"{name}/fp32"])
        return causal_logits(model, batch_of(run, 100)[:, :-1])


def check_chain(ranks: Ranks, runs: list[Run], worlds: list[int], folder: Path, spec: str | None) -> None:
    """Save after some steps; then load and save under each further run: the same state, and the oracle's logits everywhere."""
    expected = torch.zeros(0)
    for number, (run, world) in enumerate(zip(runs, worlds, strict=True)):
        load = str(folder / str(number - 1)) if number else None
        found = ranks(world).run(save_after, run, 0 if number else STEPS, str(folder / str(number)), "step", load)
        if number == 0:
            expected = logits_of_whole(run, folder / "0" / "step", folder / "whole", spec)
        else:
            assert differences(folder / "0" / "step", folder / str(number) / "step") == []
        assert max(float((logits - expected).abs().max()) for logits in found) <= BOUND


@pytest.mark.covers(
    "hf_llama",
    "hf_phi3",
    "hf_phi3_medium",
    "hf_gpt_neox",
    "hf_falcon",
    "hf_opt",
    "hf_t5",
    "hf_bert",
    shows="TP 2→1→2, state and logits",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family(family: str, ranks: Ranks, tmp_path: Path) -> None:
    sizes = [2, 1, 2]
    runs = [hugging_face(family, tp) for tp in sizes]
    check_chain(ranks, runs, sizes, tmp_path, FAMILIES[family].spec)


def test_a_tied_head_that_is_cut_by_vocabulary(ranks: Ranks, tmp_path: Path) -> None:
    """As transformers asks for it since 5.18: DeepSpeed records the cut, and the family's spec is refused."""
    whole, cut = (hugging_face("qwen2_tied", tp) for tp in (1, 2))
    cut = replace(cut, config={"tensor_parallel": {"autotp_size": 2, "vocab_parallel_lm_head": True}})
    check_chain(ranks, [cut, whole, cut], [2, 1, 2], tmp_path, None)
    for record in (MANIFEST_NAME, "AutoTP"):
        checkpoint = open_checkpoint(tmp_path / "0")
        assert UniversalView.of(checkpoint).patterns["model.embed_tokens.weight"] == Shard(0)
        with pytest.raises(
            MismatchError, match=rf"{record}(.|\n)*embed_tokens.weight: replicate; recorded was shard on dimension 0"
        ):
            UniversalView.of(checkpoint, load_spec("hf_llama"))
        (tmp_path / "0" / "step" / MANIFEST_NAME).unlink(missing_ok=True)
    with pytest.raises(
        RankError, match=r"embed_tokens.weight: spec 'hf_llama' says replicate(.|\n)*with \"spec\": \"auto\""
    ):
        ranks(2).run(build_engine, replace(cut, universal=UNIVERSAL | {"spec": "hf_llama"}))


CHAIN = ((1, 1), (2, 2), (4, 4), (1, 2))
"""Tensor-parallel sizes, each with a number of ranks."""


@pytest.mark.covers("hf_llama", "hf_phi3", "hf_phi3_medium", shows="TP 1→2→4→1, ZeRO 1, 2, 3")
@pytest.mark.parametrize(
    ("family", "stages"),
    [("llama", (1, 2, 3, 1)), ("llama", (3, 3, 1, 2)), ("phi3", (2, 1, 2, 3)), ("phi3_medium", (3, 2, 3, 1))],
)
def test_other_sizes_and_stages(family: str, stages: tuple[int, ...], ranks: Ranks, tmp_path: Path) -> None:
    """The tensor- and the data-parallel size change, and the ZeRO stage with them."""
    runs = [hugging_face(family, tp, stage) for (tp, _), stage in zip(CHAIN, stages, strict=True)]
    check_chain(ranks, runs, [world for _, world in CHAIN], tmp_path, FAMILIES[family].spec)


def test_states_are_those_of_training_on_one_rank(ranks: Ranks, tmp_path: Path) -> None:
    """Biases of row-parallel layers among them: AutoTP adds them once, and neither they nor their moments are scaled."""
    found = {}
    for tp in (1, 2):
        ranks(tp).run(save_after, hugging_face("gpt_neox", tp), STEPS, str(tmp_path / str(tp)), "step")
        found[tp] = whole_states(tmp_path / str(tp), tmp_path / f"whole-{tp}")
    assert "gpt_neox.layers.0.attention.dense.bias/exp_avg_sq" in found[1]
    assert found[1].keys() == found[2].keys()
    for key, expected in found[1].items():
        torch.testing.assert_close(found[2][key], expected, rtol=0, atol=1e-5 * float(expected.abs().max()), msg=key)


@pytest.mark.covers("hf_llama", "hf_t5", shows="without a manifest")
def test_layouts_without_a_manifest(ranks: Ranks, tmp_path: Path) -> None:
    """DeepSpeed's own record tells all, but for embeddings that are cut its maps; uneven cuts and a kv head that one rank has."""
    for family, changes in (("t5", {}), ("llama", {"num_key_value_heads": 1, "intermediate_size": 41})):
        run = hugging_face(family, 2, **changes)
        expected = ranks(2).run(save_after, run, STEPS, str(tmp_path / family), "step")[0]
        (tmp_path / family / "step" / MANIFEST_NAME).unlink()
        found = logits_of_whole(run, tmp_path / family / "step", tmp_path / f"{family}-whole", spec=None)
        assert float((found - expected).abs().max()) <= BOUND
        one = hugging_face(family, 1, 3, **changes)
        ranks(1).run(save_after, one, 0, str(tmp_path / f"{family}-1"), "step", str(tmp_path / family))
        ranks(2).run(save_after, run, 0, str(tmp_path / f"{family}-2"), "step", str(tmp_path / f"{family}-1"))
        assert differences(tmp_path / family / "step", tmp_path / f"{family}-2" / "step") == []


def test_files_of_versions_that_recorded_nothing(ranks: Ranks, tmp_path: Path) -> None:
    """A named spec has to say how AutoTP cut them: it could only be guessed, and versions differ in what they leave whole."""
    ranks(2).run(save_after, hugging_face("llama", 2), 1, str(tmp_path), "step")
    (tmp_path / "step" / MANIFEST_NAME).unlink()
    expected = UniversalView.of(open_checkpoint(copytree(tmp_path / "step", tmp_path / "as it was")))
    for file in (tmp_path / "step").glob("*model_states.pt"):
        saved = torch.load(file, map_location="cpu", weights_only=False)
        del saved["universal_checkpoint_info"]
        torch.save(saved | {"ds_version": "0.18.9"}, file)
    with pytest.raises(SpecError, match=r"doesn't record how it cut the model.*--spec hf_llama$"):
        UniversalView.of(open_checkpoint(tmp_path))
    assert list(compare(UniversalView.of(open_checkpoint(tmp_path), load_spec("hf_llama")), expected)) == []


def test_a_spec_that_contradicts_the_record(ranks: Ranks, tmp_path: Path) -> None:
    """q, k and v side by side declared as equal parts: every shape agrees, and the model would be ruined."""
    ranks(2).run(save_after, hugging_face("phi3", 2), 0, str(tmp_path), "step")
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((spec_folder() / "hf_phi3.yaml").read_text().replace("parts: [1, 1, 1]", "parts: [2, 1]"))
    for record in (MANIFEST_NAME, "AutoTP"):
        with pytest.raises(MismatchError, match=rf"{record}(.|\n)*qkv_proj.weight: shard on dimension 0 in parts 2:1"):
            UniversalView.of(open_checkpoint(tmp_path), load_spec(str(wrong)))
        (tmp_path / "step" / MANIFEST_NAME).unlink(missing_ok=True)


def test_fused_heads_that_some_ranks_lack_are_refused(ranks: Ranks, tmp_path: Path) -> None:
    """Two kv heads on four ranks: the last two have nothing of q, k and v, which is how no cut of parts continues."""
    few = {"num_attention_heads": 8, "num_key_value_heads": 2}
    for tp, kind, words in (
        (1, UnsupportedError, "qkv_proj.weight: its affine map"),
        (2, MismatchError, "qkv_proj.weight"),
    ):
        ranks(tp).run(save_after, hugging_face("phi3_medium", tp, **few), 0, str(tmp_path / str(tp)), "step")
        with pytest.raises(RankError) as caught:
            target = hugging_face("phi3_medium", 4, **few)
            ranks(4).run(save_after, target, 0, str(tmp_path / "4"), "step", str(tmp_path / str(tp)))
        assert isinstance(caught.value.original, kind)
        assert words in str(caught.value.original)
