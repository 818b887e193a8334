"""The moving line goes on whatever happens to the machine's clock, and to whoever read it."""

import contextlib
import os
import sys

from slope_megatron.training.telemetry.progress_bar import Progress


def test_a_clock_that_is_set_back_stops_no_line(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    wall = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: wall[0])
    progress = Progress("run", 10, 0, visible=True)
    progress.bar.mininterval = 0.0
    wall[0] -= 3600.0
    progress.step(3.0, 100.0)
    assert progress.bar.last_print_n == 1 and progress.bar.format_dict["elapsed"] >= 0.0
    progress.close()
    assert "1/10" in capsys.readouterr().err


def test_nobody_reads_it_any_more(monkeypatch):
    """The launcher that read standard error through a pipe was killed: the run is to be saved all the same."""
    reader, writer = os.pipe()
    stream = open(writer, "w", buffering=1)  # noqa: SIM115 - closing it fails
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    progress = Progress("run", 10, 0, visible=True)
    progress.bar.mininterval = 0.0
    os.close(reader)
    progress.step(3.0, 100.0)
    progress.close()
    with contextlib.suppress(BrokenPipeError):
        stream.close()
