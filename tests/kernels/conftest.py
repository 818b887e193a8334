"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when a kernel is defined: before any module of slope_kernels.triton is imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(scope="session")
def device():
    """Where kernels run in these tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"
