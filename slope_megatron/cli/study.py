"""`slope study`: a list of small runs, and what they say about methods."""

import argparse
import dataclasses
import fnmatch
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from slope_megatron.cli.launched_run import interrupt
from slope_megatron.cli.parser import manual
from slope_megatron.versions import check_core

DESCRIPTION = """\
Train a list of runs, several at once, and put them side by side. CONFIG names what they share and the groups of runs:
sizes x methods x learning rates x seeds. Each run is a `slope pretrain` with a settings file of its own; a finished one
adds a row to the CSV file. Runs that have a row are skipped, one that fails costs itself alone, and one that was
interrupted goes on from its checkpoint: give the same command again until nothing is left.
"""
EPILOG = """\
examples:
  slope study launch/study/toy.yaml --out runs/toy-study
  slope study launch/study/accuracy.yaml --source texts/ --dry-run
  slope study launch/study/accuracy.yaml --source texts/ --only 'sweep/*' --at-once 6 --budget-minutes 9
  slope study launch/study/accuracy.yaml --report

Writes OUT/data (tokenizer, tokens), OUT/runs (settings, log and folder of each run), OUT/rows.csv; with --report,
OUT/report.md and its charts. launch/study/ says in comments how a CONFIG is written.
"""
CODES = """\
exit codes:
    0  all runs that were asked for have a row
    1  runs failed, which are named with their logs; the others have theirs
    2  bad input: one sentence on standard error says what, and the way out
   75  the budget is spent, runs were stopped, or wait for others' rows: give the command again
  130  interrupted; runs that had begun are saved
"""
FAILED, UNFINISHED = 1, 75


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "study",
        help="train a list of runs, sizes x methods x learning rates x seeds; tables and charts",
        description=DESCRIPTION,
        epilog=manual(EPILOG, CODES),
    )
    add = parser.add_argument
    add("config", type=Path, metavar="CONFIG", help="YAML file of the study, or study/NAME of this package")
    add("--out", type=Path, default=Path("runs/study"), help="folder of everything written (default: %(default)s)")
    add("--rows", type=Path, metavar="CSV", help="file of the rows (default: OUT/rows.csv)")
    add("--source", help="text to train on, as in `slope data prepare`; default: the study's own")
    add("--data", type=Path, help="prepared data instead, as `slope data prepare` wrote it")
    add("--only", action="append", metavar="GLOB", help="runs whose name fits; may be given more than once")
    add("--at-once", type=int, default=1, help="runs that share a GPU, or the CPU (default: %(default)s)")
    add("--budget-minutes", type=float, help="after so long, runs save and stop; default: until all are done")
    add("--keep-checkpoints", action="store_true", help="of finished runs; else they go once the row is written")
    add("--tflops", type=float, help="for estimates: of a whole device, where no row tells")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--dry-run", action="store_true", help="list runs, tokens and estimated minutes; train nothing")
    action.add_argument("--report", action="store_true", help="write tables and charts of the rows; train nothing")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.data.manifest import load_manifest
    from slope_megatron.storage import locks
    from slope_megatron.storage.folders import output_folder
    from slope_megatron.study.report import write_report
    from slope_megatron.study.rows import Rows
    from slope_megatron.study.settings import read_study

    check_flags(arguments)
    study = read_study(arguments.config)
    if arguments.source:
        study = dataclasses.replace(study, corpus={**study.corpus, "source": arguments.source})
    out = output_folder(arguments.out, "--out")
    rows = Rows.read(arguments.rows or out / "rows.csv")
    data = arguments.data or out / "data"
    if arguments.data:
        load_manifest(data)
    if not (arguments.report or arguments.dry_run):
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "lock", "a") as lock:
            if not locks.take(lock, "two calls of `slope study` at once would train the same runs"):
                raise ValueError(f"--out {out} is in use by another `slope study`: wait for its end, or give another")
            # What that other call wrote until then is of this one's rows.
            return train(arguments, study, Rows.read(rows.path), out, data)
    runs = planned(arguments, study, rows, data)()
    if arguments.report:
        print(f"report: {write_report(study, runs, rows, out)}", file=sys.stderr)
    else:
        print(describe(arguments, runs, rows), end="")
    return 0


