"""What a person reads of a run: one table before its first step, then a line each of steps, validations and saves.

Off a terminal these lines are all there is; on one, a bar that moves (`progress_bar`) stands for the lines of steps.
"""

from slope_megatron.config import Config
from slope_megatron.models import counts
from slope_megatron.training.telemetry import memory


def start_table(config: Config, vocabulary: int, ranks: int, train_tokens: int, state: dict[str, int]) -> str:
    """The run as it is planned.

    Args:
        vocabulary: entries of the tokenizer.
        train_tokens: in the training split.
        state: bytes on the first rank, by what takes them.
    """
    found = counts.count(counts.model_tensors(config, vocabulary), 1)
    dense = found.trained - found.adapters - found.packed + found.packed_dense
    parallel, data, steps = config.parallel, config.data, config.train.steps
    tensor, pipeline = parallel.tensor_parallel, parallel.pipeline_parallel
    replicas = ranks // (tensor * pipeline)
    tokens = steps * data.global_batch_size * data.seq_length
    parts = ", ".join(f"{name} {memory.gib(size)}" for name, size in state.items())
    rows = (
        ("parameters", f"{dense:,} as a dense model, {found.trained:,} stored"),
        ("layout", f"TP {tensor} x PP {pipeline} x DP {replicas} = {ranks}, ZeRO stage {parallel.zero_stage}"),
        ("batch", f"{data.global_batch_size} samples of {data.seq_length} tokens, {data.micro_batch_size} at a time"),
        ("tokens", f"{tokens:,} in {steps:,} steps: {tokens / train_tokens:.2f} epochs of {train_tokens:,}"),
        ("memory", f"{memory.gib(sum(state.values()))} planned on rank 0, and activations: {parts}"),
    )
    return "\n".join(f"{name:12}{text}" for name, text in rows)


def step_line(values: dict, steps: int, skipped: int) -> str:
    """One step for people: `step | loss | lr | tokens/s | MFU | memory | skipped`; what is unknown is left out.

    Args:
        values: the step's record in metrics.jsonl.
        steps: of the run.
        skipped: steps so far that updated nothing.
    """
    parts = [
        f"step {values['step']}/{steps}",
        f"loss {values['loss']:.4f}",
        f"lr {values['learning_rate']:.2e}",
        f"{values['tokens_per_second']:,.0f} tokens/s",
    ]
    if "mfu" in values:
        parts.append(f"MFU {values['mfu']:.1%}")
    if "peak_memory_gib" in values:
        parts.append(f"{values['peak_memory_gib']:.2f} GiB")
    return " | ".join([*parts, f"skipped {skipped}"])
