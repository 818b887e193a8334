"""Trains the same small runs at two commits and compares their losses and gradient norms to the bit.

    python tests/same_losses.py BEFORE [AFTER] [--steps N] [--only NAME ...]

Each commit is checked out into a temporary git worktree, prepares its data and trains there; nothing is installed and
the working tree is not touched, so commit first. Exit code 0: all equal; 1: a difference, named by its first step.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Their readings are compared, one a step.
COMPARED = ("loss", "grad_norm")
CORPUS = Path(sysconfig.get_paths()["stdlib"]) / "asyncio"
SMALL = "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 64"
BATCH = "--micro-batch-size 2 --global-batch-size 8"
# Adapters join halfway, and the second pruning is chosen anew within the run.
SLOPE = "--slope-adapter-rank 4 --slope-lazy-fraction 0.5 --slope-backward-mask-interval 5"
LLAMA = "--activation silu --gated-mlp --normalization RMSNorm --position rope --no-linear-bias --no-tie-embeddings"
# name -> ranks and flags. The first is the model of `slope quickstart`, at its layout.
CASES = {
    "quickstart, TP 2 x DP 2, bf16": (
        4,
        "--num-layers 4 --hidden-size 256 --num-attention-heads 4 --seq-length 128 --micro-batch-size 4 "
        "--global-batch-size 16 --tensor-parallel 2 --dtype bf16 --slope-adapter-rank 16 --slope-lazy-fraction 0.5 "
        "--slope-backward-mask-interval 5 --slope-lr-multiplier 2",
    ),
    "one rank, LLaMA, mode full, fp32": (1, f"{SMALL} {BATCH} {SLOPE} {LLAMA} --slope-mode full --dtype fp32"),
    "TP 2 + sequence parallel, bf16": (
        2,
        f"{SMALL} {BATCH} {SLOPE} --tensor-parallel 2 --sequence-parallel --dtype bf16",
    ),
    "DP 2, ZeRO-3, fp32": (2, f"{SMALL} {BATCH} {SLOPE} --zero-stage 3 --dtype fp32"),
    "PP 2, dense, fp32": (2, f"{SMALL} {BATCH} --pipeline-parallel 2 --no-slope --dtype fp32"),
}


def run(command: list[str], checkout: Path) -> None:
    """A command at one commit; its output is shown where it fails."""
    paths = os.pathsep.join(map(str, (checkout, checkout / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "DS_LOG_LEVEL": "error"}
    done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with exit code {done.returncode}:\n{done.stdout}{done.stderr}"[-4000:])


def readings(checkout: Path, out: Path, steps: int, names: list[str]) -> dict[str, list[tuple]]:
    """Name of a case -> what `COMPARED` read at each step, at the commit in `checkout`."""
    data, found = out / "data", {}
    slope = [sys.executable, "-m", "slope_megatron"]
    run([*slope, "data", "prepare", str(CORPUS), "--out", str(data), "--vocab-size", "512"], checkout)
    for number, name in enumerate(names):
        ranks, flags = CASES[name]
        folder = out / f"run{number}"
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        common = f"--steps {steps} --warmup-steps 2 --lr 2e-3 --eval-samples 8 --log-interval 1 --seed 1234".split()
        where = ["--data", str(data), "--out", str(folder)]
        run([*launcher, "-m", "slope_megatron", "pretrain", *where, *common, *flags.split()], checkout)
        lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
        # JSON keeps every bit of a float.
        found[name] = [tuple(line[key] for key in COMPARED) for line in lines if "loss" in line]
        assert len(found[name]) == steps, f"{name}: {len(found[name])} of {steps} steps in metrics.jsonl"
        print(f"  {name}: loss {found[name][0][0]:.4f} .. {found[name][-1][0]:.4f}", flush=True)
    return found


def readings_at(commit: str, steps: int, names: list[str]) -> dict[str, list[tuple]]:
    """The same at any commit, in a worktree that goes again."""
    print(f"{commit}:", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder) / "checkout"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(checkout), commit], check=True)
        try:
            return readings(checkout, Path(folder), steps, names)
        finally:
            subprocess.run([*git, "remove", "--force", str(checkout)], check=True)


def verdict(before: list[tuple], after: list[tuple]) -> str:
    """`equal`, or the first step that differs and by how much."""
    for step, (old, new) in enumerate(zip(before, after, strict=True), 1):
        for key, one, other in zip(COMPARED, old, new, strict=True):
            if one != other:
                return f"{key} of step {step}: {one!r} became {other!r}"
    return "equal"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", help="commit before the change")
    parser.add_argument("after", nargs="?", default="HEAD", help="commit with the change (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="of each run (default: %(default)s)")
    parser.add_argument("--only", nargs="+", choices=list(CASES), default=list(CASES), help="some of the runs")
    arguments = parser.parse_args()
    steps, names = arguments.steps, arguments.only
    before, after = (readings_at(commit, steps, names) for commit in (arguments.before, arguments.after))
    verdicts = {name: verdict(before[name], after[name]) for name in names}
    print(f"\n| run, {steps} steps | {arguments.before} and {arguments.after} |\n| --- | --- |")
    for name, said in verdicts.items():
        print(f"| {name} | {said} |")
    return int(any(said != "equal" for said in verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
