"""The DeepSpeed side: what an engine holds, and the hooks on its saving and loading.

All access to DeepSpeed's private attributes is in this package. Each optimizer class has a module in `optimizers`;
`deepspeed_surface` holds what differs from version to version; `model` holds the rest. Importing this package refuses a version
outside the range, before it imports anything that such a version may lack. ``setup.py`` reads the range from this file's text.
"""

from __future__ import annotations

import deepspeed
from packaging.version import Version

from ucp_deepspeed.errors import UnsupportedError

OLDEST_DEEPSPEED = "0.18.0"
"""First version with which the tests pass."""

NEWEST_DEEPSPEED = "0.19"
"""Last minor version with which the tests pass; its later patch releases are accepted."""


def check_version(version: str = deepspeed.__version__) -> None:
    """Refuse a version whose internals haven't been tested.

    Raises:
        UnsupportedError: names the version and the range.
    """
    found = Version(version.split("+")[0])
    if found < Version(OLDEST_DEEPSPEED) or found.release[:2] > Version(NEWEST_DEEPSPEED).release[:2]:
        raise UnsupportedError(
            f"deepspeed {version} is outside the tested range {OLDEST_DEEPSPEED} to {NEWEST_DEEPSPEED}.x; install a version "
            f'inside it, or set "universal_checkpoint": {{"enabled": false}}'
        )


check_version()
