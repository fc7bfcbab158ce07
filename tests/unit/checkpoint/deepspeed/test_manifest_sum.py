"""A manifest's own sum: no bit of it changes in silence."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import ZERO_2
from native_models import SHAPES, write_manifest

from ucp_deepspeed.checkpoint.deepspeed.manifest import MANIFEST_NAME, read_manifest
from ucp_deepspeed.checkpoint.encoding import has_its_sum, with_sum
from ucp_deepspeed.errors import DamagedCheckpointError, FormatError


def test_a_flipped_bit(folder: Path) -> None:
    """Each byte, one bit after the other. Only the sum itself may be unreadable; then all else is as it was."""
    write_manifest(folder, ZERO_2, (tuple(SHAPES),))
    path = folder / MANIFEST_NAME
    whole = read_manifest(folder)
    assert whole is not None
    text = with_sum(whole.model_dump_json(indent=1)).encode()
    path.write_bytes(text)
    assert read_manifest(folder) == whole and has_its_sum(text)
    told = 0
    for place in range(len(text)):
        changed = text[:place] + bytes([text[place] ^ 1 << place % 8]) + text[place + 1 :]
        assert not has_its_sum(changed)
        path.write_bytes(changed)
        try:
            assert read_manifest(folder) == whole
        except (DamagedCheckpointError, FormatError):
            told += 1
    assert told > len(text) - 40


def test_the_way_on(folder: Path) -> None:
    write_manifest(folder, ZERO_2, (tuple(SHAPES),))
    whole = read_manifest(folder)
    assert whole is not None
    text = with_sum(whole.model_dump_json(indent=1))
    (folder / MANIFEST_NAME).write_text(text.replace('"vocabulary_size": null', '"vocabulary_size": 4'))
    with pytest.raises(DamagedCheckpointError, match=f"isn't as it was saved; .*remove {MANIFEST_NAME}"):
        read_manifest(folder)
