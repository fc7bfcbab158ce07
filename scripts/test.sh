#!/usr/bin/env bash
# Runs the tests, from nothing: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_environment.sh
# Some tests train with DeepSpeed's fused Adam, which is compiled for CPUs: a minute or two, once.
build_op fused_adam "from deepspeed.accelerator import get_accelerator; get_accelerator().create_op_builder('FusedAdamBuilder').load()"
exec python -m pytest -q "$@"
