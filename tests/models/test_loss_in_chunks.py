"""Whole models with their loss in chunks of tokens: the same training as with whole logits, at every layout."""

import dataclasses
import logging

import pytest
import torch

from helpers.models import VOCABULARY, build_engine, go_on, small_config
from helpers.plain_training import FAMILIES
from slope_megatron.config import ParallelConfig
from slope_megatron.models.shapes import LARGEST_LOGITS, loss_chunk_tokens

STEPS = 3


def configured(family, chunk, **parallel):
    settings = {**FAMILIES[family], **parallel}
    zero_stage = settings.pop("zero_stage", 1)
    config = small_config(slope={"adapter_rank": 4}, **settings)
    parallel = dataclasses.replace(config.parallel, loss_chunk_tokens=chunk, zero_stage=zero_stage)
    return dataclasses.replace(config, parallel=parallel)


def trained(family, chunk, dtype, parallel):
    """Losses and gradient norms of some steps, and a validation loss."""
    from helpers.models import step_batches

    engine = build_engine(configured(family, chunk, **parallel), dtype)
    results = go_on(engine, STEPS)
    return results, engine.evaluate(step_batches(engine.config, 100, 0, 1)[:1])


LAYOUTS = [
    ("opt", 1, {}),
    ("llama", 1, {}),
    ("bert", 1, {}),
    ("opt", 1, {"recompute": "full"}),
    ("opt", 2, {"tensor_parallel": 2}),
    ("llama", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    ("bert", 2, {"tensor_parallel": 2, "sequence_parallel": True}),
    ("opt", 2, {"pipeline_parallel": 2}),
    ("opt", 2, {"zero_stage": 2}),
    ("llama", 2, {"zero_stage": 3}),
    ("opt", 2, {"zero_stage": 3}),
]


@pytest.mark.parametrize(("family", "world", "parallel"), LAYOUTS, ids=str)
def test_training_is_that_of_whole_logits(ranks, family, world, parallel):
    """32 tokens in chunks of 12. Sums in another order: a few roundings of fp32, which three steps hardly magnify."""
    layout = {name: size for name, size in parallel.items() if name in ("tensor_parallel", "pipeline_parallel")}
    run = {
        chunk: ranks.run(trained, family, chunk, torch.float32, parallel, world=world, **layout) for chunk in (0, 12)
    }
    for whole, chunked in zip(run[0], run[12], strict=True):
        torch.testing.assert_close(torch.tensor(chunked[0]), torch.tensor(whole[0]), rtol=2e-5, atol=0)
        assert chunked[1] == pytest.approx(whole[1], rel=2e-5)


def test_training_in_bf16_is_near(ranks):
    """The first loss is that of the same forward pass; then gradients that were rounded once more."""
    run = {chunk: ranks.run(trained, "llama", chunk, torch.bfloat16, {}, world=1)[0][0] for chunk in (0, 12)}
    assert run[12][0][0] == pytest.approx(run[0][0][0], rel=1e-6)
    for chunked, whole in zip(run[12], run[0], strict=True):
        assert chunked == pytest.approx(whole, rel=2**-8)


@pytest.mark.parametrize(
    ("asked", "tokens", "columns", "itemsize", "chunk"),
    [
        (None, 8192, 50304, 2, 4096),  # 786 MiB
        (None, 8192, 32000, 2, 0),  # 500 MiB
        (None, 8192, 128256, 2, 2048),
        (None, 8192, 128256 // 8, 2, 0),
        (None, 1000, 2**20, 2, 256),
        (None, 3, 2**30, 2, 3),  # not less than one piece that the GPU fills
        (0, 8192, 128256, 2, 0),
        (500, 8192, 10, 2, 500),
        (500, 300, 10, 2, 300),
    ],
)
def test_the_rule(asked, tokens, columns, itemsize, chunk):
    assert loss_chunk_tokens(asked, tokens, columns, itemsize) == chunk
    if asked is None and chunk == 0:
        assert tokens * columns * itemsize <= LARGEST_LOGITS


def test_a_negative_number_of_tokens_is_refused():
    with pytest.raises(ValueError, match="--loss-chunk-tokens is -1: it must be a number of tokens, or 0 for all"):
        ParallelConfig(loss_chunk_tokens=-1)


def build(chunk, dtype):
    """The lines logged at building, and the chunk of the model's own micro-batch."""
    from slope_megatron.models.provider import build_model

    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("slope_megatron.models.loss")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    model = build_model(configured("opt", chunk), VOCABULARY, dtype)
    return lines, model.output_layer.chunk(32)


def test_what_is_chosen_is_logged(ranks):
    cases = {
        (None, torch.float32): ([], 0),
        (12, torch.float32): (["the loss is computed in chunks of 12 of a micro-batch's 32 tokens"], 12),
        (12, torch.float16): (
            ["--loss-chunk-tokens 12 is passed over: in fp16 the logits of all tokens are made at once"],
            0,
        ),
    }
    for (chunk, dtype), expected in cases.items():
        assert ranks.run(build, chunk, dtype, world=1) == [expected]
