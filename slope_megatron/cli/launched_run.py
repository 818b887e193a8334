"""One `slope pretrain` on several ranks under the `deepspeed` launcher, started and ended by this process."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

from slope_megatron.launch.ports import free_port


def run_command(flags: list[str], ranks: int) -> str:
    """One run as a person starts it: what `launch` does."""
    return f"deepspeed --num_gpus {ranks} --no_local_rank --module slope_megatron pretrain {shlex.join(flags)}"


def launch(flags: list[str], ranks: int, run_folder: Path) -> None:
    """One run under the `deepspeed` launcher; its progress bar is this command's."""
    if run_folder.exists():
        # Interrupted before its first checkpoint, it begins anew.
        flags = [*flags, "--auto-resume"]
    command = [
        *(sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--no_local_rank"),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *("--module", "slope_megatron", "pretrain", "--brief", *flags),
    ]
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "error"}
    log = run_folder.with_suffix(".launcher.log")
    with open(log, "a") as launcher_output:
        # A session of its own: an interruption reaches this process alone, which then ends all of theirs.
        process = subprocess.Popen(command, env=environment, stdout=launcher_output, start_new_session=True)
        try:
            code = process.wait()
        except KeyboardInterrupt:
            end_session(process)
            raise KeyboardInterrupt("the same command with --resume goes on") from None
    if code:
        failure = run_folder / "ranks" / "failure.txt"
        log_is = f"the launcher's output is in {log}"
        said = failure.read_text(errors="replace").strip() if failure.is_file() else log_is
        raise ValueError(f"the run in {run_folder} ended with exit code {code}; {said.removeprefix('slope: error: ')}")


def end_session(process: subprocess.Popen) -> None:
    """End a launcher and its ranks, which would train on without it: asked first, then killed."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sent)
        except ProcessLookupError:
            return
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline and session_lives(process):
            time.sleep(0.1)


def session_lives(process: subprocess.Popen) -> bool:
    """Whether any process of the launcher's session is left."""
    process.poll()  # an ended launcher that nobody has waited for would count
    try:
        os.killpg(process.pid, 0)
    except ProcessLookupError:
        return False
    return True


def interrupt(signum, frame) -> None:
    """TERM, HUP and USR1 end a quickstart as the keyboard does, and with it the ranks that it started."""
    raise KeyboardInterrupt
