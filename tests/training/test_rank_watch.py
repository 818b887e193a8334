"""Who looks after whom: any rank that dies or hangs, and any hosts at once, are named by those that are left.

Many ranks, all of them in this process: their files are real, their processes and hosts are not.
"""

import os
import random
import sys
import time
from pathlib import Path

import pytest

from slope_megatron.training import faults, heartbeat, places
from slope_megatron.training.places import Place

LAYOUTS = {
    "blocks": [f"node{rank // 4}" for rank in range(24)],
    "cyclic": [f"node{rank % 6}" for rank in range(24)],
    "uneven": ["a"] * 8 + ["b"] * 3 + ["c"] + ["d"] * 5,
    "one a host": [f"node{rank}" for rank in range(7)],
    "one host": ["node"] * 6,
}


class Left(Exception):
    """In the place of a process's end."""


class Cluster:
    """Ranks that have announced themselves, and what becomes of them."""

    def __init__(self, run: Path, hosts: list[str], monkeypatch, hang_timeout=0.0):
        self.run, self.timeout = run, hang_timeout
        self.places = [Place(rank, host, 1000 + rank, 7) for rank, host in enumerate(hosts)]
        self.gone: set[int] = set()
        monkeypatch.setattr(places, "born", lambda pid: None if pid - 1000 in self.gone else 7)
        monkeypatch.setattr(faults, "POLL_SECONDS", 0.0)
        monkeypatch.setattr(os, "_exit", self.exit)
        for place in self.places:
            heartbeat.Pulse(run / "ranks", place).announce()
        heartbeat.make_room_for_verdict(run / "ranks")

    @staticmethod
    def exit(code):
        raise Left(code)

    def watch(self, rank: int) -> faults.RankWatch:
        watch = faults.RankWatch(self.run, self.places, rank, lambda: "All is saved.", self.timeout)
        os.close(watch.wake_read)
        os.close(watch.wake_write)
        return watch

    def silence(self, rank: int, seconds: float) -> None:
        then = time.time() - seconds
        os.utime(heartbeat.file_of(self.run / "ranks", rank), (then, then))

    def die(self, ranks) -> None:
        """Their processes are gone, and their files as old as it takes to be noticed from afar."""
        for rank in ranks:
            self.gone.add(rank)
            self.silence(rank, faults.SILENCE_SECONDS + 1)

    def turn(self) -> dict[int, int]:
        """One look of every rank that is left; exit codes of those that end."""
        ended = {}
        for place in self.places:
            if place.rank not in self.gone:
                try:
                    self.watch(place.rank).look([])
                except Left as left:
                    ended[place.rank] = left.args[0]
                    self.gone.add(place.rank)
        return ended

    def check_named(self, ranks, capsys) -> None:
        """All that are left end within two looks, having said once, of exactly these, that they died."""
        alive = set(range(len(self.places))) - self.gone
        ended = {**self.turn(), **self.turn()}
        assert ended == dict.fromkeys(alive, faults.DEAD_PEER_EXIT_CODE)
        named = ", ".join(str(self.places[rank]) for rank in sorted(ranks))
        said = f"slope: error: {named} died; the run stops. All is saved.\n"
        assert (self.run / "ranks" / "failure.txt").read_text() == said
        assert capsys.readouterr().err == f"\n{said}", "not behind a progress bar, on the bar's line"


@pytest.fixture(params=LAYOUTS)
def hosts(request):
    return LAYOUTS[request.param]


def test_nobody_is_missed_and_nobody_looks_at_many(hosts):
    everybody = [Place(rank, host, rank, 0) for rank, host in enumerate(hosts)]
    several = len(set(hosts)) > 1
    looked_at = [place for rank in range(len(hosts)) for place in places.afar(everybody, rank)]
    assert {place.rank for place in looked_at} == (set(range(len(hosts))) if several else set())
    assert len(looked_at) <= 2 * len(hosts)
    for rank, host in enumerate(hosts):
        assert {place.rank for place in places.beside(everybody, rank)} == {
            other for other, name in enumerate(hosts) if name == host and other != rank
        }
        assert len({place.host for place in places.afar(everybody, rank)} | {host}) == 1 + several


def test_any_rank_that_dies_is_named(hosts, tmp_path, monkeypatch, capsys):
    for victim in range(len(hosts)):
        cluster = Cluster(tmp_path / str(victim), hosts, monkeypatch)
        assert cluster.turn() == {}
        cluster.die([victim])
        cluster.check_named([victim], capsys)


