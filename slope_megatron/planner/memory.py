"""Bytes on one GPU, by what they are for. P parameters on this GPU (packed ones counted as kept values), D replicas.

weights        b P                    b: 2 (bf16, fp16) or 4
patterns       1/8 + n/(8 m)          a dense weight: row bitmask, column bitmask; of a baseline the mask, 1/8
operands       of the backend         see `operand_bytes`; of a baseline the masked copy, b
gradients      g P                    g: 4 (fp32 accumulation) or b
optimizer      12 P / D               fp32 master and two moments (ZeRO-1)
ZeRO-2: gradients / D; ZeRO-3: weights / D too
activations    of the micro-batches in flight, as autograd holds them on a GPU, where norms and activations are fused
loss           beyond them: logits, their gradient, and the output layer's own where its logits are chunked
scratch        what the larger of these needs beyond the loss: one dense weight gradient in a block's backward; what
               AdamW and DeepSpeed allocate inside a step, when activations are gone
"""

import dataclasses
import math

from slope_megatron.config import Config
from slope_megatron.models.counts import Counts, stage_counts
from slope_megatron.models.shapes import block_linears, loss_chunk_tokens, padded_rows
from slope_megatron.planner.layout import Layout

GIB = 2**30
# CUDA context, NCCL's buffers and libraries' workspaces; and what the allocator loses to fragmentation, of what is
# allocated and freed within a step: the state is allocated once. Assumed.
CONTEXT_BYTES = 1.5 * GIB
FRAGMENTATION = 0.05
# Rows of the residual stream that the last stage keeps after its blocks.
HEAD_ROWS = {"gpt": 2, "bert": 5}
# DeepSpeed's default bucket, in elements.
BUCKET = 500_000_000


@dataclasses.dataclass(frozen=True)
class Precision:
    """The weights' type; bytes of one weight, of one gradient as it is held, and of one value in a kernel's operand."""

    dtype: str
    weight: int
    gradient: int
    operand: int


def precision(dtype: str, gradients: str, fp8: bool = False) -> Precision:
    """Bytes of each kind of number.

    Args:
        dtype: bf16, fp16 or fp32.
        gradients: fp32 or bf16 (that is, of the weights' type).
        fp8: e4m3 operands.
    """
    weight = 4 if dtype == "fp32" else 2
    return Precision(dtype, weight, 4 if gradients == "fp32" else weight, 1 if fp8 else weight)


def operand_bytes(counts: Counts, bytes_of: Precision, backend: str) -> float:
    """Forward and backward operand of packed weights.

    reference: two dense copies, an int64 index and a bool of each kept value. Kernels: half of the values (2:4 slots
    hold sparser patterns too) and one bit of metadata a dense weight, twice. cutlass: its forward product reads the
    parameter's own values.
    """
    dense = counts.packed_dense
    if backend == "reference":
        return 2 * dense * bytes_of.weight + counts.packed * (8 + 1)
    copies = 1 if backend == "cutlass" else 2
    return copies * dense / 2 * bytes_of.operand + 2 * dense / 8


def state_bytes(counts: Counts, bytes_of: Precision, backend: str, replicas: int = 1) -> dict[str, float]:
    """What stays from step to step, of a model held whole by ZeRO-1's `replicas`."""
    dense = counts.packed_dense
    return {
        "weights": counts.trained * bytes_of.weight,
        "patterns": dense / 8 + counts.packed / 8 + counts.masked / 8,
        "operands": operand_bytes(counts, bytes_of, backend) + counts.masked * bytes_of.weight,
        "gradients": counts.trained * bytes_of.gradient,
        "optimizer": 12 * counts.trained / replicas,
    }


def block_activation_bytes(config: Config, layout: Layout, b: int) -> float:
    """What one block keeps of one micro-batch for its backward, with flash attention, `b` bytes a number.

    For each token, cut over the tensor-parallel ranks: the output of QKV, of which V is a view; rotary positions
    or norms of Q and K: the Q and K that attention reads, the norms' statistics too; attention's output, and 4 bytes of
    its statistics a head; what the activation keeps and its output.
    The norms' inputs and outputs are whole on every rank without sequence parallelism, and so are their statistics (4
    bytes each) and the dropout masks (1 byte). In e4m3 linears keep their input in one byte a number: that takes the
    place of what nobody else keeps, which attention's output is not, nor what sequence parallelism gathers.
    """
    model = config.model
    linears = block_linears(model)
    qkv, attended = linears["linear_qkv"].out, linears["linear_proj"].width
    turned = (qkv + attended) / 2 if model.position == "rope" or model.qk_norm else 0
    head_statistics = (4 if model.normalization == "RMSNorm" else 8) * (model.num_attention_heads + model.query_groups)
    # ReLU keeps where its input was positive; others their input.
    kept = model.ffn if model.activation == "relu" and not model.gated_mlp else b * linears["linear_fc1"].out
    # Adapters' gradients read the input itself, and so do dense steps.
    always = config.adapter_start is None and not config.switches
    rounded = always and config.slope.packed and "wgrad" in config.slope.float8_kinds
    cut = b * (qkv + turned + attended) + (1 if rounded else b) * model.ffn + kept + 4 * model.num_attention_heads
    cut += attended if rounded else 0
    cut += head_statistics if model.qk_norm else 0
    statistics = 2 * (4 if model.normalization == "RMSNorm" else 8)
    outputs = 2 if rounded and not layout.sequence_parallel else 2 * b
    stream = (2 * b + outputs + (2 if model.dropout else 0)) * model.hidden_size + statistics
    return tokens_of(config) * (cut / layout.tensor + stream / stream_parts(layout))


