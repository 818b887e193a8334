"""Which backend runs where, and what a machine that cannot is told."""

import pytest
import torch

from helpers.packed import packed_weight
from slope_megatron.ops import backend, cusparselt, reference
from slope_megatron.ops.choices import Choice, Key


@pytest.fixture(autouse=True)
def forget():
    backend.choose.cache_clear()
    backend._say_once.cache_clear()
    yield
    backend.choose.cache_clear()
    backend._say_once.cache_clear()


def test_auto_takes_what_runs_and_names_what_does_not(monkeypatch, caplog):
    monkeypatch.setattr(cusparselt, "unsupported", lambda: "no 2:4 units here")
    with caplog.at_level("INFO"):
        assert backend.choose("auto") == "reference"
        assert backend.choose("auto") == "reference"
    assert caplog.messages == [
        "sparse products: backend reference (unpack and dense product); cusparselt: no 2:4 units here"
    ]


def test_a_backend_that_cannot_run_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(cusparselt, "unsupported", lambda: "no 2:4 units here")
    with pytest.raises(ValueError, match="--slope-backend cusparselt cannot run here: no 2:4 units here; use"):
        backend.choose("cusparselt")


def test_a_weight_that_cannot_falls_back_once(monkeypatch, caplog):
    monkeypatch.setattr(cusparselt, "unsupported", lambda: None)
    weight = packed_weight(64, 64, torch.float32, "cpu")
    with caplog.at_level("INFO"):
        for _ in range(2):
            built = backend.build_operands("auto", weight.values, weight.row, weight.column)
            assert isinstance(built, reference.ReferenceOperands)
    assert caplog.messages[1:] == [
        "sparse products: some weights run on backend reference: the weight is on cpu",
    ]
    with pytest.raises(ValueError, match="cannot run a weight: the weight is on cpu; use --slope-backend auto"):
        backend.build_operands("cusparselt", weight.values, weight.row, weight.column)


def test_bitmasks_and_bools_build_the_same(monkeypatch):
    monkeypatch.setattr(cusparselt, "unsupported", lambda: "not here")
    weight = packed_weight(64, 64, torch.float32, "cpu")
    one = backend.build_operands("auto", weight.values, weight.row, weight.column)
    other = backend.build_operands("auto", weight.values, weight.row_bits, weight.column_bits)
    assert torch.equal(one.forward_NK, other.forward_NK)
    assert torch.equal(one.backward_NK, other.backward_NK)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_pruning_is_the_same_on_every_backend(dtype, device, monkeypatch):
    monkeypatch.setattr(backend, "ROWS_AT_ONCE", 32)
    weight = packed_weight(128, 64, dtype, device)
    assert torch.equal(backend.choose_column_bits(weight.values, weight.row_bits, 2, 4), weight.column_bits)


@pytest.mark.gpu
def test_auto_on_a_gpu_with_sparse_units(device):
    weight = packed_weight(128, 128, torch.bfloat16, device)
    built = backend.build_operands("auto", weight.values, weight.row, weight.column)
    assert isinstance(built, cusparselt.CusparseltOperands)
    assert built.dense_allowed
    forced = backend.build_operands("cusparselt", weight.values, weight.row, weight.column)
    assert not forced.dense_allowed


def test_inference_operands_hold_what_the_forward_product_reads_and_no_more(device, monkeypatch, fresh_choices):
    """Values and metadata: 9/16 of dense, also where training's choice was the dense product."""
    monkeypatch.setattr(cusparselt, "unsupported", lambda: None)
    monkeypatch.setattr(cusparselt, "unsupported_weight", lambda *_: None)
    weight = packed_weight(64, 128, torch.bfloat16, device, whole_numbers=True)
    built = backend.build_operands("auto", weight.values, weight.row_bits)
    held = [value for value in vars(built).values() if isinstance(value, torch.Tensor)]
    assert sum(tensor.nbytes for tensor in held) == 64 * 128 * 2 * 9 / 16
    x = torch.randint(-1, 2, (16, 128), device=device).to(torch.bfloat16)
    fresh_choices.record(Key("forward", 64, 128, 16, torch.bfloat16), Choice(False))
    assert torch.equal(built.forward(x), x @ weight.dense().t())
