"""Names alone: of random states and of recomputation in FP8."""


class CudaRNGStatesTracker:
    pass


def __getattr__(name: str):
    if name.startswith("__"):
        raise AttributeError(name)

    def absent(*_, **__):
        raise NotImplementedError(f"{name} is not in this stand-in for Transformer Engine")

    return absent
