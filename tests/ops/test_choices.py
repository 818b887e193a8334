"""The table of choices: saved, loaded, agreed on, and ignored where it was not made."""

import dataclasses
import json

import pytest
import torch

from slope_kernels.cusparselt import Algorithm
from slope_megatron.ops import choices
from slope_megatron.ops.choices import Choice, Key, Order

KEY = Key("forward", 128, 192, 48, torch.bfloat16)
CHOICE = Choice(True, 2, Algorithm(7, 2, 5), 0.5, 0.75)


def test_a_key_reads_back_what_it_writes():
    assert Key.parse(str(KEY)) == KEY


def test_saved_choices_come_back(fresh_choices, tmp_path):
    fresh_choices.record(KEY, CHOICE)
    dense = Key("dgrad", 192, 128, 48, torch.float16)
    fresh_choices.record(dense, Choice(False, dense_ms=0.1))
    fresh_choices.save(tmp_path / "choices.json")
    fresh_choices.clear()
    assert fresh_choices.load(tmp_path / "choices.json")
    assert fresh_choices.find(KEY) == CHOICE
    assert fresh_choices.find(dense) == Choice(False, dense_ms=0.1)


def test_another_machine_s_choices_are_ignored(fresh_choices, tmp_path, caplog):
    fresh_choices.record(KEY, CHOICE)
    path = tmp_path / "choices.json"
    fresh_choices.save(path)
    saved = json.loads(path.read_text())
    saved["machine"]["torch"] = "0.1"
    path.write_text(json.dumps(saved))
    fresh_choices.clear()
    with caplog.at_level("INFO"):
        assert not fresh_choices.load(path)
    assert "another torch" in caplog.text
    assert fresh_choices.find(KEY) is None


def test_one_rank_decides(fresh_choices):
    sent = []

    def broadcast(choice):
        sent.append(choice)
        return {"sparse": True, "tiles": 2, "algorithm": {"config": 7, "split_k": 2, "split_k_mode": 5}}

    fresh_choices.agree_over(broadcast, decides=False)
    choice = fresh_choices.decide(KEY, lambda: pytest.fail("only the deciding rank measures"))
    assert (choice.tiles, choice.algorithm, sent) == (2, Algorithm(7, 2, 5), [None])
    assert fresh_choices.decide(KEY, lambda: pytest.fail("already decided")) is choice


def test_one_rank_decides_on_orders_too(fresh_choices):
    sent = []

    def broadcast(order):
        sent.append(order)
        return order or {"order": "first", "times": {"first": 0.5}}

    key = dataclasses.replace(KEY, kind="forward+8")
    fresh_choices.agree_over(broadcast, decides=False)
    order = fresh_choices.decide_order(key, lambda: pytest.fail("only the deciding rank measures"))
    assert order == Order("first", {"first": 0.5}) and sent == [None]
    assert fresh_choices.find(key) is None, "it is no choice of a product"
    fresh_choices.clear()
    assert fresh_choices.is_empty()
    fresh_choices.agree_over(broadcast, decides=True)
    assert fresh_choices.decide_order(key, lambda: Order("last")) == Order("last") == fresh_choices.find_order(key)
    assert not fresh_choices.is_empty()


def test_each_choice_is_logged_once(fresh_choices, caplog):
    with caplog.at_level("INFO"):
        for _ in range(2):
            fresh_choices.decide(KEY, lambda: CHOICE)
    assert caplog.messages == ["forward 128x192 T48 bfloat16: 2:4, 2 tiles, algorithm 7 (2:4 0.500 ms, dense 0.750 ms)"]


def test_a_shape_keeps_its_tiles_for_other_numbers_of_tokens(fresh_choices):
    """A weight has one operand: were tiles chosen for each number of tokens, it would be cut anew at every change."""
    other = dataclasses.replace(KEY, tokens=96)
    assert fresh_choices.fixed_tiles(other) is None
    fresh_choices.record(KEY, CHOICE)
    assert fresh_choices.fixed_tiles(other) == CHOICE.tiles
    assert fresh_choices.fixed_tiles(dataclasses.replace(other, kind="dgrad")) is None


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    choices.refuse_while_capturing(KEY, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    choices.refuse_while_capturing(KEY, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"{KEY} has not run yet .*: run it once before capturing"):
        choices.refuse_while_capturing(KEY, torch.device("cuda"))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b'{"machine": {}, "choi', b"[]", b'{"machine": {}, "choices": {"x": {}}}']
)
def test_a_damaged_table_is_measured_anew(fresh_choices, tmp_path, caplog, content):
    (tmp_path / "choices.json").write_bytes(content)
    assert not choices.load(tmp_path / "choices.json") and choices.is_empty()
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}/choices.json cannot be read (") and said.endswith("products are measured anew")
