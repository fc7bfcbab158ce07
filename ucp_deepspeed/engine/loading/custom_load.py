"""``custom_load_fn``: the user's own function moves the weights; here it works from any topology.

DeepSpeed calls ``custom_load_fn(src=<the rank's state dict>, dst=engine.module)`` in place of ``load_state_dict``. This
module makes the same call after everything that fits has been restored, with a state dict made for this rank's tensor-parallel
share. Then the masters take over what the function has changed in the model's weights; all else keeps its exact fp32 value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import deepspeed
import torch
from deepspeed.runtime.pipe.engine import PipelineEngine

from ucp_deepspeed.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT
from ucp_deepspeed.checkpoint.torch_files.safe_load import NAMED_DTYPES, PRECISIONS
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.deepspeed_surface import autoep_layers
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.model import EngineModel
from ucp_deepspeed.engine.optimizers import EngineOptimizer
from ucp_deepspeed.errors import UnsupportedError
from ucp_deepspeed.plan import Fragment, Target, plan_tensor
from ucp_deepspeed.transfer import FileReader, run_copies


def check_custom_load(engine: Engine) -> None:
    """Refuse pipelines, as DeepSpeed does, and experts of AutoEP: a rank's modules have some, the state dict all of them."""
    if any(autoep_layers(engine.module)):
        raise UnsupportedError("custom_load_fn can't be used with layers of DeepSpeed's AutoEP in this release")
    if isinstance(engine, PipelineEngine):
        raise UnsupportedError("custom_load_fn can't be used with pipeline parallelism, as with DeepSpeed itself")


def local_state_dict(checkpoint: Checkpoint, model: EngineModel) -> dict[str, torch.Tensor]:
    """Return weights and buffers under the checkpoint's names, each as this rank's tensor-parallel shard with its padding.

    Trained weights have the model's precision; others have the dtype in which they were saved.

    Raises:
        SpecError: nothing tells the layouts that another tensor-parallel size needs.
        MismatchError: a parameter can't be cut over the model's tensor-parallel ranks.
    """
    degree, reader = model.topology.tp, FileReader(checkpoint.versions)
    view = UniversalView.of(checkpoint, model.spec, model.vocabulary_size, degree).with_padding()
    layouts = view.layouts_on(degree)
    found: dict[str, torch.Tensor] = {}
    for name, logical in view.logical_of.items():
        parameter, layout = view.parameters[logical], layouts[logical]
        if not parameter.states:
            continue
        rank = model.rank % degree
        shape = view.patterns[logical].local_shapes(view.logical_shape(logical), degree)[rank]
        trained = parameter.kind == "trainable"
        dtype = PRECISIONS[model.precision] if trained else NAMED_DTYPES[parameter.states[WEIGHT]]
        flat, state = torch.zeros(prod(shape), dtype=dtype, device="cpu"), MASTER if trained else WEIGHT
        target = Target(layout, rank, (Fragment(0, flat.numel(), None, 0),))
        run_copies(plan_tensor(view.source(logical, state), target, state), reader, lambda _, flat=flat: flat)  # type: ignore[misc]
        found[name] = flat.view(shape)
    reader.finish()
    return found


def run_custom_load(
    engine: Engine,
    model: EngineModel,
    optimizer: EngineOptimizer,
    function: Callable[..., None],
    source: dict[str, torch.Tensor],
) -> None:
    """Call the user's function with whole weights, and take over its changes into the masters. Collective.

    Raises:
        Exception: the function's own; on the other ranks, that it failed.
    """
    with agreement(), deepspeed.zero.GatheredParameters(list(engine.module.parameters()), modifier_rank=0):
        function(src=source, dst=engine.module)
    with torch.no_grad():
        with agreement():
            optimizer.begin()
            for master, live in _pairs(model, optimizer):
                weight = live.to(master.device)  # an offloaded master is elsewhere
                changed = weight != master.to(weight.dtype)
                master[changed] = weight[changed].to(master.dtype)
            optimizer.make_weights()
        optimizer.send_weights()
    optimizer.end()


def _pairs(model: EngineModel, optimizer: EngineOptimizer) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield runs of this rank's masters, each with the weights that were made of it."""
    for slot in optimizer.slots():
        master = slot.master.data.view(-1)
        for name, part in slot.fragments():
            weight, held = model.tensors[name].held()
            first = model.tensors[name].start + part.local_start
            for _, fragment in held.fragments():
                start = max(first, fragment.local_start)
                stop = min(first + part.numel, fragment.local_start + fragment.numel)
                if start < stop:
                    mine = part.buffer_start + start - first
                    theirs = fragment.buffer_start + start - fragment.local_start
                    yield master[mine : mine + stop - start], weight.view(-1)[theirs : theirs + stop - start]
