"""`python -m slope_megatron`, which launchers start on every rank."""

import sys

from slope_megatron.cli import main

if __name__ == "__main__":
    sys.exit(main())
