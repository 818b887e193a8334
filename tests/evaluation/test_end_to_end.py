"""Training on two tensor-parallel ranks -> checkpoint -> Hugging Face -> the same logits -> the same text."""

import dataclasses

import pytest
import torch

from helpers.models import SEQUENCE, VOCABULARY, build_engine, save, small_config, step_batches
from helpers.numerics import relative_error

SLOPE = {"adapter_rank": 4, "lazy_fraction": 0.5}


def trained(config, run):
    """Train, save, and the logits of the model as it is then."""
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    engine = build_engine(config, torch.float32)
    losses = [engine.train_step(step_batches(config, step, 0, 1)).loss for step in range(config.train.steps)]
    save(engine, run)
    model = engine.model.eval()
    tokens = prompt()
    with torch.no_grad():
        if config.model.architecture == "bert":
            logits, _ = model(tokens, torch.ones_like(tokens), torch.zeros_like(tokens))
        else:
            logits = model(tokens, torch.arange(SEQUENCE).expand_as(tokens), None)
        return losses, gather_from_tensor_model_parallel_region(logits)[..., :VOCABULARY].clone()


def prompt():
    return torch.randint(0, VOCABULARY, (2, SEQUENCE), generator=torch.Generator().manual_seed(9))


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["opt", "llama", "bert"])
def test_a_trained_model_is_the_same_everywhere(ranks, tmp_path, shape):
    import transformers

    from slope_megatron.export import hf_export
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.inference.decoder import Decoder
    from slope_megatron.inference.generate import Sampling, generate

    kind = {"gated": shape == "llama", "bert": shape == "bert"}
    config = small_config(tensor_parallel=2, slope=SLOPE, steps=8, **kind)
    # The position table is twice as long as the samples, so that there is room to generate.
    model = dataclasses.replace(config.model, vocab_size=VOCABULARY, max_positions=2 * SEQUENCE)
    config = dataclasses.replace(config, model=model)
    losses, expected = ranks.run(trained, config, tmp_path / "run", world=2, tensor_parallel=2)[0]
    assert losses[-1] < losses[0]

    source = TrainedRun(tmp_path / "run")
    assert source.adapters_active and source.step == 8
    planned = hf_export.plan(source)
    assert planned.family == shape
    hf_export.export(planned, tmp_path / "hf")
    auto = transformers.AutoModelForPreTraining if shape == "bert" else transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    tokens = prompt()
    with torch.no_grad():
        out = theirs(input_ids=tokens)
    found = out.prediction_logits if shape == "bert" else out.logits
    # fp32: DESIGN section 2's bound for sums in another order.
    assert relative_error(found, expected) < 1e-5
    if shape == "bert":
        return
    decoder = Decoder(source.model, source)
    assert relative_error(decoder(tokens), expected) < 1e-5
    ours = [token for _, token in generate(decoder, [tokens[0].tolist()], Sampling(12, temperature=0.0))]
    with torch.no_grad():
        text = theirs.generate(tokens[:1], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert text[0, SEQUENCE:].tolist() == ours
