"""States of random streams: live ones are taken as they are, and each state that a library would read wrongly is refused."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from ucp_deepspeed.checkpoint.encoding import encode
from ucp_deepspeed.checkpoint.random_streams import decoded_state, numpy_name
from ucp_deepspeed.errors import DamagedCheckpointError


def numpy_state(kind: str) -> dict[str, Any]:
    """State of a bit generator after some numbers, with an odd number of halves; arrays are lists."""
    generator = getattr(np.random, kind)(7)
    np.random.Generator(generator).integers(0, 9, 5, dtype=np.int32)
    state = dict(generator.state)
    state["state"] = {key: np.asarray(value).tolist() for key, value in state["state"].items()}
    if kind.startswith("PCG"):
        state["state"] = dict(generator.state["state"])
    return {key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in state.items()}


def torch_state(**fields: int) -> bytes:
    """State of torch's CPU generator after some numbers, with other fields."""
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    state = bytearray(generator.get_state().numpy().tobytes())
    for name, (start, stop) in {"left": (8, 12), "seeded": (12, 16), "next": (16, 24), "flag": (5052, 5053)}.items():
        if name in fields:
            state[start:stop] = fields[name].to_bytes(stop - start, "little")
    return bytes(state)


def python_state(words: Callable[[tuple[int, ...]], Any] = lambda words: words, reserve: Any = None) -> Any:
    version, found, _ = random.Random(3).getstate()
    return version, words(found), reserve


def checked(name: str, state: Any, accelerator: str = "cpu") -> Any:
    return decoded_state(name, encode(state, name, {}), accelerator)


@pytest.mark.parametrize("kind", ["MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64"])
def test_live_states_of_numpy(kind: str) -> None:
    state = numpy_state(kind)
    assert checked("curriculum", state) == state
    state |= {"has_gauss": 1, "gauss": -0.5}
    assert checked(numpy_name(kind), state) == state
    with pytest.raises(DamagedCheckpointError, match="another bit generator"):
        checked("numpy" if kind != "MT19937" else "numpy/PCG64", state)


def test_live_states_of_python_and_torch() -> None:
    """At each position, so that no sound state is refused."""
    generator, numbers = torch.Generator().manual_seed(1), random.Random(1)
    for _ in range(1300):
        state = generator.get_state().numpy().tobytes()
        assert checked("torch", state) == state == checked("megatron/a", state)
        torch.randint(0, 9, (), dtype=torch.int32, generator=generator)
    torch.randn((), generator=generator), torch.randn(17, generator=generator)
    torch.normal(0.0, 1.0, (3,), generator=generator, dtype=torch.float64)
    assert checked("torch", generator.get_state().numpy().tobytes())
    for _ in range(3):
        numbers.gauss(0, 1)
        assert checked("python", numbers.getstate()) == numbers.getstate()


def _with(kind: str, **changes: Any) -> dict[str, Any]:
    state = numpy_state(kind) | {"has_gauss": 0, "gauss": 0.0}
    inner = {key: changes.pop(key) for key in list(changes) if key in state["state"]}
    return state | changes | {"state": state["state"] | inner}


WRONG_NUMPY: dict[str, list[Any]] = {
    "MT19937": [
        *({"pos": pos} for pos in (-1, 625, 1 << 30, 1.0, True, "1", None, [1])),
        *({"key": key} for key in ([1] * 10, [1] * 625, [-1] + [1] * 623, [1 << 32] + [1] * 623, [1.0] * 624, "x", 5)),
        *({"has_gauss": value} for value in (2, -1, True, 1.0)),
        *({"gauss": value} for value in ("1", None, 10**400, float("nan"), float("inf"), 1)),
        {"bit_generator": "MT19938"},
        {"bit_generator": None},
        {"bit_generator": "PCG64"},
        {"more": 1},
        {"state": [1]},
    ],
    "PCG64": [{"inc": 1 << 128}, {"inc": -1}, {"has_uint32": 2}, {"uinteger": 1 << 32}, {"uinteger": 1.5}, {"pos": 3}],
    "Philox": [
        {"buffer_pos": 5},
        {"buffer_pos": -1},
        {"buffer": [1] * 3},
        {"counter": [1 << 64] * 4},
        {"key": [1] * 3},
    ],
    "SFC64": [{"has_uint32": 7}, {"state": {"state": [1] * 3}}, {"state": {}}],
}


