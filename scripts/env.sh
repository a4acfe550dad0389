# Sourced by the other scripts: makes .venv with requirements.txt in it, once, and puts it on PATH.
# FLOWAR_PYTHON=/path/to/python uses an environment of your own as it is.

cd "$(dirname "${BASH_SOURCE[0]}")/.."

if [ -n "${FLOWAR_PYTHON:-}" ]; then
    export PATH="$(dirname "$FLOWAR_PYTHON"):$PATH"
else
    wanted="$(cat requirements.txt)"
    if [ ! -f .venv/installed ] || [ "$(cat .venv/installed)" != "$wanted" ]; then
        echo "== installing requirements.txt into .venv (5 GB with CUDA; a minute or more) =="
        [ -x .venv/bin/python ] || python3 -m venv .venv
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
        printf '%s\n' "$wanted" > .venv/installed
    fi
    export PATH="$PWD/.venv/bin:$PATH"
fi
# Threads that wait asleep, not spinning: on a shared machine, spinning costs minutes.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
