"""A free port: nobody listens there, and no connection will be given it."""

import socket

import pytest

from slope_megatron.launch import ports


def test_a_port_that_is_taken_is_not_given(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        taken = listener.getsockname()[1]
        monkeypatch.setattr(ports, "CANDIDATES", range(taken, taken + 1))
        monkeypatch.setattr(ports, "ATTEMPTS", 1)
        with pytest.raises(RuntimeError, match=f"none of 1 ports from {taken} to {taken} is free"):
            ports.free_port()
    assert ports.free_port() == taken


def test_it_is_not_one_of_those_that_connections_get():
    with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
        first = int(file.read().split()[0])
    found = {ports.free_port() for _ in range(20)}
    assert len(found) > 10 and max(found) < first
