"""A free port: nobody listens there, and no connection will be given it."""

import socket

import pytest

from slope_megatron.launch import ports
from slope_megatron.launch.slurm import FIRST_PORT


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.2", 0))
        taken = listener.getsockname()[1]
        monkeypatch.setattr(ports, "CANDIDATES", range(taken, taken + 1))
        monkeypatch.setattr(ports, "ATTEMPTS", 1)
        with pytest.raises(RuntimeError, match=f"none of 1 ports from {taken} to {taken} is free"):
            ports.free_port()
    assert ports.free_port() == taken


def test_ports_differ_and_are_not_those_that_linux_gives_to_connections():
    found = {ports.free_port() for _ in range(20)}
    assert len(found) > 10 and max(found) < min(32_768, FIRST_PORT)
