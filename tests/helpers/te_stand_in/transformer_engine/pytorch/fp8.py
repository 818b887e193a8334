"""What megatron-core asks where nothing is FP8."""

import contextlib


class FP8GlobalStateManager:
    @staticmethod
    def is_fp8_enabled() -> bool:
        return False


def fp8_autocast(enabled: bool = False, **_):
    assert not enabled
    return contextlib.nullcontext()


fp8_model_init = fp8_autocast
