"""Products are those of the present values and patterns, by whatever means they were changed.

Forward, dX and dW beside the plain oracle (`helpers.present_values`), on the plain backend and on those of 2:4 tensor
cores, whose plain-torch twins compute on a CPU.
"""

from unittest import mock

import pytest
import torch

from helpers.present_values import cases_of, worst_of

SUBJECTS = [("packed", "reference"), ("packed", "cusparselt"), ("packed", "cutlass"), ("masked", "reference")]
NAMES = [(kind, backend, name) for kind, backend in SUBJECTS for name in cases_of(kind)]


def on_cpu(subjects):
    """`{subject: worst_of}`; every backend is told that it can run."""
    from slope_megatron.ops import backend, cusparselt, cutlass

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


@pytest.fixture(scope="module")
def on_a_cpu(ranks):
    return ranks.run(on_cpu, SUBJECTS, world=1)[0]


def holds(worst) -> bool:
    return isinstance(worst, float) and worst <= 1.0


@pytest.mark.parametrize(("kind", "backend", "name"), NAMES)
def test_products_follow(on_a_cpu, kind, backend, name):
    worst = on_a_cpu[kind, backend][name]
    assert holds(worst), f"largest error over its bound: {worst}"
