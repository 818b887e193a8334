"""The processes that started this rank: torchrun, deepspeed, mpirun, srun's daemon, and what started those.

A launcher that is killed, or dies of a signal that it does not know (USR1 to torchrun), leaves its ranks behind, which
would train on as orphans with nobody to end them. So each rank looks after its launcher too: a launcher that is gone is
a request to save and to end. prctl's signal at a parent's death would come as well when the thread that started the
rank ends, and a second time beside the launcher's own TERM; looking at process numbers does neither.

Shells are none of it: they end, and what they have started goes on (`nohup`, a closed terminal).
"""

import os
import sys
import threading
from pathlib import Path

from slope_megatron.training.watch.process import born

POLL_SECONDS = 0.5
SHELLS = {"bash", "sh", "dash", "zsh", "ksh", "fish", "csh", "tcsh", "busybox", "tmux", "screen", "sshd", "login", "su"}
SHELLS |= {"sudo", "systemd", "init", "tini", "dumb-init"}
# A launcher's own launchers, by the program or module that runs: deepspeed starts a process that starts the ranks.
LAUNCHERS = {"torchrun", "deepspeed", "ds", "accelerate", "mpirun", "mpiexec", "mpiexec.hydra", "orterun", "prterun"}
LAUNCHERS |= {"orted", "prted", "hydra_pmi_proxy", "hydra_bstrap_proxy", "srun", "slurmstepd", "ibrun", "jsrun"}
LAUNCHERS |= {"torch.distributed.run", "torch.distributed.launch", "accelerate.commands.launch"}
LAUNCHERS |= {"deepspeed.launcher.runner", "deepspeed.launcher.launch", "quickstart"}


class Launcher:
    """What started this rank, from its parent on.

    Args:
        variable: the one in which the launcher tells each rank its number; empty: a single process, without one.
    """

    def __init__(self, variable: str):
        self.processes = {pid: (born(pid), name) for pid, name in found_above(variable)} if variable else {}
        self.handed_over = threading.Event()

    def gone(self) -> str | None:
        """In words, the first that has ended; None: all are there, or there is none."""
        for pid, (start, name) in self.processes.items():
            if born(pid) != start:
                return f"{name}, process {pid}"
        return None

    def guard(self, exit_code: int) -> None:
        """End this process when its launcher goes, until a `RankWatch` takes over, which can save first."""
        if self.processes:
            threading.Thread(target=self._guard, args=(exit_code,), name="launcher-guard", daemon=True).start()

    def _guard(self, exit_code: int) -> None:
        while not self.handed_over.wait(POLL_SECONDS):
            gone = self.gone()
            if gone:
                unblock_output()
                print(f"\nslope: the launcher ({gone}) is gone: ended before training", file=sys.stderr, flush=True)
                os._exit(exit_code)


def found_above(variable: str) -> list[tuple[int, str]]:
    """Process number and name of this process's launchers, the nearest first.

    Those that have `variable` themselves are wrappers around this rank, and are passed over.
    """
    found: list[tuple[int, str]] = []
    pid = os.getppid()
    while pid > 1:
        name = program(pid)
        if not found and is_wrapper(pid, variable):
            pid = parent(pid)
            continue
        # Whatever starts ranks is a launcher, also one of the user's own; further up, only what is known as one.
        if name in SHELLS or not (name in LAUNCHERS or not found):
            break
        found.append((pid, name))
        pid = parent(pid)
    return found


def is_wrapper(pid: int, variable: str) -> bool:
    """Whether a process has the variable from the beginning: a script around the rank, as the rank itself."""
    try:
        settings = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # another user's: SLURM's daemon
        return False
    own = f"{variable}={os.environ.get(variable, '')}".encode()
    return own in settings


def program(pid: int) -> str:
    """What a process runs: of Python, the script or the module; of this program, its command; "" if unknown."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return ""
    if not words:
        return ""
    name = os.path.basename(words[0]).lstrip("-").partition(":")[0]
    if name.startswith(("python", "pypy")):
        rest = iter(words[1:])
        name = next((next(rest, "") if word == "-m" else word for word in rest if word == "-m" or word[0:1] != "-"), "")
        name = os.path.basename(name)
    return "quickstart" if name in ("slope", "slope_megatron") and "quickstart" in words else name


def parent(pid: int) -> int:
    """0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def unblock_output() -> None:
    """A launcher that is gone reads no output any more: what is said now must fail nowhere."""
    for number in (1, 2):
        try:
            os.write(number, b"\n")
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, number)
            os.close(nothing)
