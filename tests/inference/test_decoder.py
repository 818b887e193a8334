"""The plain-torch decoder against the trained model, and its cache against no cache."""

import dataclasses

import pytest
import torch

from helpers.numerics import relative_error
from helpers.runs import made_run

NAMES = ("opt", "gpt2", "llama", "mistral", "qwen3")


@pytest.fixture(scope="module")
def runs(ranks, tmp_path_factory):
    """`runs(name)`: folder and logits of a family's run with adapters, made once."""
    made = {}

    def get(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name) / "run"
            made[name] = folder, made_run(ranks, folder, name)[1][0]
        return made[name]

    return get


def decoder_of(folder, **options):
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.inference.decoder import Decoder

    source = TrainedRun(folder)
    return Decoder(source.model, source, **options)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_training(runs, tmp_path, name):
    """From the checkpoint straight and from the packed export: the same tensors, so the same bits."""
    from helpers.runs import batch
    from slope_megatron.export import packed_export
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.inference.decoder import Decoder
    from slope_megatron.inference.packed_file import SafetensorsFolder, read_config

    folder, expected = runs(name)
    tokens, _, _ = batch()
    found = decoder_of(folder)(tokens)
    # fp64, the same formula; the order of sums differs in the products. The rotary angles are fp32 in both.
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-12

    source = TrainedRun(folder)
    files = packed_export.plan(source, 50_000)
    assert len(files) > 2
    packed_export.export(source, files, tmp_path / "packed")
    model, content = read_config(tmp_path / "packed")
    packed = Decoder(model, SafetensorsFolder(tmp_path / "packed"))
    assert torch.equal(packed(tokens), found)
    sizes = packed.linear_bytes()
    assert sizes == content["sparse_linears_bytes"]
    # fp64: half the values, and a bit for each of 64: 1/2 + 1/64.
    assert sizes["packed"] / sizes["dense"] == 0.5 + 1 / 64


def test_fp32_is_close(runs):
    from helpers.runs import batch

    folder, expected = runs("llama")
    found = decoder_of(folder, dtype=torch.float32)(batch()[0])
    assert found.dtype == torch.float32 and relative_error(found, expected) < 1e-5


def test_bf16_takes_9_sixteenths(runs):
    sizes = decoder_of(runs("opt")[0], dtype=torch.bfloat16).linear_bytes()
    assert sizes["packed"] / sizes["dense"] == 0.5 + 1 / 16


@pytest.mark.parametrize("name", NAMES)
def test_the_cache_gives_what_all_tokens_at_once_give(runs, name):
    """Prefill of prompts of several lengths, padded, then token by token, against each row alone without a cache."""
    decoder = decoder_of(runs(name)[0])
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, decoder.vocabulary, (3, 14), generator=generator)
    lengths = torch.tensor([3, 7, 5])
    cache = decoder.new_cache(3, 14)
    padded = tokens[:, :7].clone()
    padded[torch.arange(7) >= lengths[:, None]] = 77
    logits = decoder(padded, cache=cache)
    whole = decoder(tokens)
    for row, length in enumerate(lengths):
        assert relative_error(logits[row, :length], whole[row, :length]) < 1e-12
    for step in range(7):
        places = lengths + step
        found = decoder(tokens[torch.arange(3), places][:, None], places[:, None], cache)[:, 0]
        # fp64; only the order of sums differs.
        assert relative_error(found, whole[torch.arange(3), places]) < 1e-12


def test_generation_with_a_cache_is_generation_without(runs):
    """The tokens, greedy and drawn, are those that uncached logits give, in any batch."""
    from slope_megatron.inference.generate import Sampling, generate
    from slope_megatron.inference.sampling import next_tokens, uniform

    decoder = decoder_of(runs("llama")[0])
    prompts = [[1, 2, 3], [7], [5, 6, 5, 6, 5]]
    for sampling in (Sampling(9, 0.0), Sampling(9, 1.3, 0.9, seed=7)):
        found = [list(prompt) for prompt in prompts]
        for row, token in generate(decoder, prompts, sampling):
            found[row].append(token)
        for index, prompt in enumerate(prompts):
            ids = list(prompt)
            for _ in range(9):
                draw = uniform(sampling.seed, index, len(ids))
                logits = decoder(torch.tensor([ids]))[:, -1]
                ids += next_tokens(logits, sampling.temperature, sampling.top_p, [draw])
            assert found[index] == ids
        alone = [token for _, token in generate(decoder, prompts[1:2], sampling, first_prompt=1)]
        assert alone == found[1][1:]
    other = [token for _, token in generate(decoder, prompts[1:2], dataclasses.replace(sampling, seed=8))]
    assert other != alone, "another seed draws other tokens"


def test_generation_ends_where_it_must(runs):
    from slope_megatron.inference.generate import Sampling, generate

    decoder = decoder_of(runs("opt")[0])
    assert decoder.max_positions == 24
    tokens = [token for _, token in generate(decoder, [[1] * 20], Sampling(50, 0.0))]
    assert len(tokens) == 4, "the position table has 24 rows"
    stopped = [token for _, token in generate(decoder, [[1] * 20], Sampling(50, 0.0), stop=tokens[2])]
    assert stopped == tokens[: tokens.index(tokens[2])]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([], "there is no prompt"),
        ([[1], []], "prompt 1 is empty"),
        ([[1] * 24], "prompt 0 has 24 tokens and the model 24 positions: shorten it"),
        ([[90]], "prompt 0 has token 90 and the model 90 entries"),
    ],
)
def test_prompts_that_cannot_be_continued(runs, prompts, message):
    from slope_megatron.inference.generate import Sampling, generate

    with pytest.raises(ValueError, match=message):
        list(generate(decoder_of(runs("opt")[0]), prompts, Sampling()))


def test_rotary_positions_without_a_number_are_refused(runs):
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.inference.decoder import Decoder

    source = TrainedRun(runs("llama")[0])
    decoder = Decoder(dataclasses.replace(source.model, max_positions=None), source)
    with pytest.raises(ValueError, match="max_positions is unset, which rotary positions need: export the run again"):
        _ = decoder.max_positions


def test_more_tokens_than_positions_are_refused(runs):
    """The last row of the table would stand for all that lie behind it."""
    decoder = decoder_of(runs("gpt2")[0])
    longest = torch.zeros(1, decoder.max_positions, dtype=torch.int64)
    assert decoder(longest).shape[1] == decoder.max_positions
    with pytest.raises(ValueError, match=f"{decoder.max_positions + 1} tokens were given and the model has"):
        decoder(torch.zeros(1, decoder.max_positions + 1, dtype=torch.int64))


def test_an_encoder_is_refused(runs):
    from slope_megatron.config import ModelConfig
    from slope_megatron.inference.decoder import Decoder

    with pytest.raises(ValueError, match="architecture is bert: only decoders"):
        Decoder(ModelConfig(architecture="bert"), {})
