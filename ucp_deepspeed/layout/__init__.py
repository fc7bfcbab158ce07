"""Geometry: how one parameter lies across ranks. Pure arithmetic on integers; no torch, no files, no ranks.

Read `box` first, then `layout` (pieces: logical box ↔ local box), `pattern` (names for layouts) and `zero` (how ZeRO lays
local tensors end to end and cuts them into partitions).
"""

from ucp_deepspeed.layout.box import Box, Shape
from ucp_deepspeed.layout.layout import Layout, LocalTensor, across_stages
from ucp_deepspeed.layout.pattern import Partial, Pattern, PerRank, Replicate, Scale, Shard, ShardGrid, Unique
from ucp_deepspeed.layout.topology import Topology
from ucp_deepspeed.layout.zero import FlatGroup, Flattening, OverlappingGroup, SlicedGroup, SlotLayout

__all__ = [
    "Box",
    "FlatGroup",
    "Flattening",
    "Layout",
    "LocalTensor",
    "OverlappingGroup",
    "Partial",
    "Pattern",
    "PerRank",
    "Replicate",
    "Scale",
    "Shape",
    "Shard",
    "ShardGrid",
    "SlicedGroup",
    "SlotLayout",
    "Topology",
    "Unique",
    "across_stages",
]
