"""Ranks meet: whoever does not come is named, and so are two that have taken one GPU."""

import logging
import threading

import pytest
import torch.distributed as dist

from slope_megatron.training.watch import meeting


def meet(gpus: dict[int, str], world: int, seconds: float = 30.0) -> dict[int, str]:
    """What the ranks in `gpus` hear, each in a thread; empty: all is well."""
    store, heard = dist.HashStore(), {}

    def play(rank):
        try:
            meeting.gather(store, rank, world, gpus[rank], "ng1:20017", seconds)
            heard[rank] = ""
        except ValueError as error:
            heard[rank] = str(error)

    threads = [threading.Thread(target=play, args=(rank,)) for rank in gpus]
    for thread in threads:
        thread.start()
    for thread in threads:
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
    import datetime

    for name, value in {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "203.0.113.1", "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    with pytest.raises(ValueError, match=rf"rank {rank} .* 203\.0\.113\.1:1 \("):
        meeting.meet(datetime.timedelta(seconds=1))
