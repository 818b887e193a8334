"""Configuration: one clear sentence for each value that is wrong."""

import re

import pytest

from slope_megatron.config import (
    Config,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SlopeConfig,
    TrainConfig,
)

BAD = [
    (
        lambda: OptimizerConfig(optimizer="lamb", embedding_weight_decay=0.0),
        "--embedding-weight-decay is 0 with --optimizer lamb: what does not decay has no trust ratio",
    ),
    (lambda: OptimizerConfig(z_loss=-1.0), "--z-loss is -1.0: it must be 0 (off) or positive"),
    (lambda: OptimizerConfig(embedding_lr_multiplier=0.0), "--embedding-lr-multiplier is 0.0: it must be positive"),
    (lambda: OptimizerConfig(decay_fraction=0.0), "--decay-fraction is 0.0: it must be positive and at most 1"),
    (
        lambda: OptimizerConfig(lr_schedule="wsd", min_lr=0.0),
        "--min-lr is 0 with --lr-schedule wsd and --decay-form exponential: no factor leads there",
    ),
    (
        lambda: Config(optimizer=OptimizerConfig(lr_schedule="wsd", warmup_steps=950)),
        "--warmup-steps is 950 with --lr-schedule wsd, which decays in the last 100 of 1000 steps",
    ),
    (lambda: SlopeConfig(nm="3:5"), "--slope-nm is '3:5': it must be N:M"),
    (lambda: SlopeConfig(nm="four"), "--slope-nm is 'four'"),
    (lambda: SlopeConfig(nm="4:4"), "use 2:4, which runs on sparse tensor cores"),
    (lambda: SlopeConfig(pattern="best"), "--slope-pattern is 'best': it must be one of random, magnitude"),
    (lambda: SlopeConfig(lazy_fraction=0.0), "it must be in (0, 1]; for none: --slope-adapter-rank 0"),
    (lambda: SlopeConfig(adapter_rank=-1), "--slope-adapter-rank is -1"),
    (lambda: SlopeConfig(adapter_rank=True), "--slope-adapter-rank is True: it must be of type"),
    (lambda: SlopeConfig(adapter_rank="4x"), "--slope-adapter-rank is '4x': it must be 0 (no adapters), a positive"),
    (lambda: SlopeConfig(adapter_rank="0%"), "--slope-adapter-rank is '0%': it must be 0"),
    (lambda: SlopeConfig(method="wanda"), "--slope-method is 'wanda': it must be one of slope, dense, srste, ext"),
    (lambda: SlopeConfig(mode="full", method="srste"), "--slope-mode full with --slope-method srste: the mode is"),
    (lambda: SlopeConfig(fp8="e4m3"), "--slope-fp8 is 'e4m3': it must be one of off, current"),
    (
        lambda: SlopeConfig(fp8="current", method="srste"),
        "--slope-fp8 current with --slope-method srste: it is slope's",
    ),
    (lambda: SlopeConfig(fp8="current", mode="full"), "has no e4m3 product; use --slope-mode paper"),
    (lambda: SlopeConfig(fp8="current", backend="cutlass"), "cutlass: its kernels take 16-bit values; use cusparselt"),
    (lambda: SlopeConfig(fp8="current", nm="2:8"), "--slope-fp8 current with another pattern than 2:4"),
    (lambda: SlopeConfig(fp8="current", nm_by_block="1=1:4"), "tensor cores take no other; use --slope-nm 2:4"),
    (lambda: SlopeConfig(method="fst", nm="2:8"), "--slope-method fst with another pattern than 2:4"),
    (lambda: SlopeConfig(method="sste", nm_by_block="1=2:8"), "than 2:4: its threshold leaves two of four; use 2:4"),
    (lambda: SlopeConfig(mup=True, method="sste"), "--slope-mup with --slope-method sste: it is for masks that never"),
    (lambda: SlopeConfig(mup=True, init_rescale=True), "--slope-mup and --slope-init-rescale are both given"),
    (
        lambda: Config(slope=SlopeConfig(mup=True), optimizer=OptimizerConfig(optimizer="lamb")),
        "--slope-mup with --optimizer lamb: its trust ratios",
    ),
    (lambda: SlopeConfig(method="fst", adapter_rank=4), "--slope-method fst with --slope-adapter-rank: FST ends dense"),
    (lambda: SlopeConfig(method="fst", sparse_mlp=False), "neither attention nor MLP is sparse"),
    (lambda: SlopeConfig(fst_dense_tail=1.0), "--slope-fst-dense-tail is 1.0: it must be in [0, 1)"),
    (
        lambda: SlopeConfig(dense_tail=1.0),
        "--slope-dense-tail is 1.0: it must be in [0, 1); to train dense: --no-slope",
    ),
    (
        lambda: SlopeConfig(dense_start=0.1, adapter_rank=4),
        "--slope-dense-start with --slope-adapter-rank 4: lazy adapters join pruned weights, to the end",
    ),
    (lambda: SlopeConfig(dense_tail=0.1, adapter_rank="1.5%"), "--slope-dense-tail with --slope-adapter-rank 1.5%"),
    (
        lambda: SlopeConfig(dense_start=0.1, pattern="wanda"),
        "--slope-dense-start with --slope-pattern wanda: a dense start ends with pruning by magnitude",
    ),
    (
        lambda: Config(slope=SlopeConfig(dense_start=0.5, dense_tail=0.5)),
        "a dense start of 500 steps and a dense tail of 500 leave none of 1000 steps sparse: take a smaller",
    ),
    (
        lambda: Config(slope=SlopeConfig(method="fst", fst_dense_tail=0.95), train=TrainConfig(steps=8)),
        "a dense start of 0 steps and a dense tail of 8 leave none of 8 steps sparse: take a smaller "
        "--slope-dense-start, --slope-dense-tail or (fst) --slope-fst-dense-tail, or say --no-slope",
    ),
    (
        lambda: SlopeConfig(dense_tail=0.1, method="rigl"),
        "--slope-dense-tail with --slope-method rigl: its pruned places hold what no step has trained",
    ),
    (lambda: SlopeConfig(srste_decay=-1.0), "--slope-srste-decay is -1.0: it must not be negative"),
    (lambda: SlopeConfig(fst_mask_interval=0), "--slope-fst-mask-interval is 0: it must be at least 1"),
    (lambda: Config(slope=SlopeConfig(pattern="wanda")), "--slope-pattern wanda prunes a trained model: give --init"),
    (lambda: TrainConfig(stop_at=-1), "--stop-at is -1: it must be a step, or 0"),
    (lambda: SlopeConfig(lr_multiplier=0.0), "--slope-lr-multiplier is 0.0: it must be positive"),
    (lambda: SlopeConfig(sparse_attention=False, sparse_mlp=False), "say --no-slope for a dense run"),
    (lambda: ModelConfig(hidden_size=100, num_attention_heads=8), "the heads must divide it; take a multiple of 8"),
    (lambda: ModelConfig(num_attention_heads=12, num_query_groups=5), "it must divide the heads"),
    (lambda: ModelConfig(num_layers=0), "--num-layers is 0: it must be at least 1"),
    (lambda: ModelConfig(dropout=1.0), "--dropout is 1.0: it must be in [0, 1)"),
    (lambda: ParallelConfig(tensor_parallel=0), "--tensor-parallel is 0"),
    (
        lambda: ParallelConfig(tensor_parallel=2).data_parallel(3),
        "3 ranks were started with --tensor-parallel 2 and --pipeline-parallel 1: TP x PP x DP must be",
    ),
    (
        lambda: DataConfig(global_batch_size=6).micro_batches(4),
        "it must be a multiple of micro-batch x data-parallel = 1 x 4",
    ),
    (lambda: ParallelConfig(virtual_pipeline=2), "--virtual-pipeline is 2: DeepSpeed's engine holds one module a rank"),
    (lambda: ParallelConfig(context_parallel=2), "--context-parallel is 2: attention here sees whole sequences only"),
    (lambda: Config(parallel=ParallelConfig(pipeline_parallel=5)), "--num-layers is 12: --pipeline-parallel 5 must"),
    (lambda: SlopeConfig(nm_by_block="3=2:9"), "--slope-nm is '2:9': it must be N:M"),
    (lambda: SlopeConfig(nm_by_block="b=2:4"), "--slope-nm-by-block holds 'b': blocks are written as `3` or `3-5`"),
    (lambda: SlopeConfig(dense_blocks="5-3"), "--slope-dense-blocks holds '5-3'"),
    (
        lambda: Config(slope=SlopeConfig(dense_blocks="12")),
        "--slope-dense-blocks names block 12: the model has blocks 0 to",
    ),
    (lambda: Config(slope=SlopeConfig(dense_blocks="0-11")), "names every block: leave one of them sparse"),
    (lambda: Config(model=ModelConfig(max_positions=512)), "--seq-length is 1024: the model has 512 positions"),
    (lambda: OptimizerConfig(lr=1e-4, min_lr=1e-3), "they must satisfy 0 <= min-lr <= lr"),
    (lambda: TrainConfig(resume=True, overwrite=True), "--resume and --overwrite are both given"),
    (lambda: TrainConfig(auto_resume=True, overwrite=True), "--auto-resume and --overwrite are both given"),
    (
        lambda: Config(parallel=ParallelConfig(tensor_parallel=5)),
        "--num-attention-heads is 12: --tensor-parallel 5 must divide it",
    ),
    (
        lambda: Config(model=ModelConfig(hidden_size=72, num_attention_heads=4)),
        "--hidden-size is 72: --tensor-parallel 1 must divide it and 2:4 groups with packed patterns "
        "need multiples of 16 "
        "on each rank; take 64, say",
    ),
    (
        lambda: Config(
            model=ModelConfig(hidden_size=96, num_attention_heads=12), parallel=ParallelConfig(tensor_parallel=4)
        ),
        "--hidden-size is 96: --tensor-parallel 4 must divide it",
    ),
    (
        lambda: Config(
            parallel=ParallelConfig(tensor_parallel=2, sequence_parallel=True), data=DataConfig(seq_length=15)
        ),
        "--seq-length is 15: --tensor-parallel 2 must divide it",
    ),
]


@pytest.mark.parametrize(("build", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_values_get_one_clear_sentence(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()
