"""Imports and reads what each rank's first engine would import and read: the process from which ranks are forked does it once.

It takes a rank a second and a half of processor time otherwise, after each fresh start.
"""

import gc
from contextlib import suppress

from ucp_deepspeed.language.families import load_spec, spec_names

with suppress(ImportError):
    import ucp_deepspeed.megatron.layouts  # noqa: F401

with suppress(ImportError):  # older versions of DeepSpeed have no such optimizer
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

for family in spec_names():
    load_spec(family).coverage(["compile its patterns"])
gc.freeze()  # a collection in a rank would copy the pages of all these objects
