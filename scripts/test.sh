#!/usr/bin/env bash
# Runs the tests, from nothing: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_environment.sh
# Some tests train with DeepSpeed's fused Adam or its Adam on CPUs, which are compiled: less than a minute each, once.
for op in fused_adam:FusedAdamBuilder cpu_adam:CPUAdamBuilder; do
    build_op "${op%:*}" "from deepspeed.accelerator import get_accelerator; get_accelerator().create_op_builder('${op#*:}').load()"
done
# Some run on a stand-in for an accelerator, whose compiled half has the digest of its source in its name.
digest=$(sha256sum ucp_deepspeed/testing/device/device.cpp | cut -c1-12)
build_op "ucp_standin_$digest" "from ucp_deepspeed.testing.device.stand_in import extension; extension()"
[ $# -eq 0 ] || exec python -m pytest -q "$@"
# All tests, side by side: those with ranks wait for one another and for the disk a third of the time. A file's tests stay
# together, since they share what they have trained. Nodes of torch's agents wait most of the time.
python -m pytest -q -n 2 --dist worksteal tests/unit
python -m pytest -q -n 3 --dist worksteal tests/launcher/test_elastic.py
exec python -m pytest -q -n 2 --dist loadfile --ignore tests/unit --ignore tests/launcher/test_elastic.py
