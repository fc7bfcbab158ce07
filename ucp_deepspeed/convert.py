"""``ucp convert`` by several processes, on one machine or more: ``torchrun --nproc-per-node 8 -m ucp_deepspeed.convert SRC DST``.

Without ``torchrun`` it is one process.
"""

from __future__ import annotations

from ucp_deepspeed.cli import main as ucp


def main() -> None:
    """Run the command with the ranks that the environment tells of."""
    from ucp_deepspeed.transfer.processes import joined

    ucp.commands["convert"].main(prog_name="ucp_deepspeed.convert", obj=joined)


if __name__ == "__main__":
    main()
