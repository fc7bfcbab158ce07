"""Random streams: each rank's state is saved with the run, in one file for all ranks (`checkpoint/random_files.py`), and restored
or derived anew when it resumes.

On other ranks the live run, as its script has seeded it, tells which ranks share a new stream: ranks that are alike stay alike,
and others differ. This is Megatron's rule where its seeding is used (tensor-parallel ranks share the default stream and differ in
the tracker's). It also keeps together ranks that must decide alike, such as which layers to skip under ZeRO-3.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import sys
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint
from ucp_deepspeed.checkpoint.encoding import encode
from ucp_deepspeed.checkpoint.random_files import (
    Place,
    RandomState,
    committed_path,
    description_of,
    joined,
    parse_state,
    read_state,
    warn_of_uncommitted,
)
from ucp_deepspeed.checkpoint.random_streams import GAUSS, decoded_state, numpy_name, unlike, wrong_with_numpy
from ucp_deepspeed.engine.agreement import agreement
from ucp_deepspeed.engine.deepspeed_types import Engine
from ucp_deepspeed.engine.model import engine_topology, model_parallel_rank
from ucp_deepspeed.errors import DamagedCheckpointError, UnsupportedError

logger = logging.getLogger("ucp_deepspeed")

MEGATRON_MODULES = ("megatron.core.tensor_parallel.random", "megatron.mpu.random")
"""Modules in which Megatron-LM, Megatron-Core and Megatron-DeepSpeed of all ages keep their tracker of named streams."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One live source of random numbers.

    Attributes:
        read: returns its state, as `encode` takes it.
        write: goes on from such a state.
        reseed: begins anew, from a seed of 63 bits.
        identity: equal on ranks that were seeded alike, as far as can be told. None if the stream belongs to the whole run and
            not to a rank: it then resumes exactly on any topology.
    """

    read: Callable[[], Any]
    write: Callable[[Any], object]
    reseed: Callable[[int], object]
    identity: Hashable


def packed_random_state(engine: Engine) -> bytes:
    """Return this rank's state, for `random_states_text` on another rank."""
    state = RandomState(
        place=_place(engine),
        global_steps=engine.global_steps,
        seed=torch.initial_seed(),
        streams={name: encode(stream.read(), name, {}) for name, stream in _live_streams(engine).items()},
    )
    return zlib.compress(json.dumps(state.model_dump()).encode("ascii"), level=1)


def random_states_text(packed: Sequence[bytes], save_id: str) -> str:
    """Return the content of the file with all ranks' states. It is written after DeepSpeed's files and before the manifest,
    without which it doesn't count."""
    return joined([zlib.decompress(each).decode("ascii") for each in packed], save_id)


KEEP_HINT = '"random_state": "keep" loads all else, and leaves the streams as the script has seeded them'


def read_random_state(engine: Engine, checkpoint: Checkpoint) -> RandomState | None:
    """Read this rank's state, which its streams can take over; None if there is none, or none that was committed. Nothing of the
    engine or the streams changes.

    Raises:
        DamagedCheckpointError: the file can't be parsed, isn't what was saved, is of another save, step or rank, or isn't as
            manifest or index say; or a stream can't go on from it.
        FormatError: a later version wrote it.
    """
    rank, listing, global_steps = dist.get_rank(), description_of(checkpoint), checkpoint.run.global_steps
    try:
        path = committed_path(checkpoint.path, rank, listing)
        if path is None:
            if rank == 0:
                warn_of_uncommitted(checkpoint.path, "random streams stay as the script has seeded them")
            return None
        content = read_state(path, rank, None if listing is None else listing.save_id)
        state = None if content is None else parse_state(content, path, rank)
        if state is not None:
            _check_streams(engine, state)
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{error}; {KEEP_HINT}") from error
    if state is not None and state.global_steps != global_steps:
        raise DamagedCheckpointError(
            f"{path} is of step {state.global_steps}, and the checkpoint of step {global_steps}: if it was saved again without "
            f'ucp_deepspeed, remove the random states, or set "random_state": "keep"'
        )
    return state


def _check_streams(engine: Engine, state: RandomState) -> None:
    """Check that the live streams can go on from a rank's saved ones, if they may have to."""
    in_place = state.place == _place(engine)
    for name, stream in _live_streams(engine).items():
        if name in state.streams and (in_place or stream.identity is None):
            _taken_over(name, stream, state)


def _taken_over(name: str, stream: Stream, state: RandomState) -> Any:
    """Return the saved state of a live stream; raise a DamagedCheckpointError if it can't go on from it."""
    held = decoded_state(name, state.streams[name], state.place.accelerator)
    if (why := unlike(stream.read(), held)) is not None:
        raise DamagedCheckpointError(f"the saved state of the random stream {name!r} can't be taken over: {why}")
    return held


_RESTORED = "_universal_checkpoint_streams"
"""Attribute of an engine: in a tuple, what its last load restored."""


def keep_to_restore(engine: Engine, saved: RandomState | None) -> None:
    """Keep what a load restores, for `restore_again`."""
    setattr(engine, _RESTORED, (saved,))


