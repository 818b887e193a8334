"""Importing the package, its configuration and the command line starts nothing and pulls in no framework."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# From a bare checkout as well as installed.
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}

HEAVY = ("torch", "megatron", "deepspeed", "triton", "datasets", "matplotlib")


def modules_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sorted({{name.split('.')[0] for name in sys.modules}})))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=ENVIRONMENT)
    return set(result.stdout.split())


def test_import_is_light():
    statement = "import slope_megatron, slope_megatron.config, slope_megatron.cli as cli; cli.build_parser()"
    assert not modules_after(statement) & set(HEAVY)


def test_inference_needs_neither_megatron_nor_deepspeed():
    statement = (
        "import slope_megatron.inference.generate, slope_megatron.inference.packed_file, slope_megatron.inference.text,"
        "slope_megatron.export.trained_run, slope_megatron.export.hf_export, slope_megatron.evaluation.models"
    )
    assert not modules_after(statement) & {"megatron", "deepspeed", "datasets", "transformers"}


def test_kernels_and_ops_initialise_no_cuda():
    code = (
        "import torch, slope_kernels, slope_kernels.triton, slope_megatron.ops.backend, slope_megatron.linear;"
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=ENVIRONMENT)
