"""Copies that pipeline stages hold of one parameter: seen in the files as they are, and never taken for one another."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import pytest
import torch
import torch.distributed as dist
from click.testing import CliRunner
from native_files import NativeModel, NativeParameter, NativeRun, add_manifest, write_native

from ucp_deepspeed.checkpoint import Checkpoint, open_checkpoint
from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, read_manifest
from ucp_deepspeed.checkpoint.universal import atoms_output
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.cli import main
from ucp_deepspeed.layout import Topology
from ucp_deepspeed.transfer import FileReader, gather
from ucp_deepspeed.transfer import conversion as convert_module
from ucp_deepspeed.transfer.conversion import convert
from ucp_deepspeed.transfer.planning.targeting import plan_target
from ucp_deepspeed.transfer.processes import taking_part
from ucp_deepspeed.transfer.stage_copies import Seen, look, may_differ, merge, settle, with_copies_of

WORD, GAIN, LAST = "tied_modules.words.weight", "tied_modules.words.gain", "2.tail"
RUN = NativeRun(stage=1, dp=2, pp=2)


def model_with(gain: float, moment: float, word: float = 0.0) -> NativeModel:
    """Layers 0 and 3 share a module; ``gain`` and ``moment`` are of what isn't tied in it."""
    generator = torch.Generator().manual_seed(3)
    values = {name: torch.randn(shape, generator=generator) for name, shape in {WORD: (5, 3), LAST: (7, 2)}.items()}
    values[WORD] += word
    parameters = [
        NativeParameter(name, value, {"exp_avg": value * 2, "exp_avg_sq": value.square()})
        for name, value in values.items()
    ]
    held = torch.full((4,), gain), torch.full((4,), moment)
    parameters.insert(1, NativeParameter(GAIN, held[0], {"exp_avg": held[1], "exp_avg_sq": held[1].abs()}))
    return replace(NativeModel(tuple(parameters)), layers=4, tied={"words": (0, 3)})


def saved(tmp_path: Path, first: NativeModel, last: NativeModel) -> Checkpoint:
    """A checkpoint whose stages held two models' values."""
    folder, other = (write_native(tmp_path / str(place), model, RUN) for place, model in enumerate((first, last)))
    for path in other.glob("*_mp_rank_01_optim_states.pt"):
        path.replace(folder / path.name)
    return open_checkpoint(folder)


def held(checkpoint: Checkpoint, name: str, state: str) -> torch.Tensor:
    view = UniversalView.of(checkpoint)
    flat = torch.empty(view.logical_shape(name)).flatten()
    gather(view, name, state, 0, flat, FileReader())
    return flat


def test_equal_copies(tmp_path: Path) -> None:
    """Each partition of the two stages is cut at other elements; a manifest says it, so that nothing is read."""
    model = model_with(1.0, 0.5)
    checkpoint = saved(tmp_path, model, model)
    copies = may_differ(checkpoint)
    assert copies == {WORD: (0, 1), GAIN: (0, 1)}
    found = look(checkpoint, copies)
    assert found == {name: Seen(trained=frozenset((0, 1))) for name in copies}
    assert settle(checkpoint, copies, found, "error").stages == {}
    add_manifest(checkpoint.path, model, RUN, layouts=True)
    assert may_differ(open_checkpoint(checkpoint.path)) == {}


@pytest.mark.parametrize("trained", [0, 1])
def test_the_only_trained_copy_is_taken(tmp_path: Path, trained: int) -> None:
    models = [model_with(0.0, 0.0), model_with(2.0, -0.5)]
    checkpoint = saved(tmp_path, models[1 - trained], models[trained])
    copies = may_differ(checkpoint)
    parts = [look(checkpoint, copies, (share, 3)) for share in range(3)]
    settled = settle(checkpoint, copies, merge(parts), "error")
    assert settled.stages == {GAIN: trained} and not settled.problems
    assert "differ in exp_avg, exp_avg_sq, fp32; " in settled.told[0]
    read = with_copies_of(checkpoint, settled.stages)
    assert (held(read, GAIN, "fp32") == 2).all() and (held(read, GAIN, "exp_avg") == -0.5).all()
    assert torch.equal(held(read, WORD, "fp32"), held(checkpoint, WORD, "fp32"))
    assert sorted(name for group in read.groups for name in group.names) == sorted((WORD, GAIN, LAST))


