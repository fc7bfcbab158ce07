"""Planning: source pieces ∩ target pieces, as strided block copies that are proven to write each wanted element exactly once.

Pure: integers in, frozen data out. Only `ucp_deepspeed.transfer` touches bytes.
"""

from ucp_deepspeed.plan.plan import (
    BlockCopy,
    Fragment,
    Source,
    StridedView,
    Target,
    factor_between,
    joined,
    overlapping_fragments,
    plan_tensor,
    prove_cover,
)
from ucp_deepspeed.plan.sharing import (
    UNDIVIDED,
    Division,
    Interval,
    Shareable,
    Sharing,
    divide,
    read_together,
    without,
)

__all__ = [
    "UNDIVIDED",
    "BlockCopy",
    "Division",
    "Fragment",
    "Interval",
    "Shareable",
    "Sharing",
    "Source",
    "StridedView",
    "Target",
    "divide",
    "factor_between",
    "joined",
    "overlapping_fragments",
    "plan_tensor",
    "prove_cover",
    "read_together",
    "without",
]
