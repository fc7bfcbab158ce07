"""Random alterations of the contents of files: of bytes, of values in JSON, of words, of records of archives, and of the steps of
a pickle. Each is a function of the content and the generator of chance."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import random
import zipfile
from typing import Any

import torch

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**31, 2**31 - 1, 2**32, 2**63, -(2**63), 2**64, 10**30, 0.5, -0.0, 1e308),
    *(
        "",
        "x",
        "a.b",
        "..",
        "../x",
        "\0",
        "\x1b[31m",
        "*",
        "**",
        "weight",
        "{n}",
        "$tuple",
        "1e999",
        "\u202e",
        "x" * 300,
    ),
    *(
        [],
        {},
        [[]],
        [0],
        [1, 2],
        ["x"],
        {"x": 1},
        {"$tuple": []},
        {"$tensor": "x"},
        {"$plain": ["deque", 5]},
        {"$float": "nan"},
    ),
)


def alter_bytes(content: bytes, chance: random.Random) -> bytes:
    """Flip bits, cut, insert, move, repeat and overwrite."""
    raw = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 4, 16))):
        if not raw:
            return b""
        place, length = chance.randrange(len(raw)), chance.choice((1, 2, 4, 8, 64))
        match chance.randrange(7):
            case 0:
                raw[place] ^= 1 << chance.randrange(8)
            case 1:
                raw[place] = chance.randrange(256)
            case 2:
                del raw[place:]
            case 3:
                del raw[place : place + length]
            case 4:
                raw[place:place] = chance.randbytes(length)
            case 5:
                other = chance.randrange(len(raw))
                raw[place:place] = raw[other : other + length]
            case 6:
                raw[place : place + length] = chance.choice((b"\xff", b"\0", b"9", b"\x7f")) * length
    return bytes(raw)


def alter_value(value: Any, chance: random.Random) -> Any:
    """Replace, remove, repeat or wrap a value somewhere in a nested one, in place."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        parts: list[tuple[Any, Any]] = []
        waiting = [value]
        while waiting:
            found = waiting.pop()
            keys = list(found) if isinstance(found, dict) else range(len(found)) if isinstance(found, list) else ()
            for key in keys:
                parts.append((found, key))
                waiting.append(found[key])
        if not parts:
            return chance.choice(ODD)
        home, key = chance.choice(parts)
        match chance.randrange(6):
            case 0 | 1:
                home[key] = chance.choice(ODD)
            case 2:
                del home[key]
            case 3:
                other, place = chance.choice(parts)
                with_this = (
                    other[place] if (place in other if isinstance(other, dict) else place < len(other)) else None
                )
                home[key] = with_this if not _holds(with_this, home) else None
            case 4:
                home[key] = [home[key]] * chance.choice((1, 2, 1000))
            case 5 if isinstance(home, dict):
                home[chance.choice(("x", "../x", "layers.0.up.weight", "\0"))] = home[key]
    return value


