"""Metrics on cases worked by hand, and against the libraries' definitions on random ones."""

import pytest
import torch

from slope_megatron.evaluation import metrics


@pytest.mark.parametrize(
    ("answer", "truths", "exact", "f1"),
    [
        ("The Eiffel Tower!", ["eiffel tower"], 100.0, 100.0),
        ("in 1889", ["1889", "the year 1889"], 0.0, 200 / 3),
        ("blue", ["red"], 0.0, 0.0),
        ("a  an THE", ["the"], 100.0, 0.0),  # as in the official script: no words in common, and equal all the same
        ("new york new york", ["new york"], 0.0, 100 * 2 * 0.5 / 1.5),
    ],
)
def test_squad_by_hand(answer, truths, exact, f1):
    found = metrics.squad({"q": answer}, {"q": truths})
    assert found == pytest.approx({"exact_match": exact, "f1": f1})


def test_squad_counts_questions_without_an_answer():
    assert metrics.squad({"a": "x"}, {"a": ["x"], "b": ["y"]}) == {"exact_match": 50.0, "f1": 50.0}


def test_glue_by_their_formulas():
    generator = torch.Generator().manual_seed(3)
    predictions, labels = (torch.randint(0, 2, (200,), generator=generator) for _ in range(2))
    table = torch.bincount(2 * labels + predictions, minlength=4).double()
    tn, fp, fn, tp = table.tolist()
    expected = (tp * tn - fp * fn) / ((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)) ** 0.5
    found = predictions.tolist(), labels.tolist()
    assert metrics.matthews(*found)["matthews"] == pytest.approx(100 * expected)
    both = metrics.accuracy_and_f1(*found)
    assert both == pytest.approx({"accuracy": 100 * (tp + tn) / 200, "f1": 100 * 2 * tp / (2 * tp + fp + fn)})

    x = torch.randn(50, generator=generator, dtype=torch.float64)
    y = x**3 + 0.1
    centred = [values - values.mean() for values in (x, y)]
    pearson = float((centred[0] * centred[1]).sum() / (centred[0].norm() * centred[1].norm()))
    found = metrics.correlations(x.tolist(), y.tolist())
    assert found == pytest.approx({"pearson": 100 * pearson, "spearman": 100.0})
    assert metrics.correlations([1.0, 1.0], [1.0, 2.0]) == {"pearson": 0.0, "spearman": 0.0}
