"""Which backend runs where, and what a machine that cannot is told."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from helpers.packed import packed_weight
from slope_kernels import cusparselt_library
from slope_megatron.ops import backend
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.operands import cusparselt, cutlass, reference
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.sparsity import pieces


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


@pytest.mark.parametrize("module", [cusparselt, cutlass], ids=["cusparselt", "cutlass"])
def test_a_backend_that_cannot_run_is_refused_with_the_reason(module, monkeypatch):
    name = module.__name__.split(".")[-1]
    monkeypatch.setattr(module, "unsupported", lambda: "no 2:4 units here")
    with pytest.raises(ValueError, match=f"--slope-backend {name} cannot run here: no 2:4 units here; use"):
        backend.choose(name)


REASONS = {
    "V100": "sm_70 has no 2:4 units; they came with sm_80 (A100)",
    "old library": "cuSPARSELt 0.5.2 is older than 0.6.0; upgrade the wheel",
}


@pytest.mark.parametrize("machine", list(REASONS))
def test_the_library_s_reason_reaches_the_user(machine, monkeypatch, caplog):
    """auto: named in one line, and the run goes on; forced: refused."""
    monkeypatch.setattr(cusparselt_library, "unsupported", lambda: REASONS[machine])
    with caplog.at_level("INFO"):
        weight = packed_weight(64, 64, torch.float32, "cpu")
        for _ in range(2):
            built = backend.build_operands("auto", weight.values, weight.row_bits, weight.column_bits)
            assert isinstance(built, reference.ReferenceOperands)
    assert len(caplog.messages) == 1
    assert caplog.messages[0].endswith(f"; cusparselt: {REASONS[machine]}")
    with pytest.raises(ValueError, match="--slope-backend cusparselt cannot run here: ") as refused:
        backend.build_operands("cusparselt", weight.values, weight.row_bits, weight.column_bits)
    assert REASONS[machine] in str(refused.value)


@pytest.mark.parametrize(
    ("rows", "dtype", "reason"),
    [
        (64, torch.float32, "the weight is float32 (bf16 and fp16 are)"),
        (96, torch.bfloat16, "the weight is 96 x 64 (both must be multiples of 64)"),
    ],
)
def test_a_forced_backend_names_the_weight_it_cannot_run(rows, dtype, reason, monkeypatch):
    """Tensors without data stand in for those on a GPU."""
    monkeypatch.setattr(cusparselt, "unsupported", lambda: None)
    with FakeTensorMode(allow_non_fake_inputs=True):
        values = torch.empty(rows, 32, dtype=dtype, device="cuda")
        bits = torch.empty(rows, 8, dtype=torch.uint8, device="cuda")
    with pytest.raises(ValueError, match="--slope-backend cusparselt cannot run a weight: ") as refused:
        backend.build_operands("cusparselt", values, bits, bits)
    assert f"{reason}; use --slope-backend auto" in str(refused.value)


def test_a_weight_that_cannot_falls_back_once(monkeypatch, caplog):
    monkeypatch.setattr(cusparselt, "unsupported", lambda: None)
    weight = packed_weight(64, 64, torch.float32, "cpu")
    with caplog.at_level("INFO"):
        for _ in range(2):
            built = backend.build_operands("auto", weight.values, weight.row_bits, weight.column_bits)
            assert isinstance(built, reference.ReferenceOperands)
    assert caplog.messages[1:] == [
        "sparse products: some weights run on backend reference: the weight is on cpu",
    ]
    with pytest.raises(ValueError, match="cannot run a weight: the weight is on cpu; use --slope-backend auto"):
        backend.build_operands("cusparselt", weight.values, weight.row_bits, weight.column_bits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_second_pruning_is_the_same_on_every_backend(dtype, device, monkeypatch):
    monkeypatch.setattr(pieces, "ELEMENTS_ON_CPU", 32 * 64)
    monkeypatch.setattr(pieces, "ROWS_ON_GPU", 32)
    weight = packed_weight(128, 64, dtype, device)
    assert torch.equal(backend.choose_column_bits(weight.values, weight.row_bits, 2, 4), weight.column_bits)


@pytest.mark.gpu
def test_auto_on_a_gpu_with_sparse_units(device):
    weight = packed_weight(128, 128, torch.bfloat16, device)
    built = backend.build_operands("auto", weight.values, weight.row_bits, weight.column_bits)
    assert isinstance(built, PackedOperands)
    assert built.dense_allowed
    forced = backend.build_operands("cusparselt", weight.values, weight.row_bits, weight.column_bits)
    assert not forced.dense_allowed


def test_inference_operands_hold_what_the_forward_product_reads_and_no_more(device, monkeypatch, fresh_choices):
    """Values and metadata: 9/16 of dense, also where training's choice was the dense product."""
    monkeypatch.setattr(cusparselt, "unsupported", lambda: None)
    monkeypatch.setattr(cusparselt, "unsupported_weight", lambda *_: None)
    weight = packed_weight(64, 128, torch.bfloat16, device, whole_numbers=True)
    built = backend.build_forward("auto", weight.values, weight.row_bits)
    assert built.patterns.row_bits is None and list(built.sparse) == [Product.FORWARD]
    assert built.sparse[Product.FORWARD].buffer.nbytes == 64 * 128 * 2 * 9 / 16
    x = torch.randint(-1, 2, (16, 128), device=device).to(torch.bfloat16)
    fresh_choices.record(Key(Product.FORWARD, 64, 128, 16, torch.bfloat16), Choice(False))
    assert torch.equal(built.forward(x), x @ weight.dense().t())
    assert not built.dense


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("rows", "dtype", "reason"),
    [
        (64, torch.float32, "the weight is float32 (bf16 and fp16 are)"),
        (96, torch.bfloat16, "the weight is 96 x 128 (both must be multiples of 64)"),
    ],
)
def test_auto_on_a_gpu_names_the_weight_it_cannot_run(rows, dtype, reason, device, caplog):
    weight = packed_weight(rows, 128, dtype, device, whole_numbers=True)
    with caplog.at_level("INFO"):
        for _ in range(2):
            built = backend.build_operands("auto", weight.values, weight.row_bits, weight.column_bits)
    assert isinstance(built, reference.ReferenceOperands)
    assert caplog.messages[1:] == [f"sparse products: some weights run on backend reference: {reason}"]
    x = torch.randint(-2, 3, (48, 128), device=device).to(dtype)
    assert torch.equal(built.forward(x), x @ weight.dense().t())
