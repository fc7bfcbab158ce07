"""The record of AutoTP in model_states files, without engines."""

from __future__ import annotations

import re
from typing import Any

import pytest
from deepspeed.checkpoint.affine import contiguous_split_map, segmented_map

from ucp_deepspeed.checkpoint.deepspeed.recorded_layouts import RecordedLayouts, read_autotp_layouts
from ucp_deepspeed.errors import MismatchError, UnsupportedError
from ucp_deepspeed.language import resolve_patterns
from ucp_deepspeed.language.spec import Spec
from ucp_deepspeed.layout.pattern import Replicate, Shard


def record(**changes: Any) -> dict[str, Any]:
    """Return AutoTP's record for a cut matrix, a norm, a cut embedding, and two matrices of unknown layout."""
    maps = {
        "h.0.fc-1.weight": contiguous_split_map((4, 3), [2, 2], 0),
        "h.0.qkv.weight": segmented_map((12, 3), [(8, False), (4, True)], 0, 2, [[4, 4]]),
    }
    found = {
        "tp_replicated_parameter_patterns": [r"^h\.0\.norm\.weight$"],
        "parameter_with_row_parallelism_patterns": [r"^h\.0\.positions\.weight$"],
        "autotp_unsupported_parameter_patterns": {r"^h\.0\.shared\.weight$": "shares its heads"},
        "affine_map": {
            "version": 1,
            "params": {f"^{re.escape(name)}$": cut.to_dict() for name, cut in maps.items()},
        },
    }
    return found | changes


def test_patterns_and_refusals_by_name() -> None:
    found = read_autotp_layouts(record(), 2, "here")
    expected = {"h.0.fc-1.weight": Shard(0), "h.0.norm.weight": Replicate(), "h.0.positions.weight": Shard(1)}
    assert found.patterns == expected
    assert found.refused.keys() == {"h.0.qkv.weight", "h.0.shared.weight"}
    assert found.refused["h.0.shared.weight"] == "shares its heads"


@pytest.mark.parametrize(
    ("info", "degree"), [(None, 2), ({}, 2), ({"universal_checkpoint_version": 0.2}, 2), (record(), 1)]
)
def test_where_nothing_was_cut_nothing_is_recorded(info: Any, degree: int) -> None:
    assert read_autotp_layouts(info, degree, "here") == RecordedLayouts()


def test_maps_of_another_version() -> None:
    with pytest.raises(UnsupportedError, match="here: affine maps of version 2"):
        read_autotp_layouts(record(affine_map={"version": 2, "params": {}}), 2, "here")


def test_only_a_named_spec_tells_what_is_refused() -> None:
    refused = {"a": "interleaved"}
    with pytest.raises(UnsupportedError, match="a: interleaved"):
        resolve_patterns(["a", "b"], degree=2, recorded={"b": Shard()}, refused=refused)
    spec = Spec.parse({"family": "own", "rules": [{"match": "*", "pattern": "shard", "dim": 1}]}, "own.yaml")
    assert resolve_patterns(["a"], degree=2, spec=spec, refused=refused) == {"a": Shard(1)}
    assert resolve_patterns(["a"], degree=2, recorded={"a": Shard(1)}, refused=refused) == {"a": Shard(1)}
    assert resolve_patterns(["a"], degree=1, recorded={"a": Shard(1)}, refused=refused) == {"a": Shard(1)}


def test_a_live_plain_shard_has_no_parts() -> None:
    """Megatron-Core's attributes don't tell parts; AutoTP's maps do, and a model may be cut otherwise than the one that saved."""
    fused, plain = {"a": Shard(parts=(1, 1))}, {"a": Shard()}
    assert resolve_patterns(["a"], degree=2, recorded=fused, inferred=plain) == fused
    with pytest.raises(MismatchError, match="in parts 1:1, the live parameter is shard on dimension 0"):
        resolve_patterns(["a"], degree=2, recorded=fused, inferred=plain, exact=True)
