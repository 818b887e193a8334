"""Problems and devices of the tests of the products."""

import pytest
import torch


@pytest.fixture(scope="session")
def device():
    """The GPU where there is one; the ops' plain-torch kernels run elsewhere."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@pytest.fixture
def kernels_here(device):
    """A GPU that our own kernels run on; on a CPU the ops' plain-torch references."""
    if device.type == "cuda":
        from slope_megatron.ops.operands.cutlass import unsupported

        if unsupported():
            pytest.skip(unsupported())
    return device


@pytest.fixture
def fresh_choices():
    """No choice made before; none left behind."""
    from slope_megatron.ops import choices

    choices.clear()
    yield choices
    choices.clear()
    choices.agree_over(None, True)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu"):
        from slope_megatron.ops.operands.cusparselt import unsupported

        reason = unsupported()
        if reason:
            pytest.skip(reason)
