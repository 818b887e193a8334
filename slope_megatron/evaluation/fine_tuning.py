"""Fine-tuning of an exported encoder: AdamW, linear warm-up and decay. Zeros stay zeros; adapters train along.

Published settings (SLoPe, section 4 and its released scripts): SQuAD lr 3e-5, 2 epochs, length 384, stride 128; GLUE
lr 2.4e-6, batch 4, 3 epochs (CoLA and MRPC 5), length 128; warm-up over a tenth, weight decay 0.01. Theirs is Adam
without bias correction in fp16; here it is torch's AdamW.

Parameters, gradients and moments are fp32 whatever type the export has: an update of 2.4e-6 is far below what 16 bits
can add to a weight of 0.02. Products are in the export's type, by autocast. That takes 16 bytes a parameter, as 16-bit
parameters beside fp32 masters would (2 + 2 + 4 + 8), and needs no second copy to keep in step.
"""

import dataclasses
import functools
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from slope_megatron.config.json_file import read_json
from slope_megatron.inference.packed_file import check_written

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class FineTuning:
    """Settings of one fine-tuning."""

    lr: float
    epochs: int
    batch_size: int
    max_length: int
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip_grad: float = 1.0
    seed: int = 0
    max_steps: int | None = None

    def __post_init__(self):
        for name in ("lr", "epochs", "batch_size", "max_length"):
            if getattr(self, name) <= 0:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}: it must be positive")

    def lr_at(self, step: int, steps: int) -> float:
        """Share of the peak learning rate in step `step` of `steps`, counted from 0."""
        warm = int(self.warmup * steps)
        if step < warm:
            return (step + 1) / warm
        return max(0.0, (steps - step) / max(1, steps - warm))


def check_exported(folder: Path) -> dict:
    """config.json of a Hugging Face folder of an encoder.

    Raises:
        ValueError: a run, something else, or weights that are not what was written.
    """
    if (folder / "run.json").is_file():
        raise ValueError(
            f"{folder} is a run: fine-tuning reads an exported model; write one with "
            f"`slope export hf {folder} OUT --adapters lora`"
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} holds no config.json: give a folder that `slope export hf` wrote")
    fields = read_json(folder / "config.json", "export the run again")
    if fields.get("model_type") != "bert":
        raise ValueError(
            f"{folder} is a {fields.get('model_type')} model: SQuAD and GLUE are for bert; use `slope eval lm`"
        )
    check_written(folder, lambda name: name.endswith(".safetensors"))
    return fields


