"""The variable ``UCP_DEEPSPEED``, and the line that looks at it whenever Python starts, if ``ucp arm`` has written it.

Imports nothing but ``os``: whoever looks at the variable is in a hurry.
"""

from __future__ import annotations

import os

VARIABLE = "UCP_DEEPSPEED"
"""Name of the variable."""

FILE_NAME = "ucp_deepspeed_armed.pth"
"""The file in site-packages with the line. It sorts behind those that add folders to the path, and Python reads them in order."""

LINE = (
    f"import os; os.environ.get({VARIABLE!r}, '0') in ('', '0') or "
    "__import__('importlib.util').util.find_spec('ucp_deepspeed') and __import__('ucp_deepspeed')\n"
)
"""The line. Without the variable it imports nothing, and it says nothing if the package is gone."""


def asks() -> bool:
    """Return whether the variable asks for engines without a block, or with one that lacks ``enabled``. Empty and ``0`` don't."""
    return os.environ.get(VARIABLE, "0") not in ("", "0")
