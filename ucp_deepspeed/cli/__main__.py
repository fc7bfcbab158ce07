"""``python -m ucp_deepspeed.cli`` is ``ucp``."""

from ucp_deepspeed.cli import main

main(prog_name="ucp")
