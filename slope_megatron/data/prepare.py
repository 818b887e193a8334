"""`slope data prepare`: text becomes a tokenizer, indexed datasets and a manifest.

    read     each source once, into parts of text
    train    a tokenizer on a sample of the training documents, or take a finished one
    encode   each part, on all workers
    join     the parts of each split, in order; then the manifest, and one rename

Parts are whole or not there, in a hidden folder beside the output: a killed prepare goes on behind what is finished.
"""

import contextlib
import dataclasses
import itertools
import logging
import os
import platform
import shutil
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
from tqdm import tqdm

from slope_megatron.data import manifest as manifests
from slope_megatron.data.corpus import Corpus, read_corpus
from slope_megatron.data.encode import Task, encode_parts
from slope_megatron.data.figures import check_counts, command_of, figures_of
from slope_megatron.data.indexed import join_parts, token_dtype
from slope_megatron.data.prepared_tokenizer import given_tokenizer, prepared_tokenizer
from slope_megatron.data.scratch import explain, workspace_beside
from slope_megatron.data.settings import PrepareSettings
from slope_megatron.data.sources import Source, describe_skipped, open_source, parse_specs
from slope_megatron.data.splits import SPLITS, assign_splits, published_splits
from slope_megatron.storage import folders

PACKAGES = ("numpy", "sentencepiece", "tokenizers", "pyarrow", "datasets")

logger = logging.getLogger(__name__)


def prepare(
    source: str | Sequence[str],
    out: str | Path,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    **settings,
) -> dict:
    """Write the prepared folder `out` from one source or several, or find it finished.

    The same text and settings give the same bytes, whatever the number of workers (default: one a core), and however
    often it was killed and started again.

    Args:
        source: as `open_source` takes them; several may have weights, `["a.jsonl=0.7", "b.jsonl=0.3"]`.
        settings: as in PrepareSettings.

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
    out = folders.output_folder(out, "--out")
    specs, weights = parse_specs([source] if isinstance(source, str) else source)
    texts = [open_source(spec, chosen) for spec in specs]
    given = given_tokenizer(chosen)
    _check_target(out, texts, chosen, overwrite)
    identity = {
        "settings": dataclasses.asdict(chosen),
        "weights": weights,
        "sources": [text.fingerprint() for text in texts],
        "tokenizer": given.unique_identifiers if given else None,
        "versions": _versions(),
    }
    try:
        with workspace_beside(out, identity) as work:
            corpora = _read(texts, work, chosen)
            if not overwrite and (finished := _finished(out, corpora, weights)):
                logger.info(f"{out} already holds this corpus prepared with these settings: nothing to do")
                return finished
            folder = _write(work, corpora, specs, weights, chosen, given, workers)
            folders.put(folder, out, manifests.NAME)
            return manifests.load_manifest(out)
    except OSError as failure:
        raise ValueError(f"preparing {out} did not finish: {explain(failure, out)}") from failure


def available_cores() -> int:
    """Cores this process may use: fewer than the machine has under a job scheduler."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _check_target(out: Path, texts: list[Source], chosen: PrepareSettings, overwrite: bool) -> None:
    """Refuse, before any work, an `out` that must not be replaced."""
    for text in texts:
        if text.folder is not None and out.resolve().is_relative_to(text.folder.resolve()):
            raise ValueError(f"--out {out} lies inside the source folder {text.folder}: choose a folder outside of it")
    if folders.is_free(out):
        return
    if foreign := manifests.foreign_entries(out):
        # Not even with --overwrite: a mistyped path must not delete somebody's files.
        raise ValueError(
            f"--out {out} holds something that `slope data prepare` did not write ({', '.join(foreign[:3])}): "
            "choose another folder"
        )
    if overwrite:
        return
    # A setting that did not exist then had no effect: that is its default.
    before = dataclasses.asdict(PrepareSettings()) | manifests.load_manifest(out)["settings"]
    now = dataclasses.asdict(chosen)
    changed = [f"{key} {before[key]} then, {now[key]} now" for key in now if before[key] != now[key]]
    if changed:
        raise ValueError(
            f"--out {out} holds data prepared with other settings ({'; '.join(changed)}): "
            "choose another folder, or replace it with --overwrite"
        )


