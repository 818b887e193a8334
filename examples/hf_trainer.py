"""Hugging Face's Trainer with a sparse model: sparsify, and one callback.

python examples/hf_trainer.py             # one process, CPU or GPU, seconds
"""

import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

from slope_megatron import sparsify
from slope_megatron.torch_layers.hf_trainer import SlopeCallback

VOCABULARY, LENGTH, BATCH, STEPS = 128, 32, 8, 40


class Sevens(torch.utils.data.Dataset):
    """Sequences in which every token is 7 more than the one before."""

    def __len__(self) -> int:
        return STEPS * BATCH

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        tokens = (index + 7 * torch.arange(LENGTH)) % VOCABULARY
        return {"input_ids": tokens, "labels": tokens}


def main() -> None:
    torch.manual_seed(1234)
    config = GPT2Config(n_embd=128, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=LENGTH)
    model = sparsify(GPT2LMHeadModel(config), pattern="random", adapter_rank=4, lazy_fraction=0.25)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=STEPS,
            per_device_train_batch_size=BATCH,
            learning_rate=3e-3,
            logging_steps=1,
            save_steps=STEPS,
            report_to=[],
            disable_tqdm=True,
            use_cpu=not torch.cuda.is_available(),
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=Sevens(), callbacks=[SlopeCallback()])
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")


if __name__ == "__main__":
    main()
