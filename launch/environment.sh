#!/usr/bin/env bash
# Makes .venv with everything that training and tests need; the second time it takes no time.
# Used by launch/quickstart.sh and tests/run.sh: `bash launch/environment.sh [--cpu]`. Exit code 2: something is missing
# that only the machine's owner can install; one line says how.
set -euo pipefail
CDPATH='' cd -P "$(dirname "$0")/.."

stop() { echo "environment.sh: $*" >&2; exit 2; }

case $PWD in
    *[[:space:]]*) stop "$PWD: no compiler and no script of pip works under a name with a space; move the folder" ;;
esac
stamp=.venv/.installed-$({ echo "$PWD"; cat pyproject.toml launch/environment.sh; } | sha256sum | cut -c1-16)
has_pip='import sys; from importlib.util import find_spec; sys.exit(find_spec("pip") is None)'
has_headers='import os, sys, sysconfig; sys.exit(not os.path.isfile(sysconfig.get_path("include") + "/Python.h"))'

# .venv runs and was made in this folder: its programs and the editable install hold the path, a moved one is no good.
# The path is in pip's first line, or in its second one when it is long.
usable() {
    grep -qsF -e "#!$PWD/.venv/bin/" -e " $PWD/.venv/bin/" .venv/bin/pip && .venv/bin/python -c "$has_pip" 2>/dev/null
}
installed() { [ -f "$stamp" ] && usable; }

# Sets `missing` to the apt packages that are absent, and `python` to the interpreter: the first one that lacks nothing,
# else the first that is new enough.
look_around() {
    local name old lacks
    missing=() python=''
    for name in python3 python3.13 python3.12 python3.11 python3.10; do
        "$name" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
        lacks=()
        # Debian and Ubuntu ship an interpreter without these; DeepSpeed's CPU collectives include Python.h.
        "$name" -c 'import venv, ensurepip' 2>/dev/null || lacks+=("$name-venv")
        "$name" -c "$has_headers" 2>/dev/null || lacks+=("$name-dev")
        if [ -z "$python" ] || [ ${#lacks[@]} = 0 ]; then python=$name missing=("${lacks[@]}"); fi
        [ ${#lacks[@]} -gt 0 ] || break
    done
    if [ -z "$python" ]; then
        old=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || old=''
        [ -z "$old" ] || stop "python3 is $old, older than 3.10; install a newer one beside it:" \
            "apt-get install -y python3.12 python3.12-venv python3.12-dev"
        missing=(python3 python3-venv python3-dev)
    fi
    command -v git >/dev/null || missing+=(git)
    # DeepSpeed compiles its CPU collectives on this machine.
    command -v g++ >/dev/null || missing+=(g++)
}

install_missing() {
    command -v apt-get >/dev/null ||
        stop "absent here: ${missing[*]} (as Debian calls them); install them with this system's package manager"
    [ "$(id -u)" = 0 ] || stop "run: sudo apt-get install -y ${missing[*]}"
    # A mirror that does not answer need not matter: the package lists may be there.
    apt-get update -qq || true
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" ||
        stop "apt-get could not install: ${missing[*]}"
    look_around
    [ ${#missing[@]} = 0 ] || stop "still absent after apt-get install: ${missing[*]}"
}

if ! installed; then
    [ -w . ] || stop "$PWD: no permission to write; the environment is made in it"
    # Two set-ups at once would install into one folder. Outside .venv, which may be made again.
    exec 9>.venv.lock
    flock -n 9 || { echo "environment.sh: waiting for another set-up in this folder"; flock 9; }
    if ! installed; then
        look_around
        [ ${#missing[@]} = 0 ] || install_missing
        echo "environment.sh: installing into .venv (the first time a few minutes and 6 GB)"
        usable || "$python" -m venv --clear .venv || stop "$python could not make .venv; see above, then run again"
        rm -f .venv/.installed-*
        # DeepSpeed's operators are not compiled in advance: only the CPU collectives are needed, below.
        DS_BUILD_OPS=0 .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" ||
            stop "pip could not install the dependencies; see above, then run again"
        touch "$stamp"
    fi
    exec 9>&-
fi
bash launch/build_collectives.sh "$@"
