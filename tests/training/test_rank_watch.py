"""Who looks after whom: any rank that dies or hangs, and any hosts at once, are named by those that are left.

Many ranks, all of them in this process: their files are real, their processes and hosts are not.
"""

import dataclasses
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from helpers.watched_ranks import LAYOUTS, Cluster, Left
from slope_megatron.training.watch import hangs, heartbeat, process, rank_watch
from slope_megatron.training.watch.process import RankProcess


@pytest.fixture(params=LAYOUTS)
def hosts(request):
    return LAYOUTS[request.param]


def test_nobody_is_missed_and_nobody_looks_at_many(hosts):
    everybody = [RankProcess(rank, host, rank, 0) for rank, host in enumerate(hosts)]
    several = len(set(hosts)) > 1
    looked_at = [peer for rank in range(len(hosts)) for peer in process.remote_peers(everybody, rank)]
    assert {peer.rank for peer in looked_at} == (set(range(len(hosts))) if several else set())
    assert len(looked_at) <= 2 * len(hosts)
    for rank, host in enumerate(hosts):
        assert {peer.rank for peer in process.local_peers(everybody, rank)} == {
            other for other, name in enumerate(hosts) if name == host and other != rank
        }
        assert len({peer.host for peer in process.remote_peers(everybody, rank)} | {host}) == 1 + several


def test_any_rank_that_dies_is_named(hosts, tmp_path, monkeypatch, capsys):
    for victim in range(len(hosts)):
        cluster = Cluster(tmp_path / str(victim), hosts, monkeypatch)
        assert cluster.look() == {}
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
        assert [cluster.look() for _ in range(5)] == [{}] * 5


def test_one_of_many_that_hangs_is_named_and_killed_by_its_host(hosts, tmp_path, monkeypatch, capsys):
    """It is stopped: the others wait, it neither moves nor beats. One rank alone hears everybody."""
    readers, killed = set(), []
    original = heartbeat.Listener.heartbeat
    record = lambda listener, rank: (readers.add(id(listener)), original(listener, rank))[1]  # noqa: E731
    monkeypatch.setattr(heartbeat.Listener, "heartbeat", record)
    for victim in range(0, len(hosts), 3):
        cluster = Cluster(tmp_path / str(victim), hosts, monkeypatch, hang_timeout=30.0)
        monkeypatch.setattr(os, "kill", lambda pid, number: killed.append(pid - 1000))
        for watch in cluster.watches:
            watch.reach(0, "start")
        cluster.stopped.add(victim)
        ended, seconds = {}, 0
        while len(ended) < len(hosts) - 1:
            ended |= cluster.look(2.0)
            seconds += 2
        assert 30 < seconds <= 36, "the round after --hang-timeout, and one more for who looked too early"
        said = capsys.readouterr().err.strip()
        assert said.startswith(f"slope: error: {cluster.processes[victim]} in step 1, start, at ") and "hangs" in said
        assert len(said.splitlines()) == 1 and len(readers) == 1
        peers = [rank for rank in ended if hosts[rank] == hosts[victim]]
        assert killed == [victim] * len(peers)
        readers.clear()
        killed.clear()


def test_a_leader_that_reports_nothing_is_replaced(tmp_path, monkeypatch, capsys):
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch, hang_timeout=30.0)
    (tmp_path / "ranks" / "leader").touch()
    cluster.watches[3].reach(0, "start")
    cluster.stopped.update(set(range(24)) - {3})
    monkeypatch.setattr(os, "kill", lambda pid, number: None)
    while cluster.now < 1000.0 + 30.0 + hangs.LEADER_SECONDS:
        assert cluster.look(1.0) == {}
    assert not (tmp_path / "ranks" / "failure.txt").exists()
    assert {**cluster.look(1.0), **cluster.look(1.0)} == {3: rank_watch.DEAD_PEER_EXIT_CODE}
    assert "hangs: no progress for more than 30 seconds" in capsys.readouterr().err


def test_who_goes_on_after_all_is_reported_by_nobody(tmp_path, monkeypatch):
    """Longer than it takes to become the leader, shorter than --hang-timeout; then every rank moves."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch, hang_timeout=30.0)
    for step in range(3):
        for watch in cluster.watches:
            watch.reach(step, "start")
        assert [cluster.look(2.0) for _ in range(14)] == [{}] * 14
        assert (tmp_path / "ranks" / "leader").exists()
    for watch in cluster.watches:
        watch.reach(3, "start")
    assert cluster.look(1.0) == {} and not (tmp_path / "ranks" / "leader").exists()


SKEWS = {
    "45 s ahead": lambda number: 46.0,
    "45 s behind": lambda number: -46.0,
    "an hour ahead": lambda number: 3600.0,
    "an hour behind": lambda number: -3600.0,
    "steps": lambda number: (0.0, 3600.0, -50.0, 90.0)[number // 30 % 4],
    "stands still": lambda number: -time.time() + 86400.0,
}


@pytest.mark.parametrize("skew", SKEWS.values(), ids=SKEWS)
def test_no_clock_but_ones_own_matters(skew, tmp_path, monkeypatch, capsys):
    """Of a file server whose time is another: nobody who lives is killed, and who dies is named after 45 seconds."""
    hosts = LAYOUTS["uneven"]
    healthy = Cluster(tmp_path / "healthy", hosts, monkeypatch, hang_timeout=60.0, skew=skew, most=2.0)
    for number in range(150):
        for watch in healthy.watches:
            watch.reach(number // 20, "start")
        assert healthy.look(2.0) == {}
    # Hosts "b" and "d", at once: each is found by a host that is left.
    victims = [rank for rank, host in enumerate(hosts) if host in "bd"]
    healthy.die(victims)
    for _ in range(int(rank_watch.SILENCE_SECONDS // 2)):
        assert healthy.look(2.0) == {}
    healthy.check_named(victims, capsys, seconds=2.0, rounds=4)


def test_a_job_that_was_suspended_goes_on(tmp_path, monkeypatch, capsys):
    """For hours nobody wrote and nobody looked: neither silence nor a step of hours is a fault."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch, hang_timeout=30.0, most=2.0)
    for step in range(4):
        for watch in cluster.watches:
            watch.reach(step, "start")
        assert cluster.look(2.0) == cluster.look(2.0) == {}
        assert cluster.look(7200.0) == {}
    cluster.die([7])
    cluster.check_named([7], capsys, seconds=2.0, rounds=2)


