"""Prefill and decoding of a few blocks as `slope generate` runs them, dense and 2:4, with adapters and without.

    prefill   one prompt
    decode    one token for each sequence of a batch, which attends to a cache that is as long
Embedding and output layer are left out (a vocabulary of VOCABULARY entries): times are per block. All forms alternate,
each replayed from a CUDA graph. `byte_bound` is the ratio if decoding took no time but for reading the linears'
weights, dense ones and packed values with their metadata and the adapters' factors: what a small batch can reach.
"""

import dataclasses
import gc
from collections.abc import Iterator

from slope_megatron.bench.adapters import rank_of
from slope_megatron.bench.common import bar_chart, machine, print_table, rounded, write_csv
from slope_megatron.bench.models import MODELS, Model
from slope_megatron.bench.progress import add_budget, begin
from slope_megatron.config import ModelConfig

VOCABULARY = 128
LINEARS = {
    "qkv": "self_attention.linear_qkv",
    "proj": "self_attention.linear_proj",
    "fc1": "mlp.linear_fc1",
    "fc2": "mlp.linear_fc2",
}
NORMS = ("self_attention.linear_qkv.layer_norm_", "mlp.linear_fc1.layer_norm_")
# Bytes of a dense weight: kept values and metadata.
PACKED_SHARE = 0.5 + 1 / 16


def add_arguments(parser) -> None:
    parser.add_argument("--models", nargs="+", default=["opt-13b", "llama-3-8b"], choices=list(MODELS))
    parser.add_argument("--blocks", type=int, default=4, help="blocks of the decoder; times are per block")
    parser.add_argument("--prompt", type=int, default=2048, help="tokens of the prompt, and of the cache")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256], help="sequences that are decoded")
    parser.add_argument("--share", type=float, default=1.56, help="rank of the adapters, %% of the hidden size")
    parser.add_argument("--backend", default="auto", help="backend of the 2:4 products (--slope-backend)")
    parser.add_argument("--rounds", type=int, default=11, help="samples of each")
    add_budget(parser)
    parser.add_argument("--out", help="folder for the CSV and the chart; default: the current one")


def architecture(model: Model, blocks: int, positions: int) -> ModelConfig:
    """A few of its blocks, and a small vocabulary."""
    return dataclasses.replace(
        model.architecture, num_layers=blocks, max_positions=positions, vocab_size=VOCABULARY, tie_embeddings=True
    )


