"""Convert a checkpoint to the universal format: ``python scripts/convert.py SRC DST``; ``--help`` lists the options."""

from ucp_deepspeed.cli import load_command

if __name__ == "__main__":
    load_command("convert").main(prog_name="convert.py")
