"""Adding gradients up, to the bit; AdamW in one pass beside torch's, whose state it keeps."""

import pytest
import torch

from slope_megatron.ops.update import accumulate_, adamw_

SIZES = [0, 1, 1000, 2048, 5000]


@pytest.mark.parametrize("elements", SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_add_up_in_fp32(elements, dtype, device):
    from slope_kernels.triton.update import accumulate

    total, gradient = torch.randn(elements, device=device), torch.randn(elements, device=device).to(dtype)
    expected = total + gradient.float()
    accumulate(total, gradient)
    assert torch.equal(total, expected)


@pytest.mark.parametrize("shape", [(24, 40), (7,)])
def test_a_gradient_that_lies_otherwise_adds_up_too(shape, device):
    total, gradient = torch.randn(shape, device=device), torch.randn(*shape[::-1], device=device).bfloat16().t()
    expected = total.flatten() + gradient.reshape(-1).float()
    flat = total.flatten()
    accumulate_(flat, gradient)
    assert torch.equal(flat, expected)


@pytest.mark.parametrize("elements", [1, 1000, 3000])
@pytest.mark.parametrize("coefficient", [1.0, 0.37])
def test_adamw_is_torch_s(elements, coefficient, device):
    """Of five updates, at a learning rate and a decay that show; the masters in fp64 are the measure."""
    from slope_kernels.triton.update import adamw

    first = torch.randn(elements, device=device)
    settings = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.3}
    theirs = torch.nn.Parameter(first.double())
    optimizer = torch.optim.AdamW([theirs], **settings)
    master, mean, square = first.clone(), torch.zeros_like(first), torch.zeros_like(first)
    weight, step = torch.empty_like(first, dtype=torch.bfloat16), torch.zeros((), device=device)
    how = {"lr": 0.05, "decay": 0.3, "eps": 1e-8, "beta1": 0.9, "beta2": 0.95}
    for _ in range(5):
        gradient = torch.randn(elements, device=device)
        theirs.grad = gradient.double() * coefficient
        optimizer.step()
        step += 1
        adamw(master, mean, square, weight, gradient, step, coefficient=coefficient, **how)
        assert torch.allclose(master.double(), theirs, rtol=2e-6, atol=2e-7)
        # Triton's interpreter cuts digits off where a GPU rounds.
        assert torch.allclose(weight.float(), master, rtol=2.0**-7 if device == "cpu" else 2.0**-8, atol=0)
        assert device == "cpu" or torch.equal(weight, master.bfloat16())
    state = optimizer.state[theirs]
    assert torch.allclose(mean.double(), state["exp_avg"], rtol=1e-5, atol=1e-7)
    assert torch.allclose(square.double(), state["exp_avg_sq"], rtol=1e-5, atol=1e-9)


def test_the_first_update_divides_by_what_fp32_would_not_know(device):
    """1 - 0.999 in fp32 arithmetic is off by 5e-5."""
    first, gradient = torch.zeros(8, device=device), torch.full((8,), 0.01, device=device)
    tensors = [first.clone(), torch.zeros_like(first), torch.zeros_like(first), first.bfloat16(), gradient]
    from slope_kernels.triton.update import adamw

    step = torch.ones((), device=device)
    adamw(*tensors, step, coefficient=1.0, lr=1.0, decay=0.0, eps=0.0, beta1=0.9, beta2=0.999)
    assert torch.allclose(tensors[0], -torch.ones_like(first), rtol=5e-7)


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.0, 0.99), (0.9, 0.0)])
def test_the_plain_form_is_the_kernel(betas, device):
    from slope_kernels.triton.update import adamw

    parts = [torch.rand(100, device=device) for _ in range(3)]
    parts += [torch.empty(100, dtype=torch.bfloat16, device=device), torch.randn(100, device=device)]
    theirs = [part.cpu().clone() for part in parts]
    how = {"coefficient": 0.5, "lr": 0.1, "decay": 0.1, "eps": 1e-6, "beta1": betas[0], "beta2": betas[1]}
    adamw(*parts, torch.full((), 4.0, device=device), **how)
    adamw_(*theirs, torch.full((), 4.0), **how)
    for own, other in zip(parts[:3], theirs[:3], strict=True):
        assert torch.allclose(own.cpu(), other, rtol=1e-5, atol=1e-7)
