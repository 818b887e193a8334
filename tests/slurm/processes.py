"""Processes by their pid files, by those they started, or by the SLURM that their environment names."""

import os
import signal
import time
from pathlib import Path


def running(process: int) -> bool:
    return Path(f"/proc/{process}").exists()


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
    while time.monotonic() < deadline and any(map(running, processes)):
        time.sleep(0.1)
    for process in processes:
        if running(process):
            os.kill(process, signal.SIGKILL)


def parent(process: int) -> tuple[int, str]:
    """Its parent's number, and its own name."""
    # "4711 (name) S 4710 ...", and a name may hold spaces and brackets.
    number_and_name, _, rest = Path(f"/proc/{process}/stat").read_text().rpartition(")")
    return int(rest.split()[1]), number_and_name.partition("(")[2]


def step_of(process: int) -> list[int]:
    """A task and its ancestors up to the daemon of its step, which comes first.

    Raises:
        ValueError: no step's daemon started it.
    """
    line = []
    while process > 1:
        line.insert(0, process)
        process, name = parent(process)
        if name.startswith("slurmstepd"):
            return line
    raise ValueError(f"process {line[-1]} is no task of a SLURM step: its ancestors are {line[:-1]}")


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
