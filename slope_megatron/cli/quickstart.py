"""`slope quickstart`: corpus, sparse run, dense baseline, report, in one command on any machine."""

import argparse
import logging
import os
import platform
import re
import shlex
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from slope_megatron.cli.launched_run import interrupt, launch, run_command
from slope_megatron.cli.parser import Parser, manual
from slope_megatron.config.json_file import read_json
from slope_megatron.data.formats import FORMATS
from slope_megatron.storage import folders, whole
from slope_megatron.versions import check_core

if TYPE_CHECKING:
    from slope_megatron.config import Config

# Flags that go to `slope data prepare` as they are.
PREPARED = ("vocab_size", "format", "include")
EPILOG = """\
examples:
  slope quickstart
  slope quickstart --steps 50 --hidden 128 --no-dense-twin --out runs/tiny
  slope quickstart --source my_texts/ --out runs/mine

Writes OUT/data (tokenizer, tokens), OUT/sparse and OUT/dense (runs), OUT/report.md, OUT/report.png, OUT/summary.json.
"""
logger = logging.getLogger(__name__)
# Says whose folder it is; what a resumed quickstart goes on with.
MARK, PROGRESS = "quickstart.json", "progress.json"
DAMAGED_SUMMARY = "remove it and DONE beside it, and give --resume"


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "quickstart",
        help="prepare a corpus, train a small sparse model and its dense baseline, write a report",
        description="Pretrain a small 2:4 OPT-shaped model with SLoPe on 4 ranks, then its dense baseline; compare.",
        epilog=manual(EPILOG),
    )
    add = parser.add_argument
    add("--out", default="runs/quickstart", help="folder of everything that is written (default: %(default)s)")
    add("--source", default="stdlib", help="corpus: stdlib, a folder, .txt, .jsonl, or hf:NAME (default: %(default)s)")
    add("--format", default="auto", choices=("auto", *FORMATS), help="of a folder's files, as in `slope data prepare`")
    add("--include", default="", metavar="PATTERN,...", help="files of a folder, as in `slope data prepare`")
    add("--vocab-size", type=int, default=2048, help="SentencePiece pieces (default: %(default)s)")
    add("--steps", type=int, default=300, help="optimizer steps (default: %(default)s)")
    add("--hidden", type=int, default=256, help="hidden size (default: %(default)s)")
    add("--layers", type=int, default=4, help="transformer blocks (default: %(default)s)")
    add("--seq-length", type=int, default=128, help="tokens of a sample (default: %(default)s)")
    add("--global-batch-size", type=int, default=16, help="samples of a step (default: %(default)s)")
    add("--lr", type=float, default=2e-3, help="peak learning rate (default: %(default)s)")
    add("--sparse-lr-multiplier", type=float, default=2.0, help="of the 2:4 weights (default: %(default)s)")
    add("--ranks", type=int, default=4, help="processes (default: %(default)s)")
    add("--tensor-parallel", type=int, default=2, help="ranks that share one layer (default: %(default)s)")
    add("--dtype", default="measure", choices=("measure", "bf16", "fp32"), help="parameter type (default: %(default)s)")
    add("--seed", type=int, default=1234, help="seed of weights, patterns and data order (default: %(default)s)")
    add("--no-dense-twin", action="store_true", help="leave the dense run out")
    add("--resume", action="store_true", help="go on where an interrupted quickstart stopped")
    add("--overwrite", action="store_true", help="delete an earlier quickstart in OUT")
    parser.set_defaults(run=run)


