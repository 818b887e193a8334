"""Where metrics go, and that no writer stops a run."""

import dataclasses
import errno
import json
import math
import sys
import types

import pytest

from helpers.models import small_config
from slope_megatron.config import WatchConfig
from slope_megatron.storage.metrics_file import read_metrics


def configured(**watch):
    return dataclasses.replace(small_config(), watch=WatchConfig(**watch))


def test_lines_of_steps_to_be_done_again_are_dropped(tmp_path):
    from slope_megatron.training.telemetry.writers import open_writers

    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 3.0}\n{"step": 2, "loss": 2.5}\n{"step": 3, "lo')
    [writer] = open_writers(configured(), tmp_path, 1)
    writer.write({"step": 2, "loss": math.nan, "layers": {"fc1": {"drift": math.inf}}, "bad": True})
    lines = path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    # Neither NaN nor infinity is JSON.
    assert json.loads(lines[1], parse_constant=pytest.fail) == {
        "step": 2,
        "loss": None,
        "layers": {"fc1": {"drift": None}},
        "bad": True,
    }
    assert read_metrics(path)[0][0] == {"step": 1, "loss": 3.0}


def test_a_full_disk_costs_lines_and_is_said_once(tmp_path, monkeypatch, caplog):
    from slope_megatron.training.telemetry import writers

    [writer] = writers.open_writers(configured(), tmp_path, 0)
    writer.write({"step": 1})
    original = writers.json.dumps

    def half_a_line(values):
        with open(tmp_path / "metrics.jsonl", "a") as stream:
            stream.write('{"st')
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writers.json, "dumps", half_a_line)
    writer.write({"step": 2})
    writer.write({"step": 3})
    monkeypatch.setattr(writers.json, "dumps", original)
    writer.write({"step": 4})
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")[0]] == [1, 4]
    said = [record.message for record in caplog.records]
    assert said == ["metrics: JsonLines failed (No space left on device); the run goes on"]


def test_tensorboard_holds_the_same_numbers(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    from slope_megatron.training.telemetry.writers import open_writers

    _, writer = open_writers(configured(tensorboard=True), tmp_path, 0)
    writer.write({"step": 3, "loss": 2.5, "adapters": True, "layers": {"fc1": {"drift": 0.25}}, "note": None})
    writer.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["adapters", "layers/fc1/drift", "loss"]
    [event] = events.Scalars("layers/fc1/drift")
    assert (event.step, event.value) == (3, 0.25)


def test_weights_and_biases_is_offline_unless_told(tmp_path, monkeypatch):
    """What our side says to the package; the package itself is played."""
    from slope_megatron.training.telemetry.writers import open_writers

    calls = []
    run = types.SimpleNamespace(log=lambda *a, **k: calls.append((a, k)), finish=lambda: calls.append("finish"))
    fake = types.SimpleNamespace(init=lambda **settings: (calls.append(settings), run)[1])
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    _, writer = open_writers(configured(wandb="project"), tmp_path, 0)
    writer.write({"step": 3, "loss": 2.5})
    writer.close()
    begun, logged, ended = calls
    assert (begun["project"], begun["mode"], begun["dir"]) == ("project", "offline", str(tmp_path))
    assert begun["config"]["model"]["hidden_size"] == 64
    assert logged == (({"loss": 2.5},), {"step": 3})
    assert ended == "finish"


@pytest.mark.parametrize(("watch", "package"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_a_missing_package_is_one_sentence(monkeypatch, watch, package):
    from slope_megatron.training.telemetry import writers

    monkeypatch.setattr(writers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=rf"--{package} needs the package {package}: pip install {package}, or leave"):
        writers.check_installed(configured(**watch))
    writers.check_installed(configured())


def test_a_writer_that_cannot_be_opened_is_left_out(tmp_path, monkeypatch, caplog):
    from slope_megatron.training.telemetry import writers

    def broken(*_):
        raise RuntimeError("no route")

    monkeypatch.setattr(writers, "WeightsAndBiases", broken)
    assert len(writers.open_writers(configured(wandb="project"), tmp_path, 0)) == 1
    assert "one writer could not be opened (no route); the run goes on" in caplog.text


DAMAGE = {
    "bad bytes": (b'{"step": 2, "loss": \xff\xfe}', 1),
    "half a line": (b'{"step": 2, "lo', 1),
    "a NUL block before the next line": (bytes(512) + b'{"step": 2, "loss": 2.5}', 0),
    "a NUL block": (bytes(512), 1),
    "no object": (b"[2, 2.5]", 1),
    "no step": (b'{"loss": 2.5}', 1),
    "empty": (b"", 1),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_unreadable_line_costs_itself_alone(tmp_path, caplog, damage):
    """A resumed run keeps the others and goes on writing; the damaged one is kept beside them."""
    from slope_megatron.training.telemetry.writers import open_writers

    line, lost = DAMAGE[damage]
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 3.0}\n' + line + b'\n{"step": 3, "loss": 2.0}\n{"step": 4, "loss": 1.9}\n')
    [writer] = open_writers(configured(), tmp_path, 3)
    writer.write({"step": 4, "loss": 1.5})
    records, damaged = read_metrics(path)
    assert [record["step"] for record in records] == ([1, 3, 4] if lost else [1, 2, 3, 4]) and not damaged
    assert records[-1]["loss"] == 1.5
    said = f"{path}: 1 damaged lines are kept in metrics.jsonl.damaged, the others stay"
    assert [record.getMessage() for record in caplog.records] == [said] * lost
    assert not lost or (tmp_path / "metrics.jsonl.damaged").read_bytes() == line + b"\n"


def test_metrics_that_cannot_be_read_at_all_are_set_aside(tmp_path, caplog):
    from slope_megatron.training.telemetry.writers import open_writers

    (tmp_path / "metrics.jsonl").mkdir()
    [writer] = open_writers(configured(), tmp_path, 3)
    writer.write({"step": 4})
    assert read_metrics(tmp_path / "metrics.jsonl")[0] == [{"step": 4}]
    assert (tmp_path / "earlier" / "metrics-1.jsonl").is_dir() and "Is a directory" in caplog.text
