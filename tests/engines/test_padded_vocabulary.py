"""Rows of padding in a vocabulary. Megatron-Core's softmax counts their logits: a run goes on as it was only with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import LAST_STEP, STEP, Source, make_source, warnings_of_loading

from ucp_deepspeed.checkpoint import open_checkpoint
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.reading import open_checkpoint as open_tensors
from ucp_deepspeed.testing.ranks import RankPool
from ucp_deepspeed.testing.runs import Run, train
from ucp_deepspeed.transfer.compare import compare
from ucp_deepspeed.transfer.conversion import convert

TOKENS, ROWS = 50, 64
SIZE = {"vocabulary": TOKENS, "vocabulary_multiple": 16, "layers": 1}
"""Padded to 64 rows on one, two and four tensor-parallel ranks."""

RUN = Run("llama", SIZE, tp=2, universal={"enabled": True, "load": "always", "vocabulary_size": TOKENS})
HEAD = "output_layer.weight"
ROUNDING = 1e-6
"""Largest accepted relative difference of a loss: ranks add up in another order, in float32. Without the padding it is 6e-4."""

Ranks = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make_source(RUN, 2, tmp_path_factory.mktemp("padded"))


def head_of(folder: Path, rows: int) -> dict[str, torch.Tensor]:
    """Return the states of the output layer, with so many rows."""
    with open_tensors(folder, vocabulary_size=rows) as opened:
        return {state: opened.read(HEAD, state) for state in ("fp32", "exp_avg", "exp_avg_sq")}


@pytest.mark.parametrize(
    ("world", "target"),
    [(2, {"zero": {"stage": 2}}), (4, {"zero": {"stage": 3}}), (2, {"tp": 1}), (4, {"tp": 4})],
    ids=["zero-2", "dp2-zero-3", "tp1-dp2", "tp4"],
)
def test_as_many_rows(world: int, target: dict[str, object], source: Source, ranks: Ranks, tmp_path: Path) -> None:
    """All rows arrive bit for bit. The losses are those of the run without a stop, bit for bit where only the stage changes."""
    folder, run = str(source.folder), replace(RUN, seed=5, **target)  # type: ignore[arg-type]
    outcome = ranks(world).run(train, run, LAST_STEP, load=folder, save=str(tmp_path), save_first=True)[0]
    views = [UniversalView.of(open_checkpoint(path), vocabulary_size=ROWS) for path in (source.folder, tmp_path)]
    assert compare(*views) == []
    saved = head_of(source.folder, ROWS)
    assert all(rows[TOKENS:].any() for rows in saved.values())
    expected = {step: source.losses[step] for step in range(STEP + 1, LAST_STEP + 1)}
    assert outcome.losses == (expected if world == run.tp == RUN.tp else pytest.approx(expected, rel=ROUNDING))
    assert open_checkpoint(tmp_path).vocabulary_size == TOKENS


@pytest.mark.parametrize(("multiple", "rows"), [(20, 80), (7, 56)])
def test_another_number_of_rows(multiple: int, rows: int, source: Source, ranks: Ranks, tmp_path: Path) -> None:
    """Rows that both have arrive, further ones of the model are zero, and it is told."""
    run = replace(RUN, seed=5, tp=4 if rows == 80 else 2, size={**SIZE, "vocabulary_multiple": multiple})
    pool = ranks(run.tp)
    warnings, _ = pool.run(warnings_of_loading, run, STEP, str(source.folder))[0]
    told = "16 of the model's become zero" if rows == 80 else "8 of the checkpoint's are left out"
    assert [f"64 rows in the checkpoint and {rows} in the model, of which 50 aren't" in line for line in warnings] == [
        True
    ]
    assert told in warnings[0] and warnings[0].startswith("embedding.word_embeddings.weight, output_layer.weight: ")
    pool.run(train, run, STEP, load=str(source.folder), save=str(tmp_path), save_first=True)
    saved, found = head_of(source.folder, ROWS), head_of(tmp_path, rows)
    both = min(rows, ROWS)
    for state, values in found.items():
        assert torch.equal(values[:both], saved[state][:both]) and not values[both:].any(), state


def test_a_universal_checkpoint_holds_no_padding(source: Source, ranks: Ranks, tmp_path: Path) -> None:
    convert(UniversalView.of(open_checkpoint(source.folder)), tmp_path / "u" / "step")
    (tmp_path / "u" / "latest").write_text("step")
    warnings, _ = ranks(2).run(warnings_of_loading, RUN, STEP, str(tmp_path / "u"))[0]
    assert (
        "50 rows in the checkpoint and 64 in the model" in warnings[0]
        and "14 of the model's become zero" in warnings[0]
    )
    ranks(2).run(train, RUN, STEP, load=str(tmp_path / "u"), save=str(tmp_path / "b"), save_first=True)
    saved, found = head_of(source.folder, ROWS), head_of(tmp_path / "b", ROWS)
    assert all(torch.equal(found[key][:TOKENS], saved[key][:TOKENS]) and not found[key][TOKENS:].any() for key in saved)


def double_all(src: Mapping[str, torch.Tensor], dst: torch.nn.Module) -> None:
    """A ``custom_load_fn`` for a model that hasn't changed."""
    with torch.no_grad():
        for name, param in dst.named_parameters():
            param.copy_(2 * src[name])


@pytest.mark.parametrize("tp", [1, 4])
def test_a_load_function_of_the_users_own(tp: int, source: Source, ranks: Ranks, tmp_path: Path) -> None:
    """It sees the padding too, so that the shapes are those of the model."""
    options, run = {"custom_load_fn": double_all}, replace(RUN, tp=tp)
    ranks(4).run(train, run, STEP, load=str(source.folder), save=str(tmp_path), save_first=True, options=options)
    saved, found = head_of(source.folder, ROWS), head_of(tmp_path, ROWS)
    assert torch.equal(found["fp32"], 2 * saved["fp32"]) and torch.equal(found["exp_avg"], saved["exp_avg"])


@pytest.mark.covers("megatron_deepspeed_gpt", shows="a padded vocabulary by `original_vocab_size`: the losses go on")
def test_what_megatron_deepspeed_records(ranks: Ranks, tmp_path: Path) -> None:
    """Saved without the plugin; ``original_vocab_size`` alone tells what is padding."""
    from ucp_deepspeed.testing.megatron_deepspeed import universal_checkpoint_info

    run = Run("megatron-deepspeed-gpt", SIZE, tp=2, universal=None)
    saved = {"universal_checkpoint_info": universal_checkpoint_info(TOKENS, False, False)}
    saving = {"save": str(tmp_path), "save_at": STEP, "client_state": saved}
    expected = ranks(2).run(train, run, STEP + 2, **saving)[0].losses
    again = replace(run, universal={"enabled": True, "load": "always"}, zero={"stage": 2}, seed=5)
    losses = ranks(2).run(train, again, STEP + 2, load=str(tmp_path))[0].losses
    assert losses == {step: expected[step] for step in losses} and len(losses) == 2
