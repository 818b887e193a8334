"""Products are those of the present values and patterns, by whatever means they were changed.

Forward, dX and dW beside the plain oracle (`helpers.present_values`), on the plain backend and on those of 2:4 tensor
cores, whose plain-torch references compute on a CPU.
"""

import copy
from unittest import mock

import pytest
import torch

from helpers.present_values import IN, OUT, Subject, build
from helpers.value_changes import cases_of, worst_of

SUBJECTS = [("packed", "reference"), ("packed", "cusparselt"), ("packed", "cutlass"), ("masked", "reference")]
NAMES = [(kind, backend, name) for kind, backend in SUBJECTS for name in cases_of(kind)]
GPU_SUBJECTS = [("packed", "auto"), *SUBJECTS]
GPU_NAMES = [(kind, backend, name) for kind, backend in GPU_SUBJECTS for name in cases_of(kind, "cuda")]


def on_cpu(subjects):
    """`{subject: worst_of}`; every backend is told that it can run."""
    from slope_megatron.ops import backend
    from slope_megatron.ops.operands import cusparselt, cutlass

    able = {"unsupported_weight": lambda values, bits: None}
    with (
        mock.patch.object(backend, "choose", lambda requested: requested),
        mock.patch.multiple(cutlass, **able),
        mock.patch.multiple(cusparselt, **able),
    ):
        return {
            (kind, name): worst_of(kind, name, torch.float64 if name == "reference" else torch.bfloat16)
            for kind, name in subjects
        }


def on_gpu(subjects):
    """The same on a GPU, in bf16; a backend that cannot run there is left out."""
    from slope_megatron.ops import backend

    able = [(kind, name) for kind, name in subjects if not backend.available().get(name)]
    return {(kind, name): worst_of(kind, name, torch.bfloat16, "cuda") for kind, name in able}


@pytest.fixture(scope="module")
def on_a_cpu(ranks):
    return ranks.run(on_cpu, SUBJECTS, world=1)[0]


@pytest.fixture(scope="module")
def on_a_gpu(gpu_ranks):
    return gpu_ranks.run(on_gpu, GPU_SUBJECTS, world=1)[0]


def holds(worst) -> bool:
    return isinstance(worst, float) and worst <= 1.0


@pytest.mark.parametrize(("kind", "backend", "name"), NAMES)
def test_products_follow(on_a_cpu, kind, backend, name):
    worst = on_a_cpu[kind, backend][name]
    assert holds(worst), f"largest error over its bound: {worst}"


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "backend", "name"), GPU_NAMES)
def test_products_follow_on_a_gpu(on_a_gpu, kind, backend, name):
    if (kind, backend) not in on_a_gpu:
        pytest.skip(f"backend {backend} cannot run on this GPU")
    worst = on_a_gpu[kind, backend][name]
    assert holds(worst), f"largest error over its bound: {worst}"


def compiled_and_copied():
    """Errors of a layer under torch.compile; and of a copy of it, which goes its own way."""
    found = {}
    for kind in ("packed", "masked"):
        subject = Subject(build(kind))
        optimizer = torch.optim.AdamW(subject.layer.parameters(), lr=0.5, fused=True)
        subject.layer.compile(backend="aot_eager")
        errors = []
        for _ in range(2):
            errors += subject.train()
            optimizer.step()
            optimizer.zero_grad()
            errors += subject.evaluate() + subject.evaluate()
        subject.layer.weight.data.mul_(-2.0)
        errors += subject.train()
        found[f"{kind}, compiled"] = max(errors)
        subject = Subject(build(kind))
        errors = subject.evaluate()
        # Process groups are no part of a copy.
        memo = {id(subject.layer.tp_group): subject.layer.tp_group}
        other = Subject(copy.deepcopy(subject.layer, memo))
        other.layer.weight.data.mul_(-2.0)
        found[f"{kind}, copied"] = max(errors + other.evaluate() + subject.evaluate())
    return found


def test_under_torch_compile_and_in_a_copy(ranks):
    found = ranks.run(compiled_and_copied, world=1)[0]
    assert max(found.values()) < 1e-12, found


def bare(kind):
    """A layer as Megatron builds it without initialisation."""
    layer = build(kind)
    return type(layer)(
        IN, OUT, slope=layer.slope, config=layer.config, init_method=None, bias=False, skip_bias_add=False
    )


def loaded(kind, *states, assign=False):
    layer = bare(kind)
    for state in states:
        layer.load_state_dict(state, strict=False, assign=assign)
    return layer


def message(function, *arguments, **keywords) -> str:
    try:
        function(*arguments, **keywords)
    except RuntimeError as error:
        return str(error)
    return "nothing was raised"


def after_loads(kind, assign):
    """What a layer says it lacks, after loads that hold all, some or none of its tensors."""
    # A plain dict: torch notes `assign` in a state dict's own metadata.
    whole = dict(build(kind).state_dict())
    names = ["weight", *build(kind).PATTERNS]
    empty = loaded(kind, {}, assign=assign)
    without = [{name: value for name, value in whole.items() if name != left_out} for left_out in names]
    full = loaded(kind, whole, assign=assign)
    return {
        "nothing": empty.absent,
        "without": [loaded(kind, state, assign=assign).absent for state in without],
        "in parts": loaded(kind, *({name: whole[name]} for name in names), assign=assign).absent,
        "whole": full.absent,
        "refused": message(empty, torch.zeros(1, IN, dtype=torch.float64)),
        "same": torch.equal(Subject(full).evaluate_y(), Subject(build(kind)).evaluate_y()),
    }


def what_is_there():
    found = {}
    for kind in ("packed", "masked"):
        found |= {(kind, assign): after_loads(kind, assign) for assign in (False, True)}
        whole = dict(build(kind).state_dict())
        layer = bare(kind)
        wrong = {**whole, "weight": whole["weight"][:8]}
        found[kind, "wrong shape"] = (message(layer.load_state_dict, wrong, strict=False), layer.absent)
        meta = build(kind).to("meta")
        lost = meta.absent
        meta.load_state_dict(whole)
        unread, memory = meta.absent, meta.to_empty(device="cpu").absent
        meta.load_state_dict(whole)
        found[kind, "meta"] = (lost, unread, memory, meta.absent)
    return found


def test_initialised_is_what_was_really_loaded(ranks):
    found = ranks.run(what_is_there, world=1)[0]
    for kind, names in {
        "packed": ["weight", "weight_pattern", "weight_column"],
        "masked": ["weight", "weight_mask"],
    }.items():
        for assign in (False, True):
            case = found[kind, assign]
            assert case["nothing"] == names and case["without"] == [[name] for name in names], assign
            assert case["in parts"] == case["whole"] == [] and case["same"]
            assert f"has no {', '.join(names)} yet: initialize the built model" in case["refused"]
        said, absent = found[kind, "wrong shape"]
        assert "size mismatch for weight" in said and absent == names
        assert found[kind, "meta"] == (names, names, names, [])
