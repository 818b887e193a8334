"""Fine-tuning of an exported encoder: zeros stay, adapters move, 16-bit exports learn as much as others."""

import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

from helpers.small_bert import WORDS
from slope_megatron.evaluation import fine_tuning


def test_zeros_stay_and_adapters_train(bert):
    import transformers

    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune, open_model
    from slope_megatron.evaluation.glue import collate

    model = open_model(bert / "lora", transformers.AutoModelForSequenceClassification, num_labels=2)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    samples = [{"input_ids": [2, 5 + i % 3, 3], "token_type_ids": [0, 0, 0], "label": i % 2} for i in range(8)]
    losses = fine_tune(model, samples, collate, FineTuning(1e-2, 2, 4, 16), "2:4")
    assert len(losses) == 4
    sparse = adapters = 0
    for name, parameter in model.named_parameters():
        zeros = before[name] == 0
        linear = "encoder" in name and parameter.dim() == 2 and "lora_" not in name
        if linear and float(zeros.float().mean()) == 0.5:
            sparse += 1
            assert torch.equal(parameter == 0, zeros), name
        if "lora_" in name:
            adapters += not torch.equal(parameter, before[name])
    # Two blocks of six linears; the first block's Q, K and V are dense and have no adapter.
    assert (sparse, adapters) == (9, 18)


def sentences(path):
    """SST-2's form, with fewer rows in the last batch of an epoch than in the others."""
    for split, count in (("train", 10), ("validation", 4)):
        rows = [{"sentence": f"{WORDS[i % 3]} {WORDS[3 + i % 4]} ?", "label": i % 2} for i in range(count)]
        (path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def moved(bert, tmp_path, monkeypatch):
    """Folder's name, learning rate -> shares of adapters and of kept block weights that GLUE moves; the loss."""
    from slope_megatron.evaluation import glue

    sentences(tmp_path)

    def run(name, lr):
        opened = []

        def spy(*arguments, **options):
            model = open_model(*arguments, **options)
            opened.append((model, {name: one.detach().clone() for name, one in model.named_parameters()}))
            return model

        open_model = fine_tuning.open_model
        with monkeypatch.context() as patch:
            patch.setattr(fine_tuning, "open_model", spy)
            scores = glue.evaluate(bert / name, "sst2", tmp_path, dataclasses.replace(glue.PUBLISHED, lr=lr))
        ((model, before),) = opened
        counts = {True: [0, 0], False: [0, 0]}
        for name, parameter in model.named_parameters():
            if "encoder." in name and parameter.dim() == 2:
                kept = before[name] != 0
                count = counts["lora_" in name]
                count[0] += int((parameter != before[name])[kept].sum())
                count[1] += int(kept.sum())
        return [changed / whole for changed, whole in counts.values()], scores["loss"]

    return run


@pytest.mark.parametrize("kind", ["bf16", "fp16"])
def test_small_updates_move_as_many_weights_of_a_16_bit_export(moved, kind):
    from slope_megatron.evaluation.glue import PUBLISHED

    expected, loss = moved("lora", PUBLISHED.lr)
    found, found_loss = moved(kind, PUBLISHED.lr)
    assert min(expected) > 0.99
    # A handful of weights may move by less than fp32 can add, in one or in the other.
    assert found == pytest.approx(expected, abs=1e-3)
    # The products are 16-bit: 8 bits of mantissa at least.
    assert found_loss == pytest.approx(loss, rel=2e-2) and found_loss != loss


def test_an_optimizer_over_16_bits_is_refused():
    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune

    with pytest.raises(AssertionError, match="16-bit parameters would round its updates away"):
        fine_tune(torch.nn.Linear(2, 2, dtype=torch.bfloat16), [{}], dict, FineTuning(1e-3, 1, 1, 1), None)


def test_the_loss_reported_is_a_mean_over_samples():
    from slope_megatron.evaluation.fine_tuning import final_loss

    assert final_loss([(9.0, 4)] * 18 + [(2.0, 4), (1.0, 1)]) == pytest.approx((4 * 2 + 1) / 5)


@pytest.mark.parametrize("whole", ["2:8", "2:4"])
def test_zeros_of_blocks_with_patterns_of_their_own_stay(whole):
    from slope_megatron.config import parse_nm
    from slope_megatron.evaluation.fine_tuning import sparse_masks
    from slope_megatron.sparsity.pattern import magnitude_pattern

    model = torch.nn.Module()
    model.encoder = torch.nn.ModuleList(torch.nn.Linear(32, 16, bias=False) for _ in range(5))
    for linear, nm in zip(model.encoder, ("2:4", "2:8", "1:2", "5:8", None), strict=True):
        with torch.no_grad():
            if nm:
                linear.weight.mul_(magnitude_pattern(linear.weight, *parse_nm(nm)))
            else:
                linear.weight[3, 4] = 0.0  # by chance
    masks = sparse_masks(model, whole)
    expected = {linear.weight: linear.weight != 0 for linear in model.encoder[:4]}
    assert masks.keys() == expected.keys()
    assert all(torch.equal(masks[weight], kept) for weight, kept in expected.items())
    assert sparse_masks(model, None) == {}


def test_a_weight_that_no_output_needs_is_left_alone():
    from slope_megatron.evaluation.fine_tuning import FineTuning, fine_tune

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = torch.nn.ModuleDict({name: torch.nn.Linear(8, 1) for name in ("used", "unused")})
            for linear in self.encoder.values():
                linear.weight.data[:, :4] = 0

        def forward(self, x):
            return SimpleNamespace(loss=self.encoder["used"](x).square().mean())

    model = Model()
    before = model.encoder["unused"].weight.detach().clone()
    samples = [{"x": torch.ones(8)}, {"x": torch.zeros(8)}]
    settings = FineTuning(0.1, 1, 2, 16)
    assert len(fine_tune(model, samples, lambda part: {"x": torch.stack([s["x"] for s in part])}, settings, "2:4")) == 1
    assert torch.equal(model.encoder["unused"].weight, before)
    assert not model.encoder["used"].weight[:, :4].any()


def test_the_learning_rate_rises_and_falls():
    from slope_megatron.evaluation.fine_tuning import FineTuning

    settings = FineTuning(1.0, 1, 1, 1, warmup=0.1)
    found = [settings.lr_at(step, 20) for step in range(20)]
    assert found[:3] == [0.5, 1.0, 1.0] and found[-1] == pytest.approx(1 / 18)
    assert all(found[step + 1] < found[step] for step in range(2, 19))
