"""States of random streams: their checks. Libraries take over a state without looking, and then read memory by what it says."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ucp_deepspeed.checkpoint.encoding import decode
from ucp_deepspeed.errors import DamagedCheckpointError

MT_WORDS = 624
"""Words of a Mersenne Twister (MT19937), which Python, numpy and torch's CPU generator use."""

TORCH_NUMBYTES = 5056
"""Bytes of the state of torch's CPU generator. Its fields: seed (0–8), left (8–12), seeded (12–16), next (16–24), words (24–5016,
8 bytes each), and the normal numbers in reserve."""

PHILOX_NUMBYTES = 16
"""Bytes of the state of a CUDA generator: seed and offset. The offset is a multiple of 4."""


def _is_word(value: Any, bits: int = 32) -> bool:
    return type(value) is int and 0 <= value < 1 << bits


def _is_flag(value: Any) -> bool:
    return type(value) is int and value in (0, 1)


def _are_words(value: Any, count: int, bits: int) -> bool:
    return isinstance(value, list) and len(value) == count and all(_is_word(word, bits) for word in value)


def _is_number(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_place(value: Any, most: int) -> bool:
    return type(value) is int and 0 <= value <= most


Form = Mapping[str, Callable[[Any], bool]]
"""Key → check of its value."""

_HALF: Form = {"has_uint32": _is_flag, "uinteger": _is_word}
"""The half of a 64-bit number that numpy keeps for the next 32-bit one."""

_PCG: tuple[Form, Form] = ({key: lambda value: _is_word(value, 128) for key in ("state", "inc")}, _HALF)

NUMPY_FORMS: Mapping[str, tuple[Form, Form]] = {
    "MT19937": (
        {"key": lambda value: _are_words(value, MT_WORDS, 32), "pos": lambda value: _is_place(value, MT_WORDS)},
        {},
    ),
    "PCG64": _PCG,
    "PCG64DXSM": _PCG,
    "Philox": (
        {"counter": lambda value: _are_words(value, 4, 64), "key": lambda value: _are_words(value, 2, 64)},
        {"buffer": lambda value: _are_words(value, 4, 64), "buffer_pos": lambda value: _is_place(value, 4), **_HALF},
    ),
    "SFC64": ({"state": lambda value: _are_words(value, 4, 64)}, _HALF),
}
"""numpy's bit generators: checks of what is in ``state``, and of what is beside it. Arrays are lists."""

GAUSS: Form = {"has_gauss": _is_flag, "gauss": _is_number}
"""The normal number that numpy's global functions keep in reserve."""


def wrong_with_numpy(value: Any, beside: Form) -> str | None:
    """Say what is wrong with the state of a bit generator; None if it can be taken over.

    Args:
        beside: further keys that it must have.
    """
    if not isinstance(value, dict) or not isinstance(value.get("bit_generator"), str):
        return "it isn't the state of a bit generator"
    if value["bit_generator"] not in NUMPY_FORMS:
        return f"its bit generator is {value['bit_generator'][:40]!r}"
    inner, outer = NUMPY_FORMS[value["bit_generator"]]
    if not isinstance(value.get("state"), dict):
        return "'state' is missing or of a wrong form"
    if value["state"].keys() != inner.keys() or value.keys() != {"bit_generator", "state", *outer, *beside}:
        return "its keys aren't those of its bit generator"
    held = [(value["state"], inner), (value, {**outer, **beside})]
    wrong = [key for values, form in held for key, is_right in form.items() if not is_right(values[key])]
    return f"{', '.join(map(repr, wrong))} can't be" if wrong else None


def _wrong_with_python(value: Any) -> str | None:
    if not isinstance(value, tuple) or len(value) != 3 or type(value[0]) is not int or value[0] != 3:
        return "it isn't a state of Python's generator, version 3"
    _, words, reserve = value
    if not isinstance(words, tuple) or not _are_words(list(words[:-1]), MT_WORDS, 32):
        return f"it hasn't {MT_WORDS} words of 32 bits"
    if not _is_place(words[-1], MT_WORDS):
        return f"its position isn't 0 to {MT_WORDS}"
    return None if reserve is None or _is_number(reserve) else "its normal number in reserve is no number"


def _wrong_with_bytes(value: Any, accelerator: str) -> str | None:
    """``accelerator``: the device whose generator wrote it."""
    if type(value) is not bytes:
        return "it isn't bytes"
    if accelerator == "cpu" and len(value) == TORCH_NUMBYTES:
        left, seeded, following = (int.from_bytes(value[a:b], "little") for a, b in ((8, 12), (12, 16), (16, 24)))
        flags = value[5040:5044] in (b"\0\0\0\0", b"\1\0\0\0") and value[5052] in (0, 1)
        # torch reads word `following`, and makes new ones when none is left.
        if not (1 <= left <= MT_WORDS and left + following <= MT_WORDS + 1 and seeded == 1 and flags):
            return "its position isn't among its words"
    if accelerator == "cuda" and len(value) == PHILOX_NUMBYTES and (value[8] % 4 or value[15] > 127):
        return "its offset can't be"
    return None


def _wrong(name: str, value: Any, accelerator: str) -> str | None:
    if name == "python":
        return _wrong_with_python(value)
    if name == "curriculum":
        return wrong_with_numpy(value, {})
    if name.split("/")[0] == "numpy":
        wrong = wrong_with_numpy(value, GAUSS)
        return wrong or (None if name == numpy_name(value["bit_generator"]) else "it is of another bit generator")
    if name in ("torch", "accelerator") or name.split("/")[0] in ("deepspeed", "megatron"):
        return _wrong_with_bytes(value, "cpu" if name == "torch" else accelerator)
    return None  # of a later release: no live stream has such a name


def numpy_name(bit_generator: str) -> str:
    """Return the name of the stream of numpy's global functions. Earlier releases saved it for MT19937 alone."""
    return "numpy" if bit_generator == "MT19937" else f"numpy/{bit_generator}"


def decoded_state(name: str, encoded: Any, accelerator: str) -> Any:
    """Return a stream's state, which its library can take over without harm.

    Args:
        accelerator: of the rank that saved it.

    Raises:
        DamagedCheckpointError: it isn't such a state.
    """
    damaged = f"the saved state of the random stream {name[:80]!r} is damaged"
    try:
        value = decode(encoded, {})
    except DamagedCheckpointError as error:
        raise DamagedCheckpointError(f"{damaged}: it can't be decoded") from error
    if (wrong := _wrong(name, value, accelerator)) is not None:
        raise DamagedCheckpointError(f"{damaged}: {wrong}")
    return value


def unlike(live: Any, saved: Any) -> str | None:
    """Say why a live stream can't go on from a saved state; None if it can. Both are as `decoded_state` returns them."""
    if isinstance(live, bytes) and len(live) != len(saved):
        return f"it has {len(saved)} bytes, and the live one {len(live)}"
    if isinstance(live, Mapping) and live["bit_generator"] != saved["bit_generator"]:
        return f"it is of {saved['bit_generator']}, and the live one of {live['bit_generator']}"
    return None