def restore_again(engine: Engine) -> bool:
    """Set the streams once more as the engine's last load has, for a framework that draws from them before it trains. Return
    False if that load restored none, or was none; all ranks alike. Collective."""
    kept = vars(engine).get(_RESTORED)
    if kept is None:
        return False
    with agreement(tells=True) as told:
        told.mine = kept[0] is not None
    if not any(told.values):
        return False
    restore_random_state(engine, *kept)
    return True


def as_they_are(engine: Engine) -> Callable[[], None]:
    """Return a function that puts this rank's streams back to where they stand now."""
    held = [(stream, stream.read()) for stream in _live_streams(engine).values()]

    def put_back() -> None:
        for stream, state in held:
            stream.write(state)

    return put_back


def restore_random_state(engine: Engine, saved: RandomState | None) -> None:
    """Let the streams go on, or derive new ones. Collective; the last thing that a load does.

    Args:
        saved: the result of `read_random_state`.

    Raises:
        DamagedCheckpointError: a stream doesn't take its saved state.
    """
    with agreement(tells=True) as told:
        streams, place = _live_streams(engine), _place(engine)
        identities = {name: stream.identity for name, stream in streams.items()}
        # Others need none of the saved streams.
        told.mine = place, identities, None if saved is None else saved.model_copy(update={"streams": {}})
    ranks = told.values
    _, _, origin = ranks[0]
    if origin is None:
        if place.rank == 0:
            logger.debug("the checkpoint holds no random state: the streams stay as the script has seeded them")
        return
    if place.rank == 0:
        _warn_of_streams(list(identities), list(saved.streams if saved is not None else ()))
    exact = all(held is not None and held.place == live for live, _, held in ranks)
    with agreement():
        for name, stream in streams.items():
            if saved is not None and name in saved.streams and (exact or stream.identity is None):
                try:
                    stream.write(_taken_over(name, stream, saved))
                except DamagedCheckpointError:
                    raise
                except Exception as error:  # other packages' trackers may raise anything
                    raise DamagedCheckpointError(
                        f"the saved state of the random stream {name!r} can't be taken over ({error}); "
                        f'"random_state": "keep" leaves it out'
                    ) from error
            elif stream.identity is not None:
                alike = next(live for live, others, _ in ranks if others.get(name) == stream.identity)
                stream.reseed(derived_seed(origin.seed, origin.global_steps, name, alike))
    if place.rank == 0:
        done = f"each rank's streams go on where they stood at step {origin.global_steps}"
        if not exact:
            done = (
                f"saved at step {origin.global_steps} by {origin.place.world_size} ranks, or in other roles, or on another "
                f"accelerator; new streams are derived from its seed {origin.seed}"
            )
        logger.log(logging.DEBUG if exact else logging.INFO, "random state: %s", done)


def _warn_of_streams(live: Sequence[str], held: Sequence[str]) -> None:
    """Warn of streams that only the run or only the checkpoint has."""
    for names, what in (
        ([name for name in live if name not in held], "isn't in the checkpoint, and begins anew"),
        ([name for name in held if name not in live], "is in the checkpoint alone, and isn't restored"),
    ):
        for name in names:
            logger.warning("the random stream %s %s", name, what)


def derived_seed(seed: int, global_steps: int, stream: str, place: Place) -> int:
    """Return the seed of a new stream, 63 bits wide. It depends on a rank's role, and not on the size of either topology."""
    role = place.model_dump(exclude={"world_size", "rank", "accelerator"})
    text = json.dumps([seed, global_steps, stream, role], sort_keys=True)
    return int.from_bytes(_digest(text), "little") >> 1


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode(), digest_size=8).digest()


def _place(engine: Engine) -> Place:
    stage, tensor_parallel_rank = divmod(model_parallel_rank(engine), engine_topology(engine).tp)
    copy, share = divmod(dist.get_rank(group=engine.seq_data_parallel_group), engine.sequence_parallel_size)
    return Place(
        world_size=dist.get_world_size(),
        rank=dist.get_rank(),
        data_parallel_rank=copy,
        sequence_parallel_rank=share,
        stage=stage,
        tensor_parallel_rank=tensor_parallel_rank,
        accelerator=get_accelerator().device_name(),
    )


