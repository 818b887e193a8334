"""A Hugging Face decoder with 2:4 linears in a training loop of your own: sparsify, train, save, load as a plain model.

    python examples/library.py             # one process, CPU or GPU, seconds; neither Megatron nor DeepSpeed is needed

The model learns to continue sequences in which every token names the next.
"""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from slope_megatron import follow_optimizer, sparsify

VOCABULARY, LENGTH, BATCH, STEPS = 128, 32, 8, 40
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def build() -> LlamaForCausalLM:
    torch.manual_seed(1234)
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).to(DEVICE)


def batch(step: int) -> torch.Tensor:
    """Tokens `[BATCH, LENGTH]`: every token is 7 more than the one before."""
    start = torch.randint(VOCABULARY, (BATCH, 1), generator=torch.Generator().manual_seed(step))
    return ((start + 7 * torch.arange(LENGTH)) % VOCABULARY).to(DEVICE)


def train(model: LlamaForCausalLM) -> list[float]:
    """The loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    follow_optimizer(model, optimizer, steps=STEPS)  # the second pruning now and then, and adapters near the end
    losses = []
    for step in range(STEPS):
        loss = model(input_ids=batch(step), labels=batch(step)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    model = sparsify(build(), nm="2:4", pattern="random", skip=["layers.0.self_attn.*"])
    losses = train(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)  # plain weights, half of them zeros
        plain = LlamaForCausalLM.from_pretrained(folder).to(DEVICE)
    with torch.no_grad():
        difference = (plain(batch(STEPS)).logits - model.eval()(batch(STEPS)).logits).abs().max().item()
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; loaded as a plain model, logits differ by {difference:.1e}")


if __name__ == "__main__":
    main()