def check_flags(arguments: argparse.Namespace) -> None:
    """
    Raises:
        ValueError: a number that makes no sense.
    """
    if arguments.at_once < 1:
        raise ValueError(f"--at-once is {arguments.at_once}: it must be at least 1")
    for flag in ("budget_minutes", "tflops"):
        value = getattr(arguments, flag)
        if value is not None and not value > 0:
            raise ValueError(f"--{flag.replace('_', '-')} is {value}: it must be positive, or left out")


def planned(arguments: argparse.Namespace, study, rows, data: Path) -> Callable[[], list]:
    """The runs that were asked for, as the rows at each call tell them.

    Raises:
        ValueError: --only fits none.
    """
    from slope_megatron.study.runs import Plan

    everything = Plan(study, rows, *text_of(study, rows, data))

    def plan() -> list:
        globs = arguments.only or ["*"]
        return [run for run in everything.runs() if any(fnmatch.fnmatchcase(run.name, glob) for glob in globs)]

    if not plan():
        raise ValueError(f"--only {' '.join(arguments.only)} fits no run of {arguments.config}: see --dry-run")
    return plan


def text_of(study, rows, data: Path) -> tuple[int, str]:
    """(entries of the tokenizer, fingerprint) of prepared data; where there is none, what the rows say, or a guess.

    Raises:
        ValueError: the rows are of several texts.
    """
    from slope_megatron.data.manifest import load_manifest
    from slope_megatron.data.settings import PrepareSettings
    from slope_megatron.study.runs import fingerprint_of

    if (data / "manifest.json").is_file():
        manifest = load_manifest(data)
        return manifest["vocab_size"], fingerprint_of(manifest)
    known = {(row.vocabulary, row.data) for row in rows.rows if row.data}
    if len(known) > 1:
        raise ValueError(f"{rows.path} has rows of {len(known)} texts: give --data FOLDER, which says of which one")
    vocabulary, text = known.pop() if known else (study.corpus.get("vocab_size", PrepareSettings().vocab_size), "")
    source = f"are those of the text of {rows.path}" if text else "are a guess"
    print(f"{data} is not prepared yet: {vocabulary} entries of the vocabulary {source}", file=sys.stderr)
    return vocabulary, text


