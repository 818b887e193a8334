"""Megatron-core's indexed dataset (.bin and .idx): written one document at a time, counted on the way."""

import warnings
from pathlib import Path

import numpy as np


def indexed_dataset_module():
    """`megatron.core.datasets.indexed_dataset`, without its remarks on missing GPU libraries: none is needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


class IndexedWriter:
    """One split: `folder/name.bin` and `.idx`. `close` makes the pair valid."""

    def __init__(self, folder: Path, name: str, vocab_size: int):
        module = indexed_dataset_module()
        self._index = folder / f"{name}.idx"
        self.dtype = module.DType.optimal_dtype(vocab_size)
        self._builder = module.IndexedDatasetBuilder(str(folder / f"{name}.bin"), dtype=self.dtype)
        self.documents = 0
        self.bytes = 0
        self._counts_V = np.zeros(vocab_size, dtype=np.int64)

    def add(self, ids: list[int], size: int) -> None:
        """One document: its tokens, EOD included, and its size as text in bytes."""
        tokens = np.asarray(ids, dtype=self.dtype)
        self._builder.add_document(tokens, [len(tokens)])
        self._counts_V += np.bincount(tokens, minlength=len(self._counts_V))
        self.documents += 1
        self.bytes += size

    def close(self) -> None:
        self._builder.finalize(str(self._index))

    def figures(self) -> dict:
        """This split's part of the manifest. Entropy in nats per token, of the split's own token frequencies."""
        return {
            "documents": self.documents,
            "bytes": self.bytes,
            "tokens": int(self._counts_V.sum()),
            "unigram_entropy": unigram_entropy(self._counts_V),
        }


def unigram_entropy(counts_V: np.ndarray) -> float:
    """-sum p ln p in nats, of token counts: the loss of the best model that ignores the context."""
    counts = counts_V[counts_V > 0].astype(np.float64)
    p = counts / counts.sum()
    # + 0.0: a single token's entropy is 0, not -0.
    return float(-(p * np.log(p)).sum() + 0.0)
