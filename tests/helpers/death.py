"""What a worker process does that the machine kills; apart, so that the worker imports nothing else."""

import os
import signal


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
