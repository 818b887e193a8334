"""Versions of what computes: in a run's folder, in reports, and compared between the nodes of a job."""

import platform
from importlib import metadata

PACKAGES = (
    "slope-megatron",
    "torch",
    "megatron-core",
    "deepspeed",
    "triton",
    "numpy",
    "sentencepiece",
    "datasets",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)


def versions() -> dict[str, str]:
    """Package to version, python first; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