def random_tensors(model: Model, config, sparse: bool, rank: int, device: str = "cuda"):
    """Canonical name -> tensor, as a packed or a dense export has them."""
    import torch

    from slope_megatron.ops.autotune.trials import random_bits

    def randn(*shape):
        return torch.randn(*shape, device=device, dtype=torch.bfloat16).mul_(0.02)

    found = {"embedding.word_embeddings.weight": randn(VOCABULARY, model.hidden)}
    if config.position == "learned":
        found["embedding.position_embeddings.weight"] = randn(config.max_positions, model.hidden)
    norms = ["decoder.final_layernorm."]
    for block in range(config.num_layers):
        prefix = f"decoder.layers.{block}."
        norms += [f"{prefix}{norm}" for norm in NORMS]
        for linear, (rows, columns) in model.linears().items():
            name = prefix + LINEARS[linear]
            found[f"{name}.weight"] = randn(rows, columns // 2 if sparse else columns)
            if config.linear_bias:
                found[f"{name}.bias"] = randn(rows)
            if sparse:
                found[f"{name}.weight_pattern"] = random_bits(rows, columns, torch.device(device))
            if rank:
                found |= {f"{name}.adapter_l": randn(rank, columns), f"{name}.adapter_r": randn(rows, rank)}
    for norm in norms:
        found[f"{norm}weight"] = randn(model.hidden) + 1
        if config.normalization == "LayerNorm":
            found[f"{norm}bias"] = randn(model.hidden)
    return found


def captured(decoder, cache, batch: int, new: int):
    """A CUDA graph of `new` tokens for each of `batch` sequences, the last ones that the cache has room for."""
    import torch

    tokens = torch.randint(VOCABULARY, (batch, new), device="cuda")
    positions = torch.arange(cache.slots - new, cache.slots, device="cuda").expand(batch, new).contiguous()
    # It chooses kernels, which a capture must not.
    decoder(tokens, positions, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decoder(tokens, positions, cache)
    # The graph reads them.
    return lambda kept=(cache, tokens, positions): graph.replay()


def byte_bound(model: Model, rank: int) -> float:
    """Dense weights' bytes over those of packed values, metadata and factors."""
    weights = sum(rows * columns for rows, columns in model.linears().values())
    factors = sum(rank * (rows + columns) for rows, columns in model.linears().values())
    return weights / (PACKED_SHARE * weights + factors)


def phase_rows(model: Model, decoders: dict, phase: str, batch: int, new: int, arguments) -> list[dict]:
    """A row for each form; all write into one cache, whose contents no time depends on."""
    from slope_megatron.ops.autotune import timing

    cache = decoders["dense", 0].new_cache(batch, arguments.prompt)
    graphs = {form: captured(decoder, cache, batch, new) for form, decoder in decoders.items()}
    rough = timing.median(timing.interleaved({"": graphs["dense", 0]}, rounds=3, calls=1)[""])
    samples = timing.interleaved(graphs, rounds=arguments.rounds, calls=timing.calls_for(rough))
    rows = []
    for (form, rank), values in samples.items():
        ratios = [dense / mine for dense, mine in zip(samples["dense", 0], values, strict=True)]
        ms = timing.median(values) / arguments.blocks
        row = {"model": model.name, "phase": phase, "form": form, "rank": rank, "batch": batch}
        row |= {"prompt": arguments.prompt, "block_ms": ms, "block_tokens_per_second": batch * new / ms * 1e3}
        row |= {"ratio": timing.median(ratios), "spread": timing.spread(ratios)}
        # A prompt's products are bound by arithmetic.
        bound = "" if phase == "prefill" or form == "dense" else byte_bound(model, rank)
        rows.append(rounded(row | {"byte_bound": bound}))
    return rows


def model_rows(model: Model, arguments, clock) -> Iterator[list[dict]]:
    """The rows of one phase and batch after the other, as far as they fit the GPU."""
    import torch

    from slope_megatron.inference.decoder import Decoder

    config, rank = architecture(model, arguments.blocks, arguments.prompt), rank_of(model, arguments.share)
    rank += -rank % 4
    decoders = {
        (form, own_rank): Decoder(
            config, random_tensors(model, config, sparse, own_rank), device="cuda", backend=arguments.backend
        )
        for form, sparse, own_rank in (("dense", False, 0), ("2:4", True, 0), ("2:4 + adapters", True, rank))
    }
    for phase, batch, new in [("prefill", 1, arguments.prompt), *(("decode", batch, 1) for batch in arguments.batches)]:
        clock.say(f"{model.name}: {phase}, {batch} sequences")
        try:
            yield phase_rows(model, decoders, phase, batch, new, arguments)
        except torch.OutOfMemoryError as error:
            clock.say(f"{model.name}: {phase} of {batch} sequences does not fit: {str(error).splitlines()[0]}")
        gc.collect()
        torch.cuda.empty_cache()


def main(arguments) -> int:
    clock = begin(arguments)
    import torch

    rows: list[dict] = []
    for name in clock.within(arguments.models):
        for news in model_rows(MODELS[name], arguments, clock):
            rows += news
            path = write_csv("decode", rows, arguments.out)
        gc.collect()
        torch.cuda.empty_cache()
    if not rows:
        print("nothing fitted this GPU")
        return 1
    print_table(rows, list(rows[0]))
    labels = list(dict.fromkeys(f"{row['model']} {row['phase']} {row['batch']}" for row in rows))
    forms = [form for form in dict.fromkeys(row["form"] for row in rows) if form != "dense"]
    ratios = {(f"{row['model']} {row['phase']} {row['batch']}", row["form"]): row["ratio"] for row in rows}
    series = {form: [ratios[label, form] for label in labels] for form in forms}
    bar_chart("decode", labels, series, f"speed of a block at inference; {machine()}", arguments.out)
    print(f"wrote {path}")
    return 0
