"""Imports and reads what each rank's first engine would import and read: the process from which ranks are forked does it once.

It takes a rank a second and a half of processor time otherwise, after each fresh start.
"""

import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

import ucp_deepspeed.engine.loading.load
import ucp_deepspeed.engine.optimizers
import ucp_deepspeed.engine.saving.save
import ucp_deepspeed.engine.support
import ucp_deepspeed.testing.megatron_pipeline
import ucp_deepspeed.testing.runs  # noqa: F401
from ucp_deepspeed.language.families import load_spec, spec_names

for family in spec_names():
    load_spec(family).coverage(["compile its patterns"])
