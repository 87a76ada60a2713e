#!/usr/bin/env bash
# Fresh machine to a trained, evaluated two-query model and its result table.
#
#   bash launch/quickstart.sh [--fast] [--cpu] [--ranks N] [--seed S] [--compare]
#
# --fast     a smoke run of a small world, at most 90 s after installation, in runs/quickstart-fast
# --cpu      do not use GPUs
# --ranks    processes; default: every GPU, or 2 on the CPU
# --seed     of the world, the weights and the order; default 0
# --compare  train a second time without the generic stage and add it to the table
#
# Running it again reuses what is there: environment, world, shards, finished stages. The results are always in
# runs/quickstart; a run of another seed or number of ranks is first moved aside, to runs/quickstart.seedS-ranksN.
set -euo pipefail
cd "$(dirname "$0")/.."

stop() { echo "quickstart.sh: $*" >&2; exit 2; }
is_number() { case "$1" in '' | *[!0-9]*) return 1 ;; esac; }

fast='' cpu='' ranks='' seed=0 compare=''
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) fast=1 ;;
        --cpu) cpu=1 ;;
        --compare) compare=1 ;;
        --ranks | --seed)
            is_number "${2:-}" || stop "$1 needs a number, not '${2:-}'"
            if [ "$1" = --ranks ]; then ranks=$2; else seed=$2; fi
            shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;;
        *) stop "unknown option $1; it takes --fast, --cpu, --ranks N, --seed S and --compare" ;;
    esac
    shift
done
[ "$ranks" != 0 ] || stop "--ranks needs at least 1"

began=$SECONDS
bash launch/environment.sh ${cpu:+--cpu}
install_seconds=$((SECONDS - began))
export PATH=$PWD/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions

gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ -n "$cpu" ] || [ "$gpus" = 0 ]; then
    export DS_ACCELERATOR=cpu
    ranks=${ranks:-2}
else
    ranks=${ranks:-$gpus}
    [ "$ranks" -le "$gpus" ] || stop "--ranks $ranks: there are $gpus GPUs; use fewer, or --cpu"
fi

name=quickstart${fast:+-fast}
if [ -n "$fast" ]; then identities=64 test_identities=24 pairs=400; else identities=1200 test_identities=200 pairs=16000; fi
data=data/$name.seed$seed run=runs/$name raw=data/$name.seed$seed/raw shards=data/$name.seed$seed/shards

# The run folder is of one seed and number of ranks; another one's is kept under its own name.
settings=seed$seed-ranks$ranks
if [ -f $run/settings ] && [ "$(cat $run/settings)" != $settings ]; then
    aside=$run.$(cat $run/settings)
    echo "quickstart.sh: moving the earlier run to $aside"
    mv $run "$aside"
fi
if [ ! -d $run ] && [ -d $run.$settings ]; then mv $run.$settings $run; fi
mkdir -p $run
echo $settings >$run/settings

# The procedural world, as files in the data sets' own raw formats, and shards made from them.
began=$SECONDS
mkdir -p "$raw" "$shards"
for format in cuhk_pedes market1501; do
    python -m shards.world export $format --out "$raw/$format" --ids $identities --test-ids $test_identities --seed "$seed" --level quickstart --workers "$(nproc)"
    python -m shards.write $format --root "$raw/$format" --out "$shards/$format"
done
python -m shards.world export img2dataset --out "$raw/generic" --ids $pairs --person-share 0.6 --seed "$seed" --level quickstart --workers "$(nproc)"
python -m shards.write img2dataset --root "$raw/generic" --out "$shards/generic"
python -m shards.world vocabulary "$raw/generic" "$raw/cuhk_pedes"
python -m shards.world oracle "$raw/cuhk_pedes" "$raw/market1501" --json "$data/oracle.json"
python -m reid_dist.data.tokenizer build "$shards/cuhk_pedes" "$shards/generic" --out "$shards/vocabulary.txt"
data_seconds=$((SECONDS - began))

# The recipe; for the comparison the same without its generic stage (a stage of 0 steps hands its weights on).
began=$SECONDS
train() {
    deepspeed --num_accelerators "$ranks" --master_port "$(python -c 'from reid_dist.distributed import free_port; print(free_port())')" \
        launch/train.py configs/$name.yaml data.root="$shards" model.vocabulary="$shards/vocabulary.txt" seed="$seed" "$@"
}
train output_dir="$run"
if [ -n "$compare" ]; then train output_dir="$run/without-pretrain" stages.pretrain.steps=0; fi
train_seconds=$((SECONDS - began))

python -m reid_dist.benchmarks.quickstart "$run" --oracle "$data/oracle.json" \
    --seconds install=$install_seconds data=$data_seconds train=$train_seconds
