"""`slope report`: runs side by side."""

import argparse
import sys
from pathlib import Path

from slope_megatron.cli.parser import manual


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "report",
        help="compare runs: losses, speed, memory, scores, versions",
        description="Write report.md, report.png and report.json that put runs side by side.",
        epilog=manual("example:\n  slope report runs/quickstart/sparse runs/quickstart/dense --out reports/quickstart"),
    )
    add = parser.add_argument
    add("runs", nargs="+", type=Path, metavar="RUN", help="run folders; memory is compared with the last one")
    add("--out", type=Path, default=Path("report"), help="folder to write into (default: %(default)s)")
    add("--overwrite", action="store_true", help="replace an earlier report in --out")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.evaluation.run_report import write_report
    from slope_megatron.storage.folders import output_folder

    output_folder(arguments.out, "--out")
    if (arguments.out / "report.md").exists() and not arguments.overwrite:
        raise ValueError(f"{arguments.out} holds a report already: give --overwrite, or another --out")
    path = write_report(arguments.runs, arguments.out)
    print(f"report: {path}", file=sys.stderr)
    return 0
