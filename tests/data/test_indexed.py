"""Our index files are Megatron's, byte for byte, and its reader reads them."""

import numpy as np
import pytest

from slope_megatron.data.indexed import megatron_datasets, token_dtype, write_index


@pytest.mark.parametrize("vocabulary", [300, 70_000])
@pytest.mark.parametrize("documents", [0, 1, 40])
def test_index_equals_megatrons(tmp_path, vocabulary, documents):
    generator = np.random.default_rng()
    dtype = token_dtype(vocabulary)
    module = megatron_datasets("indexed_dataset")
    builder = module.IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=dtype.type)
    lengths, sequences = [], []
    for _ in range(documents):
        own = generator.integers(1, 50, size=generator.integers(1, 6))
        builder.add_document(generator.integers(0, vocabulary, own.sum()), own.tolist())
        lengths.extend(own)
        sequences.append(len(own))
    builder.finalize(str(tmp_path / "theirs.idx"))
    write_index(tmp_path / "ours.idx", dtype, np.array(lengths, dtype=np.int32), np.array(sequences, dtype=np.int64))
    assert (tmp_path / "ours.idx").read_bytes() == (tmp_path / "theirs.idx").read_bytes()