def _finished(out: Path, corpora: list[Corpus], weights: list[float] | None) -> dict | None:
    """The manifest of `out`, whose settings have been compared; a ValueError if it was prepared from other corpora."""
    if not (out / manifests.NAME).is_file():
        return None
    finished = manifests.verify(out)
    before = [(part["corpus"]["sha256"], part["weight"]) for part in finished["sources"]]
    now = list(zip([corpus.sha256 for corpus in corpora], weights or itertools.repeat(None), strict=False))
    if before != now:
        raise ValueError(
            f"--out {out} holds another corpus (source {finished['source']}, sha256 "
            f"{', '.join(sha[:12] for sha, _ in before)}..., now {', '.join(sha[:12] for sha, _ in now)}...): "
            "choose another folder, or replace it with --overwrite"
        )
    return finished


def _read(texts: list[Source], work: Path, chosen: PrepareSettings) -> list[Corpus]:
    """The corpora of all sources; a text that several of them hold stays with the first one, if duplicates go."""
    corpora: list[Corpus] = []
    seen: set[bytes] = set()
    for number, text in enumerate(texts):
        with _progress("read", None) as bar:
            corpus = read_corpus(
                text,
                work / f"text_{number}",
                max_documents=chosen.max_documents,
                deduplicate=chosen.deduplicate,
                seen=seen,
                advance=bar.update,
            )
        if not corpus.parts:
            raise ValueError(f"source {text.spec} holds no text that an earlier source does not hold: leave it out")
        passed = f"; passed over: {describe_skipped(corpus.skipped)}" if corpus.skipped else ""
        documents = "1 document" if len(corpus.keys_D) == 1 else f"{len(corpus.keys_D):,} documents"
        logger.info(f"read {text.spec}: {documents}, {corpus.bytes / 1e6:.1f} MB{passed}")
        corpora.append(corpus)
    return corpora


def _splits(corpus: Corpus, chosen: PrepareSettings) -> np.ndarray:
    if chosen.split_seed is not None:
        return published_splits(len(corpus.keys_D), chosen.valid_percent, chosen.split_seed)
    return assign_splits(corpus.keys_D, chosen.valid_percent, chosen.test_percent)


def _write(work: Path, corpora, specs, weights, chosen: PrepareSettings, given, workers: int) -> Path:
    """The prepared folder, complete, in the work folder."""
    splits = [_splits(corpus, chosen) for corpus in corpora]
    tokenizer = prepared_tokenizer(work / "tokenizer", corpora, splits, chosen, given)
    dtype = token_dtype(tokenizer.vocab_size)
    tasks: list[Task] = []
    encoded: list[list[Path]] = []
    for number, (corpus, splits_D) in enumerate(zip(corpora, splits, strict=True)):
        ends = np.cumsum([len(part.bytes_D) for part in corpus.parts])
        targets = [work / f"tokens_{number}" / part.folder.name for part in corpus.parts]
        tasks += zip(corpus.parts, np.split(splits_D, ends[:-1]), targets, strict=True)
        encoded.append(targets)
    with _progress("encode", sum(corpus.bytes for corpus in corpora)) as bar:
        encode_parts(tasks, work / "tokenizer", chosen.kind, workers, bar.update)

    folder = work / "prepared"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(work / "tokenizer", folder)
    counts = []
    for number, parts in enumerate(encoded):
        names = {split: manifests.dataset_name(split, number, len(corpora)) for split in SPLITS}
        counts.append({split: join_parts(folder, names[split], dtype, parts, split) for split in SPLITS})
    check_counts(corpora, counts, chosen)
    manifest = {
        "source": ", ".join(specs),
        "kind": chosen.kind,
        "command": command_of(specs, weights, chosen),
        "settings": dataclasses.asdict(chosen),
        **figures_of(corpora, counts, specs, weights),
        "vocab_size": tokenizer.vocab_size,
        "eod": tokenizer.eod,
        "tokenizer": {**tokenizer.unique_identifiers, "eod_text": tokenizer.eod_text},
        "dtype": dtype.name,
        "files": manifests.describe_files(folder),
        "versions": _versions(),
    }
    manifests.write_manifest(folder, manifest)
    logger.info("encoded " + ", ".join(f"{name} {manifest['splits'][name]['tokens']:,}" for name in SPLITS) + " tokens")
    return folder


def _versions() -> dict[str, str]:
    """Of what prepares; a package that is not installed was not used."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _progress(title: str, total: int | None) -> tqdm:
    """One line on a terminal, nothing in a log: there, the log lines tell how far it is."""
    return tqdm(desc=title, total=total, unit="B", unit_scale=True, leave=False, disable=not sys.stderr.isatty())
