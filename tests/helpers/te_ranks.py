"""Ranks that find a stand-in for Transformer Engine where they import megatron-core: processes of their own servers."""

import functools
import multiprocessing
import sys
from multiprocessing import context, forkserver
from pathlib import Path
from unittest import mock

from helpers.distributed import RankPool
from helpers.servers import WITHOUT_COMPILER, start_server

FOLDER = Path(__file__).parent / "te_stand_in"


@functools.cache
def server() -> forkserver.ForkServer:
    made = forkserver.ForkServer()
    with mock.patch.object(sys, "path", [str(FOLDER), *sys.path]):
        start_server(made, CUDA_VISIBLE_DEVICES="", **WITHOUT_COMPILER)
    return made


class Process(context.ForkServerProcess):
    """Forked from `server()`, which has imported megatron-core with the stand-in."""

    def start(self) -> None:
        with (
            mock.patch.object(forkserver, "connect_to_new_process", server().connect_to_new_process),
            mock.patch.object(sys, "path", [str(FOLDER), *sys.path]),
        ):
            super().start()


class Context(context.ForkServerContext):
    Process = Process


def te_ranks() -> RankPool:
    """As the fixture `ranks`, with the stand-in."""
    pool = RankPool()
    multiprocessing.allow_connection_pickling()
    vars(pool)["context"] = Context()
    return pool
