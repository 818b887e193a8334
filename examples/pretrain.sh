#!/usr/bin/env bash
# Text in, a 2:4 model out: prepare a corpus, pretrain, generate, export. CPU or GPU; minutes on two cores.
#
#   examples/pretrain.sh [SOURCE] [OUT] [flags of slope pretrain]      SOURCE: what `slope data prepare` takes
#   RANKS=4 examples/pretrain.sh my_texts/ runs/mine --steps 1000      RANKS: GPUs, or processes where there is none
#
# OUT gets data/, run/ (checkpoints, metrics), exported/ (for transformers) and packed/ (kept values, bitmasks).
set -euo pipefail
source=${1:-stdlib} out=${2:-runs/example}
shift $(($# < 2 ? $# : 2))
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

slope data prepare "$source" --out "$out/data" --vocab-size 2048

deepspeed --num_gpus "${RANKS:-1}" --no_local_rank --module slope_megatron pretrain \
    --data "$out/data" --out "$out/run" --num-layers 4 --hidden-size 256 --num-attention-heads 4 \
    --seq-length 128 --global-batch-size 16 --micro-batch-size 8 --steps 200 --slope-adapter-rank 16 "$@"

slope generate "$out/run" --prompt "def " --max-tokens 40
slope export hf "$out/run" "$out/exported"
slope export packed "$out/run" "$out/packed"
