"""Convert a checkpoint to the universal format: ``python scripts/convert.py SRC DST``; ``--help`` lists the options."""

from ucp_deepspeed.cli import main

if __name__ == "__main__":
    main.commands["convert"].main(prog_name="convert.py")
