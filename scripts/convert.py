"""Convert a checkpoint to the universal format: ``python scripts/convert.py SRC DST``; ``--help`` lists the options."""

import sys

from ucp_deepspeed.cli import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]], prog_name="convert.py")
