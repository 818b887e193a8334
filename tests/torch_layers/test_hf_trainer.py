"""Hugging Face's Trainer with `SlopeCallback`: the trainer's own losses, and a run that goes on."""

import dataclasses

import pytest
import torch
import transformers
from torch_layers.test_sparsify import CONFIGS, sparse_linears, sparsify

from helpers.models import build_engine, sample, save, small_config, step_batches
from slope_megatron.torch_layers.hf_trainer import SlopeCallback

STEPS, VOCABULARY, INTERVAL = 50, 96, 20


class Samples(torch.utils.data.Dataset):
    """As many as a run takes, in the order of `step_batches`."""

    def __init__(self, steps: int, batch: int):
        self.count = steps * batch

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        return {"input_ids": sample(index)["tokens"], "labels": sample(index)["labels"]}


class InOrder(transformers.Trainer):
    def get_train_dataloader(self):
        return torch.utils.data.DataLoader(self.train_dataset, batch_size=self.args.train_batch_size, shuffle=False)


def next_token_loss(outputs, labels, num_items_in_batch=None):
    """Megatron's labels are shifted already."""
    return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())


def arguments(folder, steps, **more) -> transformers.TrainingArguments:
    fixed = {"max_steps": steps, "per_device_train_batch_size": 8, "logging_steps": 1, "use_cpu": True}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no"}
    return transformers.TrainingArguments(str(folder), **{**fixed, **quiet, **more})


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


# -- the same losses as `slope pretrain`'s ----------------------------------------------------------------------------


def gpt2_shaped():
    """GPT-2 small's 12 blocks and 12 heads, an eighth as wide."""
    config = small_config(steps=STEPS, slope={"backward_mask_interval": INTERVAL})
    return dataclasses.replace(
        config,
        model=dataclasses.replace(
            config.model,
            **{"num_layers": 12, "hidden_size": 96, "ffn_hidden_size": 384, "num_attention_heads": 12},
            **{"activation": "gelu_tanh", "vocab_size": VOCABULARY, "init_std": 0.02},
        ),
        data=dataclasses.replace(config.data, micro_batch_size=8),
        optimizer=dataclasses.replace(config.optimizer, lr=1e-3, min_lr=1e-4, warmup_steps=5),
    )


def pretrained(config, run):
    """The engine's losses; its weights before the first step are saved in `run`."""
    engine = build_engine(config)
    save(engine, run)
    return [engine.train_step(step_batches(config, step, 0, 1)).loss for step in range(STEPS)]


def adamw(model, settings):
    """The engine's groups: biases and norms do not decay."""
    decaying = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    groups = [{"params": decaying, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, settings.lr, (settings.beta1, settings.beta2), settings.eps)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: settings.lr_at(step, STEPS) / settings.lr
    )


def test_the_losses_are_those_of_slope_pretrain(ranks, tmp_path):
    from slope_megatron.export import hf_export
    from slope_megatron.export.trained_run import TrainedRun

    config = gpt2_shaped()
    expected = ranks.run(pretrained, config, tmp_path / "run", world=1)[0]
    hf_export.export(hf_export.plan(TrainedRun(tmp_path / "run"), family="gpt2"), tmp_path / "hf")
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    model.config.resid_pdrop = model.config.embd_pdrop = model.config.attn_pdrop = 0.0
    # The pattern of weights of which half are zero already is theirs.
    sparsify(model, pattern="magnitude", skip=["h.0.attn.c_attn"], backward_mask_interval=INTERVAL)
    assert len(sparse_linears(model)) == 4 * 12 - 1
    assert all((linear.weight != 0).all() for linear in sparse_linears(model).values())
    trainer = InOrder(
        model=model,
        args=arguments(tmp_path / "trainer", STEPS, max_grad_norm=config.optimizer.clip_grad),
        train_dataset=Samples(STEPS, 8),
        compute_loss_func=next_token_loss,
        optimizers=adamw(model, config.optimizer),
        callbacks=[SlopeCallback()],
    )
    trainer.train()
    found = logged(trainer)
    assert expected[-1] < expected[0] - 0.3, "it learns"
    # fp32 over 12 blocks, with sums in another order (fused QKV, loss): 2e-7 a product, grown over 50 updates.
    assert found == pytest.approx(expected, rel=1e-4)


# -- going on ---------------------------------------------------------------------------------------------------------


def trainer_of(folder, steps, callback=None, **more) -> transformers.Trainer:
    torch.manual_seed(0)
    config = CONFIGS["gpt2"]()
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = transformers.GPT2LMHeadModel(config)
    sparsify(model, pattern="random", backward_mask_interval=3, adapter_rank=4, lazy_fraction=0.5)
    return InOrder(
        model=model,
        args=arguments(folder, steps, learning_rate=1e-2, **more),
        train_dataset=Samples(steps, 8),
        callbacks=[callback or SlopeCallback()],
    )


def test_a_run_goes_on_to_the_bit(tmp_path):
    """From a checkpoint in which the second pruning has been chosen anew and adapters have trained."""
    whole = trainer_of(tmp_path, 8, save_strategy="steps", save_steps=5)
    whole.train()
    again = trainer_of(tmp_path, 8)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.state.global_step == 8 and logged(again) == logged(whole)
    expected = whole.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


def test_ddp_is_told_to_leave_the_patterns_alone(tmp_path):
    assert trainer_of(tmp_path, 1).args.ddp_broadcast_buffers is False


def test_a_dense_model_is_refused(tmp_path):
    model = transformers.GPT2LMHeadModel(CONFIGS["gpt2"]())
    trainer = InOrder(model, arguments(tmp_path, 1), train_dataset=Samples(1, 8), callbacks=[SlopeCallback()])
    with pytest.raises(ValueError, match=r"without sparse linears: call sparsify\(model\)"):
        trainer.train()


def test_a_checkpoint_without_the_state_is_refused(tmp_path):
    trainer_of(tmp_path, 2, save_strategy="steps", save_steps=1).train()
    (tmp_path / "checkpoint-1" / "slope_state.pt").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-1 has no slope_state\.pt"):
        trainer_of(tmp_path, 2).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
