"""Our own kernels whose epilogue packs wgrad: against exact sums, and as candidates of the choice."""

import argparse
import dataclasses

import pytest
import torch

from helpers.numerics import relative_error
from helpers.wgrad import DTYPE, is_near_fp64, problem, rng_of
from slope_kernels import cutlass
from slope_kernels import packed_wgrad as kernels
from slope_megatron.ops import choices
from slope_megatron.ops.autotune import gate, measure, measure_cusparselt
from slope_megatron.ops.choices import Choice, Key, Product
from slope_megatron.ops.custom_ops import mvue
from slope_megatron.ops.operands import cutlass as cutlass_library
from slope_megatron.ops.operands import wgrad
from slope_megatron.sparsity.operand import scatter_slots, slot_indices
from slope_megatron.sparsity.operand_cutlass import metadata_cutlass
from slope_megatron.sparsity.packing import pack, unpack_bits
from slope_megatron.sparsity.pattern import random_pattern


@pytest.mark.parametrize(
    ("choice", "asked", "expected"),
    [
        (Choice(True), {}, "sparse_wgrad"),
        (Choice(True, algorithm=kernels.DEFAULT), {}, "packed_wgrad"),
        (Choice(True), {"among": ("cutlass",), "dense_allowed": False}, "packed_wgrad"),
        (Choice(False), {"among": ("cutlass",), "dense_allowed": False}, "packed_wgrad"),
        (
            Choice(True, algorithm=kernels.DEFAULT),
            {"among": ("cusparselt",), "dense_allowed": False},
            "sparse_wgrad",
        ),
    ],
)
def test_the_choice_says_which_product_runs_unless_one_is_asked_for(
    choice, asked, expected, kernels_here, fresh_choices, monkeypatch
):
    """Two backends in one process: what was chosen for the other one does not serve."""
    dy, x, row_bits = problem(64, 64, 128, kernels_here)
    fresh_choices.record(Key(Product.WGRAD, 64, 128, 64, DTYPE), choice)
    ran = []
    for module, name in ((mvue, "sparse_wgrad"), (cutlass_library, "packed_wgrad")):
        op = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *rest, op=op, name=name: ran.append(name) or op(*rest))
    rng = rng_of(64, kernels_here)
    assert is_near_fp64(wgrad.packed(dy, x, row_bits, rng, **asked), dy, x, row_bits, rng)
    assert ran == [expected]


def test_a_saved_choice_of_a_packing_kernel_comes_back(fresh_choices, tmp_path):
    """Beside a forward product of the same shape, whose kernel is another."""
    key, problem_of_it = Key(Product.WGRAD, 128, 128, 48, DTYPE), (True, 128, 128, 48, DTYPE)
    algorithm = dataclasses.replace(kernels.DEFAULT, swizzle=4, raster=2)
    choice = Choice(True, 1, algorithm, 0.5, 0.75)
    fresh_choices.record(key, choice)
    fresh_choices.record(dataclasses.replace(key, product=Product.FORWARD), Choice(True, algorithm=cutlass.DEFAULT))
    fresh_choices.save(tmp_path / "choices.json")
    fresh_choices.clear()
    assert choices.algorithm("cutlass", problem_of_it) is None
    assert fresh_choices.load(tmp_path / "choices.json")
    assert fresh_choices.find(key) == choice and choice.library == "cutlass"
    assert choices.algorithm("cutlass", problem_of_it) == algorithm
    assert choices.algorithm("cutlass", (False, *problem_of_it[1:])) == cutlass.DEFAULT
    assert str(choice) == "2:4, CUTLASS 128x256x64 2x1 packing, tile scheduler 4/2 (2:4 0.500 ms, dense 0.750 ms)"


def test_ranks_agree_on_a_packing_kernel(fresh_choices):
    fresh_choices.agree_over(lambda _: dataclasses.asdict(Choice(True, algorithm=kernels.DEFAULT)), decides=False)
    key = Key(Product.WGRAD, 128, 192, 48, DTYPE)
    choice = fresh_choices.decide(key, lambda: pytest.fail("only the deciding rank measures"))
    assert choice.algorithm == kernels.DEFAULT == choices.algorithm("cutlass", (True, 128, 192, 48, DTYPE))


