"""Versions of what computes: in a run's folder, in reports, and compared between the nodes of a job."""

import platform
import re
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

CORE = "megatron-core"
# The first version whose models are built here, and the first one whose models are not.
CORE_FROM, CORE_BELOW = (0, 16, 1), (0, 20)


def versions() -> dict[str, str]:
    """Package to version, python first; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def unsupported_core(version: str | None = None) -> str | None:
    """Why models cannot be built with megatron-core, and the way out; None: they can, or it is not installed.

    The plugin for Megatron-LM's scripts (`integrations.megatron_lm.plugin`) builds none, and runs on later ones too.

    Args:
        version: of megatron-core; None: the installed one.
    """
    found = version or versions().get(CORE)
    if found is None:
        return None
    # Pre-releases of a version are of that version here: 0.17.0rc0 is 0.17.
    numbers = tuple(map(int, re.findall(r"\d+", found)[:3]))
    if numbers >= CORE_FROM and numbers[:2] < CORE_BELOW:
        return None
    first, below = ".".join(map(str, CORE_FROM)), ".".join(map(str, CORE_BELOW))
    return (
        f"{CORE} {found} is installed, and models are built with {first} or later and below {below}: "
        f"pip install '{CORE}=={first}'"
    )


def check_core(version: str | None = None) -> None:
    """Raises ValueError where models cannot be built with the megatron-core that is installed, or has this version."""
    reason = unsupported_core(version)
    if reason:
        raise ValueError(reason)
