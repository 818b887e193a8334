"""A whole model on a GPU: the engine's losses on 2:4 tensor cores beside the reference backend's, and planted faults.

What counts as rounding is measured, not chosen: the same run on the reference backend with its products in fp32.
"""

import pytest
import torch

from helpers.gpu import gpu_config, one_rank, say_rank, trained_losses
from helpers.upcast import UpcastOperands
from slope_megatron.layers.packed_weight import PackedWeight
from slope_megatron.ops.choices import Product
from slope_megatron.ops.custom_ops import products
from slope_megatron.ops.operands import cusparselt, reference
from slope_megatron.ops.operands.packed import PackedOperands
from slope_megatron.ops.update import kept

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(cusparselt.unsupported()), reason=str(cusparselt.unsupported()))]
STEPS = 200
# A fault shows long before.
FAULTY_STEPS = 60


@pytest.fixture(scope="module", autouse=True)
def rank():
    with one_rank():
        yield


@pytest.fixture(autouse=True)
def environment(rank, monkeypatch):
    """After each test the environment is given back."""
    say_rank(monkeypatch)


@pytest.fixture(scope="module")
def bound(rank):
    """The reference's losses, and those with its products in fp32."""
    config = gpu_config(slope={"backend": "reference"})
    theirs = torch.tensor(trained_losses(config, STEPS))
    with pytest.MonkeyPatch.context() as patch:
        for product in reference.PRODUCTS:
            patch.setattr(reference.ReferenceOperands, product, getattr(UpcastOperands, product))
        upcast = torch.tensor(trained_losses(config, STEPS))
    assert theirs[-20:].mean() < 0.7 * theirs[:20].mean()
    return theirs, upcast


def distances(bound, steps: int) -> tuple[float, float]:
    """The furthest that the first losses are from the reference's, and that rounding leads from them."""
    theirs, upcast = (losses[:steps] for losses in bound)
    ours = torch.tensor(trained_losses(gpu_config(slope={"backend": "cusparselt"}), steps))
    found, rounding = (float((losses - theirs).abs().max()) for losses in (ours, upcast))
    print(f"{steps} steps, losses {theirs[0]:.4f} .. {theirs[-1]:.4f}: {found:.2e}, rounding {rounding:.2e}")
    return found, rounding


def test_two_hundred_steps_match_the_reference(bound):
    found, rounding = distances(bound, STEPS)
    assert found <= 3 * rounding


def test_products_in_e4m3_learn_as_fast_as_bf16(bound):
    """Another rounding, so no bound by bf16's own: the loss that is reached."""
    theirs, _ = bound
    ours = torch.tensor(trained_losses(gpu_config(slope={"backend": "cusparselt", "fp8": "current"}), STEPS))
    reached, expected = float(ours[-20:].mean()), float(theirs[-20:].mean())
    furthest = float((ours - theirs).abs().max())
    print(
        f"mean loss of the last 20 of {STEPS} steps: e4m3 {reached:.4f}, bf16 {expected:.4f}; furthest {furthest:.2e}"
    )
    assert furthest > 0, "the products must have been in e4m3"
    assert reached == pytest.approx(expected, rel=2e-2)


def dgrad_of_the_forward_weight(operands, dy_TN):
    """dY W^R: the second pruning forgotten."""
    values = operands.sparse[Product.FORWARD].packed_values()
    return dy_TN @ products.unpack_kept(values, operands.patterns.row_bits)


def wgrad_of_other_places(operands, dy_TN, x_TK, rng=None, total=None):
    """Read at the places of the next row."""
    return kept(dy_TN.t() @ x_TK, operands.patterns.row_bits.roll(1, 0), total)


def product_with_a_hole(operands, product, x_TS, bias_R=None):
    """One tile of 16 tokens x 64 outputs is not written."""
    y_TR = HEALTHY_PRODUCT(operands, product, x_TS, bias_R)
    if product is Product.FORWARD:
        y_TR[:16, :64] = 0
    return y_TR


HEALTHY_PRODUCT = PackedOperands.product


@pytest.mark.parametrize("fault", ["dgrad", "wgrad", "product", "refresh"])
def test_a_planted_fault_is_seen(bound, monkeypatch, fault):
    if fault == "refresh":
        monkeypatch.setattr(PackedWeight, "follow_values", lambda self: None)
        monkeypatch.setattr(PackedWeight, "refresh", lambda self: None)
    else:
        wrong = {"dgrad": dgrad_of_the_forward_weight, "wgrad": wgrad_of_other_places, "product": product_with_a_hole}
        monkeypatch.setattr(PackedOperands, fault, wrong[fault])
    found, rounding = distances(bound, FAULTY_STEPS)
    assert found > 3 * rounding
