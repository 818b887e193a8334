"""A tiny model of each family, as Hugging Face builds it at random, and as we build and fill it."""

import dataclasses
import hashlib

import torch

VOCABULARY, POSITIONS = 90, 24
NAMES = ("opt", "llama", "mistral", "qwen3", "gpt2", "bert")


def hf_config(name: str, **changes):
    """A `transformers` configuration: 2 layers, width 96, 6 heads; LLaMA and Mistral with 3 key/value heads."""
    import transformers

    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    usual = {**common, "hidden_size": 96, "num_hidden_layers": 2, "num_attention_heads": 6}
    gated = {**usual, "intermediate_size": 192, "num_key_value_heads": 3, "max_position_embeddings": POSITIONS}
    gpt2 = {**common, "n_embd": 96, "n_layer": 2, "n_head": 6, "n_positions": POSITIONS, "n_inner": 192}
    fields = {
        "opt": {**usual, "ffn_dim": 192, "max_position_embeddings": POSITIONS},
        "llama": {**gated, "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
        "qwen3": {**gated, "head_dim": 16},
        "mistral": {**gated, "sliding_window": None},
        "gpt2": gpt2,
        "bert": {**usual, "intermediate_size": 192, "max_position_embeddings": POSITIONS},
    }[name]
    return transformers.AutoConfig.for_model(name, **{**fields, **changes})


def hf_model(config, seed: int = 0) -> torch.nn.Module:
    """The random model in fp64, all of it: also where Hugging Face computes in fp32 whatever the weights' type.

    Every parameter gets random numbers, biases and norms too, so that none can be forgotten unnoticed.
    """
    import transformers
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.mistral.modeling_mistral import MistralRMSNorm
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    auto = transformers.AutoModelForPreTraining if config.model_type == "bert" else transformers.AutoModelForCausalLM
    # Eager attention computes its softmax in fp32.
    model = auto.from_config(config, attn_implementation="sdpa").double().eval()
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm | MistralRMSNorm | Qwen3RMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            shift = 1.0 if "norm" in name.lower() or "ln_" in name else 0.0
            numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(numbers * 0.2 + shift * name.endswith("weight"))
    return model


def our_config(model, *, tensor_parallel=1, sequence_parallel=False, slope=None, seed=1234):
    """The run configuration for an architecture; dense unless `slope` says otherwise."""
    from slope_megatron.config import Config, DataConfig, ParallelConfig, SlopeConfig, TrainConfig

    return Config(
        slope=SlopeConfig(**(slope or {"enabled": False})),
        model=dataclasses.replace(model, vocab_multiple=48),
        parallel=ParallelConfig(tensor_parallel=tensor_parallel, sequence_parallel=sequence_parallel),
        data=DataConfig(data="none", seq_length=12),
        train=TrainConfig(out="none", seed=seed),
    )


def bare_model(config, dtype=torch.float64):
    """This rank's shard without numbers."""
    from slope_megatron.models.provider import build_bare_model

    return build_bare_model(config, config.model.vocab_size, dtype)


def filled_model(config, dtype=torch.float64):
    """This rank's shard as training starts with it."""
    from slope_megatron.models.init_weights import init_weights

    model = bare_model(config, dtype)
    init_weights(model, seed=config.train.seed, init_std=config.model.init_std, num_layers=config.model.num_layers)
    return model


def whole_tensors(ranks_parts) -> dict[str, torch.Tensor]:
    """`{canonical name: tensor}` from all ranks' `[(name, offset, whole shape, data)]`."""
    whole = {}
    for parts in ranks_parts:
        for name, offset, shape, data in parts:
            target = whole.setdefault(name, torch.zeros(shape, dtype=data.dtype))
            target[tuple(slice(at, at + size) for at, size in zip(offset, data.shape, strict=True))] = data
    return whole


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names and bits."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return found.hexdigest()
