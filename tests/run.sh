#!/usr/bin/env bash
# Sets up .venv in the repository (first time only) and runs every check: ruff, mypy --strict, pytest.
# Arguments go to pytest: bash tests/run.sh -k selection; bash tests/run.sh -m "not ray" leaves out what needs a Ray cluster.
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
if ! cmp -s .venv/installed-from <(cat pyproject.toml cluster/constraints.txt pcb_ray/_native.c); then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e ".[dev]"
    cat pyproject.toml cluster/constraints.txt pcb_ray/_native.c > .venv/installed-from
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
.venv/bin/python -m pytest --durations=10 "$@"