def test_hosts_that_die_at_once_are_named(hosts, tmp_path, monkeypatch, capsys):
    """Each host alone, neighbours in the ring together, all but one, and any others."""
    names = list(dict.fromkeys(hosts))
    chance = random.Random(1)
    fates = [[name] for name in names] + [[name, names[(index + 1) % len(names)]] for index, name in enumerate(names)]
    fates += [[name for name in names if name != kept] for kept in names]
    fates += [chance.sample(names, chance.randrange(1, max(2, len(names)))) for _ in range(10)]
    for index, fate in enumerate(fates):
        victims = [rank for rank, host in enumerate(hosts) if host in fate]
        if 0 < len(victims) < len(hosts):
            cluster = Cluster(tmp_path / str(index), hosts, monkeypatch)
            cluster.die(victims)
            cluster.check_named(victims, capsys)


def test_a_rank_that_is_done_is_no_fault(hosts, tmp_path, monkeypatch):
    cluster = Cluster(tmp_path, hosts, monkeypatch)
    for victim in (0, len(hosts) - 1):
        cluster.gone.add(victim)
        heartbeat.file_of(tmp_path / "ranks", victim).unlink()
        assert cluster.turn() == {}


def test_one_of_many_that_hangs_is_named_and_killed_by_its_host(hosts, tmp_path, monkeypatch, capsys):
    """It is stopped: the others wait, it neither moves nor beats. One rank alone reads what everybody said."""
    reads, killed = [], []
    original = heartbeat.read
    monkeypatch.setattr(heartbeat, "read", lambda folder, rank: (reads.append(rank), original(folder, rank))[1])
    monkeypatch.setattr(heartbeat.Pulse, "still", lambda pulse: 31.0)
    for victim in range(0, len(hosts), 3):
        cluster = Cluster(tmp_path / str(victim), hosts, monkeypatch, hang_timeout=30.0)
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid - 1000))
        cluster.silence(victim, 6.0)
        ended = {}
        for place in cluster.places:
            if place.rank != victim:
                with pytest.raises(Left):
                    cluster.watch(place.rank).look([])
                ended[place.rank] = True
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"slope: error: {cluster.places[victim]} in step 1, start, at ") and "hangs" in said
        assert len(said.splitlines()) == 1 and len(reads) == len(hosts)
        peers = [rank for rank in ended if hosts[rank] == hosts[victim]]
        assert killed == [victim] * len(peers)
        reads.clear()
        killed.clear()


def test_a_judge_that_says_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(heartbeat.Pulse, "still", lambda pulse: 31.0)
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch, hang_timeout=30.0)
    (tmp_path / "ranks" / "judge").touch()
    watch = cluster.watch(3)
    watch.look([])
    assert not (tmp_path / "ranks" / "failure.txt").exists()
    watch.judges_at -= faults.JUDGEMENT_SECONDS
    with pytest.raises(Left):
        watch.look([])
    assert "no rank makes progress for more than 30 seconds" in capsys.readouterr().err


def test_a_full_disk_does_not_keep_the_verdict_from_the_others(tmp_path, monkeypatch, capsys):
    """No file can be created: room for the verdict was made in the beginning."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch)

    def full(path, mode="r", *arguments, **keywords):
        if mode == "x":
            raise OSError(28, "No space left on device")
        return open(path, mode, *arguments, **keywords)

    monkeypatch.setattr(faults, "open", full, raising=False)
    cluster.die([5])
    with pytest.raises(Left):
        cluster.watch(6).look([])
    assert "rank 5 (process 1005 on node1) died; the run stops." in capsys.readouterr().err
    with pytest.raises(Left):
        cluster.watch(20).look([])
    assert capsys.readouterr().err == "", "it ends by what rank 6 found"


TOUCHED: list = []
COUNTING: list[Path] = []


def count_opens(event, arguments):
    if COUNTING and event == "open" and str(arguments[0]).startswith(str(COUNTING[0])):
        TOUCHED.append(arguments[0])


def test_512_ranks_touch_3_files_each(tmp_path, monkeypatch):
    """Opens and stats in RUN/ranks of a turn of 64 hosts x 8: everybody looking after everybody would be 262,144."""
    world = 512
    cluster = Cluster(tmp_path, [f"node{rank // 8}" for rank in range(world)], monkeypatch)
    watches = [cluster.watch(rank) for rank in range(world)]
    original = Path.stat

    def stat(path, **keywords):
        if path.parent == tmp_path / "ranks":
            TOUCHED.append(path)
        return original(path, **keywords)

    monkeypatch.setattr(Path, "stat", stat)
    sys.addaudithook(count_opens)
    COUNTING.append(tmp_path / "ranks")
    for watch in watches:
        watch.look([])
    COUNTING.clear()
    assert len(TOUCHED) == 3 * world
