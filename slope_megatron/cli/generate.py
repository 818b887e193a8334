"""`slope generate`: text from a trained run, or from a packed export."""

import argparse
import json
import logging
import sys
import time
from pathlib import Path

from slope_megatron.cli.parser import manual
from slope_megatron.config.slope import BACKENDS

logger = logging.getLogger(__name__)
EPILOG = """\
examples:
  slope generate runs/quickstart/sparse --prompt "def "
  slope generate packed --prompt "import " --max-tokens 200 --temperature 0
  cat prompts.txt | slope generate packed --prompts - --batch-size 8 > answers.jsonl

With --prompt, text goes to the terminal as it is drawn. With --prompts, each line of the file is a prompt (of .jsonl,
.json or .parquet: what each record has under "prompt"; the file may be packed: .gz, .bz2, .xz, .zst), and for each a
JSON record {"prompt", "text", "tokens"} is printed on a line, in the same order.
"""


def add_parser(subcommands) -> None:
    parser = subcommands.add_parser(
        "generate",
        help="continue a prompt with a trained model",
        description="Continue prompts with a run's newest checkpoint or a packed export; the same seed, the same text.",
        epilog=manual(EPILOG),
    )
    add = parser.add_argument
    add("model", type=Path, metavar="MODEL", help="run folder, or a folder that `slope export packed` wrote")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="text to continue")
    source.add_argument("--prompts", metavar="FILE", help="file with a prompt in each line; -: standard input")
    add("--max-tokens", type=int, default=64, help="new tokens at most (default: %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token each time (default: %(default)s)")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="draw from the likeliest tokens of this total probability (default: %(default)s)",
    )
    add("--seed", type=int, default=1234, help="of the draws (default: %(default)s)")
    add(
        "--batch-size",
        type=int,
        default=8,
        help="prompts of one batch; does not change the text drawn by more than rounding (default: %(default)s)",
    )
    add("--step", type=int, help="checkpoint of this step of a run (default: the newest)")
    add("--tokenizer", type=Path, metavar="PATH", help="file or folder of the tokenizer (default: the model's own)")
    add("--dtype", choices=("keep", "bf16", "fp32"), default="keep", help="to compute in (default: the model's own)")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--backend", choices=BACKENDS, default="auto", help="of the sparse products")
    parser.set_defaults(run=run)


def read_prompts(arguments) -> list[str]:
    """
    Raises:
        ValueError: no such file, or nothing in it.
    """
    from slope_megatron.data.prompts import read_prompts_of

    if arguments.prompt is not None:
        if not arguments.prompt.strip():
            raise ValueError("--prompt is empty or blank: the model needs a text to go on from")
        return [arguments.prompt]
    return read_prompts_of(arguments.prompts)


def run(arguments: argparse.Namespace) -> int:
    from slope_megatron.evaluation.models import open_decoder
    from slope_megatron.inference.generate import Sampling

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}: it must be at least 1")
    sampling = Sampling(arguments.max_tokens, arguments.temperature, arguments.top_p, arguments.seed)
    texts = read_prompts(arguments)
    decoder, tokenizer = open_decoder(
        arguments.model,
        step=arguments.step,
        tokenizer=arguments.tokenizer,
        dtype=arguments.dtype,
        device=arguments.device,
        backend=arguments.backend,
    )
    started = time.perf_counter()
    if arguments.prompt is not None:
        count = stream(decoder, tokenizer, texts[0], sampling)
    else:
        count = batches(decoder, tokenizer, texts, sampling, arguments.batch_size)
    seconds = time.perf_counter() - started
    print(f"{count} tokens in {seconds:.1f} s, {count / seconds:.1f} tokens/s", file=sys.stderr)
    return 0


def stream(decoder, tokenizer, text: str, sampling) -> int:
    """Print the prompt, then each piece when it is complete; returns the number of tokens."""
    from slope_megatron.inference.generate import generate
    from slope_megatron.inference.text import TextStream

    prompt = tokenizer.encode(text)
    pieces = TextStream(tokenizer, prompt)
    count = 0
    room = decoder.max_positions - len(prompt)
    if 0 < room < sampling.max_tokens:
        logger.warning(
            "--max-tokens is %d: the text ends after %d, where the model's %d positions end",
            *(sampling.max_tokens, room, decoder.max_positions),
        )
    for _, token in generate(decoder, [prompt], sampling, tokenizer.eod):
        if count == 0:
            sys.stdout.write(text)
        count += 1
        sys.stdout.write(pieces.push(token))
        sys.stdout.flush()
    sys.stdout.write(pieces.close() + "\n")
    return count


def batches(decoder, tokenizer, texts: list[str], sampling, size: int) -> int:
    """Print a JSON record for each prompt; returns the number of tokens."""
    from slope_megatron.inference.generate import generate
    from slope_megatron.inference.text import TextStream

    count = 0
    for first in range(0, len(texts), size):
        part = texts[first : first + size]
        prompts = [tokenizer.encode(text) for text in part]
        drawn: list[list[int]] = [[] for _ in part]
        for row, token in generate(decoder, prompts, sampling, tokenizer.eod, first_prompt=first):
            drawn[row].append(token)
        for text, prompt, tokens in zip(part, prompts, drawn, strict=True):
            pieces = TextStream(tokenizer, prompt)
            answer = "".join(pieces.push(token) for token in tokens) + pieces.close()
            print(json.dumps({"prompt": text, "text": answer, "tokens": len(tokens)}, ensure_ascii=False), flush=True)
            count += len(tokens)
    return count
