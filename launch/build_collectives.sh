#!/usr/bin/env bash
# Compiles DeepSpeed's CPU collectives into .venv once (30-55 s), so that no training start does; on GPUs nothing is needed.
set -euo pipefail
cd "$(dirname "$0")/.."

export TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions PATH=$PWD/.venv/bin:$PATH
if [ "${1:-}" != --cpu ] && .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
    exit 0
fi
[ -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/deepspeed_shm_comm.so" ] && [ ! -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/lock" ] && exit 0
# flock: two set-ups at once would build into one folder. A lock left by a killed build would be waited on for ever.
exec 9>.venv/.build-collectives
flock 9
rm -f "$TORCH_EXTENSIONS_DIR/deepspeed_shm_comm/lock"
echo "build_collectives.sh: compiling DeepSpeed's CPU collectives (once, up to a minute)"
DS_ACCELERATOR=cpu .venv/bin/python - >/dev/null <<'PY'
from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder
ShareMemCommBuilder().load()
PY
