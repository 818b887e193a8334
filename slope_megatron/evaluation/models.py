"""A trained decoder from wherever it is: a run's checkpoint or a packed export; and a folder of scores for it."""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch

from slope_megatron.export.trained_run import TrainedRun, is_run
from slope_megatron.inference.decoder import Decoder
from slope_megatron.inference.packed_file import SafetensorsFolder, is_packed_folder, read_config
from slope_megatron.inference.text import TextTokenizer, load_text_tokenizer

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
    place = choose_device(device)
    tensors: Mapping[str, torch.Tensor]
    found: Path | None
    if is_packed_folder(model):
        architecture, _ = read_config(model)
        tensors, found = SafetensorsFolder(model), tokenizer or model
    elif is_run(model):
        run = TrainedRun(model, step, tokenizer)
        architecture, tensors, found = run.model, run, run.tokenizer_folder
    else:
        raise ValueError(
            f"{model} is neither a run nor a packed model: give a run folder, or one that `slope export packed` wrote"
        )
    if found is None:
        raise ValueError(f"{model} has no tokenizer any more: give --tokenizer FILE")
    text = load_text_tokenizer(found)
    decoder = Decoder(architecture, tensors, device=place, dtype=DTYPES[dtype], backend=backend)
    sizes = decoder.linear_bytes()
    if sizes["dense"]:
        logger.info(
            "sparse linears: %s bytes packed, %.4f of the same ones dense in %s",
            f"{sizes['packed']:,}",
            sizes["packed"] / sizes["dense"],
            str(decoder.dtype).removeprefix("torch."),
        )
    return decoder, text


def choose_device(device: str | None) -> str:
    """
    Raises:
        ValueError: a GPU was asked for and there is none.
    """
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device is {device} and this machine has no CUDA device: leave it out")
    return device
