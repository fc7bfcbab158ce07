"""``deepspeed --module ucp_deepspeed.run train.py …``: run an unmodified training script with the hooks set."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from ucp_deepspeed.arming import arm


def main() -> None:
    """Run the script named by the first argument as ``__main__``, with the arguments after it (and those of the launcher)."""
    arguments = sys.argv[1:]
    launcher = [argument for argument in arguments if argument.startswith("--local_rank")]
    rest = [argument for argument in arguments if argument not in launcher]
    if not rest:
        raise SystemExit("usage: deepspeed --module ucp_deepspeed.run SCRIPT [ARGUMENT …]")
    script = rest[0]
    if not Path(script).is_file():
        print(f"ucp_deepspeed.run: no script at {script}", file=sys.stderr)
        raise SystemExit(2)
    arm()
    sys.argv = [script, *launcher, *rest[1:]]
    sys.path[0] = str(Path(script).resolve().parent)
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