def test_copies_that_were_both_trained(tmp_path: Path) -> None:
    models = [model_with(1.0, 1.0), model_with(1.0, 1.0, word=0.5)]
    checkpoint = saved(tmp_path, *models)
    copies = may_differ(checkpoint)
    found = look(checkpoint, copies)
    [problem] = settle(checkpoint, copies, found, "error").problems
    assert problem.startswith(f"{WORD}: the copies of pipeline stages 0 and 1 differ in ")
    assert problem.endswith("trained on stages 0 and 1")
    for how, stage in (("first", 0), ("mean", 0), ("last", 1)):
        settled = settle(checkpoint, copies, found, how)  # type: ignore[arg-type]
        assert settled.stages == {WORD: stage} and not settled.problems
        read = with_copies_of(checkpoint, settled.stages)
        assert torch.equal(held(read, WORD, "fp32"), models[stage][WORD].fp32.flatten())


def test_weights_alone(tmp_path: Path) -> None:
    """States that differ don't matter then, and still tell which copy was trained."""
    checkpoint = saved(tmp_path, model_with(1.0, 0.0), model_with(1.0, 0.5))
    copies = may_differ(checkpoint)
    assert settle(checkpoint, copies, look(checkpoint, copies), "error", states=False).stages == {}
    assert settle(checkpoint, copies, look(checkpoint, copies), "error").stages == {GAIN: 1}


def test_what_the_commands_say(tmp_path: Path) -> None:
    checkpoint = saved(tmp_path, model_with(0.0, 0.0), model_with(2.0, 0.5))
    remarks = [plan_target(checkpoint, Topology(1, pp, 2, 1)).remarks for pp in (1, 2)]
    assert [sum("stages hold copies of" in remark for remark in found) for found in remarks] == [1, 0]
    add_manifest(checkpoint.path, model_with(2.0, 0.5), RUN, layouts=True)
    manifest = read_manifest(checkpoint.path)
    assert manifest is not None
    changed = manifest.model_copy(update={"differing_copies": (GAIN,)})
    (checkpoint.path / MANIFEST_NAME).write_text(changed.model_dump_json())
    assert may_differ(open_checkpoint(checkpoint.path)) == {GAIN: (0, 1)}
    shown = CliRunner().invoke(main, ["inspect", str(checkpoint.path)])
    assert shown.exit_code == 0 and f"differs over pipeline stages: {GAIN}" in shown.output


def test_ranks_that_convert_agree(tmp_path: Path) -> None:
    """Each looks at a part of the elements, and one alone sees where the copies differ."""
    first, last = model_with(0.0, 0.0), model_with(0.0, 0.0)
    last[GAIN].fp32[-1] = 2.0
    last[GAIN].states["exp_avg"][-1] = 0.5
    checkpoint = saved(tmp_path, first, last)
    view, store, opens = UniversalView.of(checkpoint), dist.HashStore(), Lock()
    assert len({bool(look(checkpoint, {GAIN: (0, 1)}, (rank, 2))[GAIN].differing) for rank in (0, 1)}) == 2

    def one(rank: int) -> None:
        with taking_part(store, rank, 2) as ranks:
            convert(view, tmp_path / "u", ranks=ranks)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        # Threads share torch's list of allowed classes.
        for module, name in ((convert_module, "look"), (convert_module, "settle"), (atoms_output, "describe")):
            patch.setattr(module, name, partial(locked, opens, getattr(module, name)))
        list(pool.map(one, range(2)))
    assert torch.equal(held(open_checkpoint(tmp_path / "u"), GAIN, "fp32"), last[GAIN].fp32)


def locked(lock: Lock, function: Callable[..., Any], *args: Any, **named: Any) -> Any:
    with lock:
        return function(*args, **named)
