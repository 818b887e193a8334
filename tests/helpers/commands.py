"""`slope ...` in a process of its own, which need not import the frameworks again: forked from the ranks' server."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from helpers.distributed import fork_server

TIMEOUT_SECONDS = 900


def play_command(arguments: list[str], stdout: str, stderr: str, before: Callable[[], object] | None) -> None:
    """What the `slope` script does, with its output in files, after `before`."""
    for descriptor, path in ((1, stdout), (2, stderr)):
        target = os.open(path, os.O_WRONLY)
        os.dup2(target, descriptor)
        os.close(target)
    from slope_megatron.cli import main

    if before is not None:
        before()
    sys.exit(main(arguments))


def slope(*arguments, before: Callable[[], object] | None = None) -> subprocess.CompletedProcess:
    """The command's exit code and what it said, as `subprocess.run` would give them.

    Args:
        before: called in that process first, to change what it finds; importable by name.
    """
    command = [*map(str, arguments)]
    with tempfile.NamedTemporaryFile() as stdout, tempfile.NamedTemporaryFile() as stderr:
        process = fork_server().Process(target=play_command, args=(command, stdout.name, stderr.name, before))
        process.start()
        process.join(TIMEOUT_SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(command, TIMEOUT_SECONDS)
        said = (Path(file.name).read_text() for file in (stdout, stderr))
        return subprocess.CompletedProcess(command, process.exitcode, *said)
