"""Universal checkpointing for DeepSpeed and Megatron-Core: a run saved on any topology resumes on any other.

Importing this package before ``deepspeed.initialize`` is all that a training script does. An engine whose DeepSpeed config has
no ``universal_checkpoint`` block behaves as if it weren't there; with the block, ``engine.save_checkpoint`` adds a manifest
beside DeepSpeed's files, and ``engine.load_checkpoint`` reads checkpoints of any topology, native or universal.

With ``"save": {"async": true}`` in the block, files are written in the background; `wait_for_save` waits for them.

DeepSpeed itself is not imported here: the hooks are set when the training script imports it.
"""

from ucp_deepspeed.arming import arm
from ucp_deepspeed.waiting import wait_for_save

__all__ = ["__version__", "wait_for_save"]

__version__ = "0.1.0"

arm()
