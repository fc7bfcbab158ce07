"""Run plans: the only place where a tensor's bytes are read or written."""

from ucp_deepspeed.transfer.copying import CopyPool, FileReader, TransferCount, gather, run_copies

__all__ = ["CopyPool", "FileReader", "TransferCount", "gather", "run_copies"]
