"""The process of each rank, known to all ranks from the start, and the peers that each rank watches.

Were every rank to read the heartbeat of every other, N ranks would read N^2 files of a shared disk each time. So

    local peers     ranks of one host watch each other through /proc, which costs the shared disk nothing
    remote peers    the hosts form a ring, and a host's ranks divide the heartbeats of the next host among them: about
                    N files in all

Whatever dies, one rank or several hosts at once, a surviving rank watches it, or watches a host whose ranks died too.
"""

import dataclasses
import os
import socket
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class RankProcess:
    """One rank's process.

    Args:
        born: when it started (clock ticks after boot), so that a number used again is not mistaken for it.
        kernel: of which boot and which container `pid` is a number; hosts and containers may share a name.
    """

    rank: int
    host: str
    pid: int
    born: int
    kernel: str = ""

    def __str__(self) -> str:
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    @property
    def machine(self) -> tuple[str, str]:
        """Equal for ranks that see each other's processes."""
        return self.host, self.kernel

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended; asked on its own host."""
        return born(self.pid) != self.born


def own(rank: int) -> RankProcess:
    """This process, which is rank `rank`."""
    return RankProcess(rank, socket.gethostname(), os.getpid(), born(os.getpid()) or 0, kernel())


def kernel() -> str:
    """Names the boot of this machine and this process's namespace of process numbers; empty where it has no name."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def born(pid: int) -> int | None:
    """When a process started; None: it is gone, or dead and not yet collected by its parent.

    -1: it is there, and when it started is hidden from other users (a launcher's daemon, /proc mounted with hidepid=1).
    """
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    except PermissionError:
        return -1
    return None if fields[0] in ("Z", "X") else int(fields[19])


def local_peers(processes: list[RankProcess], rank: int) -> list[RankProcess]:
    """The other ranks of its host."""
    return [other for other in processes if other.machine == processes[rank].machine and other.rank != rank]


def remote_peers(processes: list[RankProcess], rank: int) -> list[RankProcess]:
    """Its share of the next host's ranks; together a host's ranks have all of them. None where there is one host."""
    hosts = list(dict.fromkeys(other.machine for other in processes))
    if len(hosts) == 1:
        return []
    here = processes[rank].machine
    following = hosts[(hosts.index(here) + 1) % len(hosts)]
    ours = [other.rank for other in processes if other.machine == here]
    theirs = [other for other in processes if other.machine == following]
    index = ours.index(rank)
    return theirs[index :: len(ours)] or [theirs[index % len(theirs)]]
