"""The DeepSpeed side: what an engine holds, and the hooks on its saving and loading.

All access to DeepSpeed's private attributes is in this package. Each optimizer class has a module in `optimizers`;
`deepspeed_surface` holds what differs from version to version; `model` holds the rest. Importing this package refuses a version
outside the range, before it imports anything that such a version may lack.
"""

from ucp_deepspeed.engine.deepspeed_versions import check_version

check_version()
