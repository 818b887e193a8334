"""Random numbers of tests: the same in each run, other ones in each test, and named where a test fails."""

import random

import numpy
import torch

from helpers.seeds import seed_everything, seed_of


def drawn():
    return random.random(), float(numpy.random.rand()), float(torch.rand(()))


def test_a_test_draws_from_a_seed_of_its_own(request):
    found = drawn()
    seed_everything(seed_of(request.node.nodeid))
    assert found == drawn()
    seed_everything(seed_of(f"{request.node.nodeid}, another"))
    assert not set(found) & set(drawn())


def test_ranks_draw_from_a_seed_too(ranks):
    first, second = (ranks.run(drawn, world=1)[0] for _ in range(2))
    assert first == second


def test_a_failed_test_names_its_seed(tmp_path):
    """The mechanism itself, in a test run of its own."""
    import subprocess
    import sys
    from pathlib import Path

    root = Path(__file__).resolve().parents[1]
    test = tmp_path / "test_failing.py"
    test.write_text("def test_failing():\n    assert False\n")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "conftest", str(test), f"--rootdir={tmp_path}"]
    environment = {"PATH": "", "PYTHONPATH": f"{root / 'tests'}:{root}:{root / 'kernels'}"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 1
    assert f"seed_everything({seed_of('test_failing.py::test_failing')})" in done.stdout, done.stdout + done.stderr
