"""The files of an output: their regions, the bytes between them, and what is padding."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from sketches import Sketch

from ucp_deepspeed.checkpoint.checkpoint import MASTER, WEIGHT
from ucp_deepspeed.checkpoint.output import Literal, OutputFile, OutputPlan, Region
from ucp_deepspeed.checkpoint.view import UniversalView
from ucp_deepspeed.layout import Box, Layout
from ucp_deepspeed.layout.pattern import Shard


def test_whole_tensors_have_the_type_of_the_checkpoint_or_another() -> None:
    sketch = Sketch({"a": (4, 3), "b": (5,)}, {"b": "frozen"})
    sketch.parameters = {**sketch.parameters, "b": replace(sketch.parameters["b"], states={WEIGHT: "BF16"})}
    view = UniversalView.of(sketch)
    whole, other = Region.whole(view, "a", MASTER), Region.whole(view, "a", "exp_avg", "F64")
    assert (whole.layout, whole.rank, whole.local_start, whole.numel) == (Layout.whole((4, 3)), 0, 0, 12)
    assert (whole.dtype, whole.numbytes, other.dtype, other.numbytes) == ("F32", 48, "F64", 96)
    assert Region.whole(view, "b", WEIGHT).numbytes == 10
    assert not whole.is_padded and whole.file_offset == 0


def test_parts_lie_side_by_side_and_elements_on_their_boundaries() -> None:
    region = Region("a", MASTER, "BF16", Layout.whole((1,)), 0, 0, 1, 1)
    for parts in ((Literal(b"ab"), Literal(b"c", 1)), (Literal(b"abc", 2),), (region,)):
        with pytest.raises(AssertionError):
            OutputFile("file", 4, parts)


def test_regions_with_other_boxes_have_other_keys() -> None:
    """Ranks compare them: boxes of one size used to count as the same."""
    boxes = [Box((low, 0), (low + 8, 4)) for low in (0, 8)]
    keys = {Region("a", "fp32", "F32", Layout.around((32, 4), box), 0, 0, 32).key for box in boxes}
    assert len(keys) == 2


def test_a_key_tells_all_but_the_place() -> None:
    region = Region("a", MASTER, "F32", Layout.whole((4,)), 0, 0, 4)
    changes = ({"name": "b"}, {"state": "m"}, {"dtype": "BF16"}, {"local_start": 1}, {"numel": 3})
    assert replace(region, file_offset=8).key == region.key
    assert all(replace(region, **change).key != region.key for change in changes)  # type: ignore[arg-type]


def test_bytes_that_are_no_element() -> None:
    """Between parts, behind the last one, and where a rank's share of a vocabulary is padded."""
    region = Region("a", MASTER, "F32", Layout.whole((4,)), 0, 0, 4, 8)
    full = OutputFile("file", 24, (Literal(b"before::"), region))
    assert full.regions == (region,) and not full.has_gaps
    assert OutputFile("file", 24, (Literal(b"before:"), region)).has_gaps
    assert OutputFile("file", 25, full.parts).has_gaps
    layout = Shard(0, vocabulary=True).layout((3, 2), ((2, 2), (2, 2)))
    first, last = (Region("a", MASTER, "F32", layout, rank, 0, 4) for rank in range(2))
    assert [each.is_padded for each in (first, last)] == [False, True]
    assert [OutputFile("file", 16, (each,)).has_gaps for each in (first, last)] == [False, True]


def test_a_plan_may_be_its_files_alone(tmp_path: Path) -> None:
    OutputPlan(()).finish(tmp_path, [])
    assert list(tmp_path.iterdir()) == [] and OutputPlan(()).rest_numbytes == 0
