"""Where each rank runs, known to all from the start, and which ranks each of them looks after.

Whoever looks on a shared disk costs it: with everybody looking after everybody, N ranks read N^2 files each time. So

    ranks of one host    look after each other through /proc, which is nobody else's
    hosts in a ring      a host's ranks share out those of the next host, whose files they look at: about N in all

Whatever dies, one rank or whole hosts at once, a host that is left follows or precedes it in the ring or is its own.
"""

import dataclasses
import os
import socket
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Place:
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


def here(rank: int) -> Place:
    """This process's."""
    return Place(rank, socket.gethostname(), os.getpid(), born(os.getpid()) or 0, kernel())


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


def beside(places: list[Place], rank: int) -> list[Place]:
    """The other ranks of its host."""
    return [place for place in places if place.machine == places[rank].machine and place.rank != rank]


def afar(places: list[Place], rank: int) -> list[Place]:
    """Its share of the next host's ranks; together a host's ranks have all of them. None where there is one host."""
    hosts = list(dict.fromkeys(place.machine for place in places))
    if len(hosts) == 1:
        return []
    own = places[rank].machine
    following = hosts[(hosts.index(own) + 1) % len(hosts)]
    ours = [place.rank for place in places if place.machine == own]
    theirs = [place for place in places if place.machine == following]
    turn = ours.index(rank)
    return theirs[turn :: len(ours)] or [theirs[turn % len(theirs)]]
