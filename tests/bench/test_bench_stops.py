"""A benchmark that is stopped has written what it measured, and one whose budget is spent says what it leaves out.

Measuring itself needs a GPU; here each benchmark's own measuring function is replaced by one that stops the third time.
"""

import argparse
import csv

import pytest
import torch

from slope_megatron.cli import bench

MODELS = ["opt-2.6b", "opt-13b", "opt-66b"]
PAIR = {"model": "m", "peer": "paper", "pass": "train", "ratio": 1.0}
BLOCK = {"train": {"dense": [2.0, 2.0, 2.0], "paper": [1.0, 1.0, 1.0]}}
GEMM = {"chosen_ratio": 1.0, "dense_ms": 1.0, "cusparselt_ratio": 1.0, "tiles": 1, "cutlass_ratio": 1.0}
# Each benchmark: the function that measures, what it returns, and flags; each call makes as many rows as are counted.
CASES = {
    "block": ("timed", BLOCK, ()),
    "gemm": ("measured", GEMM, ()),
    "peers": ("peer_rows", [{**PAIR, "refused": ""}], ("--peers", "paper")),
    "refresh": ("timed", [PAIR], ()),
}


class Stop(BaseException):
    """What a signal does."""


@pytest.fixture
def loaded(monkeypatch):
    """A benchmark's module by name, on a machine that passes for one with a GPU."""

    def load(name: str):
        module = bench.load(name)
        from slope_megatron.bench import block, common, progress
        from slope_megatron.ops.operands import float8

        monkeypatch.setattr(common, "require_gpu", lambda: None)
        monkeypatch.setattr(float8, "unsupported", lambda: None)
        monkeypatch.setattr(progress.Clock, "show_log", lambda self: None)
        monkeypatch.setattr(block, "Stack", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
        monkeypatch.setattr(torch, "randn", lambda *_, **__: torch.ones(1, 1))
        for unneeded in ("copy_bandwidth", "sparse_peak"):
            monkeypatch.setattr(module, unneeded, lambda: 1e12, raising=False)
        monkeypatch.setattr(module, "cases", lambda *_: [], raising=False)
        return module

    return load


def run(module, folder, *words):
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.main(parser.parse_args([*words, "--out", str(folder)]))


def measuring(values, on_call, stop):
    """A function that returns `values`; its call number `on_call` does `stop`."""
    calls = []

    def measure(*_, **__):
        calls.append(None)
        if len(calls) == on_call:
            stop()
        return values

    return measure


def rows_in(path):
    with path.open() as file:
        file.readline()
        return list(csv.DictReader(file))


def stop():
    raise Stop


@pytest.mark.parametrize("name", CASES)
def test_what_was_measured_is_there_after_a_stop(name, loaded, monkeypatch, tmp_path):
    module = loaded(name)
    function, values, flags = CASES[name]
    monkeypatch.setattr(module, function, measuring(values, 3, stop))
    models = () if name == "refresh" else ("--models", *MODELS)
    with pytest.raises(Stop):
        run(module, tmp_path, *models, *flags)
    assert len(rows_in(tmp_path / f"{name}.csv")) == 2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("name", [name for name in CASES if name != "refresh"])
def test_models_after_the_budget_are_named(name, loaded, monkeypatch, tmp_path, capsys):
    module = loaded(name)
    from slope_megatron.bench import progress

    function, values, flags = CASES[name]
    monkeypatch.setattr(module, function, measuring(values, 1, lambda: monkeypatch.setattr(progress, "time", Later)))
    for unneeded in ("print_table", "bar_chart"):
        monkeypatch.setattr(module, unneeded, lambda *_, **__: None, raising=False)
    assert run(module, tmp_path, "--models", *MODELS, *flags, "--seconds", "100") == 0
    assert "the 100 s of --seconds are over: not measured: opt-13b, opt-66b" in capsys.readouterr().err
    assert rows_in(tmp_path / f"{name}.csv")


def test_an_earlier_benchmark_keeps_its_rows(tmp_path, caplog):
    """Run again with fewer models, or stopped after its first row, a benchmark replaces nothing."""
    bench.load("gemm")
    from slope_megatron.bench import common

    for number, rows in enumerate(([{"ms": 1}, {"ms": 2}], [{"ms": 3}], [{"ms": 4}])):
        common._written.clear()  # what a process of its own begins with
        for count in range(len(rows)):
            common.write_csv("gemm", rows[: count + 1], tmp_path)
        assert len(list((tmp_path / "earlier").glob("*"))) == number if number else not caplog.records
    assert [row["ms"] for row in rows_in(tmp_path / "gemm.csv")] == ["4"]
    assert [row["ms"] for row in rows_in(tmp_path / "earlier" / "gemm-1.csv")] == ["1", "2"]
    assert [row["ms"] for row in rows_in(tmp_path / "earlier" / "gemm-2.csv")] == ["3"]
    assert "these rows are of an earlier benchmark; it is kept as" in caplog.text


class Later:
    """A clock that is far ahead."""

    @staticmethod
    def monotonic():
        return 1e12
