"""Why a machine cannot run cuSPARSELt's products: a sentence for each reason; nothing here needs the library."""

import pytest
import torch

from slope_kernels import cusparselt, cusparselt_library


@pytest.fixture
def machine(monkeypatch):
    """A machine that can run them; its parts are replaced one at a time."""

    def build(capability=(9, 0), path="/site/libcusparseLt.so.0", version=(0, 8, 0)):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(cusparselt_library, "library_path", lambda: path)
        monkeypatch.setattr(cusparselt_library, "version", version if callable(version) else lambda: version)
        cusparselt_library.unsupported.cache_clear()

    yield build
    cusparselt_library.unsupported.cache_clear()


def cannot_open():
    raise OSError("libcudart.so.13: cannot open shared object file")


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"capability": None}, "no CUDA device"),
        ({"capability": (7, 0)}, "sm_70 has no 2:4 units; they came with sm_80 (A100)"),
        ({"capability": (7, 5)}, "sm_75 has no 2:4 units; they came with sm_80 (A100)"),
        (
            {"path": None},
            "libcusparseLt.so was not found; pip install nvidia-cusparselt-cu12 (or -cu13, as torch's CUDA)",
        ),
        ({"version": (0, 5, 2)}, "cuSPARSELt 0.5.2 is older than 0.6.0; upgrade the wheel"),
        (
            {"version": cannot_open},
            "/site/libcusparseLt.so.0 cannot be used: libcudart.so.13: cannot open shared object file",
        ),
        ({"capability": (8, 0)}, None),
        ({}, None),
    ],
)
def test_each_machine_that_cannot_is_told_why(parts, reason, machine):
    machine(**parts)
    assert cusparselt_library.unsupported() == reason


@pytest.mark.parametrize(
    ("rows", "columns", "dtype", "reason"),
    [
        (128, 192, torch.bfloat16, None),
        (128, 192, torch.float16, None),
        (128, 192, torch.float32, "float32 (bf16 and fp16 are)"),
        (96, 192, torch.bfloat16, "96 x 192 (both must be multiples of 64)"),
        (128, 100, torch.bfloat16, "128 x 100 (both must be multiples of 64)"),
    ],
)
def test_each_weight_that_cannot_has_a_reason(rows, columns, dtype, reason):
    assert cusparselt.unsupported_shape(rows, columns, dtype) == reason
