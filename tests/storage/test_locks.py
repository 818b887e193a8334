"""A lock that another process holds is told from a file system that has none."""

import errno
import fcntl
import logging
import os

import pytest

from slope_megatron.storage import locks

WITHOUT = sorted(locks.NO_LOCKS)


def refuse_locks(monkeypatch, number):
    def flock(stream, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.mark.parametrize("number", WITHOUT, ids=[errno.errorcode[number] for number in WITHOUT])
def test_a_file_system_without_locks_is_said_in_one_line(tmp_path, monkeypatch, caplog, number):
    refuse_locks(monkeypatch, number)
    with open(tmp_path / "lock", "w") as stream:
        assert locks.take(stream, "start only one")
    said = f"{tmp_path}/lock: this file system has no locks ({os.strerror(number)}): start only one"
    assert [record.getMessage() for record in caplog.records] == [said]


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EACCES])
def test_what_another_process_holds_is_refused(tmp_path, monkeypatch, caplog, number):
    refuse_locks(monkeypatch, number)
    with open(tmp_path / "lock", "w") as stream:
        assert not locks.take(stream, "")
    assert not caplog.records


def test_a_lock_is_given_back_with_its_file(tmp_path):
    with open(tmp_path / "lock", "w") as first, open(tmp_path / "lock", "w") as second:
        assert locks.take(first, "") and not locks.take(second, "")
        first.close()
        assert locks.take(second, "")


def test_what_else_goes_wrong_names_the_file(tmp_path, monkeypatch):
    refuse_locks(monkeypatch, errno.EIO)
    said = rf"Input/output error: '{tmp_path}/lock'"
    with open(tmp_path / "lock", "w") as stream, pytest.raises(OSError, match=said):
        locks.take(stream, "")


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_run_and_a_prepare_begin_without_locks(tmp_path, monkeypatch, caplog, number):
    """Neither takes the missing lock for another process."""
    from slope_megatron.data.scratch import workspace_beside
    from slope_megatron.training.checkpoint.run_folder import RunLock

    refuse_locks(monkeypatch, number)
    with caplog.at_level(logging.WARNING):
        RunLock(tmp_path)
        with workspace_beside(tmp_path / "data", {}):
            pass
    first, second = (record.getMessage() for record in caplog.records)
    assert f"nothing keeps a second process from writing {tmp_path} too, which would spoil it" in first
    assert f"nothing keeps a second prepare from writing {tmp_path}/data too" in second


def test_whose_lock_it_is_may_be_unreadable(tmp_path):
    from slope_megatron.training.checkpoint.run_folder import RunLock

    held = RunLock(tmp_path)
    (tmp_path / "lock").write_bytes(b"\xff\xfe\0")
    with pytest.raises(ValueError, match=r"is being written by .*: wait for it to end"):
        RunLock(tmp_path)
    held.stream.close()
