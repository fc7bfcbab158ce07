"""The libraries are imported once, in the process from which ranks are forked: they take each rank seconds."""

from ucp_deepspeed.testing import ranks

ranks.IMPORTED_ONCE += ["transformers.trainer", "accelerate", "peft"]