def _holds(value: Any, wanted: Any) -> bool:
    """Return whether a value is, or has in it, another one."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return value is wanted or any(_holds(part, wanted) for part in parts)


def alter_json(content: bytes, chance: random.Random) -> bytes:
    """Alter the values, or the text."""
    if chance.random() < 0.3:
        return alter_bytes(content, chance)
    return json.dumps(alter_value(json.loads(content), chance)).encode()


def alter_lines(content: bytes, chance: random.Random) -> bytes:
    """Alter one line of JSON. The first line may still tell of its former length."""
    lines = content.splitlines()
    place = chance.randrange(len(lines))
    lines[place] = alter_json(lines[place], chance)
    return b"\n".join(lines) + b"\n"


def alter_header(content: bytes, chance: random.Random) -> bytes:
    """Alter the header of a safetensors file, and keep its size if that is possible; or any bytes of the file."""
    if chance.random() < 0.3:
        return alter_bytes(content, chance)
    length = int.from_bytes(content[:8], "little")
    header = alter_json(content[8 : 8 + length].strip(), chance).ljust(length)
    return (len(header).to_bytes(8, "little") + header + content[8 + length :])[: max(len(content), 8)]


def alter_words(content: bytes, chance: random.Random) -> bytes:
    """Alter lines and words of a text, or bytes."""
    if chance.random() < 0.3:
        return alter_bytes(content, chance)
    lines = content.decode().split("\n")
    for _ in range(chance.choice((1, 1, 2, 4))):
        place = chance.randrange(len(lines))
        match chance.randrange(5):
            case 0:
                del lines[place]
            case 1:
                lines.insert(place, chance.choice(lines) if lines else "x")
            case 2:
                lines[place] = lines[place].replace(
                    ":", chance.choice((":", "", ": &a", ": *a", ": [", ": !!binary")), 1
                )
            case 3:
                words = lines[place].split(" ")
                words[chance.randrange(len(words))] = chance.choice(
                    (
                        "*",
                        "**",
                        "0",
                        "-1",
                        "9" * 30,
                        "heads",
                        "heads//0",
                        "{",
                        "}",
                        "[]",
                        "~",
                        "&a",
                        "*a",
                        "<<:",
                        '"',
                        "2**9",
                        "\t",
                        "1_0",
                    )
                )
                lines[place] = " ".join(words)
            case 4:
                lines[place] = " " * chance.randrange(6) + lines[place].strip()
        lines = lines or [""]
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def alter_archive(content: bytes, chance: random.Random) -> bytes:
    """Alter the pickle in an archive of torch's, by steps, values or bytes; or its records; or any bytes."""
    how = chance.randrange(8)
    if how == 0:
        return alter_bytes(content, chance)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    if how in (1, 2):
        held = torch.load(io.BytesIO(content), weights_only=False)
        written = io.BytesIO()
        torch.save(alter_value(held, chance), written)
        return written.getvalue()
    [pickled] = [name for name in records if name.endswith("data.pkl")]
    if how == 3:
        name = chance.choice(list(records))
        records[name] = alter_bytes(records[name], chance)
        if chance.random() < 0.2:
            del records[name]
    elif how == 4:
        records[pickled] = alter_bytes(records[pickled], chance)
    else:
        records[pickled] = alter_steps(records[pickled], chance)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive:
        for name, raw in records.items():
            if not name.endswith(
                (".format_version", ".storage_alignment")
            ):  # python's writer lays archives out otherwise
                archive.writestr(name, raw)
    return written.getvalue()


def alter_pickle(content: bytes, chance: random.Random) -> bytes:
    """Alter a pickle by steps, or by bytes."""
    return alter_bytes(content, chance) if chance.random() < 0.3 else alter_steps(content, chance)


def alter_steps(pickled: bytes, chance: random.Random) -> bytes:
    """Remove, repeat, exchange or add steps of a pickle."""
    places = [place for _, _, place in pickletools.genops(pickled)] + [len(pickled)]
    steps = [pickled[start:stop] for start, stop in itertools.pairwise(places)]
    added = (
        *(
            b"N",
            b"]",
            b"}",
            b")",
            b"(",
            b"0",
            b"2",
            b"R",
            b"b",
            b"t",
            b"\x85",
            b"\x86",
            b"a",
            b"e",
            b"s",
            b"u",
            b"Q",
            b"\x81",
            b".",
        ),
        *(
            b"h\0",
            b"q\0",
            b"K\xff",
            b"J\xff\xff\xff\xff",
            b"\x8a\x08" + b"\xff" * 8,
            b"\x8f",
            b"(\x91",
            b"\x90",
            b"cos\nsystem\n",
        ),
        *(
            b"cbuiltins\nrange\n",
            b"ctorch\nSize\n",
            b"cnumpy\ndtype\n",
            b"ccollections\ndeque\n",
            b"X\x01\0\0\0x",
            b"G" + b"\xff" * 8,
        ),
    )
    for _ in range(chance.choice((1, 1, 2, 3, 8))):
        place = chance.randrange(len(steps))
        match chance.randrange(4):
            case 0:
                del steps[place]
            case 1:
                steps.insert(place, chance.choice(steps))
            case 2:
                other = chance.randrange(len(steps))
                steps[place], steps[other] = steps[other], steps[place]
            case 3:
                steps.insert(place, chance.choice(added))
        steps = steps or [b"."]
    return b"".join(steps)
