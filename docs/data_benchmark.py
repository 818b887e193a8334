"""`slope data prepare` beside Megatron-LM's `tools/preprocess_data.py`: the same text, tokenizer and workers, in turn.

    python docs/data_benchmark.py --megatron ../Megatron-LM --text text.jsonl --tokenizer tokenizer.model --workers 2

Both write whole files from whole files; imports, hashes and manifest are counted. It prints the seconds by the wall and
of the processors (which other work on the machine disturbs less), medians, and whether both wrote the same tokens.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def timed(command: list[str], environment: dict[str, str], folder: Path) -> tuple[float, float]:
    """Seconds by the wall and of all processors."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with open(folder / "log", "w") as log:
        subprocess.run(command, env=environment, cwd=folder, stdout=log, stderr=log, check=True)
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """The two command lines; `folder` is where they write."""
    whole = ["--valid-percent", "0", "--test-percent", "0", "--overwrite"]
    kind = "SentencePieceTokenizer" if options.tokenizer.endswith(".model") else "HuggingFaceTokenizer"
    shared = ["--workers", str(options.workers)]
    ours = ["-m", "slope_megatron", "data", "prepare", options.text, "--tokenizer", options.tokenizer, *whole]
    theirs = [f"{options.megatron}/tools/preprocess_data.py", "--input", options.text, "--append-eod"]
    theirs += ["--tokenizer-type", kind, "--tokenizer-model", options.tokenizer]
    return {
        "slope data prepare": [sys.executable, *ours, *shared, "--out", str(folder / "ours")],
        "preprocess_data.py": [sys.executable, *theirs, *shared, "--output-prefix", str(folder / "theirs")],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", required=True, help="a checkout of Megatron-LM")
    parser.add_argument("--text", required=True, help="a .jsonl of {'text': ...}")
    parser.add_argument("--tokenizer", required=True, help="tokenizer.model, or a folder with tokenizer.json")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    options.text, options.tokenizer, options.megatron = map(
        os.path.abspath, (options.text, options.tokenizer, options.megatron)
    )
    folder = Path(tempfile.mkdtemp(prefix="data_benchmark"))
    environments = {
        "slope data prepare": dict(os.environ),
        "preprocess_data.py": {
            **os.environ,
            "PYTHONPATH": f"{options.megatron}{os.pathsep}{os.environ.get('MEGATRON_PYTHONPATH', '')}",
            "HF_HUB_OFFLINE": "1",
        },
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in environments}
    for _ in range(options.repeats):
        for name, command in commands(options, folder).items():
            seconds[name].append(timed(command, environments[name], folder))
            print(name, *(f"{value:.1f}" for value in seconds[name][-1]), flush=True)
    ours, theirs = folder / "ours" / "train.bin", folder / "theirs_text_document.bin"
    tokens = ours.stat().st_size // (2 if (folder / "ours" / "manifest.json").read_text().count('"uint16"') else 4)
    same = ours.read_bytes() == theirs.read_bytes()
    print(f"{Path(options.text).stat().st_size / 1e6:.0f} MB, {tokens:,} tokens, the same in both: {same}")
    for name, pairs in seconds.items():
        wall, processor = (statistics.median(values) for values in zip(*pairs, strict=True))
        print(
            f"{name:20} median of {len(pairs)}: {wall:.1f} s, {tokens / wall:,.0f} tokens/s; "
            f"processors {processor:.1f} s, {tokens / processor:,.0f} tokens/s of one core"
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
