#!/usr/bin/env bash
# The whole test suite. Arguments go to pytest: bash scripts/test.sh -k goldens
set -euo pipefail
source "$(dirname "$0")/env.sh"
exec python -m pytest -q tests "$@"
