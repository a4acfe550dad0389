#!/usr/bin/env bash
# The whole test suite, a process with one thread a core. Arguments go to pytest: bash scripts/test.sh -k goldens
set -euo pipefail
EXTRA="test"
source "$(dirname "$0")/env.sh"
export OMP_NUM_THREADS=1
exec python -m pytest -q -n "${TEST_PROCESSES:-auto}" --dist loadfile --no-loadscope-reorder "$@"
