"""The position of Hugging Face's Trainer in its data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

WRAPPERS: dict[str, Callable[..., Any]] = {}