@pytest.mark.parametrize("tokens", [64, 40])
def test_the_gate_judges_the_packed_gradient(tokens, kernels_here, monkeypatch):
    """The trial's right answer is from cuSPARSELt's order of metadata, our kernels' from CUTLASS's."""
    from slope_megatron.ops.autotune.measure_wgrad import WgradTrial

    trial, factor = WgradTrial(Key(Product.WGRAD, 64, 128, tokens, DTYPE), kernels_here), 1.0
    run = kernels.run

    def scaled(algorithm, operand, x, row_bits, packed):
        if kernels_here.type == "cuda":
            run(algorithm, operand, x, row_bits, packed)
        else:
            packed.copy_(cutlass_library.packed_wgrad(operand, x, row_bits))
        packed.mul_(factor)

    monkeypatch.setattr(kernels, "run", scaled)
    candidate = cutlass_library.WgradCandidate(trial, kernels.DEFAULT)
    assert trial.y_TR.shape == (64, 64) and gate.wrong(candidate) is None
    factor = 2.0
    assert "relative error 1.0e+00" in gate.wrong(candidate)
    exact = pack(trial.dy_TN.t() @ trial.x_SK[:tokens], unpack_bits(trial.row_bits))
    assert relative_error(trial.dense_product(), exact) < 1e-2


def test_the_gate_sees_a_dense_gradient_that_was_not_written(kernels_here, monkeypatch):
    """cuSPARSELt's product goes into a buffer that half of is kept: right results of before must not lie there."""
    from slope_kernels import cusparselt
    from slope_megatron.ops.autotune.measure_wgrad import WgradTrial

    class NoPlan:
        def __init__(self, *_):
            pass

        def run(self, *_, **__):
            pass

    monkeypatch.setattr(cusparselt, "Plan", NoPlan)
    if kernels_here.type == "cpu":
        monkeypatch.setattr(torch.cuda, "current_stream", lambda _: argparse.Namespace(cuda_stream=0))
    trial = WgradTrial(Key(Product.WGRAD, 64, 128, 64, DTYPE), kernels_here)
    assert "relative error nan" in gate.wrong(measure_cusparselt.candidate_of(trial, None, 1))


def whole_operand(rows, tokens, dtype, device):
    """An operand of whole numbers and its matrix `[N, T]`; past the last token zeros, at any indices."""
    columns = tokens + -tokens % 64
    indices = slot_indices(random_pattern(torch.randint(0, 1 << 32, (rows, columns), device=device), 2, 4))
    values = torch.randint(-2, 3, (rows, columns // 2), device=device).to(dtype)
    token = indices + 4 * torch.arange(columns // 4, device=device)[:, None]
    values[token.reshape(rows, -1) >= tokens] = 0
    operand = torch.cat((values.view(torch.uint8).flatten(), metadata_cutlass(indices)))
    return operand, scatter_slots(values, indices)[:, :tokens]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("tokens", "rows", "columns"),
    [(64, 64, 64), (200, 192, 320), (7, 320, 448), (1000, 1088, 1600), (777, 2048, 1024)],
)
def test_every_packing_kernel_rounds_the_exact_sums_once(tokens, rows, columns, dtype, kernels_here):
    """Whole numbers: fp32 sums are exact. NaNs around X, and a poisoned output with guards around it."""
    operand, matrix = whole_operand(rows, tokens, dtype, kernels_here)
    room = torch.full((tokens + 16, columns), float("nan"), dtype=dtype, device=kernels_here)
    x = room[8:-8].copy_(torch.randint(-2, 3, (tokens, columns), device=kernels_here))
    _, _, row_bits = problem(1, rows, columns, kernels_here, dtype)
    expected = pack(matrix.double() @ x.double(), unpack_bits(row_bits)).to(dtype)
    for name in cutlass_library.packing_kernels(dtype):
        for scheduler in ((1, 0), (8, 1), (2, 2)):
            output = torch.full((rows + 16, columns // 2), -77.0, dtype=dtype, device=kernels_here)
            packed = output[8:-8].fill_(float("nan"))
            kernels.run(kernels.Algorithm(name, *scheduler), operand, x, row_bits, packed)
            assert torch.equal(packed, expected), (name, scheduler)
            assert (output[:8] == -77).all() and (output[-8:] == -77).all(), (name, scheduler)


@pytest.mark.gpu
def test_tensors_off_the_line_are_copied(kernels_here, fresh_choices):
    dy, x, row_bits = problem(200, 192, 320, kernels_here)
    rng = rng_of(192, kernels_here)
    operand = mvue.mvue_operand(dy, rng.key, rng.streams, True)
    expected = cutlass_library.packed_wgrad(operand, x, row_bits)
    moved = [
        torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=kernels_here)[1:].view_as(tensor).copy_(tensor)
        for tensor in (x, row_bits)
    ]
    assert torch.equal(cutlass_library.packed_wgrad(operand, *moved), expected)


@pytest.mark.gpu
def test_packing_kernels_are_among_the_candidates(kernels_here, fresh_choices):
    samples = measure.contest(Key(Product.WGRAD, 2048, 1024, 1000, DTYPE), kernels_here, rounds=3)
    algorithms = [name[1] for name in samples if name != "dense"]
    ours = [algorithm for algorithm in algorithms if isinstance(algorithm, kernels.Algorithm)]
    assert ours and all(algorithm.kernel in kernels.KERNELS for algorithm in ours)
    assert len(ours) < len(algorithms), "cuSPARSELt's are there too"
