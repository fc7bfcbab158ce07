#!/usr/bin/env bash
# The main job from nothing: trains on one topology, resumes the same checkpoint on others, and compares the losses.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/setup_environment.sh
exec python scripts/quickstart.py "$@"
