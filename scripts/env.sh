# shellcheck shell=bash
# Sourced by the other scripts: makes .venv, once, with this project in editable form and the extra of pyproject.toml
# that EXTRA names, and puts it on PATH. FLOWAR_PYTHON=/path/to/python uses an environment of your own as it is.

fail() {
    echo "error: $*" >&2
    exit 2
}

if [ -n "${FLOWAR_PYTHON:-}" ]; then # seen from where the user is
    bin="$(command -v "$FLOWAR_PYTHON" || echo "$FLOWAR_PYTHON")"
    bin="$(cd "$(dirname "$bin")" 2>/dev/null && pwd)" || bin="nowhere"
    if [ ! -x "$bin/python" ] || [ ! -x "$bin/torchrun" ]; then
        fail "FLOWAR_PYTHON=$FLOWAR_PYTHON: no python and torchrun in its folder;" \
            "name the bin/python of an environment with requirements.txt in it"
    fi
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" # this project need not be installed there
else
    cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
    bin="$PWD/.venv/bin"
    if command -v flock >/dev/null && touch .venv.lock 2>/dev/null; then # two of the scripts may be started at once
        exec 9>.venv.lock
        flock --nonblock 9 || { echo "== another script is installing into .venv: waiting for it =="; flock 9; }
    fi
    # No environment, one of a Python that is gone, or an interrupted one: pip comes last.
    if [ ! -x .venv/bin/python ] || [ ! -x .venv/bin/pip ]; then
        python3 -c "import sys; sys.exit(sys.version_info < (3, 11))" ||
            fail "Python 3.11 or newer is needed: install one, or name it in FLOWAR_PYTHON"
        [ -x .venv/bin/python ] || rm -f .venv/installed* .venv/bin/python* # of a Python that is gone
        maker=python3
        [ ! -x .venv/bin/python ] || maker=.venv/bin/python # adds pip, removes nothing of what others made
        "$maker" -m venv .venv ||
            fail "$maker could not make .venv (on Debian and Ubuntu: apt install python3-venv); then start again"
    fi
    installed=".venv/installed-${EXTRA:-base}"
    wanted="$PWD $(cat requirements.txt pyproject.toml)" # also differs in a folder that was moved
    if [ ! -f "$installed" ] || [ "$(cat "$installed")" != "$wanted" ]; then
        echo "== installing flowar${EXTRA:+[$EXTRA]} into .venv (6 GB with CUDA; a minute or more) =="
        rm -f "$installed" # until all of it is there
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".${EXTRA:+[$EXTRA]}" ||
            fail "the packages are not installed, pip says why: no network, no space on the disk? then start again"
        printf '%s\n' "$wanted" > "$installed" || fail "$installed cannot be written"
    fi
    exec 9>&-
fi
export PATH="$bin:$PATH"
# Threads that wait asleep, not spinning: on a shared machine, spinning costs minutes.
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-passive}"
