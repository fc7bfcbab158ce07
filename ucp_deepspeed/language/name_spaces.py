"""Types of names: where two spaces of names meet, mypy sees a name that comes from the wrong one."""

from __future__ import annotations

from typing import NewType

ModuleName = NewType("ModuleName", str)
"""A name in the modules of one rank: each expert-parallel rank calls its own experts 0, 1, …"""

CatalogName = NewType("CatalogName", str)
"""A name in a whole model, as a checkpoint's catalog and a described engine have it: a layer's experts have one number each."""

LogicalName = NewType("LogicalName", str)
"""A name that both sides have in common, by a spec or a record."""
