#!/usr/bin/env bash
# 2:4 weights in Megatron-LM's own pretrain_gpt.py, with a checkout that patches/README.md lists.
#
#   examples/megatron_lm.sh MEGATRON DATA [flags of pretrain_gpt.py]
#   GPUS=4 examples/megatron_lm.sh ../Megatron-LM data/mine --tensor-model-parallel-size 2 --bf16
#
# DATA is a folder that `slope data prepare` wrote from one source: Megatron's own format and a SentencePiece model.
set -euo pipefail
slope=$(realpath "$(dirname "$0")/..") megatron=$(realpath "$1") data=$(realpath "$2")
shift 2

model=(
    --transformer-impl local --no-gradient-accumulation-fusion --no-persist-layer-norm
    --num-layers 12 --hidden-size 768 --num-attention-heads 12 --seq-length 1024 --max-position-embeddings 1024
    --tokenizer-type SentencePieceTokenizer --tokenizer-model "$data/tokenizer.model" --data-path "$data/train"
    --split 100,0,0 --eval-interval 1000 --eval-iters 0 --log-interval 10
    --micro-batch-size 4 --global-batch-size 32 --train-iters 1000 --lr 6e-4 --lr-decay-style cosine
)

"$slope/patches/apply" megatron-lm "$megatron"
export PYTHONPATH=$megatron:$slope:$slope/kernels CUDA_DEVICE_MAX_CONNECTIONS=1
cd "$megatron"
torchrun --nproc-per-node "${GPUS:-1}" pretrain_gpt.py "${model[@]}" \
    --slope --slope-nm 2:4 --slope-adapter-rank 16 --slope-lazy-fraction 0.01 "$@"
