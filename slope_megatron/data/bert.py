"""Prepared sentences as Megatron's BERT samples: `[CLS] A [SEP] B [SEP]` with hidden tokens.

A and B are runs of sentences of one document. Where `is_next` is 0 they are swapped: Megatron asks for the
order (as ALBERT, arXiv 1909.11942), where BERT (arXiv 1810.04805) took B from another document. Of the tokens 15 % are
asked for; of those 80 % are [MASK], 10 % a random token, 10 % unchanged. Sample i is seeded with seed + i.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.indexed import megatron_datasets
from slope_megatron.data.tokenizer import Tokenizer

# [CLS], two [SEP], and a token or two on both sides.
SHORTEST = 8


class BertVocabulary:
    """A tokenizer as Megatron's BERT dataset asks for it."""

    def __init__(self, tokenizer: Tokenizer | FastTokenizer):
        """Raises ValueError if one of BERT's marks is missing."""
        if isinstance(tokenizer, Tokenizer):
            raise ValueError("the tokenizer is a SentencePiece model: BERT needs a WordPiece vocabulary")
        self.pad, self.cls, self.sep, self.mask = (tokenizer.mark(name) for name in ("pad", "cls", "sep", "mask"))
        self.vocab_size = tokenizer.vocab_size
        self.inv_vocab = tokenizer.inverse_vocabulary
        self.unique_identifiers = tokenizer.unique_identifiers


class BertSamples:
    """Megatron's dataset with items as `MaskedLanguageModel` takes them.

    Item i: tokens, labels, types, padding_mask [s] int64, loss_mask [s] fp32, and is_next, int64.
    """

    def __init__(self, dataset):
        self.dataset = dataset
        vocabulary = dataset.config.tokenizer
        marks = {vocabulary.pad, vocabulary.cls, vocabulary.sep, vocabulary.mask}
        # Megatron draws random tokens from all of them; a [PAD] in the text would then be taken for padding.
        dataset.token_lookup = [token for token in dataset.token_lookup if token not in marks]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, number: int) -> Mapping[str, torch.Tensor]:
        item = self.dataset[number]
        asked = item["loss_mask"] == 1
        return {
            "tokens": torch.from_numpy(item["text"]),
            # Elsewhere Megatron writes -1, which is no token.
            "labels": torch.from_numpy(np.where(asked, item["labels"], 0)),
            "loss_mask": torch.from_numpy(asked.astype(np.float32)),
            "padding_mask": torch.from_numpy(item["padding_mask"]),
            "types": torch.from_numpy(item["types"]),
            "is_next": torch.tensor(1 - item["is_random"]),
        }


def bert_config(tokenizer: Tokenizer | FastTokenizer, seq_length: int, seed: int, masking):
    """Megatron's settings of the dataset; `masking` as in DataConfig: its `mlm_` and `short_` fields."""
    return megatron_datasets("bert_dataset").BERTMaskedWordPieceDatasetConfig(
        random_seed=seed,
        sequence_length=seq_length,
        blend_per_split=[None, None, None],
        tokenizer=BertVocabulary(tokenizer),
        classification_head=True,
        masking_probability=masking.mlm_probability,
        short_sequence_probability=masking.short_sequences,
        masking_max_ngram=1,
        masking_do_full_word=masking.mlm_whole_words,
        masking_do_permutation=False,
        masking_use_longer_ngrams=False,
        masking_use_geometric_distribution=False,
    )


def usable_documents(prefix: Path) -> int:
    """Documents of two sentences or more: the others give no pair. Megatron would look for ever in a split of none."""
    # Kept by name: its arrays are views of a mapped file that goes with it.
    dataset = megatron_datasets("indexed_dataset").IndexedDataset(str(prefix))
    return int((np.diff(dataset.document_indices) >= 2).sum())
