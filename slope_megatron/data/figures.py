"""What the manifest says of the text: documents, bytes, tokens, entropy; and the command that gives the same bytes."""

import dataclasses
import shlex

from slope_megatron.data.corpus import Corpus
from slope_megatron.data.indexed import unigram_entropy
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.splits import SPLITS


def figures_of(corpora: list[Corpus], counts: list[dict[str, dict]], specs: list[str], weights) -> dict:
    """`corpus`, `splits` (both over all sources) and `sources` (each one's own).

    Args:
        counts: of each source and split what `join_parts` returned.
    """
    sources = [
        {
            "source": spec,
            "weight": weights[number] if weights else None,
            "corpus": {
                "documents": len(corpus.keys_D),
                "bytes": corpus.bytes,
                "sha256": corpus.sha256,
                "skipped": corpus.skipped,
            },
            "splits": {split: _figures([counts[number][split]]) for split in SPLITS},
        }
        for number, (spec, corpus) in enumerate(zip(specs, corpora, strict=True))
    ]
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
