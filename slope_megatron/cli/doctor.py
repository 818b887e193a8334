"""`slope doctor`: what this machine is, and what each operation would run on."""

import argparse
import json
import platform

from slope_megatron.cli.parser import manual

OPERATIONS = {
    "sparse forward": "Y = X (W^R)^T",
    "sparse dgrad": "dX = dY W^{R,C}",
    "wgrad": "dW = dY^T X, packed",
}


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "doctor",
        help="versions, GPU, and the backend that each operation would use",
        description="Print this machine's versions and GPU, and for each operation the backend it would use and why.",
        epilog=manual("examples:\n  slope doctor\n  slope doctor --json > machine.json"),
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def gpu() -> dict | None:
    """The first CUDA device; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "count": torch.cuda.device_count(),
        "architecture": f"sm_{properties.major}{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "sparse_tensor_cores": (properties.major, properties.minor) >= (8, 0),
    }


def examine() -> dict:
    """Everything that `doctor` prints."""
    import os

    import torch

    from slope_megatron.ops.backend import available, choose
    from slope_megatron.versions import core_in_use, versions

    chosen = choose("auto")
    reasons = available()
    device = gpu()
    why = {name: reason or "available" for name, reason in reasons.items()}
    return {
        "versions": versions(),
        "models": core_in_use() or "megatron-core is not installed",
        "system": platform.platform(),
        "cpu": {"cores": os.cpu_count(), "capability": torch.backends.cpu.get_cpu_capability()},
        "gpu": device,
        "communication": "nccl" if device else "gloo",
        "parameter_type": "bf16" if device else "fp32",
        "backends": why,
        "operations": {operation: chosen for operation in OPERATIONS},
    }


def run(arguments: argparse.Namespace) -> int:
    found = examine()
    if arguments.json:
        print(json.dumps(found, indent=1))
        return 0
    print("versions")
    for package, version in found["versions"].items():
        print(f"  {package:16} {version}")
    print(f"slope pretrain\n  {found['models']}")
    print(f"system\n  {found['system']}, {found['cpu']['cores']} cores ({found['cpu']['capability']})")
    device = found["gpu"]
    if device:
        cores = "with" if device["sparse_tensor_cores"] else "without"
        print(
            f"  {device['count']} x {device['name']} ({device['architecture']}, {device['memory_gib']} "
            f"GiB), {cores} 2:4 units"
        )
    else:
        print("  no CUDA device")
    print(f"ranks talk over {found['communication']}; --dtype auto means {found['parameter_type']}")
    print("backends of the sparse products")
    for name, reason in found["backends"].items():
        print(f"  {name:12} {reason}")
    print("operations")
    for operation, backend in found["operations"].items():
        print(f"  {operation:15} {backend:12} {OPERATIONS[operation]}")
    return 0
