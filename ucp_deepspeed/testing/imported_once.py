"""Imports and reads what each rank's first engine would import and read: the process from which ranks are forked does it once.

It takes a rank a second and a half of processor time otherwise, after each fresh start.
"""

import gc
from contextlib import suppress
from importlib import import_module

from ucp_deepspeed.language.families import load_spec, spec_names

MODULES = (
    "ucp_deepspeed.testing.runs",
    "ucp_deepspeed.testing.megatron_pipeline",
    "ucp_deepspeed.engine.loading.load",
    "ucp_deepspeed.engine.optimizers",
    "ucp_deepspeed.engine.saving.save",
    "ucp_deepspeed.engine.support",
    "ucp_deepspeed.megatron.layouts",
    "deepspeed.runtime.zero.muon.muon_optimizer",  # older versions of DeepSpeed have none
)

for name in MODULES:
    with suppress(ImportError):
        import_module(name)
for family in spec_names():
    load_spec(family).coverage(["compile its patterns"])
gc.freeze()  # a collection in a rank would copy the pages of all these objects
