#!/usr/bin/env bash
# Fresh machine to a trained, evaluated two-query model and its result table.
#
#   bash launch/quickstart.sh [--fast] [--cpu] [--ranks N] [--seed S] [--compare]
#
# --fast     a smoke run of a small world, at most 90 s after installation, in runs/quickstart-fast
# --cpu      do not use GPUs
# --ranks    processes, a divisor of 64; default: as many GPUs as divide 64 (of CUDA_VISIBLE_DEVICES), or 2 on the CPU
# --seed     of the world, the weights and the order; default 0
# --compare  also train without the generic stage, and the T2I stage without a queue, and add both to the table
#
# Running it again reuses what is there: environment, world, shards, finished stages. The results are always in
# runs/quickstart; a run of another device, seed or number of ranks is first moved aside, for example to
# runs/quickstart.cpu-seed0-ranks2, and comes back when it is asked for again.
set -euo pipefail
CDPATH='' cd -P "$(dirname "$0")/.."

phase='' port=''
stop() { phase=''; echo "quickstart.sh: $*" >&2; exit 2; }

fast='' cpu='' ranks='' seed=0 compare=''
while [ $# -gt 0 ]; do
    case "$1" in
        --fast) fast=1 ;;
        --cpu) cpu=1 ;;
        --compare) compare=1 ;;
        --ranks | --seed)
            [[ ${2:-} =~ ^[0-9]{1,15}$ ]] || stop "$1 needs a number of at most 15 digits, not '${2:-}'"
            # 10#: else bash reads 010 as 8.
            if [ "$1" = --ranks ]; then ranks=$((10#$2)); else seed=$((10#$2)); fi
            shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' launch/quickstart.sh; exit 0 ;;
        *) stop "unknown option $1; it takes --fast, --cpu, --ranks N, --seed S and --compare" ;;
    esac
    shift
done
# data.global_batch_size of both recipes is 64.
[[ -z $ranks || " 1 2 4 8 16 32 64 " == *" $ranks "* ]] || stop "--ranks $ranks: take one of 1, 2, 4, 8, 16, 32, 64"

# Runs a program in a session of its own, so that its whole group can be ended: the ranks are deepspeed's grandchildren.
run() { setsid "$@" & wait "$!"; }

interrupted() {
    trap '' INT TERM HUP
    local group
    group=$(jobs -p)
    if [ -n "$group" ]; then
        # Also by process: it may not have made its group yet.
        kill -TERM -- "-$group" "$group" 2>/dev/null || true
        for _ in {1..25}; do kill -0 -- "-$group" 2>/dev/null || break; sleep 0.2; done
        kill -KILL -- "-$group" 2>/dev/null || true
    fi
    exit "$1"
}

ended() {
    # DeepSpeed's CPU collectives leave 66 MB per rank there when they are killed.
    [ -z "$port" ] || rm -f /dev/shm/deepspeed_allreduce_buffer_*_"$port"_*
    local how
    case "$1-$phase" in
        # `stop` and the set-up have said in one line what is wrong.
        0-* | *- | 2-set-up) return ;;
        75-* | 129-* | 130-* | 143-*) how="interrupted during the $phase" ;;
        *) how="the $phase failed with exit code $1, see above" ;;
    esac
    echo "quickstart.sh: $how; run the same command again to continue" >&2
}
trap 'ended $?' EXIT
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

phase=set-up began=$SECONDS
run bash launch/environment.sh ${cpu:+--cpu}
install_seconds=$((SECONDS - began))
export PATH=$PWD/.venv/bin:$PATH TORCH_EXTENSIONS_DIR=$PWD/.venv/torch_extensions

device=gpu
gpus=0
[ -n "$cpu" ] || gpus=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$gpus" = 0 ]; then
    device=cpu ranks=${ranks:-2}
    export DS_ACCELERATOR=cpu
elif [ -z "$ranks" ]; then
    ranks=64
    while [ "$ranks" -gt "$gpus" ]; do ranks=$((ranks / 2)); done
fi
accelerators=(--num_accelerators "$ranks")
if [ "$device" = gpu ]; then
    [ "$ranks" -le "$gpus" ] || stop "--ranks $ranks: there are $gpus GPUs; use fewer ranks, or --cpu"
    # deepspeed drops CUDA_VISIBLE_DEVICES when it is given a number.
    visible=${CUDA_VISIBLE_DEVICES:-}
    if [ -n "$visible" ]; then
        [[ $visible =~ ^[0-9]+(,[0-9]+)*$ ]] || stop "CUDA_VISIBLE_DEVICES=$visible: deepspeed takes only numbers"
        accelerators=(--include "localhost:$(cut -d, -f"1-$ranks" <<<"$visible")")
    fi
