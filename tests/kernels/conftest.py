"""Kernels run on the GPU where there is one, and in Triton's interpreter elsewhere."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """Where kernels run in these tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    return "cuda" if torch.cuda.is_available() else "cpu"
