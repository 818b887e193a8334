"""`slope eval`: scores of a trained model on SQuAD, GLUE and the tasks of lm-evaluation-harness."""

import argparse
import dataclasses
import json
from pathlib import Path

from slope_megatron.cli.parser import manual

SUITES = {
    "squad": """\
Fine-tune an exported BERT on SQuAD v1.1 and print exact match and F1 on its dev questions. MODEL is a folder that
`slope export hf` wrote; zeros of a 2:4 model stay, its adapters (--adapters lora) are trained along.
""",
    "glue": """\
Fine-tune an exported BERT on one task of GLUE and print that task's metric. MODEL is a folder that `slope export hf`
wrote; zeros of a 2:4 model stay, its adapters (--adapters lora) are trained along.
""",
    "lm": """\
Score a decoder on tasks of lm-evaluation-harness, without training. MODEL is a run folder, a packed export or a
Hugging Face folder.
""",
}
EXAMPLES = {
    "squad": """\
  slope eval squad bert --run runs/bert
  slope eval squad bert --train train-v1.1.json --dev dev-v1.1.json      (where the hub cannot be reached)
""",
    "glue": """\
  slope eval glue bert --task mrpc --run runs/bert
  slope eval glue bert --task cola --data glue/cola                      (train.jsonl and validation.jsonl there)
""",
    "lm": """\
  slope eval lm runs/gpt2
  slope eval lm packed --tasks piqa,winogrande --limit 100
  slope eval lm packed --tasks mine --include-path my_tasks              (mine.yaml there; no hub needed)
""",
}
EPILOG = f"""\
examples:
{"".join(EXAMPLES.values())}
Defaults are the published settings. Scores go to the screen and to scores/NAME.json of --run (default: of MODEL), where
`slope report` finds them.
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "eval",
        help="scores: SQuAD and GLUE for BERT, zero-shot tasks for decoders",
        description="Fine-tune and score an exported BERT, or score a decoder zero-shot.",
        epilog=manual(EPILOG),
    )
    suites = parser.add_subparsers(dest="suite", required=True, metavar="SUITE")
    squad, glue, lm = (
        suites.add_parser(name, help=text, description=SUITES[name], epilog=manual(f"examples:\n{EXAMPLES[name]}"))
        for name, text in (
            ("squad", "SQuAD v1.1: exact match and F1"),
            ("glue", "one task of GLUE, by its own metric"),
            ("lm", "tasks of lm-evaluation-harness"),
        )
    )
    for suite, function in ((squad, run_squad), (glue, run_glue), (lm, run_lm)):
        suite.add_argument("model", type=Path, metavar="MODEL", help="folder of the model")
        suite.add_argument("--run", dest="run_folder", type=Path, metavar="RUN", help="run that the score belongs to")
        suite.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
        suite.set_defaults(run=function)
    squad.add_argument("--train", type=Path, metavar="JSON", help="questions to train on (default: the hub's)")
    squad.add_argument("--dev", type=Path, metavar="JSON", help="questions to score on (default: the hub's)")
    squad.add_argument("--stride", type=int, default=128, help="tokens from window to window (default: %(default)s)")
    glue.add_argument("--task", required=True, help="cola, sst2, mrpc, stsb, qqp, rte, mnli or qnli")
    glue.add_argument("--data", type=Path, metavar="FOLDER", help="train.jsonl, validation.jsonl (default: the hub's)")
    for suite, published in ((squad, (3e-5, 2, 24, 384)), (glue, (2.4e-6, None, 4, 128))):
        add = suite.add_argument
        lr, epochs, batch, length = published
        add("--lr", type=float, default=lr, help="peak learning rate (default: %(default)s)")
        add("--epochs", type=int, default=epochs, help=f"passes (default: {epochs or '5 for cola and mrpc, else 3'})")
        add("--batch-size", type=int, default=batch, help="samples of a step (default: %(default)s)")
        add("--max-length", type=int, default=length, help="tokens of a sample (default: %(default)s)")
        add("--seed", type=int, default=0, help="of the new head and the order (default: %(default)s)")
        add("--max-steps", type=int, help="stop after so many steps (default: all epochs)")
    add = lm.add_argument
    add("--tasks", help="the harness's names, with commas (default: the eight of the paper's GPT-2 table)")
    add("--include-path", type=Path, metavar="FOLDER", help="task files besides the harness's own")
    add("--few-shot", type=int, default=0, help="examples in front of each question (default: %(default)s)")
    add("--limit", type=int, help="questions of each task (default: all)")
    add("--batch-size", type=int, default=8, help="questions at once (default: %(default)s)")
    add("--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="to compute in (default: the model's own)")


def settings_of(arguments, epochs: int):
    from slope_megatron.evaluation.fine_tuning import FineTuning

    return FineTuning(
        lr=arguments.lr,
        epochs=epochs if arguments.epochs is None else arguments.epochs,
        batch_size=arguments.batch_size,
        max_length=arguments.max_length,
        seed=arguments.seed,
        max_steps=arguments.max_steps,
    )


def finish(arguments, name: str, settings: dict, scores: dict) -> int:
    """Print the scores and keep them."""
    from slope_megatron.evaluation.scores import write_scores

    path = write_scores(arguments.run_folder or arguments.model, name, arguments.model, settings, scores)
    print(json.dumps({"scores": scores, "file": str(path)}, indent=1))
    return 0


def check_run_folder(arguments) -> None:
    """
    Raises:
        ValueError: --run is no folder; hours of scoring would be lost.
    """
    if arguments.run_folder is not None and not arguments.run_folder.is_dir():
        raise ValueError(f"--run {arguments.run_folder} is no folder: give the run that the score belongs to")


def run_squad(arguments: argparse.Namespace) -> int:
    from slope_megatron.evaluation import squad
    from slope_megatron.evaluation.models import choose_device

    check_run_folder(arguments)
    if (arguments.train is None) != (arguments.dev is None):
        raise ValueError("--train and --dev go together: give both files, or neither for the hub's")
    settings = settings_of(arguments, squad.PUBLISHED.epochs)
    device = choose_device(arguments.device)
    scores = squad.evaluate(arguments.model, arguments.train, arguments.dev, settings, arguments.stride, device)
    return finish(arguments, "squad", dataclasses.asdict(settings), scores)


def run_glue(arguments: argparse.Namespace) -> int:
    from slope_megatron.evaluation import glue
    from slope_megatron.evaluation.models import choose_device

    check_run_folder(arguments)
    epochs = glue.TASKS[arguments.task].epochs if arguments.task in glue.TASKS else 1
    settings = settings_of(arguments, epochs)
    device = choose_device(arguments.device)
    scores = glue.evaluate(arguments.model, arguments.task, arguments.data, settings, device)
    return finish(arguments, f"glue-{arguments.task}", dataclasses.asdict(settings), scores)


def run_lm(arguments: argparse.Namespace) -> int:
    from slope_megatron.evaluation import harness

    check_run_folder(arguments)
    for flag, value, least in (
        ("--limit", arguments.limit, 1),
        ("--batch-size", arguments.batch_size, 1),
        ("--few-shot", arguments.few_shot, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{flag} is {value}: it must be at least {least}")
    if arguments.include_path is not None and not arguments.include_path.is_dir():
        raise ValueError(f"--include-path {arguments.include_path} is no folder: give one with task files (.yaml)")
    tasks = arguments.tasks.split(",") if arguments.tasks else list(harness.TASKS)
    scores = harness.evaluate(
        arguments.model,
        tasks,
        include_path=arguments.include_path,
        few_shot=arguments.few_shot,
        limit=arguments.limit,
        batch_size=arguments.batch_size,
        device=arguments.device,
        dtype=arguments.dtype,
    )
    settings = {"tasks": tasks, "few_shot": arguments.few_shot, "limit": arguments.limit}
    return finish(arguments, "lm", settings, scores)
