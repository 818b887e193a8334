"""`slope export hf`: a run's checkpoint as a `transformers` model, tensor by tensor.

    config.json, generation_config.json, tokenizer files, checksums.json
    model*.safetensors     dense, zeros where pruned; tied tensors once
    adapter/               with `--adapters lora`: the adapters as a PEFT LoRA folder

Adapters: `fold` W + (1/R) (L R)^T, exact but for one rounding, and no longer 2:4; `lora` beside the 2:4 weights.
"""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from slope_megatron.export import lora
from slope_megatron.export.hf_config import choose_family, fields_of
from slope_megatron.export.hf_import import INVERSES, full_name, table_rows
from slope_megatron.export.hf_names import FAMILIES
from slope_megatron.export.hf_tokenizer import TokenIds, plan_tokenizer, write_tokenizer
from slope_megatron.export.output_folder import (
    Entry,
    describe,
    new_folder,
    plan_files,
    total_bytes,
    write_files,
    write_json,
)
from slope_megatron.export.trained_model import TrainedModel
from slope_megatron.storage import sums

ADAPTERS = ("fold", "lora", "drop")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


@dataclasses.dataclass(frozen=True)
class HfPlan:
    """What an export will write.

    Args:
        files: of the model; adapter: of the adapter's folder, or None.
    """

    source: TrainedModel
    family: str
    adapters: str
    dtype: torch.dtype
    files: dict[str, list[Entry]]
    adapter: list[Entry] | None

    @property
    def all_files(self) -> dict[str, list[Entry]]:
        adapter = {"adapter/adapter_model.safetensors": self.adapter} if self.adapter is not None else {}
        return {**self.files, **adapter}

    @property
    def bytes(self) -> int:
        return total_bytes(self.all_files)

    def describe(self, target: Path) -> str:
        """For people, a line a file."""
        small = ["config.json", "generation_config.json", *plan_tokenizer(self.source.tokenizer), sums.FOLDER]
        return describe(f"{target}: {self.family} model of step {self.source.step}", self.all_files, small)


def plan(
    source: TrainedModel,
    *,
    family: str = "auto",
    adapters: str = "fold",
    dtype: str = "keep",
    max_shard_bytes: int = 5 * 10**9,
) -> HfPlan:
    """
    Raises:
        ValueError: no family of theirs is this architecture.
    """
    chosen = choose_family(source.model, family)
    kind = source.dtype("embedding.word_embeddings.weight") if dtype == "keep" else DTYPES[dtype]
    shapes = hf_parts(source, chosen, lambda name: torch.empty(source.dense_shape(name), device="meta"))
    entries = [Entry(name, tuple(tensor.shape), kind) for name, tensor in shapes]
    adapter = None
    if adapters == "lora" and source.adapters_active:
        adapter = [
            Entry(name, tuple(tensor.shape), torch.promote_types(kind, torch.float32))
            for name, tensor in lora.tensors(source, chosen)
        ]
    return HfPlan(source, chosen, adapters, kind, plan_files(entries, max_shard_bytes), adapter)


def hf_parts(source: TrainedModel, family: str, fetch) -> Iterator[tuple[str, torch.Tensor]]:
    """`(their name, tensor)` of the whole model, from `fetch(canonical name)`, which is called once a name."""
    table = FAMILIES[family]
    for canonical, how, names in table_rows(table, source.model):
        parts = INVERSES[how](fetch(canonical), source.model)
        yield from ((full_name(name, table.prefix), part) for name, part in zip(names, parts, strict=True))


def config_fields(planned: HfPlan, ids: TokenIds) -> dict:
    """config.json. `slope` says where the model is from; transformers keeps it and does nothing with it."""
    source, slope = planned.source, planned.source.config.slope
    kept = source.adapters_active and planned.adapters == "fold"
    return {
        **fields_of(planned.family, source.model),
        "dtype": str(planned.dtype).removeprefix("torch."),
        "bos_token_id": ids.bos,
        "eos_token_id": ids.eos,
        "pad_token_id": ids.pad,
        "slope": {
            "nm": slope.nm if slope.enabled else None,
            "step": source.step,
            "adapters": planned.adapters if source.adapters_active else None,
            "zeros_kept": slope.enabled and not kept,
        },
    }


@torch.no_grad()
def export(planned: HfPlan, target: Path) -> None:
    """Write what was planned; the folder appears when it is complete."""
    source = planned.source
    fold = planned.adapters == "fold"
    with new_folder(target, planned.bytes) as folder:
        ids = write_tokenizer(source.tokenizer, folder, source.model.architecture)
        parts = hf_parts(source, planned.family, lambda name: source.dense(name, fold))
        write_files(folder, planned.files, parts)
        fields = config_fields(planned, ids)
        write_json(folder / "config.json", fields)
        generation = {name: fields[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", {"_from_model_config": True, **generation})
        if planned.adapter is not None:
            (folder / "adapter").mkdir()
            found = lora.tensors(source, planned.family, with_numbers=True)
            write_files(folder / "adapter", {"adapter_model.safetensors": planned.adapter}, found)
            write_json(folder / "adapter" / "adapter_config.json", lora.config(planned.adapter, source, planned.family))
