"""SLoPe's adapters as a PEFT LoRA folder.

Ours: Y += (1/R) (X L) R with `adapter_l` = L^T `[R, K]`, `adapter_r` = R^T `[N, R]`. PEFT's: Y += (alpha/r) B A X with
A `[r, K]`, B `[N, r]`. So A = adapter_l, B = adapter_r, alpha = 1. The parts of a fused linear share A; its B is cut.
"""

from collections.abc import Iterator

import torch

from slope_megatron.export.hf_import import INVERSES, full_name, table_rows
from slope_megatron.export.hf_names import FAMILIES
from slope_megatron.export.output_folder import Entry
from slope_megatron.export.trained_model import TrainedModel

PREFIX = "base_model.model."
# B `[N, r]` has the rows of the weight `[N, K]`; Conv1D's weights are transposed, LoRA's factors are not.
OF_ROWS = {"plain": "plain", "transpose": "plain", "qkv": "qkv", "qkv_conv1d": "qkv_split", "stack": "stack"}


def tensors(source: TrainedModel, family: str, with_numbers: bool = False) -> Iterator[tuple[str, torch.Tensor]]:
    """`(PEFT's name, tensor)` of all adapters, without numbers unless they are asked for."""
    table = FAMILIES[family]

    def get(name: str) -> torch.Tensor:
        if with_numbers:
            return source[name]
        return torch.empty(source.shape(name), dtype=source.dtype(name), device="meta")

    for canonical, how, names in table_rows(table, source.model):
        if not canonical.endswith(".weight") or not source.has_adapter(canonical):
            continue
        linear = canonical.removesuffix(".weight")
        left, right = get(f"{linear}.adapter_l"), get(f"{linear}.adapter_r")
        for name, part in zip(names, INVERSES[OF_ROWS[how]](right, source.model), strict=True):
            module = PREFIX + full_name(name, table.prefix).removesuffix(".weight")
            # A copy: safetensors refuses tensors that share memory.
            yield f"{module}.lora_A.weight", left.clone()
            yield f"{module}.lora_B.weight", part


def config(entries: list[Entry], source: TrainedModel, family: str) -> dict:
    """adapter_config.json: every module by its whole name, for the first linear has no adapter."""
    modules = [entry.name for entry in entries if entry.name.endswith(".lora_A.weight")]
    return {
        "peft_type": "LORA",
        "task_type": None if family == "bert" else "CAUSAL_LM",
        "base_model_name_or_path": "..",
        "inference_mode": True,
        "r": entries[0].shape[0],
        "lora_alpha": 1,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family == "gpt2",
        "target_modules": [name.removeprefix(PREFIX).removesuffix(".lora_A.weight") for name in modules],
    }
