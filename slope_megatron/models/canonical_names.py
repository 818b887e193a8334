"""Canonical names of experts' tensors: those of one block are one tensor in checkpoints, with an axis of experts."""

EXPERTS = ".experts.experts."


def numbered(name: str, index: tuple[int, ...]) -> str:
    """The name of one expert's tensor.

    Args:
        index: the expert's number in the whole model, or nothing: no expert's.
    """
    return name.replace(EXPERTS, f"{EXPERTS}{index[0]}.") if index else name
