#!/usr/bin/env bash
# Runs the tests: bash tests/run.sh [pytest arguments]
# Where no virtual environment is active it makes and uses .venv.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${VIRTUAL_ENV:-}" ]; then
    [ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
    source .venv/bin/activate
fi

# Without a GPU the CPU build of PyTorch is enough; left to itself pip may choose one of several gigabytes.
if ! python -c "import torch" 2>/dev/null && ! command -v nvidia-smi >/dev/null; then
    python -m pip install --quiet torch==2.13.0
fi
if ! python -c "import importlib.metadata as m; m.version('megatron-llm'); import pytest, xdist, hypothesis" 2>/dev/null; then
    python -m pip install --quiet -e ".[test]"
fi

# Two files of tests at a time, with one thread each; -n 0 runs them one after the other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec python -m pytest -n 2 --dist loadfile "$@"