def devices() -> list[str | None]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES names them; a machine without any has one device."""
    import os

    import torch

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count()
    return [visible[index] if visible else str(index) for index in range(count)] or [None]


def estimator(arguments: argparse.Namespace, rows):
    """Minutes that a list of runs will take here."""
    import torch

    from slope_megatron.study import estimate

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    assumed, slots = estimate.flops(arguments.tflops), len(devices()) * arguments.at_once
    return lambda runs: estimate.minutes(runs, rows.rows, device, assumed, slots, arguments.at_once)


def describe(arguments: argparse.Namespace, runs: list, rows) -> str:
    """The list of --dry-run: what each run is, whether it has a row, and how long the others take."""
    from slope_megatron.study import estimate
    from slope_megatron.study.runs import millions

    minutes = estimator(arguments, rows)
    lines = [f"{'run':56} {'state':8} {'lr':>9} {'M tokens':>9} {'M params':>9} {'minutes':>8}"]
    left = {}
    for run in runs:
        done = run.lr is not None and rows.find(run.key) is not None
        if not done:
            left[run.key] = run  # equal settings in two groups are trained once
        state = "done" if done else "waits" if run.lr is None else "left"
        rate = "of sweep" if run.lr is None else f"{run.lr:g}"
        # By itself it has one slot of all that the estimate shares out.
        own = "" if done else f"{minutes([run]) * len(devices()) * arguments.at_once:8.1f}"
        size = f"{millions(run.tokens):>9} {run.body_parameters / 1e6:9,.2f}"
        lines.append(f"{run.name:56} {state:8} {rate:>9} {size} {own}".rstrip())
    tokens, total = sum(run.tokens for run in left.values()), minutes(list(left.values()))
    lines.append(
        f"{len(runs)} runs, {len(left)} to train (equal ones once): {millions(tokens)} M tokens, about "
        f"{estimate.duration(total)} on {len(devices())} x {arguments.at_once} at once; by this device's rows, or at "
        f"{estimate.flops(arguments.tflops) / 1e12:g} TFLOP/s (--tflops)"
    )
    return "\n".join(lines) + "\n"


def train(arguments: argparse.Namespace, study, rows, out: Path, data: Path) -> int:
    """Prepare the text, then train what has no row."""
    from slope_megatron.bench.progress import Clock
    from slope_megatron.study.work import Place, Work

    check_core()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, interrupt)
    budget = None if arguments.budget_minutes is None else 60.0 * arguments.budget_minutes
    clock = Clock(budget)
    if not arguments.data:
        prepare_once(study, data, clock)
    plan = planned(arguments, study, rows, data)
    check_runs(plan(), data, budget)
    slots = tuple(device for device in devices() for _ in range(arguments.at_once))
    place = Place(out, data.absolute(), slots, arguments.at_once, arguments.keep_checkpoints)
    work = Work(plan, rows, place, clock, estimator(arguments, rows))
    try:
        work.do()
    except KeyboardInterrupt:
        raise KeyboardInterrupt("runs that had begun are saved; the same command goes on") from None
    return conclude(arguments, work, clock)


def prepare_once(study, data: Path, clock) -> None:
    """Tokenize the study's text; not again where it was done with these settings, also if the text has gone since.

    Raises:
        ValueError: the study names no text, it cannot be prepared, or another one is there.
    """
    from slope_megatron.data.manifest import load_manifest
    from slope_megatron.data.prepare import prepare
    from slope_megatron.data.settings import PrepareSettings

    corpus = dict(study.corpus)
    source = corpus.pop("source", None)
    if source is None:
        raise ValueError("the study names no corpus.source: give --source TEXT, or --data FOLDER")
    if (data / "manifest.json").is_file():
        manifest = load_manifest(data)
        now = dataclasses.asdict(PrepareSettings(**corpus))
        now["source"] = source if isinstance(source, str) else ", ".join(source)
        # A setting that did not exist then had no effect: that is its default.
        then = dataclasses.asdict(PrepareSettings()) | manifest["settings"] | {"source": manifest["source"]}
        changed = [f"{key} {then[key]} then, {now[key]} now" for key in now if then[key] != now[key]]
        if not changed:
            return
        raise ValueError(
            f"{data} was prepared otherwise than the study says ({'; '.join(changed)}): give another --out, or "
            f"--data {data} to train on what is there"
        )
    clock.say(f"data: {source} -> {data}")
    prepare(source, data, **corpus)


def check_runs(runs: list, data: Path, budget: float | None) -> None:
    """
    Raises:
        ValueError: runs would validate nothing, or could not be stopped by a budget.
    """
    from slope_megatron.data.manifest import load_manifest

    if not load_manifest(data)["splits"]["valid"]["tokens"]:
        raise ValueError(f"{data} holds no validation text, and rows are validation losses: give it a valid_percent")
    for run in runs:
        if not run.config.train.eval_samples:
            raise ValueError(f"run {run.name} has eval_samples 0, and rows are validation losses: give it 64, say")
        if budget is not None and not run.config.train.save_interval:
            raise ValueError(
                f"run {run.name} has save_interval 0, so --budget-minutes would lose it: give it 500, say, or no budget"
            )


def conclude(arguments: argparse.Namespace, work, clock) -> int:
    """What is done, what failed and what is left, in words; the exit code."""
    from slope_megatron.study.report import warnings_of

    left = work.todo()
    clock.say(f"{len(work.plan()) - len(left)} rows in {work.rows.path}, {len(left)} runs without one")
    for warning in warnings_of(work.plan(), work.rows):
        clock.say(warning)
    for reason in work.stopped.values():
        clock.say(reason)
    for reason in work.failed.values():
        clock.say(f"no row: {reason}")
    if work.failed:
        return FAILED
    waiting = [run.name for run in left if run.lr is None]
    if left and len(waiting) == len(left):
        clock.say(f"these wait for the learning rate that a sweep tells: {', '.join(waiting)}")
    return UNFINISHED if left else 0
