"""`slope import`: a dense Hugging Face model as what `slope pretrain --init-from` starts from."""

import argparse
import shlex
import sys
from pathlib import Path

from slope_megatron.cli.parser import manual
from slope_megatron.config import DataConfig

DESCRIPTION = """\
Convert a dense Hugging Face model (OPT, GPT-2, LLaMA, Mistral, BERT; safetensors only, nothing is unpickled) into a
checkpoint that `slope pretrain` prunes as it loads it.
"""
EXAMPLES = """\
example:
  slope import hf opt-125m/ dense-opt
  slope pretrain --config dense-opt/model.yaml --init-from dense-opt --slope-pattern magnitude --data data/mine \\
      --out runs/pruned
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "import",
        help="a dense Hugging Face model as a checkpoint to start from",
        description=DESCRIPTION,
        epilog=manual(EXAMPLES),
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    form = forms.add_parser(
        "hf",
        help="from a folder of transformers",
        description=DESCRIPTION,
        epilog=manual(EXAMPLES),
    )
    add = form.add_argument
    add("source", type=Path, metavar="FOLDER", help="config.json and safetensors of a dense model")
    add("target", type=Path, metavar="OUT", help="folder to write; must be new or empty, appears when complete")
    add("--dtype", choices=("bf16", "fp32"), default="fp32", help="of the written tensors (default: %(default)s)")
    add("--dry-run", action="store_true", help="check the model, say what would be written, and write nothing")
    form.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.export import hf_checkpoint
    from slope_megatron.export.hf_config import model_config
    from slope_megatron.export.hf_export import DTYPES
    from slope_megatron.export.output_folder import check_target

    check_target(arguments.target, 0)
    dtype = DTYPES[arguments.dtype]
    fields, weights = hf_checkpoint.open_folder(arguments.source)
    size = hf_checkpoint.total_bytes(weights, dtype)
    check_target(arguments.target, size)
    if not arguments.dry_run:
        hf_checkpoint.import_hf(arguments.source, arguments.target, dtype)
    would = "would be a" if arguments.dry_run else "a"
    command = start_command(arguments.target, model_config(fields).max_positions)
    sys.stdout.write(
        f"{arguments.target}: {would} {fields['model_type']} model, {len(weights)} tensors, {size / 1e6:,.1f} MB; to "
        f"start from it, with text that `slope data prepare` has prepared with its tokenizer: {command}\n"
    )
    return 0


def start_command(target: Path, positions: int | None) -> str:
    """The command that starts from a converted model: it keeps the largest of the trained weights.

    Args:
        positions: that the model has; None: as many as one likes.
    """
    command = ["slope", "pretrain", "--config", f"{target}/model.yaml", "--init-from", str(target)]
    command += ["--slope-pattern", "magnitude", "--data", "DATA", "--out", "RUN"]
    if positions is not None and positions < DataConfig().seq_length:
        command += ["--seq-length", str(positions)]
    return shlex.join(command)
