"""`slope data`: text into what `slope pretrain` reads."""

import argparse
import sys

from slope_megatron.cli.parser import manual
from slope_megatron.config.fields import add_arguments, destination, field_names
from slope_megatron.data.settings import TITLE, PrepareSettings

WHOLE = "Text into what `slope pretrain` reads: one command, once, on one machine, without a GPU."
DESCRIPTION = """\
Turn text into a folder that `slope pretrain --data FOLDER` reads:

  tokenizer.model or .json  the tokenizer, trained on the training documents or the one that was given
  train, valid, test        .bin and .idx, in Megatron's format; every document ends with the end-of-document token
  manifest.json             what is in them: documents, bytes, tokens, hashes, versions, the command, and each split's
                            unigram entropy (nats per token: what a model without context reaches)

SOURCE is one of
  stdlib                    the source text of this Python's standard library; needs no network
  FOLDER                    the files below it, links followed: of text, each is a document; of .jsonl, .ndjson and
                            .json, or of .parquet, their records are. Where there are several of these, --format says
                            which is meant; what is passed over (hidden, binary, other files) is counted
  FILE.jsonl, .parquet      every line {"text": "..."}, or every row, is a document; .json may also be an array
  FILE                      one document: UTF-8, or UTF-16 with a byte order mark, which goes; also .gz .bz2 .xz .zst
  hf:NAME[:CONFIG]          the train split of a dataset that the `datasets` library streams from the hub, or reads
                            from a local folder
Several sources are blended when a run reads them, by the weights given as SOURCE=WEIGHT, or by their tokens.

A document is in one split only: a hash of its name decides (for records: of its text). The same text and settings give
the same files, whatever the workers. A prepare that was killed goes on where it stopped when the same command is given
again; a finished folder is kept if it was made from the same text with the same settings.
"""
EPILOG = """\
examples:
  slope data prepare stdlib --out data/stdlib
  slope data prepare corpus.jsonl --text-key content --vocab-size 8192 --out data/corpus
  slope data prepare wiki/=0.7 books.parquet=0.3 --tokenizer models/llama-3 --deduplicate --out data/mix
  slope data prepare hf:wikimedia/wikipedia:20231101.en --kind bert --tokenizer bert-large-uncased/ --out data/bert
  slope data prepare hf:Skylion007/openwebtext --tokenizer gpt2/ --valid-percent 0.05 --test-percent 0 \\
      --split-seed 2357 --out data/openwebtext          (OpenWebText with its published split)
  slope data prepare hf:allenai/c4:en --max-documents 1000000 --vocab-size 32000 --out data/c4
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add `data` and its subcommand `prepare`; parsed arguments go to `run`."""
    parser = subparsers.add_parser(
        "data", help="prepare text for training", description=WHOLE, epilog=manual("see: slope data prepare --help")
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser(
        "prepare",
        help="tokenizer, token files and manifest from text",
        description=DESCRIPTION,
        epilog=manual(EPILOG),
    )
    prepare.add_argument("source", metavar="SOURCE", nargs="+", help="one of the above; several, each with =WEIGHT")
    prepare.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; appears only when finished")
    add_arguments(prepare, PrepareSettings, TITLE)
    prepare.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="INT",
        help="processes that encode; changes nothing that is written (default: one a core)",
    )
    prepare.add_argument(
        "--overwrite",
        action="store_true",
        help="replace what an earlier prepare wrote to --out; nothing else is replaced",
    )
    parser.set_defaults(run=run)
    return parser


def run(arguments: argparse.Namespace) -> int:
    """Prepare, and print the table of splits on stdout.

    Raises:
        ValueError: one sentence on what is wrong with the source, the settings or the output folder.
    """
    from slope_megatron.data.prepare import prepare

    flags = {name: destination(PrepareSettings, name) for name in field_names(PrepareSettings)}
    settings = {name: vars(arguments)[flag] for name, flag in flags.items() if flag in arguments}
    manifest = prepare(
        arguments.source, arguments.out, workers=arguments.workers, overwrite=arguments.overwrite, **settings
    )
    sys.stdout.write(describe(manifest, arguments.out))
    return 0


def describe(manifest: dict, folder: str) -> str:
    """The manifest's figures as a small table."""
    size = manifest["corpus"]["bytes"] / 1e6
    lines = [
        f"{folder}: {size:.1f} MB from {manifest['source']}, a vocabulary of {manifest['vocab_size']:,}",
        f"{'split':<6} {'documents':>10} {'MB':>10} {'tokens':>14}  unigram entropy (nats/token)",
    ]
    for name, split in manifest["splits"].items():
        size = split["bytes"] / 1e6
        entropy = split["unigram_entropy"]
        lines.append(f"{name:<6} {split['documents']:>10,} {size:>10.2f} {split['tokens']:>14,}  {entropy:.4f}")
    return "\n".join(lines) + "\n"
