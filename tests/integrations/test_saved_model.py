"""A checkpoint of patched Megatron-LM, exported: the model that it holds, without Megatron."""

import argparse
import os
import pickle
import zipfile

import pytest
import torch

from helpers.experts import BLOCKS, LENGTH, VOCABULARY, Layout, batch, build, metadata, start
from helpers.numerics import relative_error
from slope_megatron.export import hf_export, packed_export
from slope_megatron.inference.decoder import Decoder
from slope_megatron.integrations.megatron_lm.saved_model import SavedModel, is_saved_model, model_config

# Arguments as Megatron-LM has parsed them, of the small model in `helpers.experts`.
ARGUMENTS = {
    "num_layers": BLOCKS,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "kv_channels": 16,
    "group_query_attention": True,
    "num_query_groups": 2,
    "swiglu": True,
    "bias_gelu_fusion": False,
    "normalization": "RMSNorm",
    "qk_layernorm": False,
    "layernorm_epsilon": 1e-5,
    "position_embedding_type": "rope",
    "rotary_base": 10000,
    "max_position_embeddings": LENGTH,
    "seq_length": LENGTH,
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "hidden_dropout": 0.0,
    "init_method_std": 0.02,
    "padded_vocab_size": VOCABULARY,
    "train_iters": 10,
    "num_experts": 4,
    "moe_ffn_hidden_size": None,
    "moe_router_topk": 2,
    "SlopeConfig.enabled": True,
    "SlopeConfig.adapter_rank": 4,
    "SlopeConfig.lazy_fraction": 0.5,
}


class AttentionBackend:
    """Something of the upstream's in the arguments, which an export does not import."""


def trained(layout, folder, arguments, settings, step):
    """Save as Megatron-LM does, at iteration `step` of 10; logits of the fixed batch."""
    from megatron.core import dist_checkpointing

    from slope_megatron.config import SlopeConfig
    from slope_megatron.integrations.megatron_lm.adapters import use_adapters
    from slope_megatron.models.layer_spec import pruned_modules

    start(layout)
    enabled = arguments.get("SlopeConfig.enabled", False)
    slope = SlopeConfig(backend="reference", adapter_rank=4, lazy_fraction=0.5, enabled=enabled)
    model = build(layout, slope, **settings)
    use_adapters([model], step > 5)
    for number, module in enumerate(pruned_modules(model)):
        # Adapters start as zero: other numbers show that they are exported, the same on every rank.
        generator = torch.Generator().manual_seed(number % 3)
        module.adapter_r.data.copy_(torch.randn(1, 4, generator=generator) * 0.05)
    iteration = folder / f"iter_{step:07d}"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir()
        (folder / "latest_checkpointed_iteration.txt").write_text(f"{step}\n")
    torch.distributed.barrier()
    args = argparse.Namespace(**arguments, attention_backend=AttentionBackend(), params_dtype=torch.float32)
    state = {"args": args, "iteration": step, "model": model.sharded_state_dict(metadata=metadata())}
    dist_checkpointing.save(state, str(iteration))
    tokens = batch(0)
    # Megatron's own attention, of the dense model, would make this one on a GPU.
    mask = torch.ones(LENGTH, LENGTH).triu(1).bool()[None, None]
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(LENGTH).expand_as(tokens), mask), tokens


def logits_of(folder, tokens):
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    with torch.no_grad():
        return model.eval()(input_ids=tokens).logits


@pytest.mark.parametrize("step", [4, 8], ids=["before adapters join", "with adapters"])
def test_logits_of_an_exported_mixtral_are_the_models(ranks, tmp_path, step):
    (tmp_path / "saved").mkdir()
    layout = Layout(expert=2)
    results = ranks.run(trained, layout, tmp_path / "saved", ARGUMENTS, {}, step, world=layout.world)
    source = SavedModel(tmp_path / "saved")
    assert (source.step, source.adapters_active) == (step, step > 5)
    planned = hf_export.plan(source)
    hf_export.export(planned, tmp_path / "out")
    assert planned.family == "mixtral"
    for expected, tokens in results:
        # fp32, the sums over experts in another order.
        assert relative_error(logits_of(tmp_path / "out", tokens), expected) < 1e-5
    with pytest.raises(ValueError, match="the packed form has no experts: use `slope export hf`"):
        packed_export.plan(source)
    weights = hf_export.hf_parts(source, "mixtral", lambda name: source.dense(name, False))
    fc1 = next(weight for name, weight in weights if name.endswith("layers.1.block_sparse_moe.experts.3.w1.weight"))
    assert ((fc1.view(-1, 16, 4) != 0).sum(-1) == 2).all()


