"""Megatron-core's indexed dataset (.bin and .idx), written from parts that were encoded apart.

    .bin   all tokens
    .idx   "MMIDIDX\\0\\0", version 1, code of the token type, sequences S, documents + 1,
           lengths [S] int32, offsets into .bin in bytes [S] int64, first sequence of each document and S at last, int64

The test compares with Megatron's own writer byte for byte.
"""

import importlib
import shutil
import struct
import types
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HEADER = b"MMIDIDX\x00\x00"
VERSION = 1
# Megatron's codes of the two token types.
CODES = {"uint16": 8, "int32": 4}


def megatron_datasets(name: str) -> types.ModuleType:
    """`megatron.core.datasets.NAME`, without its remarks on missing GPU libraries: none is needed here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(f"megatron.core.datasets.{name}")


def token_dtype(vocab_size: int) -> np.dtype:
    """The type that holds every token; Megatron's rule, which leaves the last few uint16 unused."""
    return np.dtype(np.uint16 if vocab_size < 65500 else np.int32)


def write_index(path: Path, dtype: np.dtype, lengths_S: np.ndarray, sequences_D: np.ndarray) -> None:
    """Write `path` from the tokens of each sequence and the sequences of each document."""
    ends_S = np.cumsum(lengths_S, dtype=np.int64)
    first_D = np.concatenate([[0], np.cumsum(sequences_D, dtype=np.int64)])
    with path.open("wb") as file:
        file.write(HEADER + struct.pack("<QB", VERSION, CODES[dtype.name]))
        file.write(struct.pack("<QQ", len(lengths_S), len(first_D)))
        file.write(lengths_S.astype("<i4").tobytes())
        file.write(((ends_S - lengths_S) * dtype.itemsize).astype("<i8").tobytes())
        file.write(first_D.astype("<i8").tobytes())


def join_parts(folder: Path, name: str, dtype: np.dtype, parts: Sequence[Path], split: str) -> dict:
    """Write `folder/name.bin` and `.idx` from one split of encoded parts (see `encode`); returns its figures."""
    lengths, sequences, size, dropped, counts_V = [], [], 0, 0, 0
    with (folder / f"{name}.bin").open("wb") as target:
        for part in parts:
            with np.load(part / f"{split}.npz") as arrays:
                lengths.append(arrays["lengths_S"])
                sequences.append(arrays["sequences_D"])
                size += int(arrays["bytes"])
                dropped += int(arrays["dropped"])
                counts_V = counts_V + arrays["counts_V"]
            with (part / f"{split}.bin").open("rb") as tokens:
                shutil.copyfileobj(tokens, target, 1 << 22)
    lengths_S, sequences_D = np.concatenate(lengths), np.concatenate(sequences)
    write_index(folder / f"{name}.idx", dtype, lengths_S, sequences_D)
    return {
        "documents": len(sequences_D),
        "dropped": dropped,
        "bytes": size,
        "tokens": int(lengths_S.sum()),
        "sequences": len(lengths_S),
        "counts_V": counts_V,
    }


def unigram_entropy(counts_V: np.ndarray) -> float:
    """-sum p ln p in nats, of token counts: the loss of the best model that ignores the context."""
    counts = counts_V[counts_V > 0].astype(np.float64)
    p = counts / counts.sum()
    # + 0.0: a single token's entropy is 0, not -0.
    return float(-(p * np.log(p)).sum() + 0.0)
