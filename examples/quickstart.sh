#!/usr/bin/env bash
# From a clone to merged models: makes .venv, installs the package with pinned versions, runs examples/quickstart.py.
#
#   bash examples/quickstart.sh            # a second run reuses the trained models
#   bash examples/quickstart.sh --fresh    # trains them again
#   PYTHON=/usr/bin/python3.12 bash examples/quickstart.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

is_recent() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

if [[ -x .venv/bin/python ]]; then
    is_recent .venv/bin/python || { echo "error: .venv has a Python older than 3.11. Remove .venv and run this again." >&2; exit 2; }
else
    for python in ${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}; do
        if is_recent "$python"; then break; fi
        python=
    done
    [[ $python ]] || { echo "error: no Python 3.11 or newer found. Name one: PYTHON=/path/to/python3 bash $0" >&2; exit 2; }
    echo "Making .venv with $("$python" --version)"
    "$python" -m venv .venv || {
        rm -rf .venv
        echo "error: '$python -m venv' failed. On Debian or Ubuntu: apt install python3-venv" >&2
        exit 2
    }
fi

# Installed once; again when what is installed or pinned has changed.
stamp=.venv/.quickstart
wanted=$(cat pyproject.toml cluster/constraints.txt pcb_ray/*/*.c | cksum)
if [[ ! -f $stamp || $(<"$stamp") != "$wanted" ]]; then
    echo "Installing pcb-ray and what it needs into .venv (some minutes the first time) ..."
    .venv/bin/python -m pip install -qq --disable-pip-version-check -c cluster/constraints.txt -e ".[examples]"
    echo "$wanted" >"$stamp"
fi

exec .venv/bin/python examples/quickstart.py "$@"
