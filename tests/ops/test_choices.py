"""The table of choices: saved, loaded, agreed on, and ignored where it was not made."""

import dataclasses
import json

import pytest
import torch

from slope_kernels import cutlass
from slope_kernels.cusparselt import Algorithm
from slope_megatron.ops.autotune import measure_cusparselt, resolve
from slope_megatron.ops.choices import AdapterChoice, Choice, Key, Product, Strategy

KEY = Key(Product.FORWARD, 128, 192, 48, torch.bfloat16)
CHOICE = Choice(True, 2, Algorithm(7, 2, 5), 0.5, 0.75)


@pytest.mark.parametrize(
    "key", [KEY, dataclasses.replace(KEY, rank=40), dataclasses.replace(KEY, augmented=True)], ids=str
)
def test_a_key_reads_back_what_it_writes(key):
    assert Key.parse(str(key)) == key


def test_a_table_of_version_0_1_is_read(fresh_choices, tmp_path):
    """Its words for strategies were others."""
    plain = {"sparse": True, "tiles": 2, "sparse_ms": 0.5, "dense_ms": 0.75}
    augmented = {"tiles": 1, "algorithm": None}
    saved = {
        "forward 128x192 T48 bfloat16": plain | {"algorithm": {"config": 7, "split_k": 2, "split_k_mode": 5}},
        "dgrad 192x128 T48 bfloat16": plain | {"tiles": 1, "algorithm": dataclasses.asdict(cutlass.DEFAULT)},
        "forward+40 128x192 T48 bfloat16": {"order": "wide", "times": {"last": 0.5, "wide": 0.25}},
        "wide 128x320 T48 bfloat16": plain | augmented,
        # What is no more is left out, and measured anew.
        "tall 192x320 T48 bfloat16": plain | augmented,
        "row-augmented 192x384 T48 bfloat16": plain | augmented,
        "dgrad+40 192x128 T48 bfloat16": {"order": "tall", "times": {"last": 0.5, "tall": 0.25}},
        "dgrad+8 192x128 T48 bfloat16": {"strategy": "kernels", "times": {"last": 0.5, "kernels": 0.25}},
    }
    path = tmp_path / "choices.json"
    path.write_text(json.dumps({"machine": fresh_choices.machine(), "choices": saved}))
    assert fresh_choices.load(path)
    assert fresh_choices.find(KEY) == CHOICE
    dgrad = dataclasses.replace(KEY, product=Product.DGRAD, rows=192, columns=128)
    assert fresh_choices.find(dgrad).algorithm == cutlass.DEFAULT and fresh_choices.find(dgrad).library == "cutlass"
    assert fresh_choices.find(dataclasses.replace(KEY, rank=40)).strategy is Strategy.AUGMENTED
    augmented_key = Key(Product.FORWARD, 128, 320, 48, torch.bfloat16, augmented=True)
    assert fresh_choices.find(augmented_key).sparse
    assert str(augmented_key) == "column-augmented 128x320 T48 bfloat16"
    fresh_choices.save(path)
    assert len(json.loads(path.read_text())["choices"]) == 4


def test_saved_choices_come_back(fresh_choices, tmp_path):
    fresh_choices.record(KEY, CHOICE)
    dense = Key(Product.DGRAD, 192, 128, 48, torch.float16)
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


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda text: text.replace("0.75", "0.25"), "it has another checksum"),
        (lambda text: text[:-20], "measured anew"),
        (lambda text: "[1]", "measured anew"),
    ],
)
def test_damaged_choices_are_made_anew(fresh_choices, tmp_path, caplog, spoil, said):
    fresh_choices.record(KEY, CHOICE)
    path = tmp_path / "choices.json"
    fresh_choices.save(path)
    path.write_text(spoil(path.read_text()))
    fresh_choices.clear()
    assert not fresh_choices.load(path)
    assert f"{path} cannot be read" in caplog.text and said in caplog.text and "measured anew" in caplog.text
    assert fresh_choices.find(KEY) is None


