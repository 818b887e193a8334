"""Processes by their pid files, or by the SLURM that their environment names."""

import os
import signal
import time
from pathlib import Path


def alive(pid_file: Path) -> bool:
    try:
        os.kill(int(pid_file.read_text()), 0)
    except (OSError, ValueError):
        return False
    return True


def end(*pid_files: Path) -> None:
    """TERM to the processes of pid files, all at once, and KILL to what is not gone in ten seconds."""
    processes = [int(path.read_text()) for path in pid_files if alive(path)]
    for process in processes:
        os.kill(process, signal.SIGTERM)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and any(Path(f"/proc/{process}").exists() for process in processes):
        time.sleep(0.1)
    for process in processes:
        if Path(f"/proc/{process}").exists():
            os.kill(process, signal.SIGKILL)


def end_processes_of(slurm_conf: str) -> list[int]:
    """KILL to every other process whose environment names this SLURM: its steps and their tasks, and nothing else."""
    found = []
    mark = f"SLURM_CONF={slurm_conf}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        process = int(path.parent.name)
        try:
            if process != os.getpid() and mark in path.read_bytes().split(b"\0"):
                os.kill(process, signal.SIGKILL)
                found.append(process)
        except OSError:
            continue  # gone meanwhile
    return found
