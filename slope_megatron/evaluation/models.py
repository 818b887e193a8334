"""A trained decoder from wherever it is: a run's checkpoint or a packed export; and a folder of scores for it."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from slope_megatron.data.fast_tokenizer import FastTokenizer
from slope_megatron.data.tokenizer import Tokenizer, find_tokenizer, load_tokenizer
from slope_megatron.export.run_tokenizer import check_given
from slope_megatron.export.trained_run import TrainedRun, is_run, no_run
from slope_megatron.inference.decoder import Decoder
from slope_megatron.inference.packed_file import SafetensorsFolder, is_packed_folder, read_config
from slope_megatron.inference.text import TextTokenizer

logger = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "keep": None}


def open_decoder(
    model: Path,
    *,
    step: int | None = None,
    tokenizer: Path | None = None,
    dtype: str = "keep",
    device: str | None = None,
    backend: str = "auto",
) -> tuple[Decoder, TextTokenizer]:
    """
    Raises:
        ValueError: neither a run nor a packed export, no tokenizer, or a device that is not there.
    """
    device = choose_device(device)
    tensors: Mapping[str, torch.Tensor]
    text: Tokenizer | FastTokenizer | None
    if is_packed_folder(model):
        architecture, _ = read_config(model)
        tensors, text = SafetensorsFolder(model), load_tokenizer(tokenizer or model)
        if tokenizer is not None:
            check_given(text, tokenizer, model if find_tokenizer(model) else None)
    elif is_run(model):
        run = TrainedRun(model, step, tokenizer)
        architecture, tensors, text = run.model, run, run.tokenizer
    else:
        raise ValueError(f"{model} {not_a_decoder(model)}")
    if text is None:
        raise ValueError(f"{model} has no tokenizer any more: give --tokenizer FILE")
    decoder = Decoder(architecture, tensors, device=device, dtype=DTYPES[dtype], backend=backend)
    if tokenizer is not None:
        check_size(tokenizer, text.vocab_size, decoder.vocabulary)
    sizes = decoder.linear_bytes()
    if sizes["dense"]:
        logger.info(
            "sparse linears: %s bytes packed, %.4f of the same ones dense in %s",
            f"{sizes['packed']:,}",
            sizes["packed"] / sizes["dense"],
            str(decoder.dtype).removeprefix("torch."),
        )
    return decoder, text


def not_a_decoder(folder: Path) -> str:
    """Why a folder is neither a run nor a packed export, and the way out."""
    if (folder / "config.json").is_file():
        return "is a Hugging Face model: transformers reads it; for `slope generate` give the run or a packed export"
    if folder.is_dir() and not any(is_run(path) for path in folder.iterdir()):
        return "is neither a run nor a packed model: give a run folder, or one that `slope export packed` wrote"
    return no_run(folder)


def check_size(path: Path, size: int, vocabulary: int) -> None:
    """A smaller one may be right (--vocab-size), and is logged.

    Raises:
        ValueError: the tokenizer has more tokens than the model has entries: it is another one.
    """
    if size > vocabulary:
        raise ValueError(
            f"--tokenizer {path} has {size} tokens and the model {vocabulary} entries: it is not the model's; leave "
            "--tokenizer out, or give the one that the data was prepared with"
        )
    if size < vocabulary:
        logger.warning(
            "--tokenizer %s has %d tokens and the model %d entries: is it the model's?", path, size, vocabulary
        )


def choose_device(device: str | None) -> str:
    """
    Raises:
        ValueError: a GPU was asked for and there is none, or something else than a CPU or a GPU.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ValueError(
            f"--device is {device!r}: it must be cpu, cuda or cuda:N; leave it out for a GPU if there is one"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {device} and this machine has no CUDA device: leave it out")
    return device
