"""Scores of SQuAD v1.1 and GLUE, as their official scripts define them; all in percent."""

import re
import string
from collections import Counter

ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise_answer(text: str) -> str:
    """Lower case; no punctuation, no articles, single spaces."""
    text = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", text).split())


def answer_f1(answer: str, truth: str) -> float:
    """Harmonic mean of precision and recall over words, in [0, 1]."""
    found, expected = normalise_answer(answer).split(), normalise_answer(truth).split()
    common = sum((Counter(found) & Counter(expected)).values())
    if not common:
        return 0.0
    precision, recall = common / len(found), common / len(expected)
    return 2 * precision * recall / (precision + recall)


def squad(answers: dict[str, str], truths: dict[str, list[str]]) -> dict[str, float]:
    """Exact match and F1 over all questions, each against its best truth; a question without an answer scores 0.

    Args:
        answers: question's id -> text.
        truths: question's id -> accepted texts.
    """
    exact = f1 = 0.0
    for question, accepted in truths.items():
        answer = answers.get(question)
        if answer is None:
            continue
        exact += any(normalise_answer(answer) == normalise_answer(truth) for truth in accepted)
        f1 += max(answer_f1(answer, truth) for truth in accepted)
    return {"exact_match": 100.0 * exact / len(truths), "f1": 100.0 * f1 / len(truths)}


def accuracy(predictions, labels) -> dict[str, float]:
    hits = sum(int(found == label) for found, label in zip(predictions, labels, strict=True))
    return {"accuracy": 100.0 * hits / len(labels)}


def accuracy_and_f1(predictions, labels) -> dict[str, float]:
    from sklearn.metrics import f1_score

    return {**accuracy(predictions, labels), "f1": 100.0 * float(f1_score(labels, predictions, zero_division=0.0))}


def matthews(predictions, labels) -> dict[str, float]:
    """Matthews correlation; 0 where all predictions are alike."""
    from sklearn.metrics import matthews_corrcoef

    return {"matthews": 100.0 * float(matthews_corrcoef(labels, predictions))}


def correlations(predictions, labels) -> dict[str, float]:
    """Pearson's and Spearman's; 0 where all predictions are alike, for which neither is defined."""
    from scipy.stats import pearsonr, spearmanr

    if len(set(predictions)) < 2:
        return {"pearson": 0.0, "spearman": 0.0}
    return {
        "pearson": 100.0 * float(pearsonr(predictions, labels)[0]),
        "spearman": 100.0 * float(spearmanr(predictions, labels)[0]),
    }