def pretrain_flags(arguments, out: Path, dtype: str, *, dense: bool) -> list[str]:
    """The flags of one of the two runs; they differ in `--no-slope` and the folder alone."""
    save = max(1, arguments.steps // 4)
    values = {
        "data": out / "data",
        "out": out / ("dense" if dense else "sparse"),
        "steps": arguments.steps,
        "num-layers": arguments.layers,
        "hidden-size": arguments.hidden,
        "num-attention-heads": max(arguments.tensor_parallel, arguments.hidden // 64),
        "seq-length": arguments.seq_length,
        "micro-batch-size": max(1, arguments.global_batch_size // (2 * arguments.ranks // arguments.tensor_parallel)),
        "global-batch-size": arguments.global_batch_size,
        "tensor-parallel": arguments.tensor_parallel,
        "lr": arguments.lr,
        "min-lr": arguments.lr / 10,
        "warmup-steps": max(1, arguments.steps // 10),
        "eval-interval": max(1, arguments.steps // 8),
        "eval-samples": max(1, 32768 // arguments.seq_length),
        "save-interval": save,
        "log-interval": 5,
        "dtype": dtype,
        "seed": arguments.seed,
        "slope-adapter-rank": 16,
        "slope-lazy-fraction": 0.1,
        "slope-backward-mask-interval": 20,
        "slope-lr-multiplier": arguments.sparse_lr_multiplier,
    }
    flags = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    return [*flags, "--no-slope"] if dense else flags


def check_flags(arguments, out: Path) -> dict[str, "Config"]:
    """Both runs' configurations, refused here rather than by four ranks."""
    from slope_megatron.config import add_config_arguments, read_config

    parser = Parser()
    add_config_arguments(parser)
    configs = {}
    for name in ("sparse",) if arguments.no_dense_twin else ("sparse", "dense"):
        flags = pretrain_flags(arguments, out, "fp32", dense=name == "dense")
        config, _ = read_config(parser.parse_args(flags))
        config.data.micro_batches(config.parallel.data_parallel(arguments.ranks))
        configs[name] = config
    return configs


def open_folder(arguments, out: Path) -> dict:
    """The rules of a run folder, for the folder of both runs.

    Returns:
        what an earlier start of this quickstart found out (`keep_progress`); empty: it starts.
    Raises:
        ValueError: something else is there, or a quickstart that was not to be continued or deleted.
    """
    folders.output_folder(out, "--out")
    mark = out / MARK
    apart = ("run", "rest", "resume", "overwrite", "verbose", "command")
    settings = {name: value for name, value in vars(arguments).items() if name not in apart}
    if not folders.is_free(out):
        if not mark.is_file():
            raise ValueError(f"{out} is not empty and holds no quickstart: give another --out")
        if arguments.overwrite:
            folders.empty(out, last=MARK)
        elif not arguments.resume:
            raise ValueError(f"{out} holds a quickstart already: give --resume, --overwrite or another --out")
        elif read_json(mark, "give --overwrite, or another --out") != settings:
            raise ValueError(f"{out} was started with other flags: give the same ones to --resume, or another --out")
        else:
            return read_progress(out)
    out.mkdir(parents=True, exist_ok=True)
    whole.write_json(mark, settings)
    return {}


def read_progress(out: Path) -> dict:
    """What `keep_progress` kept; where that cannot be read, a line says what it costs."""
    path = out / PROGRESS
    try:
        return read_json(path, "seconds are counted, and the parameter type chosen, anew", holds=("dtype", "seconds"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        logger.warning("%s", error)
        return {}


def keep_progress(out: Path, dtype: list[str] | None, seconds: dict[str, float]) -> None:
    """The parameter type, its reason, and the seconds of each stage so far: a resumed quickstart goes on with them."""
    whole.write_json(out / PROGRESS, {"dtype": dtype, "seconds": seconds})


def choose_dtype(arguments) -> tuple[str, str]:
    """The faster of bf16 and fp32 for this model's MLP on this machine, measured; and the reason in words."""
    if arguments.dtype != "measure":
        return arguments.dtype, "as asked for"
    import torch

    if torch.cuda.is_available():
        return "bf16", "the GPU's sparse tensor cores take it"
    from torch.utils.benchmark import Timer

    seconds = {}
    for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        tensors = {
            "x": torch.randn(2048, arguments.hidden, dtype=dtype),
            "weight": torch.randn(4 * arguments.hidden // arguments.tensor_parallel, arguments.hidden, dtype=dtype),
        }
        # On one thread.
        mlp = Timer("torch.layer_norm(torch.relu(x @ weight.t()) @ weight, x.shape[1:])", globals=tensors)
        seconds[name] = mlp.blocked_autorange().median
    chosen = min(seconds, key=seconds.__getitem__)
    milliseconds = ", ".join(f"{name} {1000 * value:.2f} ms" for name, value in seconds.items())
    return chosen, f"the faster one here, on an MLP of this size and one core: {milliseconds}"


def prepared(arguments, out: Path) -> dict:
    """The manifest of the corpus in OUT/data, prepared now if need be.

    Raises:
        ValueError: it cannot be; then OUT is gone again, if nothing else is in it.
    """
    from slope_megatron.data.prepare import prepare

    try:
        return prepare(arguments.source, out / "data", **{name: getattr(arguments, name) for name in PREPARED})
    except ValueError:
        # Whatever else is there is somebody's work: trained runs whose data was moved away, or the parts of another
        # process that is preparing now.
        if folders.is_free(out, apart_from=(MARK,)):
            folders.remove(out)
        raise


def write_results(
    out: Path,
    configs: dict[str, "Config"],
    summaries: dict[str, dict],
    manifest: dict,
    seconds: dict,
    dtype_reason: str,
) -> None:
    """summary.json, for programs, and the report of both runs."""
    from slope_megatron.evaluation.run_report import write_report

    config, corpus = configs["sparse"], manifest["sources"][0]["corpus"]
    machine = {"system": platform.platform(), "processor": processor(), "cores": os.cpu_count()}
    summary = {
        **summaries,
        "unigram_entropy": summaries["sparse"]["unigram_entropy"],
        "double_prune_extra_zeros": summaries["sparse"]["double_pruning"],
        "corpus": {"source": manifest["source"], **corpus},
        "seconds": seconds["total"],
        "stage_seconds": seconds,
        "machine": machine,
    }
    whole.write_json(out / "summary.json", summary)
    splits = ", ".join(f"{name} {split['tokens']:,}" for name, split in manifest["splits"].items())
    notes = (
        f"machine: {machine['processor']}, {machine['cores']} cores, {machine['system']}",
        f"corpus: {manifest['source']}, {corpus['bytes'] / 1e6:.1f} MB, SHA-256 {corpus['sha256']}; tokens: {splits}; "
        f"SentencePiece BPE, {manifest['vocab_size']} pieces; documents are split by file",
        f"parameter type: {dtype_reason}",
        f"adapters: rank {config.slope.rank}, from step {config.adapter_start} on: lazy fraction "
        f"{config.slope.lazy_fraction:g}, ten times the paper's 0.01, so that they can be seen to learn in a short run",
        f"learning rate: {config.optimizer.lr:g}, of the 2:4 values {config.slope.lr_multiplier:g} times as high",
        "seconds: " + ", ".join(f"{stage} {value:.0f}" for stage, value in seconds.items()),
    )
    write_report([out / name for name in summaries], out, notes)


def processor() -> str:
    path = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)", path.read_text() if path.is_file() else "", re.M)
    return found[1] if found else platform.machine()


def run(arguments: argparse.Namespace) -> int:
    """The four stages."""
    check_core()
    for signum in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(signum, interrupt)
    out = Path(arguments.out)
    configs = check_flags(arguments, out)
    before = open_folder(arguments, out)
    if (out / "report.md").is_file():
        print(f"{out} is finished: nothing was changed. Its report: {out / 'report.md'}", file=sys.stderr)
        return 0
    started = time.perf_counter()
    seconds: dict[str, float] = before.get("seconds", {})
    chosen = before.get("dtype")
    begun = 0.0

    def stage(text: str):
        nonlocal begun
        begun = time.perf_counter()
        print(f"[{begun - started:5.0f} s] {text}", file=sys.stderr, flush=True)

    def finish(name: str):
        seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - begun
        keep_progress(out, chosen, seconds)

    stage(f"data: {arguments.source} -> {out / 'data'}")
    manifest = prepared(arguments, out)
    finish("data")
    # Measured once: a run that goes on keeps its type.
    chosen = chosen or list(choose_dtype(arguments))
    keep_progress(out, chosen, seconds)
    dtype, dtype_reason = chosen
    print(f"parameter type: {dtype}, {dtype_reason}", file=sys.stderr)
    summaries = {}
    for name in configs:
        flags = pretrain_flags(arguments, out, dtype, dense=name == "dense")
        stage(f"{name} run: {run_command(flags, arguments.ranks)}")
        # A run that was told to stop has a summary too, and is not done.
        if not (out / name / "DONE").is_file():
            try:
                launch(flags, arguments.ranks, out / name)
            finally:
                finish(name)
        summaries[name] = read_json(out / name / "summary.json", DAMAGED_SUMMARY)
    seconds["total"] = sum(seconds.values())
    write_results(out, configs, summaries, manifest, seconds, dtype_reason)
    print(f"[{seconds['total']:5.0f} s] report: {out / 'report.md'}, plot: {out / 'report.png'}", file=sys.stderr)
    print(f'its text: slope generate {shlex.quote(str(out / "sparse"))} --prompt "def "', file=sys.stderr)
    return 0
