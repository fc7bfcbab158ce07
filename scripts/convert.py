"""Convert a checkpoint to the universal format: ``python scripts/convert.py SRC DST``; ``--help`` lists the options."""

from ucp_deepspeed.cli.convert import convert_command

if __name__ == "__main__":
    convert_command.main(prog_name="convert.py")
