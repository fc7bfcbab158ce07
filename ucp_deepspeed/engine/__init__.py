"""The DeepSpeed side: what an engine holds, and the hooks on its saving and loading.

All access to DeepSpeed's private attributes is in this package: per optimizer class in `optimizers`, what differs from version to
version in `deepspeed_surface`, the rest in `model`. A version outside the range is refused by importing this package, before
anything is imported that such a version may lack.
"""

from ucp_deepspeed.engine.deepspeed_versions import check_version

check_version()
