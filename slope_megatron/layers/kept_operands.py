"""Operands that are kept from one product to the next, and what they were made of.

Whether a weight has changed since is hard to see: autograd's version counters miss fused optimizers and writes through
`.data`; addresses and object identities miss writes in place. So a layer that nobody tells of changes refreshes its
operands wherever an optimizer may have run before (`PrunedLinear.watches_values` says where); elsewhere it compares all
three (`TensorSnapshot`).

A backward product may come after others have been multiplied with these operands: under a pipeline, or where
`torch.func.functional_call` gives one weight after the other. `restore_for_backward` then brings them back to what
forward read.
"""

import weakref
from typing import Generic, TypeVar

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from slope_megatron.ops.backend import Following

Made = TypeVar("Made", bound=Following)


def version_of(tensor: torch.Tensor) -> int | None:
    """How often autograd has seen the tensor written in place; None: nobody counts (an inference tensor)."""
    return None if tensor.is_inference() else tensor._version


def lent(weight: torch.Tensor) -> torch.Tensor:
    """What operands get of a weight, and some read where it lies from then on.

    A parameter itself: whoever kept its present memory would keep it from being freed, as ZeRO-3 does between uses. Of
    a tensor that was computed the values alone, without the graph behind them.
    """
    return weight if weight.is_leaf else weight.detach()


class TensorSnapshot:
    """One tensor as it was when operands were made of it: which one, where it lay, how often it had been written.

    Nothing is kept alive by this; and as long as it is here, no other memory can be taken for the one seen.
    """

    def __init__(self, tensor: torch.Tensor):
        self.tensor = weakref.ref(tensor)
        self.storage = StorageWeakRef(tensor.untyped_storage())
        self.address, self.version = tensor.data_ptr(), version_of(tensor)

    def unwritten(self, tensor: torch.Tensor) -> bool:
        """Whether no write has been counted since; of the same tensor."""
        return self.version is not None and self.version == version_of(tensor)

    def same_memory(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` is what was seen or another view of it, unwritten: saved tensors come back as such."""
        here = tensor.untyped_storage()._cdata == self.storage.cdata and tensor.data_ptr() == self.address
        return here and self.unwritten(tensor)

    def is_same(self, tensor: torch.Tensor) -> bool:
        """Whether it is the very tensor that was seen, at the same address, and unwritten."""
        return self.tensor() is tensor and self.same_memory(tensor)


class KeptOperands(Generic[Made]):
    """Operands, and the weight and patterns that they are made of.

    Args:
        operands: built of the present values of `weight`.
        weight: the parameter, or what was given instead of it.
        patterns: the buffers that say which weights count; operands may read them where they lie.
    """

    def __init__(self, operands: Made, weight: torch.Tensor, patterns: tuple[torch.Tensor, ...]):
        self.operands = operands
        self.signature = (weight.shape, weight.dtype, weight.device)
        # Counts refreshes: a backward product asks whether there were any since its forward.
        self.generation = 0
        # Whether the values may change, unseen, before the next product.
        self.may_be_stale = False
        self.weight, self.patterns = TensorSnapshot(weight), tuple(TensorSnapshot(pattern) for pattern in patterns)

    def fits(self, weight: torch.Tensor) -> bool:
        """Whether these operands can take the values at all; others must be built for another shape, type or device."""
        return self.signature == (weight.shape, weight.dtype, weight.device)

    def unwritten(self, weight: torch.Tensor, patterns: tuple[torch.Tensor, ...]) -> tuple[bool, bool]:
        """Whether weight and patterns have not been written by anything that autograd counts."""
        seen = [before.unwritten(now) for before, now in zip(self.patterns, patterns, strict=True)]
        return self.weight.unwritten(weight), all(seen)

    def is_same(self, patterns: tuple[torch.Tensor, ...]) -> bool:
        """Whether the patterns are those that were seen."""
        return all(before.is_same(now) for before, now in zip(self.patterns, patterns, strict=True))

    def refresh(self, weight: torch.Tensor) -> None:
        """Bring the operands up to the present values; the patterns are the same."""
        self.operands.refresh(lent(weight))
        self.mark_fresh(weight)

    def mark_fresh(self, weight: torch.Tensor) -> None:
        """The operands are those of the present values now."""
        self.weight, self.generation, self.may_be_stale = TensorSnapshot(weight), self.generation + 1, False

    def reads(self, weight: torch.Tensor, patterns: tuple[torch.Tensor, ...]) -> bool:
        """Whether these operands can follow a weight and the very buffers that they were made of, written or not."""
        return self.fits(weight) and all(
            seen.tensor() is now for seen, now in zip(self.patterns, patterns, strict=True)
        )

    def mark_last_pattern(self, pattern: torch.Tensor) -> None:
        """The operands are those of the last pattern as it is now; of the others as they were."""
        self.patterns = (*self.patterns[:-1], TensorSnapshot(pattern))

    def rebind(self, weight: torch.Tensor) -> None:
        """The same values may lie elsewhere: for operands that read them where they are."""
        if hasattr(self.operands, "rebind"):
            self.operands.rebind(lent(weight))

    def restore_for_backward(self, generation: int, weight: torch.Tensor) -> None:
        """Before a backward product: the operands of what forward read, which autograd has saved and checked.

        Args:
            generation: that of the forward product.
        """
        if generation != self.generation and not self.weight.same_memory(weight):
            self.refresh(weight)
        # A gradient: the values are about to change.
        self.may_be_stale = True
