"""The plugin behind the patches, on a megatron-core model without Megatron's training scripts."""

import types

import pytest

from slope_megatron.config import SlopeConfig
from slope_megatron.integrations.megatron_lm import plugin


def build_and_train(steps):
    """A small GPT through the plugin's builder, trained by a bare step with the plugin's refresh around it."""
    import torch
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_config import TransformerConfig

    from slope_megatron.config import SlopeConfig
    from slope_megatron.models.layer_spec import sparse_modules

    args = types.SimpleNamespace(seed=1, init_method_std=0.02, num_layers=2, curr_iteration=0, train_iters=steps)
    args.overlap_grad_reduce = args.overlap_param_gather = False
    slope = SlopeConfig(backend="reference", backward_mask_interval=3, adapter_rank=4, lazy_fraction=0.25)
    plugin.settings = lambda: (args, slope)
    off = "gradient_accumulation_fusion persist_layer_norm masked_softmax_fusion bias_dropout_fusion".split()
    config = TransformerConfig(
        num_layers=2,
        hidden_size=64,
        num_attention_heads=4,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **dict.fromkeys(off, False),
    )
    build = plugin.with_sparse_layers(GPTModel)
    spec = get_gpt_layer_local_spec()
    model = build(config=config, transformer_layer_spec=spec, vocab_size=128, max_sequence_length=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    drawn = {name: value.clone() for name, value in model.state_dict().items() if name.endswith("adapter_l")}
    tokens = torch.randint(0, 128, (2, 32), generator=torch.Generator().manual_seed(0))
    losses, adapters = [], []

    def counts():
        return {int(state.get("step", 0)) for state in optimizer.state.values()}

    def bare_step(_forward, _data, chunks, _optimizer):
        active = {module.adapters_active for module in sparse_modules(model)}
        fresh = all(torch.equal(model.state_dict()[name], value) for name, value in drawn.items())
        adapters.append((active, fresh, counts()))
        loss = chunks[0](tokens, torch.arange(32).expand(2, 32), None, labels=tokens.roll(-1, 1)).mean()
        optimizer.zero_grad()
        loss.backward()
        for parameter in model.parameters():  # Megatron's buffers hold zeros for those that are not used
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        losses.append(loss.item())

    step = plugin.with_phase_and_refresh(bare_step)
    for args.curr_iteration in range(steps):
        step(None, None, [model], types.SimpleNamespace(optimizer=optimizer))
        assert counts() == {args.curr_iteration + 1}, "a checkpoint holds one count"
    refusal = None
    try:
        plugin.refresh_operands([torch.nn.Linear(2, 2)], slope, 1)
    except ValueError as error:
        refusal = str(error)
    fresh = [torch.equal(module.operands().forward_NK, module.dense_weight()) for module in sparse_modules(model)]
    return losses, fresh, refusal, adapters


def test_the_model_is_sparse_trains_and_its_operands_follow(ranks):
    (found,) = ranks.run(build_and_train, 12, world=1)
    losses, fresh, refusal, adapters = found
    assert len(fresh) == 7, "all block linears but the first QKV"
    assert all(fresh)
    assert losses[-1] < losses[0] - 1.0
    assert "--slope was given and the model has no 2:4 layer" in refusal, "never a dense run in silence"
    assert [active for active, _, _ in adapters] == [{False}] * 9 + [{True}] * 3
    # Weight decay shrank L until then; at their step it is what was drawn, and Adam has made no step of theirs.
    assert [fresh for _, fresh, _ in adapters] == [True] + [False] * 8 + [True] + [False] * 2
    assert [counters for _, _, counters in adapters][8:] == [{8}, {9, 0}, {10, 1}, {11, 2}]


def test_what_is_not_there_is_refused():
    with pytest.raises(ValueError, match="somewhere has no train_step"):
        plugin.wrap({}, "train_step", plugin.with_phase_and_refresh, "somewhere")


def test_hooking_twice_is_once():
    namespace = {"add_megatron_arguments": lambda parser: parser}
    for _ in range(2):
        plugin.wrap(namespace, "add_megatron_arguments", plugin.with_flags, "here")
    hooked = namespace["add_megatron_arguments"]
    assert hooked.slope_hook and not hasattr(hooked.__wrapped__, "__wrapped__")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"bf16": False, "use_distributed_optimizer": True}, "--use-distributed-optimizer is on"),
        ({"use_precision_aware_optimizer": True}, "--use-precision-aware-optimizer is on with --slope-adapter-rank"),
        ({"iterations_to_skip": [4, 10]}, "--iterations-to-skip has the step at which adapters join"),
    ],
)
def test_what_adapters_could_not_join_under_is_refused(values, said):
    common = {"bf16": True, "fp16": False, "use_distributed_optimizer": False, "train_iters": 12}
    args = types.SimpleNamespace(**{**common, **values})
    adapters = SlopeConfig(adapter_rank=4, lazy_fraction=0.25)  # they join at step 9, counted from 0
    (text,) = plugin.adapter_refusals(args, adapters)
    assert text.startswith(said) and not plugin.adapter_refusals(args, SlopeConfig())
    assert not plugin.adapter_refusals(types.SimpleNamespace(**common, iterations_to_skip=[9, 11]), adapters)
