"""Which documents train, validate and test: a hash decides, so that none is in two splits and none ever moves."""

import hashlib
import math

import numpy as np

SPLITS = ("train", "valid", "test")


def split_key(identity: str) -> float:
    """A document's position in [0, 1), from its name or its text; equal identities share it."""
    digest = hashlib.blake2b(identity.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def assign_splits(keys_D: np.ndarray, valid_percent: float, test_percent: float) -> np.ndarray:
    """Index into SPLITS of each of the D documents: valid lowest, then test, train the rest.

    A small corpus may leave a split empty by chance; that split then takes the lowest key of the split with the
    most, and this is the only case in which one document's split depends on the others.

    Raises:
        ValueError: fewer different documents than splits that are to hold one.
    """
    valid_end = valid_percent / 100
    test_end = valid_end + test_percent / 100
    splits_D = np.where(keys_D < valid_end, 1, np.where(keys_D < test_end, 2, 0))
    wanted = [0] + [1] * (valid_percent > 0) + [2] * (test_percent > 0)
    different = len(np.unique(keys_D))
    if different < len(wanted):
        names = ", ".join(SPLITS[split] for split in wanted)
        raise ValueError(
            f"the corpus has too few different documents ({different}) for {len(wanted)} splits ({names}), and a "
            "document is never cut: give more documents (a folder, or a .jsonl with one a line), "
            "or --test-percent 0, or --valid-percent 0 too"
        )
    for split in wanted:
        if not (splits_D == split).any():
            sizes = [len(np.unique(keys_D[splits_D == other])) for other in range(len(SPLITS))]
            spare = keys_D[splits_D == int(np.argmax(sizes))].min()
            splits_D[keys_D == spare] = split
    return splits_D


def published_splits(documents: int, valid_percent: float, seed: int) -> np.ndarray:
    """Index into SPLITS of each document as `datasets.Dataset.train_test_split(valid_percent / 100, seed=seed)` cuts.

    The library draws one permutation with numpy's default generator; its head is the held-out part. OpenWebText's
    published split is 0.05 percent with seed 2357 (the FlashAttention training code).

    Raises:
        ValueError: too few documents to leave some on both sides.
    """
    held_out = math.ceil(valid_percent / 100 * documents)
    if not 0 < held_out < documents:
        raise ValueError(
            f"--valid-percent {valid_percent} of {documents} documents leaves a split empty: give more documents"
        )
    splits_D = np.zeros(documents, dtype=np.int64)
    splits_D[np.random.default_rng(seed).permutation(documents)[:held_out]] = 1
    return splits_D
