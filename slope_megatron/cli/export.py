"""`slope export`: a trained run as a Hugging Face model, or in this project's packed form."""

import argparse
import sys
from pathlib import Path

from slope_megatron.cli.parser import manual

HF = """\
Write the newest checkpoint of RUN as a `transformers` model: config.json, generation_config.json, safetensors (dense,
with zeros where the run is 2:4), tokenizer files. The padding of the vocabulary is removed. The family (OPT, GPT-2,
LLaMA, Mistral, Mixtral, Qwen 3, BERT) is the one that this architecture is.
"""
PACKED = """\
Write the newest checkpoint of RUN in packed form: kept values, pattern bitmasks and adapters in safetensors, for
`slope generate` and `slope eval`, which need neither Megatron nor DeepSpeed to read it.
"""
EXAMPLES = {
    "hf": """\
examples:
  slope export hf runs/quickstart/sparse exported
  slope export hf runs/opt-2.6b exported --adapters lora --max-shard-size 2GB --dry-run
""",
    "packed": """\
examples:
  slope export packed runs/quickstart/sparse packed
  slope generate packed --prompt "def "
""",
}
EPILOG = EXAMPLES["hf"] + "  slope export packed runs/quickstart/sparse packed"


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "export",
        help="a trained run as a Hugging Face model or as a packed one",
        description="Read a run's checkpoint in one process, whatever layout wrote it, and write it in another form.",
        epilog=manual(EPILOG),
    )
    forms = parser.add_subparsers(dest="form", required=True, metavar="FORM")
    for name, text, function in (("hf", HF, run_hf), ("packed", PACKED, run_packed)):
        form = forms.add_parser(
            name,
            help={"hf": "a model for transformers", "packed": "2:4 form, for slope generate and slope eval"}[name],
            description=text,
            epilog=manual(EXAMPLES[name]),
        )
        add = form.add_argument
        add("source", type=Path, metavar="RUN", help="run folder, or what --save named in Megatron-LM")
        add("target", type=Path, metavar="OUT", help="folder to write; must be new or empty, appears when complete")
        add("--step", type=int, help="checkpoint of this step (default: the newest)")
        add("--tokenizer", type=Path, metavar="PATH", help="tokenizer's file or folder (default: the run's data's)")
        add("--max-shard-size", default="5GB", metavar="SIZE", help="of one file of weights (default: %(default)s)")
        add("--dry-run", action="store_true", help="say what would be written, and write nothing")
        form.set_defaults(run=function)
        if name == "hf":
            add(
                "--adapters",
                choices=("fold", "lora", "drop"),
                default="fold",
                help="fold: added to the weights, which are then no longer 2:4; lora: beside them, as a PEFT LoRA in "
                "OUT/adapter; drop: left out, which changes the model (default: %(default)s)",
            )
            families = ("auto", "opt", "gpt2", "llama", "mistral", "mixtral", "qwen3", "bert")
            add("--family", choices=families, default="auto", help="Hugging Face's model type (default: %(default)s)")
            add(
                "--dtype",
                choices=("keep", "bf16", "fp16", "fp32", "fp64"),
                default="keep",
                help="of the weights; keep: the run's own (default: %(default)s)",
            )


def open_run(arguments):
    """The source, once the target is known to be free."""
    from slope_megatron.export.output_folder import check_target, parse_size
    from slope_megatron.export.trained_run import TrainedRun
    from slope_megatron.integrations.megatron_lm.saved_model import SavedModel, is_saved_model

    size = parse_size(arguments.max_shard_size)
    check_target(arguments.target, 0)
    source = SavedModel if is_saved_model(arguments.source) else TrainedRun
    return source(arguments.source, arguments.step, arguments.tokenizer), size


def run_hf(arguments: argparse.Namespace) -> int:
    from slope_megatron.export import hf_export
    from slope_megatron.export.output_folder import check_target

    source, size = open_run(arguments)
    planned = hf_export.plan(
        source,
        family=arguments.family,
        adapters=arguments.adapters,
        dtype=arguments.dtype,
        max_shard_bytes=size,
    )
    check_target(arguments.target, planned.bytes)
    if not arguments.dry_run:
        hf_export.export(planned, arguments.target)
    sys.stdout.write(planned.describe(arguments.target) + "\n")
    return 0


def run_packed(arguments: argparse.Namespace) -> int:
    from slope_megatron.export import packed_export

    source, size = open_run(arguments)
    files = packed_export.plan(source, size)
    if not arguments.dry_run:
        packed_export.export(source, files, arguments.target)
    sys.stdout.write(packed_export.describe(source, files, arguments.target) + "\n")
    return 0