def test_choices_of_before_carry_no_sum(fresh_choices, tmp_path):
    fresh_choices.record(KEY, CHOICE)
    path = tmp_path / "choices.json"
    fresh_choices.save(path)
    saved = json.loads(path.read_text())
    del saved["xxh3_128"]
    path.write_text(json.dumps(saved))
    fresh_choices.clear()
    assert fresh_choices.load(path) and fresh_choices.find(KEY) == CHOICE


def test_one_rank_decides(fresh_choices):
    sent = []

    def broadcast(choice):
        sent.append(choice)
        return {"sparse": True, "tiles": 2, "algorithm": {"config": 7, "split_k": 2, "split_k_mode": 5}}

    fresh_choices.agree_over(broadcast, decides=False)
    choice = fresh_choices.decide(KEY, lambda: pytest.fail("only the deciding rank measures"))
    assert (choice.tiles, choice.algorithm, sent) == (2, Algorithm(7, 2, 5), [None])
    again = resolve.resolve(KEY, torch.device("cuda"), lambda: pytest.fail("already decided"), on_cpu=Choice(False))
    assert again is choice


def test_one_rank_decides_on_strategies_too(fresh_choices):
    sent = []

    def broadcast(choice):
        sent.append(choice)
        return choice or {"strategy": "first", "times": {"first": 0.5}}

    key = dataclasses.replace(KEY, rank=8)
    fresh_choices.agree_over(broadcast, decides=False)
    choice = fresh_choices.decide(key, lambda: pytest.fail("only the deciding rank measures"))
    assert choice == AdapterChoice(Strategy.FIRST, {"first": 0.5}) and sent == [None]
    assert fresh_choices.find(KEY) is None, "it is no choice of the product alone"
    fresh_choices.clear()
    assert not fresh_choices.table()
    fresh_choices.agree_over(broadcast, decides=True)
    last = AdapterChoice(Strategy.LAST)
    assert fresh_choices.decide(key, lambda: last) == last == fresh_choices.find(key)
    assert fresh_choices.table()


def test_each_choice_is_logged_once(fresh_choices, caplog):
    with caplog.at_level("INFO"):
        for _ in range(2):
            resolve.resolve(KEY, torch.device("cpu"), lambda: pytest.fail("a CPU measures nothing"), on_cpu=CHOICE)
    assert caplog.messages == ["forward 128x192 T48 bfloat16: 2:4, 2 tiles, algorithm 7 (2:4 0.500 ms, dense 0.750 ms)"]


def test_a_shape_keeps_its_tiles_for_other_numbers_of_tokens(fresh_choices):
    """A weight has one operand: were tiles chosen for each number of tokens, it would be cut anew at every change."""
    other = dataclasses.replace(KEY, tokens=96)
    assert fresh_choices.earlier(other) is None
    fresh_choices.record(KEY, CHOICE)
    assert measure_cusparselt.tilings(other, torch.device("cpu")) == [CHOICE.tiles]
    assert fresh_choices.earlier(dataclasses.replace(other, product=Product.DGRAD)) is None


def test_nothing_is_measured_while_a_graph_is_captured(monkeypatch):
    resolve.refuse_while_capturing(KEY, torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    resolve.refuse_while_capturing(KEY, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=f"{KEY} has not run yet .*: run it once before capturing"):
        resolve.refuse_while_capturing(KEY, torch.device("cuda"))


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b'{"machine": {}, "choi', b"[]", b'{"machine": {}, "choices": {"x": {}}}']
)
def test_a_damaged_table_is_measured_anew(fresh_choices, tmp_path, caplog, content):
    (tmp_path / "choices.json").write_bytes(content)
    assert not fresh_choices.load(tmp_path / "choices.json") and not fresh_choices.table()
    [said] = [record.getMessage() for record in caplog.records]
    assert said.startswith(f"{tmp_path}/choices.json cannot be read (") and said.endswith("products are measured anew")
