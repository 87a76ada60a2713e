#!/usr/bin/env bash
# Fresh machine to passing tests: the environment if absent, then ruff, mypy and pytest. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."

bash launch/environment.sh --cpu
# A real browser, a real SLURM, hosts that talk by ssh: installed where this user may, their tests are skipped where not.
packages=()
for each in chromium:chromium slurmctld:slurm-wlm munged:munge sshd:openssh-server ssh:openssh-client pdsh:pdsh ip:iproute2; do
    PATH=$PATH:/usr/sbin command -v "${each%:*}" >/dev/null || packages+=("${each#*:}")
done
if [ "${#packages[@]}" -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    { apt-get update -qq &&
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}"; } >/dev/null 2>&1 ||
        echo "run.sh: apt-get could not install ${packages[*]}"
fi
export DS_ACCELERATOR=cpu OMP_NUM_THREADS=1 TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions PATH=$PWD/.venv/bin:$PATH
ruff check .
ruff format --check .
mypy
if [ "${1:-}" = --faults ]; then # every fault and more than fifty kills: many minutes
    cable=tests/nodes/test_launchers.py::test_a_cut_cable_ends_both_sides_in_time_and_nothing_differs_afterwards
    FAULTS_ALL=1 exec python -m pytest -q -m '' tests/faults "$cable" "${@:2}"
fi
if [ "${1:-}" = --long ]; then # what takes minutes each
    exec python -m pytest -m long "${@:2}"
fi
if [ $# -gt 0 ]; then
    exec python -m pytest "$@"
fi

# Two halves side by side: most tests keep one core busy. What the first one says follows the second one's.
first=(tests/benchmarks tests/claims tests/data tests/distributed tests/engine tests/evaluate tests/evaluation)
first+=(tests/golden tests/kernels tests/losses tests/models tests/report tests/stages tests/planning)
said=$(mktemp)
set -m # without job control bash would start it with interrupts ignored, and what it starts would ignore them too
python -m pytest "${first[@]}" >"$said" 2>&1 &
beside=$!
set +m
trap 'kill -- "-$beside" 2>/dev/null || true; rm -f "$said"' EXIT
status=0
python -m pytest "${first[@]/#/--ignore=}" || status=$?
wait "$beside" || status=$?
cat "$said"
exit "$status"
