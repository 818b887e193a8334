"""`slope export hf`: the exported model computes what the trained one computed, to the last digits of fp64."""

import json

import pytest
import torch

from helpers.families import NAMES
from helpers.numerics import relative_error
from helpers.runs import batch, made_run


def load(folder, family):
    """transformers' model in fp64 all through, also where it computes in fp32 whatever the weights' type."""
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    auto = transformers.AutoModelForPreTraining if family == "bert" else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm | MistralRMSNorm | Qwen3RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                norm.weight.data = child.weight.data
                setattr(module, name, norm)
    return model.eval()


def logits_of(model, family):
    tokens, mask, types = batch()
    with torch.no_grad():
        if family == "bert":
            out = model(input_ids=tokens, attention_mask=mask, token_type_ids=types)
            return out.prediction_logits, out.seq_relationship_logits
        return model(input_ids=tokens).logits, None


def export(run, out, **options):
    from slope_megatron.export import hf_export
    from slope_megatron.export.trained_run import TrainedRun

    planned = hf_export.plan(TrainedRun(run), **options)
    hf_export.export(planned, out)
    return planned


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_run(ranks, tmp_path, name):
    """Every family with its adapters folded in, and beside as a LoRA."""
    run = tmp_path / "run"
    _, (expected, binary) = made_run(ranks, run, name)
    planned = export(run, tmp_path / "folded", family="auto" if name != "mistral" else "mistral")
    assert planned.family == name
    found, found_binary = logits_of(load(tmp_path / "folded", name), name)
    # fp64, the same sums in another order; folding adds the adapters' product to the weight first.
    assert found.shape == expected.shape and relative_error(found, expected) < 1e-12
    if binary is not None:
        assert relative_error(found_binary, binary) < 1e-12

    import peft

    export(run, tmp_path / "lora", adapters="lora", family=planned.family)
    base = load(tmp_path / "lora", name)
    assert relative_error(logits_of(base, name)[0], expected) > 1e-3, "without the adapters it is another model"
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "lora" / "adapter", autocast_adapter_dtype=False)
    assert relative_error(logits_of(adapted.double().eval(), name)[0], expected) < 1e-12


@pytest.mark.parametrize("name", ["opt", "llama"])
def test_zeros_stay_where_nothing_is_folded(ranks, tmp_path, name):
    """A run before its adapters join: 2:4 weights, every packed linear, and the logits of the run."""
    _, (expected, _) = made_run(ranks, tmp_path / "run", name, adapters=False, tie_word_embeddings=False)
    export(tmp_path / "run", tmp_path / "out", max_shard_bytes=60_000)
    model = load(tmp_path / "out", name)
    assert relative_error(logits_of(model, name)[0], expected) < 1e-12
    sparse = 0
    for key, weight in model.named_parameters():
        if ".layers." in key and weight.dim() == 2 and "norm" not in key:
            kept = (weight.view(weight.shape[0], -1, 4) != 0).sum(-1)
            sparse += bool((kept == 2).all())
    # Two blocks; Q, K and V of the first stay dense.
    assert sparse == 2 * (7 if name == "llama" else 6) - 3
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert json.loads((tmp_path / "out" / "config.json").read_text())["slope"]["zeros_kept"]


def test_a_dense_twin_is_exported_too(ranks, tmp_path):
    _, (expected, _) = made_run(ranks, tmp_path / "run", "gpt2", slope={"enabled": False})
    export(tmp_path / "run", tmp_path / "out")
    assert relative_error(logits_of(load(tmp_path / "out", "gpt2"), "gpt2")[0], expected) < 1e-12


@pytest.mark.parametrize(
    "slope",
    [{"method": "srste", "adapter_rank": 4}, {"method": "sste"}, {"method": "fst"}],
    ids=["srste", "sste", "fst"],
)
def test_baselines_are_exported_as_they_are_multiplied(ranks, tmp_path, slope):
    """Dense weights under a mask, of the present values or stored: pruned in the export, and generation agrees."""
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.inference.decoder import Decoder

    adapters = "adapter_rank" in slope
    _, (expected, _) = made_run(ranks, tmp_path / "run", "llama", slope=slope, adapters=adapters)
    export(tmp_path / "run", tmp_path / "out")
    assert relative_error(logits_of(load(tmp_path / "out", "llama"), "llama")[0], expected) < 1e-12
    source = TrainedRun(tmp_path / "run")
    assert relative_error(Decoder(source.model, source)(batch()[0]), expected) < 1e-12


def test_the_way_back_is_the_same_model(ranks, tmp_path):
    """Export, import, and every tensor is there again under its canonical name."""
    from slope_megatron.export.hf_checkpoint import import_hf
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.models.dense_checkpoint import MegatronCheckpoint

    made_run(ranks, tmp_path / "run", "mistral", adapters=False)
    export(tmp_path / "run", tmp_path / "out", family="mistral")
    model = import_hf(tmp_path / "out", tmp_path / "back", torch.float64)
    source, back = TrainedRun(tmp_path / "run"), MegatronCheckpoint(tmp_path / "back")
    assert model.query_groups == 3 and len(back) == len([name for name in source if "_pattern" not in name])
    for name in back:
        assert torch.equal(back[name], source.dense(name, fold=False)), name
