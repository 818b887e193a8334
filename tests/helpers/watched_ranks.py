"""Many watched ranks in one process: their files are real, their processes, hosts and clocks are not."""

import math
import os
import time
import types
from pathlib import Path

from slope_megatron.training.watch import heartbeat, process, rank_watch
from slope_megatron.training.watch.process import RankProcess

LAYOUTS = {
    "blocks": [f"node{rank // 4}" for rank in range(24)],
    "cyclic": [f"node{rank % 6}" for rank in range(24)],
    "uneven": ["a"] * 8 + ["b"] * 3 + ["c"] + ["d"] * 5,
    "one a host": [f"node{rank}" for rank in range(7)],
    "one host": ["node"] * 6,
}


class Left(Exception):
    """Instead of a process's end."""


class Cluster:
    """Ranks that have announced themselves, and what becomes of them; time is what `look` says.

    Args:
        skew: seconds by which the file server's clock is ahead of ours, of the round's number.
        most: seconds that a round counts at most.
    """

    def __init__(self, run: Path, hosts: list[str], monkeypatch, hang_timeout=0.0, skew=None, most=math.inf):
        self.run, self.skew, self.now, self.rounds = run, skew, 1000.0, 0
        self.processes = [RankProcess(rank, host, 1000 + rank, 7) for rank, host in enumerate(hosts)]
        self.gone: set[int] = set()
        self.stopped: set[int] = set()
        monkeypatch.setattr(process, "born", lambda pid: None if pid - 1000 in self.gone else 7)
        monkeypatch.setattr(heartbeat, "MAX_TICK_SECONDS", most)
        monkeypatch.setattr(heartbeat, "time", types.SimpleNamespace(monotonic=lambda: self.now))
        monkeypatch.setattr(rank_watch, "time", types.SimpleNamespace(sleep=self.sleep))
        monkeypatch.setattr(os, "_exit", self.exit)
        self.watches = [self.watch(one.rank, hang_timeout) for one in self.processes]
        for watch in self.watches:
            watch.pulse.announce()
        heartbeat.reserve_report(run / "ranks")

    @staticmethod
    def exit(code):
        raise Left(code)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def watch(self, rank: int, hang_timeout: float) -> rank_watch.RankWatch:
        watch = rank_watch.RankWatch(self.run, self.processes, rank, lambda: "All is saved.", hang_timeout)
        os.close(watch.wake_read)
        os.close(watch.wake_write)
        return watch

    def die(self, ranks) -> None:
        self.gone.update(ranks)

    def look(self, seconds: float = 16.0) -> dict[int, int]:
        """One look of every rank that is left; exit codes of those that end."""
        self.now += seconds
        self.rounds += 1
        ended = {}
        for watch in self.watches:
            if watch.rank not in self.gone | self.stopped:
                try:
                    watch.look([])
                    self.date(watch.rank)
                except Left as left:
                    ended[watch.rank] = left.args[0]
                    self.gone.add(watch.rank)
        return ended

    def date(self, rank: int) -> None:
        """What was written has the file server's time."""
        if self.skew is not None:
            then = time.time() + self.skew(self.rounds)
            os.utime(heartbeat.file_of(self.run / "ranks", rank), (then, then))

    def check_named(self, ranks, capsys, seconds=16.0, rounds=6) -> None:
        """All that are left end within some rounds, having said once, of exactly these, that they died."""
        alive = set(range(len(self.processes))) - self.gone
        ended: dict[int, int] = {}
        for _ in range(rounds):
            ended |= self.look(seconds)
            if len(ended) == len(alive):
                break
        assert ended == dict.fromkeys(alive, rank_watch.DEAD_PEER_EXIT_CODE)
        named = ", ".join(str(self.processes[rank]) for rank in sorted(ranks))
        said = f"slope: error: {named} died; the run stops. All is saved.\n"
        assert (self.run / "ranks" / "failure.txt").read_text() == said
        assert capsys.readouterr().err == f"\n{said}", "not behind a progress bar, on the bar's line"
