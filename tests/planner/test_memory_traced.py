"""The planner's bytes beside those that a small model really holds, term by term, and beside peaks of real runs."""

import dataclasses
import os

import pytest
import torch
import yaml
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from slope_megatron.config import Config, DataConfig, ModelConfig, ParallelConfig, SlopeConfig, shipped
from slope_megatron.planner.layout import Layout
from slope_megatron.planner.memory import (
    GIB,
    Holding,
    activation_bytes,
    block_activation_bytes,
    fullest_gpu,
    loss_bytes,
    precision,
)

SEQUENCE, VOCABULARY = 64, 90
BF16 = precision("bf16", "fp32")
LLAMA = {
    "ffn_hidden_size": 896,
    "num_query_groups": 2,
    "activation": "silu",
    "gated_mlp": True,
    "normalization": "RMSNorm",
    "position": "rope",
    "max_positions": SEQUENCE,
    "linear_bias": False,
    "tie_embeddings": False,
}
BERT = {"architecture": "bert", "activation": "gelu", "norm_eps": 1e-12}
FAMILIES = {"opt": {}, "llama": LLAMA, "bert": BERT}


def small(family, layers, recompute="none", sparse=True):
    return Config(
        slope=SlopeConfig(enabled=sparse),
        model=ModelConfig(
            num_layers=layers, hidden_size=256, num_attention_heads=8, vocab_multiple=48, **FAMILIES[family]
        ),
        parallel=ParallelConfig(recompute=recompute),
        data=DataConfig(seq_length=SEQUENCE, micro_batch_size=2, global_batch_size=2),
    )


def fuse_as_on_gpus() -> None:
    """Norms, activations and positions keep what the compiler's partition of them keeps, here without its kernels."""
    from torch._dynamo import config

    # The suite has switched the compiler off.
    os.environ.pop("TORCHDYNAMO_DISABLE", None)
    config.disable = False
    from slope_megatron.layers import activation, fused, rotary

    norms = [(fused, "layer_norm"), (fused, "rms_norm")]
    for module, name in [*norms, (activation, "fused_activation"), (rotary, "rotate_halves")]:
        plain = getattr(module, name).__wrapped__
        setattr(module, name, torch.compile(plain, dynamic=False, backend="aot_eager_decomp_partition"))


def kept_bytes(config) -> int:
    """What autograd keeps of one micro-batch up to the logits: each piece of memory once, parameters not counted."""
    from slope_megatron.models.provider import build_model

    model = build_model(config, VOCABULARY, torch.bfloat16)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and (tensor.is_floating_point() or tensor.dtype == torch.bool):
            held[storage.data_ptr()] = tensor
        return tensor

    tokens = torch.randint(0, VOCABULARY, (2, SEQUENCE))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        if config.model.architecture == "bert":
            model(tokens, torch.ones(2, SEQUENCE))
        else:
            model(tokens, torch.arange(SEQUENCE).expand(2, -1), None)
    return sum(tensor.untyped_storage().nbytes() for tensor in held.values())


def kept_by_depth(family, recompute):
    fuse_as_on_gpus()
    return [kept_bytes(small(family, layers, recompute)) for layers in (3, 4)]


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_are_those_that_autograd_keeps(ranks, family):
    """A block's and the whole model's within 5 %; on CPUs norms keep statistics of two bytes, and not of four."""
    [(three, four)] = ranks.run(kept_by_depth, family, "none", world=1)
    assert block_activation_bytes(small(family, 3), Layout(1, 1, 1), 2) == pytest.approx(four - three, rel=0.02)
    assert activation_bytes(small(family, 4), Layout(1, 1, 1), 2, 0) == pytest.approx(four, rel=0.05)


