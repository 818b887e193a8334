"""Hints of earlier runs: kept for each machine, and never taken for choices."""

import dataclasses
from unittest import mock

import pytest
import torch

from slope_kernels.cusparselt import Algorithm
from slope_megatron.ops import hints, libraries
from slope_megatron.ops.autotune import measure
from slope_megatron.ops.choices import Choice, Key, Product

KEY = Key(Product.FORWARD, 128, 192, 48, torch.bfloat16)
CHOICE = Choice(True, 2, Algorithm(7), 0.5, 0.75)
DENSE = dataclasses.replace(KEY, product=Product.DGRAD)


@pytest.fixture
def machine(fresh_choices, tmp_path):
    """A folder with the hints of a run that chose two products."""
    hints.note(KEY, CHOICE)
    hints.note(DENSE, Choice(False, dense_ms=0.1))
    hints.save(hints.file_of_machine(tmp_path / "choices"))
    hints.load(hints.file_of_machine(tmp_path / "choices"))
    yield fresh_choices
    hints._hints.clear()


def test_a_sparse_choice_is_a_hint_and_no_choice(machine):
    assert machine.find(KEY) is None and hints.find(KEY) == CHOICE
    assert hints.find(DENSE) is None
    assert hints.find(dataclasses.replace(KEY, tokens=96)) is None


@pytest.mark.parametrize(("tiles", "found"), [(2, CHOICE), (1, None)])
def test_a_weight_keeps_its_tiles(machine, tiles, found):
    machine.record(dataclasses.replace(KEY, tokens=96), Choice(True, tiles, Algorithm(3)))
    assert hints.find(KEY) == found


def test_later_runs_add_to_the_file(machine, tmp_path):
    other = dataclasses.replace(KEY, rows=256)
    hints.note(other, CHOICE)
    hints.save(hints.file_of_machine(tmp_path / "choices"))
    hints.load(hints.file_of_machine(tmp_path / "choices"))
    assert hints.find(KEY) == hints.find(other) == CHOICE


def test_another_machine_has_another_file_and_damage_costs_the_hints_alone(machine, tmp_path, caplog):
    path = hints.file_of_machine(tmp_path / "choices")
    with mock.patch.object(machine, "machine", lambda: {"gpu": "another"}):
        assert hints.file_of_machine(tmp_path / "choices") != path
        hints.load(path)
        assert hints.find(KEY) is None
    path.write_text(path.read_text().replace('"tiles": 2', '"tiles": 4'))
    hints.load(path)
    assert hints.find(KEY) is None and "cannot be read" in caplog.text
    hints.load(tmp_path / "nothing.json")
    assert hints.find(KEY) is None


class Library:
    """Notes what its candidates are asked for."""

    def __init__(self, passes: bool):
        self.passes, self.asked = passes, []

    def finalists(self, trial, known=None):
        self.asked.append(known)
        return ["hinted"] if known and self.passes else [] if known else ["searched"]


@pytest.mark.parametrize(
    ("passes", "among", "asked", "found"),
    [
        (True, ("cusparselt", "cutlass"), [CHOICE], ["hinted"]),
        # It fails the gate: all are searched, as if nothing were known.
        (False, ("cusparselt", "cutlass"), [CHOICE, None], ["searched", "searched"]),
        (True, ("cutlass",), [], ["searched"]),
    ],
)
def test_a_search_is_cut_short_by_a_hint_that_passes(machine, passes, among, asked, found):
    cusparselt, cutlass = Library(passes), Library(True)
    trial = mock.Mock(key=KEY)
    with mock.patch.object(libraries, "load", lambda: {"cusparselt": cusparselt, "cutlass": cutlass}):
        assert measure.finalists(trial, among) == found
    assert cusparselt.asked == asked


@pytest.mark.parametrize(
    ("key", "restriction", "noted"),
    [
        (KEY, {}, CHOICE),
        (KEY, {"among": ("cusparselt",)}, None),
        (KEY, {"dense_allowed": False}, None),
        (dataclasses.replace(KEY, product=Product.WGRAD), {"among": ("cusparselt",)}, CHOICE),
    ],
)
def test_only_what_was_free_to_win_is_noted(machine, key, restriction, noted):
    hints._hints.clear()
    with (
        mock.patch.object(measure, "contest", lambda *_, **__: {}),
        mock.patch.object(measure, "pick", lambda *_, **__: CHOICE),
        mock.patch.object(torch.cuda, "empty_cache"),
    ):
        assert measure.measure(key, torch.device("cpu"), **restriction) == CHOICE
    assert hints.find(key) == noted
