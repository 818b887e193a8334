"""Where a test needs 2:4 metadata whose layout our kernels know."""

import sys

import pytest
import torch

from slope_megatron.ops.custom_ops import layout


def skip_without_known_metadata(device, dtype=torch.bfloat16) -> None:
    """On a Hopper GPU an unknown layout is a fault, which the test then shows, unless the run plays an A100."""
    if device.type == "cpu" or layout.probe(device, dtype).known_metadata:
        return
    if "helpers.as_on_a100" in sys.modules or torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the layout of this GPU's 2:4 metadata is not known")
