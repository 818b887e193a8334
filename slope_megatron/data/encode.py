"""Parts of text into parts of tokens, on several processes; a part is finished or not there.

Legend: D documents, S sequences (a document, or for BERT a sentence), V vocabulary.
"""

import concurrent.futures
import contextlib
import itertools
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np

from slope_megatron.data.corpus import TextPart
from slope_megatron.data.indexed import token_dtype
from slope_megatron.data.scratch import sealed_folder
from slope_megatron.data.sentences import split_sentences
from slope_megatron.data.splits import SPLITS
from slope_megatron.data.tokenizer import load_tokenizer

# Characters that are given to a tokenizer at a time.
BATCH = 1_000_000
# Characters of one document that are encoded as a whole; a longer one is cut behind a line end, which bounds memory.
LONGEST_PIECE = 8_000_000
# Megatron's BERT samples leave a document out that has a sentence of more than 512 tokens.
LONGEST_SENTENCE = 500

Task = tuple[TextPart, np.ndarray, Path]
_state: dict = {}


def encode_parts(
    tasks: Sequence[Task], tokenizer: Path, kind: str, workers: int, advance: Callable[[int], object]
) -> None:
    """Encode each `(part, split of each document, target folder)` whose target is not there yet.

    Args:
        tokenizer: the folder that holds it.
        advance: called with the bytes of text of each part, also of those that were there.
    Raises:
        OSError: a file could not be written, or a worker was killed; finished parts stay.
    """
    waiting = []
    for task in tasks:
        if task[2].is_dir():
            advance(int(task[0].bytes_D.sum()))
        else:
            waiting.append(task)
    if workers == 1 or len(waiting) <= 1:
        with _one_thread():
            _state.update(tokenizer=load_tokenizer(tokenizer), kind=kind)
            for task in waiting:
                advance(encode_part(*task))
        return
    context = multiprocessing.get_context("spawn")
    workers = min(workers, len(waiting))
    with (
        _one_thread(),
        concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (tokenizer, kind)) as pool,
    ):
        futures = [pool.submit(encode_part, *task) for task in waiting]
        try:
            for future in concurrent.futures.as_completed(futures):
                advance(future.result())
        except BrokenProcessPool:
            raise OSError("a worker was killed, for want of memory perhaps: fewer --workers need less") from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """The `tokenizers` library of this process, and of those it starts, takes one thread."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _start_worker(tokenizer: Path, kind: str) -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _state.update(tokenizer=load_tokenizer(tokenizer), kind=kind)


def _end_with(parent: BaseProcess) -> None:
    """A killed parent tells nobody: its workers would wait for work for ever."""
    parent.join()
    os._exit(1)


def encode_part(part: TextPart, splits_D: np.ndarray, target: Path) -> int:
    """Write `target/SPLIT.bin` and `.npz` (lengths, sequences of each document, token counts, bytes of text,
    documents that gave no sequence).

    Returns:
        bytes of text.
    """
    tokenizer, kind = _state["tokenizer"], _state["kind"]
    dtype = token_dtype(tokenizer.vocab_size)
    sequences_of = _sentences if kind == "bert" else _documents
    tokens: list[list[np.ndarray]] = [[] for _ in SPLITS]
    lengths: list[list[int]] = [[] for _ in SPLITS]
    sequences: list[list[int]] = [[] for _ in SPLITS]
    sizes, dropped = [0] * len(SPLITS), [0] * len(SPLITS)
    documents = zip(sequences_of(part.texts(), tokenizer), splits_D.tolist(), part.bytes_D.tolist(), strict=True)
    for ids_S, split, size in documents:
        if not ids_S:  # bert: no sentence in it
            dropped[split] += 1
            continue
        count = sum(map(len, ids_S))
        tokens[split].append(np.fromiter(itertools.chain.from_iterable(ids_S), dtype=dtype, count=count))
        lengths[split].extend(map(len, ids_S))
        sequences[split].append(len(ids_S))
        sizes[split] += size
    with sealed_folder(target) as partial:
        for index, split in enumerate(SPLITS):
            whole = np.concatenate([np.zeros(0, dtype), *tokens[index]])
            whole.tofile(partial / f"{split}.bin")
            np.savez_compressed(
                partial / f"{split}.npz",
                lengths_S=np.array(lengths[index], dtype=np.int32),
                sequences_D=np.array(sequences[index], dtype=np.int64),
                counts_V=np.bincount(whole, minlength=tokenizer.vocab_size),
                bytes=sizes[index],
                dropped=dropped[index],
            )
    return int(part.bytes_D.sum())


def _documents(texts: Iterator[str], tokenizer) -> Iterator[list[list[int]]]:
    """Of each document its one sequence, EOD included."""
    for ids_P in _encoded(texts, tokenizer, _pieces):
        yield [[*itertools.chain.from_iterable(ids_P), tokenizer.eod]]


def _sentences(texts: Iterator[str], tokenizer) -> Iterator[list[list[int]]]:
    """Of each document its sentences that have tokens; over-long ones are cut."""
    for ids_S in _encoded(texts, tokenizer, split_sentences):
        yield [ids[at : at + LONGEST_SENTENCE] for ids in ids_S for at in range(0, len(ids), LONGEST_SENTENCE)]


def _encoded(texts: Iterator[str], tokenizer, cut: Callable[[str], Iterable[str]]) -> Iterator[list[list[int]]]:
    """Of each document the ids of each of its pieces."""
    for batch in _batches(texts):
        pieces = [list(cut(text)) for text in batch]
        encoded = iter(tokenizer.encode_all(list(itertools.chain.from_iterable(pieces))))
        for several in pieces:
            yield [next(encoded) for _ in several]


def _batches(texts: Iterator[str]) -> Iterator[list[str]]:
    """Lists of documents of about BATCH characters."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > LONGEST_PIECE:
        end = text.rfind("\n", start, start + LONGEST_PIECE) + 1
        end = end if end > start else start + LONGEST_PIECE
        yield text[start:end]
        start = end
    yield text[start:]
