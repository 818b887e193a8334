"""The upstream's own script at other layouts, and under a stand-in for Transformer Engine: the same losses."""

import re

import pytest
from integrations.test_upstream_scripts import GPT, HELPERS, check_operands, checkout_of, corpus, losses, run

pytestmark = pytest.mark.slow
DISTRIBUTED = "--use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 30000".split()


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_losses_with_overlap_param_gather_are_those_without(version, tmp_path):
    """Evaluated on the way, which takes the hooks away that gather."""
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, "--data-path", tmp_path / "corpus", *DISTRIBUTED]
    common += ["--eval-iters", 1, "--eval-interval", 8, "--split", "90,10,0"]
    expected, found = (run(script, *common, *more, world=2) for more in ((), ("--overlap-param-gather",)))
    assert losses(found) == losses(expected) and losses(found)[-1] < losses(found)[0] - 1.0
    evaluated = [re.findall(r"lm loss value: (\S+)", result.stdout) for result in (expected, found)]
    assert evaluated[0] == evaluated[1] and len(evaluated[0]) >= 2


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_a_virtual_pipeline_is_the_same_model(version, tmp_path):
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, "--data-path", tmp_path / "corpus", "--num-layers", 4]
    parts = ["--pipeline-model-parallel-size", 2, "--num-layers-per-virtual-pipeline-stage", 1]
    expected = losses(run(script, *common))
    assert losses(run(script, *common, *parts, world=2)) == pytest.approx(expected, rel=1e-5)


ENGINE, STAND_IN = ("--transformer-impl", "transformer_engine"), HELPERS / "te_stand_in"
LLAMA = "--swiglu --normalization RMSNorm --qk-layernorm --disable-bias-linear".split()


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_losses_under_transformer_engine_are_the_local_spec_s(version, tmp_path):
    """With a stand-in for it in plain torch."""
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, *LLAMA, "--data-path", tmp_path / "corpus"]
    expected = losses(run(script, *common))
    assert losses(run(script, *common, *ENGINE, more=[STAND_IN])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_context_parallel_ranks_are_one(version, tmp_path):
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, *ENGINE, "--data-path", tmp_path / "corpus"]
    expected = losses(run(script, *common, more=[STAND_IN]))
    cut = run(script, *common, "--context-parallel-size", 2, world=2, more=[STAND_IN])
    assert losses(cut) == pytest.approx(expected, rel=1e-5)


def test_the_local_spec_reads_what_was_saved_under_transformer_engine(tmp_path):
    script = checkout_of("core_v0.16.1", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, *LLAMA, "--data-path", tmp_path / "corpus"]
    save = ["--save", tmp_path / "saved", "--save-interval", 10, "--exit-interval", 10]
    expected = losses(run(script, *common))
    assert losses(run(script, *common, *ENGINE, *save, more=[STAND_IN])) == pytest.approx(expected[:10], rel=1e-5)
    # In the second line after a start the upstream logs the mean of both.
    assert losses(run(script, *common, "--load", tmp_path / "saved"))[2:] == pytest.approx(expected[12:], rel=1e-5)


MIXTRAL = """
--num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 0.01 --moe-token-dispatcher-type alltoall --swiglu
--group-query-attention --num-query-groups 2 --ffn-hidden-size 128 --normalization RMSNorm --disable-bias-linear
--untie-embeddings-and-output-weights --position-embedding-type rope --make-vocab-size-divisible-by 64
""".split()


EXPERTS_CUT = ["--expert-model-parallel-size", 2]
CUT_TWICE = [*EXPERTS_CUT, "--tensor-model-parallel-size", 2, "--sequence-parallel"]


@pytest.mark.parametrize("version", ["core_v0.16.1", "main_d98e8a64"])
def test_a_sparse_mixtral_is_the_same_on_four_ranks(version, tmp_path):
    script = checkout_of(version, "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, *MIXTRAL, "--data-path", tmp_path / "corpus"]
    whole = run(script, *common)
    expected = losses(whole)
    assert expected[-1] < expected[0] - 1.0
    # QKV of the second block, both projections, and two linears of each of four experts in both blocks.
    check_operands(whole, "ReferenceOperands", linears=19)
    assert losses(run(script, *common, *CUT_TWICE, world=4)) == pytest.approx(expected, rel=1e-5)


def test_a_sparse_mixtral_resumes_at_another_layout(tmp_path):
    """Megatron has an optimizer of experts' own at EP > 1, whose state it cannot load at EP 1: there, weights alone."""
    script = checkout_of("core_v0.16.1", "pretrain_gpt", tmp_path)
    corpus(tmp_path / "corpus")
    common = [*GPT, *MIXTRAL, "--data-path", tmp_path / "corpus"]
    first, second, third = losses(run(script, *common, *EXPERTS_CUT, world=2))[17:]
    save = ["--save", tmp_path / "saved", "--save-interval", 17, "--exit-interval", 17]
    losses(run(script, *common, *CUT_TWICE, *save, world=4))
    load = [*common, "--load", tmp_path / "saved"]
    # In the second line after a start the upstream logs the mean of both.
    expected = pytest.approx([first, (first + second) / 2, third], rel=1e-5)
    assert losses(run(script, *load, *EXPERTS_CUT, world=2)) == expected
    assert losses(run(script, *load, "--no-load-optim"))[0] == pytest.approx(first, rel=1e-5)
