"""`slope data prepare`: a source's text becomes a tokenizer, three indexed datasets and a manifest."""

import dataclasses
import itertools
import logging
import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from slope_megatron.data import manifest as manifests
from slope_megatron.data.corpus import Corpus, read_corpus
from slope_megatron.data.indexed import IndexedWriter
from slope_megatron.data.scratch import move_into_place, scratch_beside
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import Source, describe_skipped, open_source
from slope_megatron.data.splits import SPLITS, assign_splits
from slope_megatron.data.tokenizer import Tokenizer, train_tokenizer, training_chunks

TOKENIZER = "tokenizer.model"
# Bytes of training text that the tokenizer learns from: a second of work, and more would hardly change it.
TOKENIZER_SAMPLE = 4_000_000
# Bytes of text that are encoded at a time, over all workers.
BATCH = 4_000_000

logger = logging.getLogger(__name__)


def prepare(
    source: str,
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    **settings,
) -> dict:
    """Write the prepared folder `out` from `source`, or find it finished; `settings` as in PrepareSettings.

    The same text and settings give the same bytes, whatever the number of workers (default: one a core).

    Returns:
        the manifest.
    Raises:
        ValueError: a source that cannot be read or holds too little, settings that do not fit it, or an `out` that
            holds something else. `out` is then what it was before.
    """
    chosen = PrepareSettings(**settings)
    workers = workers if workers is not None else available_cores()
    if workers < 1:
        raise ValueError(f"--workers is {workers}: it must be at least 1; leave it out to use every core")
    out = Path(out).absolute()
    text = open_source(source, chosen.text_key)
    _check_target(out, text, chosen, overwrite)
    try:
        with scratch_beside(out) as scratch:
            corpus = _read(text, scratch / "corpus", chosen.max_documents)
            if not overwrite and (finished := _finished(out, corpus)):
                logger.info(f"{out} already holds this corpus prepared with these settings: nothing to do")
                return finished
            folder = scratch / "prepared"
            folder.mkdir()
            manifest = _write(folder, corpus, text, chosen, workers)
            move_into_place(folder, out)
            return manifest
    except OSError as failure:
        raise ValueError(
            f"preparing {source} failed ({failure}): {out} is unchanged; mend that and run it again"
        ) from failure


def available_cores() -> int:
    """Cores this process may use: fewer than the machine has under a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_target(out: Path, text: Source, chosen: PrepareSettings, overwrite: bool) -> None:
    """Refuse, before any work, an `out` that must not be replaced.

    Raises:
        ValueError: see the messages.
    """
    if text.folder is not None and out.resolve().is_relative_to(text.folder.resolve()):
        raise ValueError(f"--out {out} lies inside the source folder {text.folder}: choose a folder outside of it")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: choose a folder")
    if not out.exists() or not any(out.iterdir()):
        return
    if foreign := manifests.foreign_entries(out):
        # Not even with --overwrite: a mistyped path must not delete somebody's files.
        raise ValueError(
            f"--out {out} holds something that `slope data prepare` did not write ({', '.join(foreign[:3])}): "
            "choose another folder"
        )
    if overwrite:
        return
    before = manifests.load_manifest(out)["settings"]
    now = dataclasses.asdict(chosen)
    changed = [f"{key} {before.get(key)} then, {now[key]} now" for key in now if before.get(key) != now[key]]
    if changed:
        raise ValueError(
            f"--out {out} holds data prepared with other settings ({'; '.join(changed)}): "
            "choose another folder, or replace it with --overwrite"
        )


def _finished(out: Path, corpus: Corpus) -> dict | None:
    """The manifest of `out` if it was prepared from this corpus; its settings have been compared before.

    Raises:
        ValueError: it was prepared from another corpus.
    """
    if not (out / manifests.NAME).is_file():
        return None
    finished = manifests.load_manifest(out)
    if finished["corpus"]["sha256"] != corpus.sha256:
        raise ValueError(
            f"--out {out} holds another corpus (source {finished['source']}, sha256 "
            f"{finished['corpus']['sha256'][:12]}..., now {corpus.sha256[:12]}...): "
            "choose another folder, or replace it with --overwrite"
        )
    return finished


def _read(text: Source, path: Path, max_documents: int | None) -> Corpus:
    with _progress("read", None) as bar:
        corpus = read_corpus(text, path, max_documents, bar.update)
    skipped = f"; passed over: {describe_skipped(text.skipped)}" if text.skipped else ""
    logger.info(f"read {len(corpus.bytes_D):,} documents, {corpus.bytes / 1e6:.1f} MB{skipped}")
    return corpus


def _write(folder: Path, corpus: Corpus, text: Source, chosen: PrepareSettings, workers: int) -> dict:
    """Fill `folder`; returns the manifest, which is written last."""
    splits_D = assign_splits(corpus.keys_D, chosen.valid_percent, chosen.test_percent)
    share = TOKENIZER_SAMPLE / max(1, int(corpus.bytes_D[splits_D == 0].sum()))
    training = (content for content, split in zip(corpus.texts(), splits_D, strict=True) if split == 0)
    model = train_tokenizer(training_chunks(training, share), chosen.vocab_size)
    tokenizer = Tokenizer(model)
    (folder / TOKENIZER).write_bytes(model)
    logger.info(f"trained a tokenizer of {tokenizer.vocab_size:,} tokens on {min(1.0, share):.0%} of the training text")

    writers = [IndexedWriter(folder, name, tokenizer.vocab_size) for name in SPLITS]
    with _progress("encode", corpus.bytes) as bar:
        for documents in _batches(corpus, splits_D):
            ids = tokenizer.encode_all([content for content, _, _ in documents], workers)
            for tokens, (_, split, size) in zip(ids, documents, strict=True):
                writers[split].add([*tokens, tokenizer.eod], size)
                bar.update(size)
    for writer in writers:
        writer.close()
    figures = {name: writer.figures() for name, writer in zip(SPLITS, writers, strict=True)}
    logger.info("encoded " + ", ".join(f"{name} {figures[name]['tokens']:,}" for name in SPLITS) + " tokens")

    manifests.write_manifest(
        folder,
        {
            "source": text.spec,
            "settings": dataclasses.asdict(chosen),
            "corpus": {
                "documents": len(corpus.bytes_D),
                "bytes": corpus.bytes,
                "sha256": corpus.sha256,
                "skipped": dict(sorted(text.skipped.items())),
            },
            "vocab_size": tokenizer.vocab_size,
            "eod": tokenizer.eod,
            "dtype": np.dtype(writers[0].dtype).name,
            "splits": figures,
            "files": manifests.describe_files(folder),
            "versions": {
                "python": platform.python_version(),
                **{name: version(name) for name in ("megatron-core", "numpy", "sentencepiece")},
            },
        },
    )
    return manifests.load_manifest(folder)


def _batches(corpus: Corpus, splits_D: np.ndarray) -> Iterator[list[tuple[str, int, int]]]:
    """`(text, split, bytes)` of all documents, in lists of about BATCH bytes."""
    documents = zip(corpus.texts(), splits_D.tolist(), corpus.bytes_D.tolist(), strict=True)
    ends_D = np.cumsum(corpus.bytes_D)
    for _, batch in itertools.groupby(zip(documents, ends_D.tolist(), strict=True), key=lambda item: item[1] // BATCH):
        yield [document for document, _ in batch]


def _progress(title: str, total: int | None) -> tqdm:
    """One line on a terminal, nothing in a log: there, the log lines tell how far it is."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
