"""Universal checkpoints of version 1, which has no sums: tests may change their files."""

from __future__ import annotations

import json
from pathlib import Path

SUMS = "ucp_checksums.jsonl"


def as_version_1(folder: Path) -> None:
    """Take away what version 2 of the format adds."""
    path = folder / "ucp_index.json"
    index = json.loads(path.read_text())
    index["format_version"] = 1
    for key in ("sum", "save_id", "checksums"):
        del index[key]
    del index["files"][SUMS]
    (folder / SUMS).unlink()
    path.write_text(json.dumps(index))
