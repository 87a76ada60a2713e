#!/usr/bin/env bash
# Fresh machine to passing tests: the environment if absent, then ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/environment.sh --cpu
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

# Two halves side by side: most tests keep one core busy. What the second one says follows the first one's.
first=(tests/benchmarks tests/claims tests/data tests/distributed tests/evaluation tests/golden)
first+=(tests/kernels tests/losses tests/models tests/stages)
said=$(mktemp)
trap 'kill "$second" 2>/dev/null || true; rm -f "$said"' EXIT
python -m pytest "${first[@]/#/--ignore=}" >"$said" 2>&1 &
second=$!
status=0
python -m pytest "${first[@]}" || status=$?
wait "$second" || status=$?
cat "$said"
exit "$status"
