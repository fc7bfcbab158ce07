"""Geometry: how one parameter lies across ranks. Pure arithmetic on integers; no torch, no files, no ranks.

Read `box` first, then `layout` (pieces: logical box ↔ local box), `pattern` (names for layouts) and `zero` (how ZeRO lays
local tensors end to end and cuts them into partitions), with `overlap` for states that it doesn't cut.
"""

from ucp_deepspeed.layout.box import Box, Shape, flat_interval_boxes, row_major_strides
from ucp_deepspeed.layout.layout import Layout, LocalTensor, Piece, across_stages
from ucp_deepspeed.layout.pattern import (
    AnyPattern,
    Partial,
    Pattern,
    PerRank,
    Replicate,
    Scale,
    Shard,
    ShardGrid,
    Unique,
)
from ucp_deepspeed.layout.topology import Topology
from ucp_deepspeed.layout.zero import FlatGroup, Flattening, OverlappingGroup, Slice, SlicedGroup, SlotLayout

__all__ = [
    "AnyPattern",
    "Box",
    "FlatGroup",
    "Flattening",
    "Layout",
    "LocalTensor",
    "OverlappingGroup",
    "Partial",
    "Pattern",
    "PerRank",
    "Piece",
    "Replicate",
    "Scale",
    "Shape",
    "Shard",
    "ShardGrid",
    "Slice",
    "SlicedGroup",
    "SlotLayout",
    "Topology",
    "Unique",
    "across_stages",
    "flat_interval_boxes",
    "row_major_strides",
]
