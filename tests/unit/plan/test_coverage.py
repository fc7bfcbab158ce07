"""The proof that a plan covers what is wanted, against counting elements one by one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ucp_deepspeed.layout import Box
from ucp_deepspeed.plan import Fragment, overlapping_fragments, prove_cover


@st.composite
def box_lists(draw: st.DrawFn) -> tuple[Box, list[Box]]:
    """A wanted box and boxes that may or may not tile it; mostly cuts of it, some spoilt."""
    ndim = draw(st.integers(0, 3))
    start = tuple(draw(st.integers(0, 2)) for _ in range(ndim))
    wanted = Box(start, tuple(low + draw(st.integers(1, 4)) for low in start))
    boxes = [wanted]
    for _ in range(draw(st.integers(0, 3)) if ndim else 0):
        box = boxes.pop(draw(st.integers(0, len(boxes) - 1)))
        dim = draw(st.integers(0, ndim - 1))
        at = draw(st.integers(box.start[dim], box.stop[dim]))
        boxes.append(Box(box.start, (*box.stop[:dim], at, *box.stop[dim + 1 :])))
        boxes.append(Box((*box.start[:dim], at, *box.start[dim + 1 :]), box.stop))
    boxes = draw(st.permutations([box for box in boxes if box.numel]))
    for _ in range(draw(st.integers(0, 2))):
        boxes = _spoilt(draw, boxes)
    return wanted, boxes


def _spoilt(draw: st.DrawFn, boxes: list[Box]) -> list[Box]:
    """The boxes with one removed, repeated or moved by one."""
    if not boxes:
        return boxes
    at = draw(st.integers(0, len(boxes) - 1))
    change = draw(st.sampled_from(["remove", "repeat", "move"]))
    if change == "repeat":
        return [*boxes, boxes[at]]
    rest = boxes[:at] + boxes[at + 1 :]
    if change == "remove":
        return rest
    shift = tuple(draw(st.integers(0, 1)) for _ in boxes[at].start)
    return [*rest, boxes[at].moved((0,) * len(shift), shift)]


@settings(deadline=None, max_examples=500)
@given(box_lists())
def test_cover_is_proven_exactly_where_each_element_counts_once(case: tuple[Box, list[Box]]) -> None:
    wanted, found = case
    counts = np.zeros((10,) * len(wanted.start), dtype=int)
    for box in found:
        counts[tuple(slice(low, high) for low, high in zip(box.start, box.stop, strict=True))] += 1
    inside = np.zeros_like(counts, dtype=bool)
    inside[tuple(slice(low, high) for low, high in zip(wanted.start, wanted.stop, strict=True))] = True
    missing = int((counts[inside] == 0).sum())
    if (counts[~inside] > 0).any():
        expected = "a source box leaves the wanted box"
    elif (counts > 1).any():
        expected = "the checkpoint holds elements twice"
    elif missing:
        expected = rf"^{missing} of {wanted.numel} elements of .* are not in the checkpoint"
    else:
        prove_cover(wanted, found)
        return
    with pytest.raises(ValueError, match=expected):
        prove_cover(wanted, found)


def test_as_many_elements_but_not_the_same_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="twice"):
        prove_cover(Box((0,), (4,)), [Box((0,), (3,)), Box((2,), (3,))])
    with pytest.raises(ValueError, match="leaves"):
        prove_cover(Box((0,), (4,)), [Box((0,), (3,)), Box((4,), (5,))])


def test_the_message_names_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"^2 of 6 elements of \(1, 0\)\.\.\(3, 3\) are not in the checkpoint$"):
        prove_cover(Box((1, 0), (3, 3)), [Box((1, 0), (3, 2))])
    with pytest.raises(ValueError, match=r"^1 of 1 elements"):
        prove_cover(Box((), ()), [])
    with pytest.raises(ValueError, match="twice"):
        prove_cover(Box((), ()), [Box((), ()), Box((), ())])


fragments = st.builds(Fragment, st.integers(0, 50), st.integers(1, 5), st.sampled_from("ab"), st.integers(0, 25))


@settings(deadline=None, max_examples=300)
@given(st.lists(fragments, max_size=6))
def test_overlapping_fragments_claim_the_same_element_of_a_buffer(held: list[Fragment[str]]) -> None:
    claims = {name: np.zeros(40, dtype=int) for name in "ab"}
    for fragment in held:
        claims[fragment.buffer][fragment.buffer_start : fragment.buffer_start + fragment.numel] += 1
    found = overlapping_fragments(held)
    assert (found is not None) == any((count > 1).any() for count in claims.values())
    if found is not None:
        one, other = found
        elements = [set(range(f.buffer_start, f.buffer_start + f.numel)) for f in found]
        assert one.buffer == other.buffer
        assert elements[0] & elements[1]
        assert one is not other


def test_touching_fragments_and_other_buffers_do_not_overlap() -> None:
    first = Fragment(0, 4, "a", 0)
    assert overlapping_fragments([Fragment(4, 2, "a", 4), first]) is None
    assert overlapping_fragments([first, Fragment(0, 4, "b", 2)]) is None
    assert overlapping_fragments([Fragment(4, 2, "a", 3), first]) == (first, Fragment(4, 2, "a", 3))
    assert overlapping_fragments(iter(())) is None
