#!/usr/bin/env bash
# Checks, speed and memory on a GPU -> output/gpu_report/<the GPU's name>.md and .json. The same command resumes.
# Arguments go to scripts/gpu_report.py: bash scripts/gpu_report.sh --minutes 9
set -euo pipefail
EXTRA="test"
source "$(dirname "$0")/env.sh"
exec python scripts/gpu_report.py "$@"
