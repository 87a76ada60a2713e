#!/usr/bin/env bash
# Fresh machine to passing tests: the environment if absent, then ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/environment.sh --cpu
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
exec python -m pytest "$@"
