"""What rounding is: the reference backend once more, with fp32 products."""

from slope_megatron.ops.operands import reference
from slope_megatron.ops.update import handed_on


class UpcastOperands(reference.ReferenceOperands):
    """The reference with its three products in fp32: what the rounding of products changes."""

    def forward(self, x_TK):
        return (x_TK.float() @ self.forward_NK.float().t()).to(x_TK.dtype)

    def dgrad(self, dy_TN):
        return (dy_TN.float() @ self.backward_NK.float()).to(dy_TN.dtype)

    def wgrad(self, dy_TN, x_TK, rng=None, total=None):
        found = (dy_TN.float().t() @ x_TK.float()).gather(1, self.index_NC).to(dy_TN.dtype)
        return handed_on(found, total)
