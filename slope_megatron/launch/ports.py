"""A port at which ranks of one machine meet."""

import contextlib
import random
import socket

# Below those that Linux gives to outgoing connections (from 32768 on, unless set otherwise): one of these may be taken
# the next moment, by the many connections that NCCL and gloo open. Below those too that jobs take by number (`ranks`).
CANDIDATES = range(12_000, 20_000)
ATTEMPTS = 200


def free_port() -> int:
    """One that nobody listens on now; a RuntimeError where all that were tried are taken."""
    for port in random.SystemRandom().sample(CANDIDATES, ATTEMPTS):
        with socket.socket() as listener, contextlib.suppress(OSError):
            # On every address, as a rendezvous will be.
            listener.bind(("", port))
            return port
    raise RuntimeError(
        f"none of {ATTEMPTS} ports from {CANDIDATES.start} to {CANDIDATES.stop - 1} is free: see `ss -ltn`"
    )
