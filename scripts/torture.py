"""Harms checkpoints, and the processes that write and read them, and counts what becomes of it: see `docs/reliability.md`.

python scripts/torture.py faults --count 5000
"""

from __future__ import annotations

import click
from torture_disks import disks_command
from torture_faults import faults_command
from torture_kills import kills_command


@click.group()
def main() -> None:
    """Harm checkpoints in some way and count outcomes; the exit status is 1 if one isn't right."""


main.add_command(disks_command)
main.add_command(faults_command)
main.add_command(kills_command)


if __name__ == "__main__":
    main()
