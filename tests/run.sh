#!/usr/bin/env bash
# Sets up .venv in the repository (first time only) and runs the checks: ruff, mypy --strict, pytest.
#   bash tests/run.sh                the first tier: tests without Ray on all cores, then one case of each kind that share one Ray
#   bash tests/run.sh --all          everything, the slowest too (half an hour on two cores)
#   bash tests/run.sh -k selection   just `pytest -k selection`
set -euo pipefail
cd "$(dirname "$0")/.."
[ -x .venv/bin/python ] || python3 -m venv .venv
if ! cmp -s .venv/installed-from <(cat pyproject.toml cluster/constraints.txt pcb_ray/*/*.c); then
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -c cluster/constraints.txt -e ".[dev]"
    cat pyproject.toml cluster/constraints.txt pcb_ray/*/*.c > .venv/installed-from
fi
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
alone="not ray and not very_slow" ray="ray and not very_slow"
if [ "${1:-}" = --all ]; then
    alone="not ray" ray="ray"
elif [ $# -gt 0 ]; then
    exec .venv/bin/python -m pytest "$@"
fi
.venv/bin/python -m pytest -m "$alone" -n auto --durations=5
.venv/bin/python -m pytest -m "$ray" --durations=10
