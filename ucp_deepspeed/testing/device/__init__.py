"""A device for machines without one: torch, DeepSpeed and this package take it for an accelerator.

Its memory is the host's (``device.cpp``), and everything else is as strict as with a real one: tensors of both can't meet in an
operation, copies that don't block are done late, and pinned and device memory have budgets. `nccl_like` moves its tensors between
ranks. Nothing here makes anything faster or slower as a real device would.
"""
