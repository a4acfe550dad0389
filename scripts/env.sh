# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with requirements.txt in it, once, and puts it on PATH.
# FLOWAR_PYTHON=/path/to/python uses an environment of your own as it is.

fail() {
    echo "error: $1" >&2
    exit 2
}

if [ -n "${FLOWAR_PYTHON:-}" ]; then # seen from where the user is
    bin="$(cd "$(dirname "$(command -v "$FLOWAR_PYTHON" || echo "$FLOWAR_PYTHON")")" 2>/dev/null && pwd)" || bin="nowhere"
    if [ ! -x "$bin/python" ] || [ ! -x "$bin/torchrun" ]; then
        fail "FLOWAR_PYTHON=$FLOWAR_PYTHON: no python and torchrun in its folder; name the bin/python of an environment with requirements.txt in it"
    fi
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
else
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    bin="$PWD/.venv/bin"
    if command -v flock >/dev/null && touch .venv.lock 2>/dev/null; then # two of the scripts may be started at once
        exec 9>.venv.lock
        flock --nonblock 9 || { echo "== another script is installing into .venv: waiting for it =="; flock 9; }
    fi
    if [ ! -x .venv/bin/python ]; then
        python3 util/versions.py || exit 2
        rm -f .venv/installed .venv/bin/python* # of a Python that is gone
        python3 -m venv .venv || fail "python3 could not make .venv (on Debian and Ubuntu it needs: apt install python3-venv); then start again"
    fi
    .venv/bin/python util/versions.py || fail ".venv was made with that Python: remove .venv and start again"
    if ! .venv/bin/python -c "import pip" 2>/dev/null; then
        echo "== .venv has no pip: putting it in =="
        rm -rf .venv/installed .venv/lib/python*/site-packages/pip .venv/lib/python*/site-packages/pip-* # a half of it would count as there
        .venv/bin/python -m ensurepip --upgrade >/dev/null || fail ".venv has no pip, and ensurepip, which puts it in, failed (on Debian and Ubuntu: apt install python3-venv); then start again"
    fi
    wanted="$(cat requirements.txt)"
    if [ ! -f .venv/installed ] || [ "$(cat .venv/installed)" != "$wanted" ]; then
        echo "== installing requirements.txt into .venv (6 GB with CUDA; a minute or more) =="
        rm -f .venv/installed # until all of it is there
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt ||
            fail "requirements.txt is not installed, pip says why: no network, no space on the disk? then start again"
        printf '%s\n' "$wanted" > .venv/installed || fail ".venv/installed cannot be written"
    fi
    exec 9>&-
fi
export PATH="$bin:$PATH"
# Threads that wait asleep, not spinning: on a shared machine, spinning costs minutes.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
