#!/usr/bin/env bash
# Compiles DeepSpeed's CPU collectives into .venv once (30-55 s), so that no training start does.
# With a GPU, and without --cpu, nothing is needed.
set -euo pipefail
CDPATH='' cd -P "$(dirname "$0")/.."

export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions PATH=$PWD/.venv/bin:$PATH
folder=$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm log=.venv/build_collectives.log
# What they were compiled for is written last: a file of a killed build, or of another torch, does not count.
versions=$(echo .venv/lib/python*/site-packages/{torch,deepspeed}-*.dist-info)
built() { [ -f "$folder/versions" ] && [ "$(cat "$folder/versions")" = "$versions" ]; }

if built; then
    # Some releases of torch wait until this file is gone: for ever, when a training was killed while it loaded them.
    find "$folder/lock" -mmin +1 -delete 2>/dev/null || true
    exit 0
fi
has_gpu='import sys, torch; sys.exit(not torch.cuda.is_available())'
if [ "${1:-}" != --cpu ] && .venv/bin/python -c "$has_gpu" 2>/dev/null; then exit 0; fi
# Two set-ups at once would build into one folder.
exec 9>.venv/.build-collectives
flock 9
if built; then exit 0; fi
if [ -f "$folder/versions" ]; then rm -rf "$folder"; else rm -f "$folder/lock"; fi
echo "build_collectives.sh: compiling DeepSpeed's CPU collectives (once, up to a minute)"
if ! DS_ACCELERATOR=cpu .venv/bin/python >"$log" 2>&1 <<'PY'
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load()
PY
then
    echo "build_collectives.sh: DeepSpeed's CPU collectives did not compile; they need g++ and Python.h" \
        "(apt-get install -y g++ python3-dev); what was said: $log" >&2
    exit 2
fi
echo "$versions" >"$folder/versions"