@pytest.mark.parametrize(("kind", "changes"), [(kind, each) for kind, of in WRONG_NUMPY.items() for each in of])
def test_wrong_states_of_numpy(kind: str, changes: dict[str, Any]) -> None:
    with pytest.raises(DamagedCheckpointError, match=r"the saved state of the random stream 'numpy.*' is damaged"):
        state = _with(kind, **changes)
        checked(numpy_name(kind), state | changes if "state" in changes else state)


@pytest.mark.parametrize(
    "state",
    [
        python_state(lambda words: words[:-1]),
        python_state(lambda words: (*words, 1)),
        python_state(lambda words: (1 << 32, *words[1:])),
        python_state(lambda words: (2**70, *words[1:])),
        python_state(lambda words: (-1, *words[1:])),
        python_state(lambda words: (*words[:-1], 625)),
        python_state(lambda words: (*words[:-1], -1)),
        python_state(lambda words: (*words[:-1], True)),
        python_state(list),
        python_state(reserve="x"),
        python_state(reserve=1),
        python_state(reserve=float("nan")),
        (2, *python_state()[1:]),
        python_state()[:2],
        "x",
        None,
        {"a": 1},
    ],
    ids=lambda state: "",
)
def test_wrong_states_of_python(state: Any) -> None:
    with pytest.raises(DamagedCheckpointError, match="the saved state of the random stream 'python' is damaged"):
        checked("python", state)


@pytest.mark.parametrize(
    "fields",
    [
        {"left": 0},
        {"left": 625},
        {"left": 624, "next": 624},
        {"next": 1 << 32},
        {"next": 625},
        {"seeded": 0},
        {"flag": 3},
    ],
)
def test_wrong_states_of_torch(fields: dict[str, int]) -> None:
    """torch itself takes a state with 624 words left behind word 624, and then reads behind them."""
    assert checked("torch", torch_state()) == torch_state()
    for name in ("torch", "deepspeed/a", "accelerator"):
        with pytest.raises(DamagedCheckpointError, match="its position isn't among its words"):
            checked(name, torch_state(**fields))
        if name != "torch":
            assert checked(name, torch_state(**fields), "npu")


@pytest.mark.parametrize("state", [1, "AAAA", None, [1], {"a": 1}])
def test_states_that_are_not_bytes(state: Any) -> None:
    for name in ("torch", "deepspeed/a", "megatron/a", "accelerator"):
        with pytest.raises(DamagedCheckpointError, match="it isn't bytes"):
            checked(name, state)


def test_offsets_of_cuda() -> None:
    for offset, sound in ((0, True), (4, True), (1 << 40, True), (3, False), (1 << 63, False)):
        state = b"\1" * 8 + offset.to_bytes(8, "little")
        if sound:
            assert checked("accelerator", state, "cuda") == state
            continue
        with pytest.raises(DamagedCheckpointError, match="its offset can't be"):
            checked("deepspeed/a", state, "cuda")


@pytest.mark.parametrize("encoded", [{"$bytes": 5}, {"$bytes": "A"}, {"$odd": 1}, {"$tensor": "a"}, {"$tuple": 3}])
@pytest.mark.parametrize("name", ["torch", "python", "numpy", "x" * 500])
def test_what_cant_be_decoded(name: str, encoded: Any) -> None:
    with pytest.raises(DamagedCheckpointError, match="it can't be decoded") as caught:
        decoded_state(name, encoded, "cpu")
    assert len(str(caught.value)) < 300