def test_a_disk_that_cannot_be_written_keeps_nobody_from_being_alive(tmp_path, monkeypatch):
    """Over quota, nothing can be written in place on some file systems: the file's time changes, whatever it is."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch)

    def full(path, mode="r", *arguments, **keywords):
        if "+" in mode:
            raise OSError(122, "Disk quota exceeded")
        return open(path, mode, *arguments, **keywords)

    monkeypatch.setattr(heartbeat, "open", full, raising=False)
    assert [cluster.look() for _ in range(6)] == [{}] * 6


def test_hosts_of_one_name_are_told_apart(tmp_path, monkeypatch):
    """Containers are often all called the same: another one's process number says nothing."""
    own = process.own(0)
    everybody = [own, dataclasses.replace(own, rank=1, pid=1, born=1, kernel="another boot")]
    assert process.local_peers(everybody, 0) == [] and process.remote_peers(everybody, 0) == [everybody[1]]
    assert process.kernel() and own.kernel == process.kernel()


def test_a_full_disk_does_not_keep_the_report_from_the_others(tmp_path, monkeypatch, capsys):
    """No file can be created: room for the report was made in the beginning."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch)

    def full(path, mode="r", *arguments, **keywords):
        if mode == "x":
            raise OSError(28, "No space left on device")
        return open(path, mode, *arguments, **keywords)

    monkeypatch.setattr(rank_watch, "open", full, raising=False)
    cluster.die([5])
    with pytest.raises(Left):
        cluster.watches[6].look([])
    assert "rank 5 (process 1005 on node1) died; the run stops." in capsys.readouterr().err
    with pytest.raises(Left):
        cluster.watches[20].look([])
    assert capsys.readouterr().err == "", "it ends by what rank 6 found"


def test_a_rank_that_can_read_no_file_of_the_others_reports_itself(tmp_path, monkeypatch, capsys):
    """RUN/ranks is gone, or its disk: whoever hangs does not hang for ever."""
    cluster = Cluster(tmp_path, LAYOUTS["blocks"], monkeypatch, hang_timeout=30.0)
    watch = cluster.watches[3]
    watch.reach(4, "gradients")
    shutil.rmtree(tmp_path / "ranks")
    ended = None
    for _ in range(30):
        cluster.now += 5.0
        try:
            watch.look([])
        except Left as left:
            ended = left.args[0]
            break
    assert ended == rank_watch.DEAD_PEER_EXIT_CODE
    said = capsys.readouterr().err
    assert "slope: error: rank 3 (process 1003 on node0) in step 5, gradients, at " in said
    assert "hangs: no progress for more than 30 seconds (--hang-timeout) (no other rank can be heard); the run" in said


def test_a_look_that_fails_is_said_once_and_signals_are_still_heeded(tmp_path, monkeypatch, capsys):
    watch = rank_watch.RankWatch(tmp_path, [process.own(0)], 0, lambda: "All is saved.")
    monkeypatch.setattr(rank_watch, "POLL_SECONDS", 0.01)
    looks = []

    def fail():
        looks.append(len(looks))
        raise RuntimeError("nobody has thought of this")

    watch.dead = fail
    watch.start()
    try:
        until = time.monotonic() + 300
        while len(looks) < 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert len(looks) >= 3
        os.kill(os.getpid(), signal.SIGUSR1)
        assert watch.stop_requested.wait(300)
    finally:
        watch.stop()
    said = capsys.readouterr().err
    assert said.count("rank 0: looking after the ranks failed, and is tried again") == 1
    assert "RuntimeError: nobody has thought of this" in said and "rank 0 got SIGUSR1: saving after this step" in said


def test_another_users_process_whose_start_is_hidden_is_there(monkeypatch):
    def hidden(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "read_text", hidden)
    assert process.born(1) == -1
    monkeypatch.undo()
    assert process.born(2**22 + 1) is None and process.born(os.getpid()) > 0


TOUCHED: list = []
COUNTING: list[Path] = []


def count_opens(event, arguments):
    if COUNTING and event == "open" and str(arguments[0]).startswith(str(COUNTING[0])):
        TOUCHED.append(arguments[0])


def test_512_ranks_touch_3_files_each(tmp_path, monkeypatch):
    """Opens and stats in RUN/ranks when each of 64 hosts x 8: everybody looking after everybody would be 262,144."""
    world = 512
    cluster = Cluster(tmp_path, [f"node{rank // 8}" for rank in range(world)], monkeypatch)
    original = Path.stat

    def stat(path, **keywords):
        if path.parent == tmp_path / "ranks":
            TOUCHED.append(path)
        return original(path, **keywords)

    monkeypatch.setattr(Path, "stat", stat)
    sys.addaudithook(count_opens)
    COUNTING.append(tmp_path / "ranks")
    for watch in cluster.watches:
        watch.look([])
    COUNTING.clear()
    assert len(TOUCHED) == 3 * world