fi

name=quickstart${fast:+-fast}
data=data/$name.seed$seed result=runs/$name
raw=$data/raw shards=$data/shards
# Generic pairs are streamed: every reading process of every rank needs tars of its own, so these are small.
identities=1200 test_identities=200 pairs=16000 pair_shard_mb=1
if [ -n "$fast" ]; then identities=64 test_identities=24 pairs=400 pair_shard_mb=.03; fi

mkdir -p runs "$raw" "$shards"
exec 8>"runs/.$name.lock"
flock -n 8 || stop "another $name is running in this folder; wait for it"
# The result folder is of one device, seed and number of ranks; another one's is kept under its own name.
settings=$device-seed$seed-ranks$ranks
if [ -e "$result" ]; then
    found=$(cat "$result/settings" 2>/dev/null) || found=''
    [[ $found =~ ^[a-z0-9-]+$ ]] || stop "$result: has no file settings, so this script did not make it; move it away"
    if [ "$found" != "$settings" ]; then
        [ ! -e "$result.$found" ] || stop "$result cannot make room: $result.$found exists; move one of them away"
        echo "quickstart.sh: moving the earlier run to $result.$found"
        mv -T "$result" "$result.$found"
    fi
fi
if [ ! -e "$result" ]; then
    # A new one gets its settings under another name, so that it never stands without them.
    earlier=$result.$settings
    if [ ! -e "$earlier" ]; then
        earlier=$result.new
        mkdir -p "$earlier"
        echo "$settings" >"$earlier/settings"
    fi
    mv -T "$earlier" "$result"
fi

# The procedural world, as files in the data sets' own raw formats, and shards made from them.
phase=data began=$SECONDS
draw() { run python -m shards.world export "$@" --seed "$seed" --level quickstart --workers "$(nproc)"; }
for format in cuhk_pedes market1501; do
    draw "$format" --out "$raw/$format" --ids "$identities" --test-ids "$test_identities"
    run python -m shards.write "$format" --root "$raw/$format" --out "$shards/$format"
    run python -m shards.world attributes "$raw/$format" "$shards/$format"
done
draw img2dataset --out "$raw/generic" --ids "$pairs" --person-share 0.6
run python -m shards.write img2dataset --root "$raw/generic" --out "$shards/generic" --shard-mb "$pair_shard_mb"
run python -m shards.world vocabulary "$raw/generic" "$raw/cuhk_pedes"
run python -m shards.world oracle "$raw/cuhk_pedes" "$raw/market1501" --json "$data/oracle.json"
run python -m reid_dist.data.tokenizer build "$shards/cuhk_pedes" "$shards/generic" --out "$shards/vocabulary.txt"
data_seconds=$((SECONDS - began))

# The recipe; for the comparisons the same with one thing less (a stage of 0 steps hands its weights on).
phase=training began=$SECONDS
train() {
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    run deepspeed "${accelerators[@]}" --master_port "$port" launch/train.py "configs/$name.yaml" \
        data.root="$shards" model.vocabulary="$shards/vocabulary.txt" seed="$seed" "$@"
}
train output_dir="$result"
if [ -n "$compare" ]; then
    train output_dir="$result/without-pretrain" stages.pretrain.steps=0
    train output_dir="$result/without-queue" model.weights="$result/i2i/export" \
        stages.pretrain.steps=0 stages.i2i.steps=0 \
        stages.t2i.loss.queue_size=0 stages.t2i.loss.in_batch_negatives=false
fi
train_seconds=$((SECONDS - began))

phase=report
run python -m reid_dist.benchmarks.quickstart "$result" --oracle "$data/oracle.json" \
    --seconds "install=$install_seconds" "data=$data_seconds" "train=$train_seconds"
cat <<END

The model is in $result. What to do with it, after: source .venv/bin/activate
  python launch/evaluate.py $result --benchmarks cuhk_pedes market1501 --report $result/report
  python launch/search.py index $result $shards/market1501 --out $result/photos.index
  python launch/search.py serve $result/photos.index
END