def _live_streams(engine: Engine) -> dict[str, Stream]:
    """Return all streams of this rank, by the names that they have in the file."""
    python = Stream(random.getstate, random.setstate, random.seed, _digest(repr(random.getstate())))
    streams = {"python": python, "torch": _generator_stream(torch.default_generator)}
    with _known_form("numpy"):
        streams.update([_numpy_stream()])
    if get_accelerator().device_name() != "cpu":
        device = get_accelerator()
        streams["accelerator"] = _tensor_stream(
            device.get_rng_state, device.set_rng_state, device.manual_seed, device.initial_seed()
        )
    for owner, tracker in _trackers().items():
        with _known_form(f"{owner}'s tracker"):
            for name, state in tracker.get_states().items():
                with _known_form(f"{owner}/{name}"):
                    streams[f"{owner}/{name}"] = _tracked_stream(tracker, name, state)
    # DeepSpeed's curriculum sampler: rank 0 draws for all, and the sampler's state dict holds numpy's global stream instead.
    sampling = getattr(getattr(engine.training_dataloader, "data_sampler", None), "np_rng", None)
    if sampling is not None:
        with _known_form("curriculum"):
            held = sampling.bit_generator
            _check_numpy(_without_arrays(held.state), {})
            streams["curriculum"] = Stream(
                lambda: _without_arrays(held.state),
                lambda state: setattr(held, "state", _with_arrays(state)),
                lambda seed: None,
                None,
            )
    return streams


def _trackers() -> dict[str, Any]:
    """Return the trackers of named streams by their owners: DeepSpeed's activation checkpointing and Megatron have one each."""
    shared = checkpointing.get_cuda_rng_tracker()
    trackers: dict[str, Any] = {"deepspeed": shared}
    for module in [sys.modules[name] for name in MEGATRON_MODULES if sys.modules.get(name) is not None]:
        with _known_form("megatron's tracker"):
            # Where it is None, Megatron-Core makes it when it is first asked for, in the form that is then wanted.
            held = hasattr(module, "_CUDA_RNG_STATE_TRACKER")
            tracker = module._CUDA_RNG_STATE_TRACKER if held else module.get_cuda_rng_tracker()
            if tracker is not None and tracker is not shared:
                trackers["megatron"] = tracker
    return trackers


@contextmanager
def _known_form(what: str) -> Iterator[None]:
    """Leave a stream out if it isn't as expected: other packages may give theirs any form, and neither a save nor a load may fail
    for it."""
    try:
        yield
    except Exception as error:
        _warn_of_unknown(what, f"{type(error).__name__}: {error}")


@cache
def _warn_of_unknown(what: str, reason: str) -> None:
    """Warn once in a process, and not at every save."""
    logger.warning(
        "the random stream %s has a form that isn't known here (%s): it is neither saved nor restored, and all else is",
        what,
        reason,
    )


def _numpy_stream() -> tuple[str, Stream]:
    """Return the stream of numpy's global functions, and its name, which tells its bit generator."""

    def read() -> Any:
        return _without_arrays(np.random.get_state(legacy=False))

    def write(state: dict[str, Any]) -> None:
        np.random.set_state(_with_arrays(state))

    def reseed(seed: int) -> None:
        if kind == "MT19937":
            np.random.seed(seed % 2**32)
        else:
            np.random.set_state(getattr(np.random, kind)(seed).state)

    state = read()
    _check_numpy(state, GAUSS)
    kind = state["bit_generator"]
    return numpy_name(kind), Stream(read, write, reseed, _digest(repr(state)))


def _check_numpy(state: Any, beside: Mapping[str, Any]) -> None:
    """Raise an UnsupportedError if a live bit generator isn't one of numpy's own, which a load could take over."""
    if (wrong := wrong_with_numpy(state, beside)) is not None:
        raise UnsupportedError(wrong)


def _without_arrays(value: Any) -> Any:
    """Return the state of a bit generator with plain numbers and lists in it."""
    if isinstance(value, Mapping):
        return {key: _without_arrays(item) for key, item in value.items()}
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else value


def _with_arrays(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state of a bit generator as numpy takes it, from the result of `_without_arrays`."""
    kind = np.uint32 if state["bit_generator"] == "MT19937" else np.uint64

    def whole(values: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: np.asarray(value, dtype=kind) if isinstance(value, list) else value for key, value in values.items()
        }

    return whole(state) | {"state": whole(state["state"])}


def _generator_stream(generator: torch.Generator) -> Stream:
    return _tensor_stream(generator.get_state, generator.set_state, generator.manual_seed, generator.initial_seed())


def _tensor_stream(
    read: Callable[[], torch.Tensor],
    write: Callable[[torch.Tensor], object],
    reseed: Callable[[int], object],
    identity: Hashable,
) -> Stream:
    """Return a stream whose state is a tensor of bytes."""
    return Stream(
        lambda: read().cpu().numpy().tobytes(),
        lambda state: write(torch.frombuffer(bytearray(state), dtype=torch.uint8)),
        reseed,
        identity,
    )


def _tracked_stream(tracker: Any, name: str, held: Any) -> Stream:
    """Return a tracker's stream: a generator where CUDA graphs use it, which must stay the same object; otherwise a state."""
    if isinstance(held, torch.Generator):
        return _generator_stream(held)
    generator, set_states = torch.Generator(device=get_accelerator().current_device_name()), tracker.set_states
    generator.set_state(held)

    def put(state: torch.Tensor) -> None:
        set_states(tracker.get_states() | {name: state})

    reseed: Callable[[int], None] = lambda seed: put(generator.manual_seed(seed).get_state())  # noqa: E731
    return _tensor_stream(lambda: held, put, reseed, generator.initial_seed())
