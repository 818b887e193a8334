"""A Qwen2.5-7B-shaped block on a GPU: dense and sparse, both under torch.compile; prints the speed-up."""

import pytest
import torch
import transformers

from slope_megatron.torch_layers import sparsify

TOKENS, RUNS = 8192, 20


def block() -> torch.nn.Module:
    """With its rotary embedding, so that it takes hidden states alone."""
    sizes = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
    config = transformers.Qwen2Config(**sizes, num_hidden_layers=1, vocab_size=128, attn_implementation="sdpa")
    with torch.device("cuda"):
        return transformers.AutoModel.from_config(config, dtype=torch.bfloat16).train()


def milliseconds(model: torch.nn.Module) -> float:
    """Median of forward and backward."""
    compiled = torch.compile(model)
    x = torch.randn(1, TOKENS, 3584, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    found = []
    for _ in range(5 + RUNS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        compiled(inputs_embeds=x, use_cache=False).last_hidden_state.sum().backward()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))
    return sorted(found[5:])[RUNS // 2]


@pytest.mark.gpu
def test_a_sparse_block_is_faster_than_its_dense_one():
    dense = milliseconds(block())
    sparse = milliseconds(sparsify(block()))
    print(f"Qwen2.5-7B block, {TOKENS} tokens, bf16: dense {dense:.2f} ms, 2:4 {sparse:.2f} ms, {dense / sparse:.3f}x")
    assert sparse < dense
