"""A parameter's values as a whole, wherever FSDP or ZeRO-3 has put the parts."""

import contextlib
from collections.abc import Iterator

import torch
from torch.distributed.tensor import DTensor


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 has it in parts now."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


@contextlib.contextmanager
def whole(parameter: torch.Tensor) -> Iterator[torch.Tensor]:
    """The values, `parameter` itself where that is whole within; collective where it is not."""
    if isinstance(parameter, DTensor):
        yield DTensor.full_tensor(parameter).detach()
    elif is_partitioned(parameter):
        # Whoever has such a parameter has DeepSpeed.
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter]):
            yield parameter
    else:
        yield parameter
