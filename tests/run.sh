#!/usr/bin/env bash
# Sets up .venv in the repository (first time only) and runs every check: ruff, mypy --strict, pytest.
# First the tests without Ray, on all cores; then those that share one, but for the slowest (bash tests/run.sh -m very_slow). With arguments, just `pytest ARGUMENTS`: bash tests/run.sh -k selection
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
if ! cmp -s .venv/installed-from <(cat pyproject.toml cluster/constraints.txt pcb_ray/kernels/_native.c); then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e ".[dev]"
    cat pyproject.toml cluster/constraints.txt pcb_ray/kernels/_native.c > .venv/installed-from
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
if [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/python -m pytest -m "not ray" -n auto --durations=5
.venv/bin/python -m pytest -m "ray and not very_slow" --durations=10
