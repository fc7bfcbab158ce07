"""``python -m ucp_deepspeed.elastic`` is ``ucp run``."""

from ucp_deepspeed.cli.commands import RUN

RUN(prog_name="python -m ucp_deepspeed.elastic")
