"""What the manifest says of the text: documents, bytes, tokens, entropy; and the command that gives the same bytes."""

import dataclasses
import shlex

from slope_megatron.data.corpus import Corpus
from slope_megatron.data.indexed import unigram_entropy
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.splits import SPLITS

NO_SENTENCE = "without a sentence"


def check_counts(corpora: list[Corpus], counts: list[dict[str, dict]], chosen: PrepareSettings) -> None:
    """Refuse an empty split that was asked for; a document that is neither written nor dropped is our own fault."""
    for corpus, splits in zip(corpora, counts, strict=True):
        written = sum(split["documents"] + split["dropped"] for split in splits.values())
        assert written == len(corpus.keys_D), f"{len(corpus.keys_D)} documents read, {written} written or dropped"
    asked = {"train": 100.0, "valid": chosen.valid_percent, "test": chosen.test_percent}
    for name, percent in asked.items():
        if percent and not sum(splits[name]["tokens"] for splits in counts):
            dropped = sum(splits[name]["dropped"] for splits in counts)
            way_out = "give more text" if name == "train" else f"give more text, or --{name}-percent 0"
            raise ValueError(f"the {name} split has no tokens ({dropped} documents {NO_SENTENCE}): {way_out}")


def figures_of(corpora: list[Corpus], counts: list[dict[str, dict]], specs: list[str], weights) -> dict:
    """`corpus`, `splits` (both over all sources) and `sources` (each one's own) from the counts of `join_parts`."""
    sources = []
    for number, (spec, corpus) in enumerate(zip(specs, corpora, strict=True)):
        dropped = sum(split["dropped"] for split in counts[number].values())
        of_corpus = {
            "documents": len(corpus.keys_D),
            "bytes": corpus.bytes,
            "sha256": corpus.sha256,
            # Passed over while the text was read, and while it was encoded.
            "skipped": {**corpus.skipped, **({NO_SENTENCE: dropped} if dropped else {})},
        }
        weight = weights[number] if weights else None
        splits = {split: _figures([counts[number][split]]) for split in SPLITS}
        sources.append({"source": spec, "weight": weight, "corpus": of_corpus, "splits": splits})
    return {
        "corpus": {
            "documents": sum(len(corpus.keys_D) for corpus in corpora),
            "bytes": sum(corpus.bytes for corpus in corpora),
        },
        "splits": {split: _figures([each[split] for each in counts]) for split in SPLITS},
        "sources": sources,
    }


def _figures(parts: list[dict]) -> dict:
    """One split's figures. Entropy in nats per token, of the split's own token frequencies."""
    totals = {key: sum(part[key] for part in parts) for key in ("documents", "bytes", "tokens", "sequences")}
    return {**totals, "unigram_entropy": unigram_entropy(sum(part["counts_V"] for part in parts))}


def command_of(specs: list[str], weights: list[float] | None, chosen: PrepareSettings) -> str:
    """The command that gives these bytes: all that decides them, so neither workers nor the folder."""
    sources = [f"{spec}={weight}" for spec, weight in zip(specs, weights, strict=True)] if weights else specs
    words = ["slope", "data", "prepare", *sources]
    default = PrepareSettings()
    for field in dataclasses.fields(chosen):
        value = getattr(chosen, field.name)
        if value == getattr(default, field.name):
            continue
        flag = field.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", str(value)]
    return shlex.join(words)