def test_a_dense_model_by_blocks_in_one_tensor_is_exported_too(ranks, tmp_path):
    """Megatron's usual form of a model whose blocks are alike; without experts it is a LLaMA."""
    (tmp_path / "saved").mkdir()
    arguments = {**ARGUMENTS, "num_experts": None, "SlopeConfig.enabled": False}
    for name in ("adapter_rank", "lazy_fraction"):
        del arguments[f"SlopeConfig.{name}"]
    ((expected, tokens),) = ranks.run(
        trained, Layout(), tmp_path / "saved", arguments, {"num_moe_experts": None}, 8, world=1
    )
    source = SavedModel(tmp_path / "saved" / "iter_0000008")
    assert source.tensors.places["decoder.layers.1.mlp.linear_fc2.weight"].index == (1,)
    planned = hf_export.plan(source)
    hf_export.export(planned, tmp_path / "out")
    assert planned.family == "llama"
    assert relative_error(logits_of(tmp_path / "out", tokens), expected) < 1e-5


def test_a_packed_export_of_a_sparse_gpt_computes_the_same(ranks, tmp_path):
    (tmp_path / "saved").mkdir()
    arguments, layout = {**ARGUMENTS, "num_experts": None}, Layout(tensor=2)
    settings = {"num_moe_experts": None, "sequence_parallel": False}
    (expected, tokens), _ = ranks.run(trained, layout, tmp_path / "saved", arguments, settings, 8, world=2)
    source = SavedModel(tmp_path / "saved")
    found = Decoder(source.model, source)(tokens)
    assert relative_error(found.chunk(2, dim=-1)[0], expected) < 1e-5
    packed_export.export(source, packed_export.plan(source), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moe_shared_expert_intermediate_size": 64}, "--moe-shared-expert-intermediate-size is 64"),
        ({"squared_relu": True, "qk_l2_norm": True}, "--squared-relu is True; --qk-l2-norm is True"),
        ({"moe_router_pre_softmax": True}, "--moe-router-pre-softmax is True"),
        ({"kv_channels": 32}, "--kv-channels is 32"),
        ({"position_embedding_type": "none"}, "--position-embedding-type is none"),
    ],
)
def test_what_no_written_model_has_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message):
        model_config(argparse.Namespace(**{**ARGUMENTS, **changes}), VOCABULARY)


def test_the_fused_gelu_is_the_approximate_one():
    arguments = {**ARGUMENTS, "swiglu": False, "num_experts": None}
    kinds = {fused: {**arguments, "bias_gelu_fusion": fused} for fused in (True, False)}
    found = {fused: model_config(argparse.Namespace(**kind), 128).activation for fused, kind in kinds.items()}
    assert found == {True: "gelu_tanh", False: "gelu"}


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_arguments_are_read_without_executing_anything(tmp_path, monkeypatch):
    from slope_megatron.storage import pickled_arguments

    monkeypatch.chdir(tmp_path)
    content = {"args": argparse.Namespace(num_layers=2, evil=Evil()), "iteration": 3}
    with zipfile.ZipFile(tmp_path / "common.pt", "w") as archive:
        archive.writestr("common/data.pkl", pickle.dumps(content))
    found = pickled_arguments.read(tmp_path)
    assert found["args"].num_layers == 2 and found["iteration"] == 3
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"latest_checkpointed_iteration.txt": "7"}, "iter_0000007 holds no checkpoint of the torch_dist format"),
        ({"latest_checkpointed_iteration.txt": "release"}, "says 'release', which is no iteration: give --step"),
        ({"common.pt": "", ".metadata": ""}, "common.pt cannot be read"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert is_saved_model(tmp_path)
    with pytest.raises(ValueError, match=message):
        SavedModel(tmp_path)
