"""Comparisons whose bounds have a reason."""

import torch


def integers(*shape, low=-3, high=4, seed=0, dtype=torch.float64) -> torch.Tensor:
    """Small whole numbers: products and sums of a few thousand of them are exact in fp32 and fp64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, shape, generator=generator).to(dtype)


def whole_numbers(*shape, device, dtype=torch.bfloat16) -> torch.Tensor:
    """-1, 0 and 1, which e4m3 holds too: sums under 256 are exact in bf16 and fp16, in any order."""
    return torch.randint(-1, 2, shape, device=device).to(dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||."""
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))
