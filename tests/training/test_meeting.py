"""Ranks meet: whoever does not come is named, and so are two that have taken one GPU."""

import datetime
import logging
import os
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist

from helpers.servers import fork_server
from slope_megatron.launch.ports import free_port
from slope_megatron.training.watch import meeting


def meet(gpus: dict[int, str], world: int, seconds: float = 300.0) -> dict[int, str]:
    """What the ranks in `gpus` hear, each in a thread; empty: all is well. Rank 0, which waits, comes last."""
    store, heard = dist.HashStore(), {}

    def play(rank):
        try:
            meeting.gather(store, rank, world, gpus[rank], "ng1:20017", seconds)
            heard[rank] = ""
        except ValueError as error:
            heard[rank] = str(error)

    threads = {rank: threading.Thread(target=play, args=(rank,)) for rank in gpus}
    others, first = [thread for rank, thread in threads.items() if rank], threads[0]
    for thread in others:
        thread.start()
    while store.add("come", 0) < len(others):
        time.sleep(0.01)
    first.start()
    for thread in threads.values():
        thread.join()
    return heard


def test_all_come():
    assert meet({0: "a", 1: "b", 2: ""}, 3) == {0: "", 1: "", 2: ""}


def test_who_is_missing_is_named_while_the_others_wait_and_at_the_end(monkeypatch, caplog):
    monkeypatch.setattr(meeting, "QUIET_SECONDS", 0.2)
    with caplog.at_level(logging.WARNING):
        heard = meet({0: "", 2: ""}, 5, seconds=1.0)
    named = "of 5 ranks that are to meet at ng1:20017, 3 have not come (rank 1, 3, 4)"
    assert f"waiting: {named}" in caplog.text
    assert heard[0] == heard[2] and heard[0].startswith(f"{named} after 1 s: start all of them")


def test_many_that_are_missing_are_not_all_named():
    [said] = meet({0: ""}, 100, seconds=0.3).values()
    assert "99 have not come (rank 1, 2, 3" in said and said.count(",") < 25


def test_one_gpu_for_two_ranks_is_refused_on_all():
    heard = meet({0: "h1 u0", 1: "h1 u1", 2: "h1 u0", 3: ""}, 4)
    assert len(set(heard.values())) == 1
    assert heard[3].startswith("ranks 0 and 2 on ") and "have the same GPU: start one rank for each GPU" in heard[3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_place_where_nobody_answers_is_said(rank, monkeypatch):
    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "203.0.113.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ValueError, match=rf"rank {rank} .* 203\.0\.113\.1:1 \("):
        meeting.meet(datetime.timedelta(seconds=1))


def come(rank: int, world: int, port: int, seconds: float, folder, together) -> None:
    """One rank of a program that is started: it meets the others, sums with them, and says how that went."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
    meeting.QUIET_SECONDS = seconds / 2
    logging.basicConfig(filename=folder / f"{rank}.log", level=logging.WARNING, force=True)
    together.wait()
    try:
        store = meeting.meet(datetime.timedelta(seconds=seconds))
        dist.init_process_group("gloo")
        del store
        total = torch.ones(1)
        dist.all_reduce(total)
        said = f"sum {total.item():g}"
        dist.barrier()
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.said").write_text(said)
    sys.stdout.flush()
    os._exit(0)


def processes_meet(ranks, world, seconds, folder) -> tuple[set[str], str]:
    """What ranks in processes of their own said at the end, and rank 0 meanwhile."""
    port, context = free_port(), fork_server()
    common = (world, port, seconds, folder, context.Barrier(len(ranks)))
    started = [context.Process(target=come, args=(rank, *common)) for rank in ranks]
    for process in started:
        process.start()
    for process in started:
        process.join(300)
        assert process.exitcode == 0
    return {(folder / f"{rank}.said").read_text() for rank in ranks}, (folder / "0.log").read_text()


def test_over_a_real_store_who_is_missing_is_named_on_every_rank(tmp_path):
    said, meanwhile = processes_meet([0, 1], 3, 4.0, tmp_path)
    named = "of 3 ranks that are to meet at 127.0.0.1:"
    assert f"waiting: {named}" in meanwhile and "1 have not come (rank 2)" in meanwhile
    [one] = said
    assert one.startswith(f"NotMet: {named}") and "1 have not come (rank 2) after 4 s: start all of them" in one


def test_over_a_real_store_all_meet_and_go_on(tmp_path):
    said, _ = processes_meet([0, 1, 2], 3, 300.0, tmp_path)
    assert said == {"sum 3"}


@pytest.mark.parametrize("rank", ["0", "1"])
def test_every_rank_says_that_it_has_not_met_the_others(rank, monkeypatch, capsys):
    from slope_megatron.cli import pretrain as program
    from slope_megatron.training import pretrain

    def refuse(*_):
        raise meeting.NotMet("rank 2 has not come")

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(pretrain, "pretrain", refuse)
    assert program.train(None, {}) == 2
    assert capsys.readouterr().err == "slope: error: rank 2 has not come\n"