def tokens_of(config: Config) -> int:
    """Of a micro-batch."""
    return config.data.seq_length * config.data.micro_batch_size


def stream_parts(layout: Layout) -> int:
    """Over how many ranks the residual stream is cut."""
    return layout.tensor if layout.sequence_parallel else 1


def activation_bytes(config: Config, layout: Layout, b: int, stage: int) -> float:
    """Activations of one stage at its fullest: 1F1B keeps PP - stage micro-batches alive there."""
    row = b * tokens_of(config) * config.model.hidden_size / stream_parts(layout)
    blocks = config.model.num_layers // layout.pipeline
    block = block_activation_bytes(config, layout, b)
    # With recomputation a block keeps its input; one block at a time is computed again in full.
    kept, extra = (blocks * row, block) if layout.recompute == "full" else (blocks * block, 0.0)
    in_flight = min(layout.pipeline - stage, config.data.micro_batches(layout.data))
    # The last norm's input and output; BERT's heads.
    head = HEAD_ROWS[config.model.architecture] * row if stage == layout.pipeline - 1 else 0.0
    return in_flight * kept + extra + head


def loss_bytes(config: Config, layout: Layout, vocabulary: int, bytes_of: Precision) -> float:
    """What output layer and loss take beyond activations, on the last stage.

    In chunks: those of one chunk and the gradients of weight and input. Whole on one rank, where the loss is fused:
    logits and their gradient, or that and the weight's. Of a cut vocabulary Megatron's loss has two fp32 copies.
    """
    b, tokens, hidden = bytes_of.weight, tokens_of(config), config.model.hidden_size
    columns = padded_rows(config.model, vocabulary) / layout.tensor
    chunk = 0
    if bytes_of.dtype != "fp16":
        chunk = loss_chunk_tokens(config.parallel.loss_chunk_tokens, tokens, int(columns), b)
    if chunk:
        # Under sequence parallelism the whole input is gathered besides.
        return b * (chunk * columns + columns * hidden + tokens * hidden * (2 if layout.sequence_parallel else 1))
    if layout.tensor == 1:
        return b * columns * (tokens + max(tokens, hidden))
    return tokens * columns * (b + 4 + 4)


def scratch_bytes(
    counts: Counts, config: Config, layout: Layout, bytes_of: Precision, fused: bool
) -> tuple[float, float]:
    """What is allocated and freed again: during backward (beside the activations), and inside the optimizer's step."""
    widest = max(linear.out * linear.width for linear in block_linears(config.model).values()) / layout.tensor
    backward = widest * bytes_of.weight
    partition = counts.trained / layout.data
    # AdamW's foreach form holds one temporary of the partition's size; the fused one none.
    step = 0.0 if fused else 4 * partition
    if bytes_of.gradient != 4:
        # ZeRO makes an fp32 copy of the gradients' partition, and reduces through a bucket.
        step += 4 * partition
        backward += min(BUCKET, counts.trained) * bytes_of.weight
    return backward, step


@dataclasses.dataclass(frozen=True)
class Holding:
    """How a run holds its state.

    Args:
        backend: whose operands: "reference", "kernels" (cuSPARSELt's) or "cutlass".
        offload: the optimizer's state in host memory.
        fused: AdamW in its fused form.
    """

    precision: Precision
    backend: str
    offload: bool = False
    fused: bool = False


def gpu_bytes(config: Config, layout: Layout, vocabulary: int, how: Holding, stage: int) -> dict[str, float]:
    """Everything on one GPU of a pipeline stage; the sum is the peak."""
    bytes_of = how.precision
    counts = stage_counts(config, vocabulary, layout.pipeline, stage, layout.tensor)
    sizes = state_bytes(counts, bytes_of, how.backend, layout.data)
    if layout.zero >= 2:
        sizes["gradients"] /= layout.data
    if layout.zero == 3:
        # Patterns stay; values are gathered, and operands rebuilt, for one block at a time (two with prefetch).
        share = min(1.0, 2 * layout.pipeline / config.model.num_layers)
        sizes["weights"] = sizes["weights"] * (1 / layout.data + share)
        if not config.parallel.zero3_resident_operands:
            sizes["operands"] *= share
    backward, step = scratch_bytes(counts, config, layout, bytes_of, how.fused)
    if how.offload:
        sizes["optimizer"], step = 0.0, 0.0
    sizes["activations"] = activation_bytes(config, layout, bytes_of.weight, stage)
    last = stage == layout.pipeline - 1
    sizes["loss"] = loss_bytes(config, layout, vocabulary, bytes_of) if last else 0.0
    sizes["scratch"] = max(0.0, backward - sizes["loss"], step - sizes["activations"] - sizes["loss"])
    sizes["context"] = CONTEXT_BYTES
    sizes["fragmentation"] = FRAGMENTATION * (sizes["activations"] + sizes["loss"] + sizes["scratch"])
    return sizes


def fullest_gpu(config: Config, layout: Layout, vocabulary: int, how: Holding) -> dict[str, float]:
    """`gpu_bytes` of the stage that needs most; only the ends and their neighbours can be it."""
    stages = sorted({0, min(1, layout.pipeline - 1), layout.pipeline - 1})
    found = [gpu_bytes(config, layout, vocabulary, how, stage) for stage in stages]
    return max(found, key=lambda sizes: math.fsum(sizes.values()))