def open_model(folder: Path, auto, **options) -> torch.nn.Module:
    """The exported encoder under a new head, in fp32 at least; its adapters, if it has any beside its weights, are
    trained along.

    Args:
        auto: a class of transformers, such as AutoModelForQuestionAnswering.
    Raises:
        ValueError: adapters, and `peft` is not installed.
    """
    model = in_full_precision(auto.from_pretrained(folder, use_safetensors=True, trust_remote_code=False, **options))
    if not (folder / "adapter").is_dir():
        return model
    try:
        import peft
    except ImportError:
        raise ValueError(
            f"{folder} has adapters beside its weights, which `peft` reads: install it (pip install peft)"
        ) from None
    model = peft.PeftModel.from_pretrained(model, folder / "adapter", is_trainable=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return in_full_precision(model)


def in_full_precision(model: torch.nn.Module) -> torch.nn.Module:
    """The same numbers, where they were 16 bits long in fp32."""
    return model.float() if any(is_short(parameter) for parameter in model.parameters()) else model


def is_short(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < torch.float32.itemsize


def product_type(fields: dict) -> torch.dtype | None:
    """The 16-bit type in which an export's products are computed, by its config.json; None: in its parameters' own."""
    name = str(fields.get("dtype", fields.get("torch_dtype")))
    found = {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if found:
        logger.info("fine-tuning: parameters and AdamW's state in fp32, products in %s as the export", name)
    return found


def sparse_masks(model: torch.nn.Module, nm: str | None) -> dict[torch.nn.Parameter, torch.Tensor]:
    """Which weights of each pruned linear may change: those that are not zero. Those of the other linears may all.

    Blocks may have patterns of their own; of every N:M there is (M up to 8), each eight neighbours have a zero.
    """
    if nm is None:
        return {}
    masks = {}
    for name, weight in model.named_parameters():
        if weight.dim() == 2 and "encoder." in name and "lora_" not in name and weight.shape[1] % 8 == 0:
            kept = weight.detach() != 0
            if bool((~kept).unflatten(1, (-1, 8)).any(-1).all()):
                masks[weight] = kept
    return masks


def parameter_groups(model: torch.nn.Module, decay: float) -> list[dict]:
    """No decay on biases and norms."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    other = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    return [{"params": decayed, "weight_decay": decay}, {"params": other, "weight_decay": 0.0}]


def fine_tune(
    model: torch.nn.Module,
    samples: list[dict],
    collate: Callable[[list[dict]], dict[str, torch.Tensor]],
    settings: FineTuning,
    nm: str | None,
    device: str = "cpu",
    products: torch.dtype | None = None,
) -> list[tuple[float, int]]:
    """Train in place; returns for every step the mean loss of its samples, and their number.

    Args:
        model: as `open_model` gives it.
        samples: one dict a sample; `collate` makes a batch of them, labels included.
        nm: the sparsity of the weights that stay sparse; None: all of them may change.
        products: as `product_type` gives it.
    """
    short = [name for name, one in model.named_parameters() if one.requires_grad and is_short(one)]
    assert not short, f"AdamW on 16-bit parameters would round its updates away: {short[:3]}"
    model.to(device).train()
    masks = sparse_masks(model, nm)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr)
    # bf16 has fp32's range, fp16 has not.
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=products == torch.float16)
    per_epoch = -(-len(samples) // settings.batch_size)
    steps = min(settings.epochs * per_epoch, settings.max_steps or settings.epochs * per_epoch)
    losses: list[tuple[float, int]] = []
    torch.manual_seed(settings.seed)
    with tqdm(total=steps, desc="fine-tuning", unit="step") as bar:
        for step in range(steps):
            epoch, batch_index = divmod(step, per_epoch)
            if batch_index == 0:
                generator = torch.Generator().manual_seed(settings.seed * 1009 + epoch)
                order = torch.randperm(len(samples), generator=generator).tolist()
            chosen = order[batch_index * settings.batch_size : (batch_index + 1) * settings.batch_size]
            batch = {key: value.to(device) for key, value in collate([samples[i] for i in chosen]).items()}
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * settings.lr_at(step, steps)
            with computing_in(products, device):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            for weight, mask in masks.items():
                if weight.grad is not None:
                    weight.grad.mul_(mask)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append((loss.item(), len(chosen)))
            bar.set_postfix_str(f"loss {loss.item():.3f}", refresh=False)
            bar.update()
    return losses


def computing_in(products: torch.dtype | None, device: str) -> torch.autocast:
    return torch.autocast(torch.device(device).type, products, enabled=products is not None)


def padded(samples: list[dict]) -> dict[str, torch.Tensor]:
    """The inputs of a batch, `[b, s]`, filled up with zeros to its longest sample."""
    pad = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    names = ("input_ids", "token_type_ids")
    batch = {name: pad([torch.tensor(sample[name]) for sample in samples]) for name in names}
    batch["attention_mask"] = pad([torch.ones(len(sample["input_ids"]), dtype=torch.int64) for sample in samples])
    return batch


def tuned(
    folder: Path, fields: dict, auto, samples: list[dict], collate, settings: FineTuning, device: str, **options
) -> tuple[Callable, float]:
    """An exported encoder under a new head, trained on `samples`.

    Args:
        fields: of its config.json, as `check_exported` gives them.
        auto, options: as for `open_model`.
        collate: of samples and whether to add labels.
    Returns:
        samples -> `predict`'s outputs, and the loss as `final_loss` has it.
    """
    nm = fields.get("slope", {}).get("nm") if fields.get("slope", {}).get("zeros_kept") else None
    torch.manual_seed(settings.seed)
    model = open_model(folder, auto, **options)
    products = product_type(fields)
    losses = fine_tune(model, samples, collate, settings, nm, device, products)
    unlabelled = functools.partial(collate, labels=False)
    outputs = functools.partial(
        predict, model, collate=unlabelled, batch_size=settings.batch_size, device=device, products=products
    )
    return outputs, final_loss(losses)


def final_loss(losses: list[tuple[float, int]]) -> float:
    """Mean over the samples of the last tenth of the steps; the last step of an epoch may have fewer than others."""
    tail = losses[-max(1, len(losses) // 10) :]
    return sum(loss * samples for loss, samples in tail) / sum(samples for _, samples in tail)


@torch.no_grad()
def predict(
    model, samples: list[dict], collate, batch_size: int, device: str = "cpu", products: torch.dtype | None = None
):
    """The model's outputs for all samples, batch by batch: `(samples of the batch, output)`."""
    model.eval()
    for first in tqdm(range(0, len(samples), batch_size), desc="predicting", unit="batch"):
        part = samples[first : first + batch_size]
        with computing_in(products, device):
            output = model(**{key: value.to(device) for key, value in collate(part).items()})
        yield part, output
