#!/usr/bin/env bash
# Runs the tests, from nothing: bash scripts/test.sh [pytest arguments]
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_environment.sh
exec python -m pytest -q "$@"
