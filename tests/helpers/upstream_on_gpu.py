"""Runs an upstream training script on a GPU, as it is, and looks at the operands.

python upstream_on_gpu.py CHECKOUT SCRIPT flags ...      SCRIPT: patched
"""

import runpy
import sys

from helpers.cpu_for_cuda import look_at_operands


def main(checkout: str, script: str) -> None:
    sys.path.insert(0, checkout)
    import megatron.core.datasets.utils as datasets

    # The wheel's compiled helpers lie in the checkout.
    datasets.compile_helpers = lambda: None
    look_at_operands()
    sys.argv = sys.argv[2:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:3])
