#!/usr/bin/env bash
# Makes .venv with everything that training and tests need; the second time it takes no time.
# Used by launch/quickstart.sh and tests/run.sh: `bash launch/environment.sh [--cpu]`. Exit code 2: something is missing
# that only the machine's owner can install; one line says how.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "environment.sh: $*" >&2; exit 2; }

# A Python >= 3.10 that can make virtual environments, by name; empty when there is none.
find_python() {
    local name
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            echo "$name"
            return
        fi
    done
}

missing=()
command -v git >/dev/null || missing+=(git)
[ -n "$(find_python)" ] || missing+=(python3 python3-venv python3-dev)
# DeepSpeed compiles its CPU collectives at the first start.
command -v g++ >/dev/null || missing+=(g++)
if [ ${#missing[@]} -gt 0 ]; then
    command -v apt-get >/dev/null || stop "needs git, Python >= 3.10 with venv, and g++; install them with this system's package manager"
    [ "$(id -u)" = 0 ] || stop "run: sudo apt-get install -y ${missing[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
        stop "apt-get could not install: ${missing[*]}"
fi
python=$(find_python)
[ -n "$python" ] || stop "this system's python3 is older than 3.10; install a newer one: apt-get install -y python3.12 python3.12-venv python3.12-dev"

stamp=.venv/.installed-$(cat pyproject.toml launch/environment.sh | sha256sum | cut -c1-16)
if [ ! -f "$stamp" ]; then
    # A half-made environment is made again; a whole one is only brought up to date.
    [ -x .venv/bin/pip ] || "$python" -m venv --clear .venv
    echo "environment.sh: installing into .venv (the first time a few minutes and 6 GB)"
    # DeepSpeed's operators are not compiled in advance: only the CPU collectives are needed, below.
    DS_BUILD_OPS=0 .venv/bin/pip install --quiet --disable-pip-version-check -e ".[dev]" ||
        stop "pip could not install the dependencies; see above, then run again"
    rm -f .venv/.installed-*
    touch "$stamp"
fi
bash launch/build_collectives.sh "$@"
