"""`sparsify` and `densify` of plain torch and Hugging Face models."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

import slope_megatron
from slope_megatron.sparsity.pattern import magnitude_pattern
from slope_megatron.torch_layers import after_step, densify, join_adapters, load_sparse_state, sparse_linears, sparsify

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**SIZES, "intermediate_size": 128, "num_key_value_heads": 2}
CONFIGS = {
    "gpt2": lambda: transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=96, n_positions=32),
    "llama": lambda: transformers.LlamaConfig(**LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**LLAMA, tie_word_embeddings=True),
    "opt": lambda: transformers.OPTConfig(**SIZES, ffn_dim=128, word_embed_proj_dim=64, max_position_embeddings=32),
}
LINEARS = {"gpt2": 8, "llama": 14, "qwen2": 14, "opt": 12}


def decoder(name: str, seed: int = 0):
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval()


def tokens(seed: int = 1) -> torch.Tensor:
    return torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(seed))


def train(model, steps: int = 3) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model.train()
    losses = []
    for step in range(steps):
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        after_step(model, step + 1)
        losses.append(loss.item())
    model.eval()
    return losses


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_computes_what_its_pruned_weights_give(name):
    """Against the same model with zeros written into its dense weights."""
    model, pruned = decoder(name), decoder(name)
    sparsify(model)
    linears = sparse_linears(model)
    assert len(linears) == LINEARS[name] and not any("head" in found for found in linears)
    with torch.no_grad():
        for found, linear in linears.items():
            weight = pruned.get_submodule(found).weight
            weight_NK = weight.t() if linear.transposed else weight
            weight_NK.mul_(magnitude_pattern(weight_NK, 2, 4))
            assert linear.weight.shape == (weight_NK.shape[0], weight_NK.shape[1] // 2)
        expected = pruned(tokens()).logits
        torch.testing.assert_close(model(tokens()).logits, expected)
        torch.testing.assert_close(densify(model)(tokens()).logits, expected, rtol=0, atol=0)
    assert model.state_dict().keys() == pruned.state_dict().keys()


@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_learns(name):
    losses = train(sparsify(decoder(name), pattern="random"), steps=8)
    assert losses[-1] < losses[0] - 0.5


def test_an_encoder_learns():
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, intermediate_size=128, max_position_embeddings=32)
    model = sparsify(transformers.BertForMaskedLM(config))
    assert len(sparse_linears(model)) == 12 and "cls.predictions.transform.dense" not in sparse_linears(model)
    losses = train(model, steps=8)
    assert losses[-1] < losses[0] - 0.5


@pytest.mark.parametrize("name", ("gpt2", "llama"))
def test_saved_weights_load_into_the_plain_model(name, tmp_path):
    model = sparsify(decoder(name))
    train(model)
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens()).logits, model(tokens()).logits)
    found = next(iter(sparse_linears(model)))
    assert (plain.get_submodule(found).weight == 0).float().mean() == 0.5
    again = load_into(sparsify(decoder(name, seed=9)), tmp_path)
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())


def load_into(model, folder):
    """As the Trainer resumes: the plain weights first."""
    from safetensors.torch import load_file

    model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    load_sparse_state(model, folder)
    return model


def test_copies_pickles_and_saved_states_compute_alike(tmp_path):
    model = sparsify(decoder("gpt2"), adapter_rank=4)
    train(model)
    join_adapters(model)
    train(model)
    torch.save(model, tmp_path / "model.pt")
    other = sparsify(decoder("gpt2", seed=5), pattern="random", adapter_rank=4)
    other.load_state_dict(model.state_dict())
    expected = model(tokens()).logits
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    copies = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded)
    for found in (other, *copies):
        assert torch.equal(found(tokens()).logits, expected)
    copies[0].save_pretrained(tmp_path / "copy")
    train(copies[0])
    assert torch.equal(model(tokens()).logits, expected), "a copy trains alone"


def test_adapters_join_and_are_folded(tmp_path):
    model = sparsify(decoder("llama"), adapter_rank=4, lazy_fraction=0.5)
    before = train(model, steps=2)
    linears = sparse_linears(model).values()
    assert before and not any(linear.adapters_active for linear in linears)
    assert not any(linear.adapter_r.any() for linear in linears)
    after_step(model, 2, steps=4)
    assert all(linear.adapters_active for linear in linears)
    train(model)
    assert all(linear.adapter_r.any() for linear in linears)
    expected = model(tokens()).logits
    model.save_pretrained(tmp_path)
    plain = type(model).from_pretrained(tmp_path)
    torch.testing.assert_close(plain(tokens()).logits, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(densify(model)(tokens()).logits, expected, rtol=1e-4, atol=1e-5)


def test_wanda_prunes_by_what_the_calibration_feeds():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8))
    weight = model[0].weight.detach().clone()
    x = torch.ones(4, 16)
    x[:, ::2] = 100.0
    sparsify(model, pattern="wanda", calibrate=lambda model: model(x))
    expected = magnitude_pattern(weight * x[0], 2, 4)
    assert torch.equal(model[0].row_pattern(), expected)
    assert not torch.equal(expected, magnitude_pattern(weight, 2, 4))


def test_a_random_pattern_depends_on_seed_and_name_alone():
    patterns = []
    for model_seed, seed in ((0, 0), (1, 0), (0, 1)):
        model = sparsify(decoder("llama", seed=model_seed), pattern="random", seed=seed)
        patterns.append(next(iter(sparse_linears(model).values())).weight_pattern)
    assert torch.equal(patterns[0], patterns[1]) and not torch.equal(patterns[0], patterns[2])


def test_full_mode_draws_anew_for_each_micro_batch():
    gradients = []
    for forwards in (1, 1, 2):
        model = sparsify(decoder("llama"), mode="full").train()
        for _ in range(forwards):
            loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        gradients.append(model.model.layers[1].mlp.down_proj.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def tied() -> nn.Module:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    return model


def test_what_stays_dense_is_said(caplog):
    model = nn.Sequential(*tied(), nn.Linear(16, 2))
    sparsify(model)
    assert list(sparse_linears(model)) == ["1"]
    said = [record.message for record in caplog.records]
    assert said == [
        "0 stays dense: its weight is tied to another module's",
        "2 stays dense: its weight is tied to another module's",
        "3 stays dense: 2 x 16 (out x in) is no multiple of 4 x 16",
    ]


def mixtral():
    config = transformers.MixtralConfig(**LLAMA, num_local_experts=4)
    return transformers.AutoModelForCausalLM.from_config(config)


WRONG = {
    "experts": (mixtral, {}, r"mlp\.experts\.gate_up_proj holds the experts' weights as one tensor .* skip="),
    "skip": (lambda: decoder("gpt2"), {"skip": ["attention"]}, "skip names 'attention', and no module"),
    "string": (lambda: decoder("gpt2"), {"skip": "lm_head"}, r"give a list of names, such as skip=\['lm_head'\]"),
    "all": (lambda: decoder("gpt2"), {"skip": ["h"]}, "no linear of this GPT2LMHeadModel can be pruned 2:4"),
    "setting": (tied, {"method": "srste"}, "sparsify has no setting 'method': it has mode"),
    "nm": (tied, {"nm": "4:2"}, "it must be N:M"),
    "wanda": (tied, {"pattern": "wanda"}, "calibrate missing"),
    "calibrate": (tied, {"calibrate": print}, "pattern is 'magnitude' and calibrate given"),
    "unseen": (tied, {"pattern": "wanda", "calibrate": lambda model: None}, "has run nothing through 1"),
    "twice": (lambda: sparsify(tied()), {}, r"sparse already: call densify"),
    "meta": (lambda: nn.Sequential(nn.Linear(16, 16, device="meta")), {}, "on the meta device"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_done_is_refused(case):
    build, arguments, message = WRONG[case]
    model = build()
    with pytest.raises(ValueError, match=message):
        sparsify(model, **arguments)


def test_experts_stay_dense_where_skip_names_them():
    model = sparsify(mixtral(), skip=["experts"])
    assert {name.rpartition(".")[2] for name in sparse_linears(model)} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_a_folder_without_the_state_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no slope_state\.pt"):
        load_sparse_state(sparsify(tied()), tmp_path)


def test_neither_megatron_nor_deepspeed_is_imported():
    code = (
        "import sys, torch, slope_megatron as s\n"
        "model = s.sparsify(torch.nn.Sequential(torch.nn.Linear(16, 8)))\n"
        "model(torch.ones(2, 16)).sum().backward()\n"
        "s.after_step(model, 100)\n"
        "assert not {'megatron', 'deepspeed', 'transformers'} & {name.split('.')[0] for name in sys.modules}"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_package_names_the_library():
    assert slope_megatron.sparsify is sparsify
    with pytest.raises(AttributeError, match="no attribute 'sparse'"):
        slope_megatron.sparse  # noqa: B018
