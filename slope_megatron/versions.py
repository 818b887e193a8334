"""Versions of what computes: in a run's folder, in reports, and compared between the nodes of a job."""

import platform
import re
import sys
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
# The first one that has megatron-core 0.17 and later.
NEWER_PYTHON = (3, 12)


def versions() -> dict[str, str]:
    """Package to version, python first; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def numbers_of(version: str) -> tuple[int, ...]:
    """(0, 17, 0) of 0.17.0, and of its pre-releases, which are of that version here."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def unsupported_core(version: str | None = None) -> str | None:
    """Why models cannot be built with megatron-core, and the way out; None: they can, or it is not installed.

    The plugin for Megatron-LM's scripts (`integrations.megatron_lm.plugin`) builds none, and runs on later ones too.

    Args:
        version: of megatron-core; None: the installed one.
    """
    found = version or versions().get(CORE)
    if found is None:
        return None
    numbers = numbers_of(found)
    if numbers >= CORE_FROM and numbers[:2] < CORE_BELOW:
        return None
    first, below = ".".join(map(str, CORE_FROM)), ".".join(map(str, CORE_BELOW))
    return (
        f"{CORE} {found} is installed, and models are built with {first} or later and below {below}: "
        f"pip install '{CORE}=={first}'"
    )


def core_in_use() -> str | None:
    """What the installed megatron-core, where models can be built with it, means; None: it is not installed."""
    found = versions().get(CORE)
    if found is None or unsupported_core(found):
        return unsupported_core(found) if found else None
    if sys.version_info < NEWER_PYTHON:
        return (
            f"{CORE} {found} is in use: pip takes no later one than 0.16.1 on Python {platform.python_version()}, for "
            "0.17 and later want 3.12; both give the same losses, so this is no fault"
        )
    if numbers_of(found)[:2] < (0, 17):
        return (
            f"{CORE} {found} is in use although this Python ({platform.python_version()}) can have a later one: "
            f"pip install --upgrade '{CORE}<{'.'.join(map(str, CORE_BELOW))}'"
        )
    return f"{CORE} {found} is in use"


def check_core(version: str | None = None) -> None:
    """Raises ValueError where models cannot be built with the megatron-core that is installed, or has this version."""
    reason = unsupported_core(version)
    if reason:
        raise ValueError(reason)