class Live(TorchDispatchMode):
    """The most bytes that lived at once of those allocated under it."""

    def __init__(self, *there_before):
        super().__init__()
        self.before = {tensor.untyped_storage().data_ptr() for tensor in there_before}
        self.alive, self.most = {}, 0

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.before:
                    self.alive[storage.data_ptr()] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {place: held for place, held in self.alive.items() if not held[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return result


@pytest.mark.parametrize("chunk", [64, 200, 256])
def test_a_chunked_loss_takes_what_is_planned(chunk, monkeypatch):
    """Without the numbers: on GPUs those two functions are one kernel each, and allocate what they return."""
    from slope_megatron.layers import linear_cross_entropy

    class Alone:
        size, rank = staticmethod(lambda: 1), staticmethod(lambda: 0)

    monkeypatch.setattr(linear_cross_entropy, "label_statistics", lambda z, _: (torch.zeros(len(z)),) * 2)
    monkeypatch.setattr(linear_cross_entropy, "logit_gradient_", lambda z, *_: z)
    config = dataclasses.replace(small("opt", 1), parallel=ParallelConfig(loss_chunk_tokens=chunk))
    config = dataclasses.replace(config, data=DataConfig(seq_length=128, micro_batch_size=2))
    columns, hidden, tokens = 480, 256, 256
    x, w = (torch.zeros(rows, hidden, dtype=torch.bfloat16, requires_grad=True) for rows in (tokens, columns))
    labels, mask = torch.zeros(tokens, dtype=torch.int64), torch.ones(tokens)
    with Live(x, w) as live:
        losses = linear_cross_entropy.LinearCrossEntropy.apply(x, w, None, labels, mask, chunk, Alone)
        losses.sum().backward()
    assert loss_bytes(config, Layout(1, 1, 1), columns, BF16) == pytest.approx(live.most, rel=0.05)


OPT13B, OPT30B, OPT66B = ((5120, 40), (7168, 56), (9216, 72))
# One H200, torch 2.11, whole logits, the allocator's peak in GiB; LLaMA-3-8B in `slope pretrain`, the others two blocks
# and the embedding (kernels/results/parallel.csv). The 2:4 engines' operands were partly CUTLASS's, which has one copy
# of the values less: at TP 2 they took up to 6 % less than is planned for cuSPARSELt's.
PEAKS = [
    (OPT13B, "dense", 1, 1, 18.99),
    (OPT13B, "dense", 1, 2, 13.97),
    (OPT13B, "dense", 2, 1, 10.84),
    (OPT30B, "dense", 2, 1, 17.34),
    (OPT66B, "dense", 2, 1, 25.53),
    (OPT13B, "paper", 2, 1, 8.549),
    (OPT30B, "paper", 2, 1, 13.2),
    (OPT66B, "paper", 2, 1, 18.85),
]


def planned_gib(config, layout, vocabulary, backend="kernels"):
    """Of tensors alone: without what is assumed for CUDA's context and fragmentation."""
    sizes = fullest_gpu(config, layout, vocabulary, Holding(BF16, backend, fused=True))
    return sum(size for name, size in sizes.items() if name not in ("context", "fragmentation")) / GIB


@pytest.mark.parametrize(("shape", "mode", "tensor", "replicas", "measured"), PEAKS)
def test_measured_peaks_are_planned_within_5_percent(shape, mode, tensor, replicas, measured):
    config = Config(
        model=ModelConfig(num_layers=2, hidden_size=shape[0], num_attention_heads=shape[1]),
        slope=SlopeConfig(enabled=mode != "dense"),
        parallel=ParallelConfig(loss_chunk_tokens=0),
        data=DataConfig(seq_length=2048, micro_batch_size=4, global_batch_size=16 * replicas),
    )
    layout = Layout(tensor, 1, replicas, sequence_parallel=tensor > 1)
    backend = "kernels" if mode == "dense" else "cutlass"
    assert planned_gib(config, layout, 50272, backend) == pytest.approx(measured, rel=0.05)


def test_llama_3_8b_on_one_gpu():
    """132.9 GiB were measured in mode `paper`; in chunks the loss takes 2.4 GiB less."""
    shape = ModelConfig(**yaml.safe_load((shipped.folder("models") / "llama-3-8b.yaml").read_text())["model"])
    whole = Config(
        model=shape,
        parallel=ParallelConfig(loss_chunk_tokens=0),
        data=DataConfig(seq_length=8192, global_batch_size=4),
    )
    assert planned_gib(whole, Layout(1, 1, 1), 128256) == pytest.approx(132.9, rel=0.01)
    with_assumptions = fullest_gpu(whole, Layout(1, 1, 1), 128256, Holding(BF16, "kernels", fused=True))
    assert sum(with_assumptions.values()) / GIB == pytest.approx(132.9, rel=0.05)
    chunked = dataclasses.replace(whole, parallel=ParallelConfig())
    saved = planned_gib(whole, Layout(1, 1, 1), 128256) - planned_gib(chunked, Layout(1, 1, 1), 128256)
    assert saved == pytest.approx(2.4, abs=0.05)


def test_e4m3_keeps_linears_inputs_in_a_byte_unless_something_will_read_them_whole():
    """fc2's input and both norms' outputs are halved, of attention's output a rounded copy is added."""

    def bytes_of(**slope):
        config = dataclasses.replace(small("llama", 4), slope=SlopeConfig(**slope))
        return block_activation_bytes(config, Layout(1, 1, 1), 2)

    whole, fewer = bytes_of(adapter_rank=0), bytes_of(adapter_rank=0, fp8="current")
    assert whole - fewer == 2 * SEQUENCE * (896 + 2 * 256 - 256)
    for slope in ({"adapter_rank": 8}, {"adapter_rank": 0, "dense_tail": 0.2}, {"adapter_rank": 0, "fp8_wgrad": False}):
        assert bytes_of(**slope, fp8="current") == whole
