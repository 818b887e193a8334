"""`slope data`: text into what `slope pretrain` reads."""

import argparse
import sys

from slope_megatron.data.settings import PrepareSettings

DESCRIPTION = """\
Turn a corpus of text into a folder that `slope pretrain --data FOLDER` reads:

  tokenizer.model          SentencePiece BPE, trained on the training documents, lossless
  train, valid, test       .bin and .idx, in Megatron's format; every document ends with <eod>
  manifest.json            what is in them: documents, bytes, tokens, hashes, and each split's
                           unigram entropy (nats per token: what a model without context reaches)

SOURCE is one of
  stdlib                   the source text of this Python's standard library; needs no network
  FOLDER                   every UTF-8 file below it is a document (hidden and binary files are passed
                           over); a folder of nothing but .jsonl files is read as records
  FILE.jsonl               every line is a record {"text": "..."}, and a document
  FILE                     one document
  hf:NAME[:CONFIG]         the train split of a dataset that the `datasets` library streams from the hub
                           or reads from a local folder

A document is in one split only: a hash of its name decides (for records: of its text). The same text and
settings give the same files. A finished folder is kept if it was made from the same text with the same settings.
"""
EPILOG = """\
examples:
  slope data prepare stdlib --out data/stdlib
  slope data prepare corpus.jsonl --text-key content --vocab-size 8192 --out data/corpus
  slope data prepare hf:allenai/c4:en --max-documents 1000000 --vocab-size 32000 --out data/c4
"""


def add_parser(subparsers) -> argparse.ArgumentParser:
    """Add `data` and its subcommand `prepare`; parsed arguments go to `run`."""
    parser = subparsers.add_parser("data", help="prepare text for training", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    prepare = actions.add_parser(
        "prepare",
        help="tokenizer, token files and manifest from a corpus",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = PrepareSettings()
    prepare.add_argument("source", metavar="SOURCE", help="stdlib, FOLDER, FILE.jsonl, FILE or hf:NAME[:CONFIG]")
    prepare.add_argument("--out", required=True, metavar="FOLDER", help="folder to write; appears only when finished")
    prepare.add_argument(
        "--vocab-size",
        type=int,
        default=default.vocab_size,
        metavar="INT",
        help="tokens of the tokenizer, 256 bytes and <eod> among them (default: %(default)s)",
    )
    prepare.add_argument(
        "--text-key",
        default=default.text_key,
        metavar="KEY",
        help="where a record's text is: key of a .jsonl line, column of a dataset (default: %(default)s)",
    )
    for split in ("valid", "test"):
        prepare.add_argument(
            f"--{split}-percent",
            type=float,
            default=getattr(default, f"{split}_percent"),
            metavar="FLOAT",
            help=f"share of the documents for the {split} split; 0: none (default: %(default)s)",
        )
    prepare.add_argument(
        "--max-documents", type=int, default=None, metavar="INT", help="read the first so many (default: all of them)"
    )
    prepare.add_argument(
        "--workers",
        type=int,
        default=None,
        metavar="INT",
        help="threads that encode; changes nothing that is written (default: one a core)",
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

    manifest = prepare(
        arguments.source,
        arguments.out,
        vocab_size=arguments.vocab_size,
        text_key=arguments.text_key,
        valid_percent=arguments.valid_percent,
        test_percent=arguments.test_percent,
        max_documents=arguments.max_documents,
        workers=arguments.workers,
        overwrite=arguments.overwrite,
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
