"""On-disk forms of a checkpoint, each as a *catalog*: it tells which range of which file holds which elements of a parameter."""

from ucp_deepspeed.checkpoint.checkpoint import Checkpoint, FileExtent, LossScale, Parameter, ParameterGroup, RunState
from ucp_deepspeed.checkpoint.opening import open_checkpoint, resolve_tag

__all__ = [
    "Checkpoint",
    "FileExtent",
    "LossScale",
    "Parameter",
    "ParameterGroup",
    "RunState",
    "open_checkpoint",
    "resolve_tag",
]
