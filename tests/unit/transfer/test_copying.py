"""What a reader takes out of a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ucp_deepspeed.checkpoint.checkpoint import FileExtent
from ucp_deepspeed.errors import DamagedCheckpointError
from ucp_deepspeed.plan import StridedView
from ucp_deepspeed.transfer import FileReader


@pytest.mark.parametrize("shift", range(5))
@pytest.mark.parametrize(
    ("shape", "start", "strides", "span"),
    [((2,), 7, (1,), 2), ((3, 2), 10, (10, 1), 22), ((3, 2), 0, (10, 5), 26), ((1,), 99, (1,), 1)],
)
def test_a_block_at_any_place(
    shift: int, shape: tuple[int, ...], start: int, strides: tuple[int, ...], span: int, tmp_path: Path
) -> None:
    """Where its elements aren't aligned it must be copied, and then no more than it spans."""
    whole = torch.arange(100.0)
    (tmp_path / "f").write_bytes(b"x" * shift + whole.numpy().tobytes())
    view = StridedView(FileExtent(str(tmp_path / "f"), shift, "F32", 100), start, strides)
    block = FileReader().block(view, shape)
    assert torch.equal(block, whole.as_strided(shape, strides, start))
    assert block.untyped_storage().nbytes() == (4 * span if shift % 4 else shift + 400)


def test_a_file_that_ends_before_the_extent_does(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"x" * 399)
    view = StridedView(FileExtent(str(tmp_path / "f"), 0, "F32", 100), 0, (1,))
    with pytest.raises(DamagedCheckpointError, match="is truncated: expected 400 bytes, found 399"):
        FileReader().block(view, (1,))
