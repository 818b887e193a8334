"""OPT-66B at TP 4 x PP 8 x DP 2, built without memory: every rank's shapes, packed sizes and bytes add up."""

import pytest

from helpers.distributed import fork_server

TENSOR, PIPELINE, DATA = 4, 8, 2
WORLD = TENSOR * PIPELINE * DATA


def config_66b():
    """The run: TP 4 inside a node of four, eight stages of eight blocks, sequence parallelism, bf16."""
    from test_families import read

    from slope_megatron.config import Config, DataConfig, ParallelConfig, TrainConfig

    return Config(
        model=read("opt-66b"),
        parallel=ParallelConfig(tensor_parallel=TENSOR, pipeline_parallel=PIPELINE, sequence_parallel=True),
        data=DataConfig(data="none", seq_length=2048, micro_batch_size=1, global_batch_size=512),
        train=TrainConfig(out="none"),
    )


def build_rank(config, rank):
    """One rank's place, layers and `[(canonical name, shape here, shape, offset, bytes, main, is a parameter)]`."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from slope_megatron.models.canonical import shards
    from slope_megatron.models.provider import build_bare_model

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=WORLD)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=TENSOR,
        pipeline_model_parallel_size=PIPELINE,
        create_gloo_process_groups=False,
    )
    with torch.device("meta"):
        model = build_bare_model(config, config.model.vocab_size, torch.bfloat16)
    parameters = {name for name, _ in model.named_parameters()}
    found = [
        (
            shard.name,
            tuple(shard.data.shape),
            shard.shape,
            shard.offset,
            shard.data.numel() * shard.data.element_size(),
            shard.main,
            shard.local_name in parameters,
        )
        for shard in shards(model)
    ]
    assert all(parameter.is_meta for parameter in model.parameters())
    place = (
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(),
    )
    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
    return place, layers, found


def build_all(pipe, config):
    """All ranks, one after the other, in a process of its own: the groups are not real and the device is none."""
    from slope_megatron.integrations import cpu_host

    cpu_host.prepare()
    try:
        pipe.send([build_rank(config, rank) for rank in range(WORLD)])
    except BaseException as error:
        pipe.send(repr(error))
        raise


@pytest.fixture(scope="module")
def built():
    context = fork_server()
    ours, theirs = context.Pipe()
    config = config_66b()
    process = context.Process(target=build_all, args=(theirs, config))
    process.start()
    theirs.close()
    try:
        assert ours.poll(240), "no model after 240 s"
        results = ours.recv()
    finally:
        process.join(10)
        process.kill()
    assert isinstance(results, list), results
    return config, {place: (layers, found) for place, layers, found in results}


def test_every_rank_has_its_blocks(built):
    config, ranks = built
    assert len(ranks) == WORLD
    share = config.model.num_layers // PIPELINE
    for (_, stage, _), (layers, found) in ranks.items():
        assert layers == list(range(stage * share, (stage + 1) * share))
        blocks = {int(name.split(".")[2]) for name, *_ in found if name.startswith("decoder.layers.")}
        assert blocks == set(layers)


def test_every_shape_is_the_arithmetics(built):
    """Shapes here and packed sizes, of each tensor on each rank, from the architecture alone."""
    from slope_megatron.models.shapes import canonical_shapes, padded_rows

    config, ranks = built
    shapes = canonical_shapes(config.model, padded_rows(config.model))
    sparse_first = "decoder.layers.0.self_attention.linear_qkv.weight"
    for (tensor, _, _), (_, found) in ranks.items():
        for name, here, whole, offset, size, _, _ in found:
            base = name.removesuffix("_pattern").removesuffix("_column")
            out_in = shapes[base]
            linear = base.endswith(".weight") and ".linear_" in base
            if linear and base != sparse_first:
                # Values: half the inputs. Patterns: a bit for each weight, a bit for each value.
                width = {"weight": 2, "weight_pattern": 8, "weight_column": 16}[name.rpartition(".")[2]]
                expected = (out_in[0], out_in[1] // width)
            else:
                expected = out_in
            assert whole == expected, name
            cut = 0 if ("linear_qkv" in name or "linear_fc1" in name) and "norm" not in name else None
            cut = 1 if linear and ("linear_proj" in name or "linear_fc2" in name) else cut
            cut = 0 if name == "embedding.word_embeddings.weight" else cut
            local = tuple(length // TENSOR if axis == cut else length for axis, length in enumerate(whole))
            assert here == local, name
            assert offset == tuple(tensor * length if axis == cut else 0 for axis, length in enumerate(local)), name
            elements = local[0] * (local[1] if len(local) > 1 else 1)
            assert size == elements * (1 if name.endswith(("_pattern", "_column")) else 2), name


def test_one_replica_adds_up_to_the_published_model(built):
    from helpers.counts import count_parameters
    from slope_megatron.models.shapes import block_linears, padded_rows

    config, ranks = built
    model = config.model
    first = block_linears(model)["linear_qkv"]
    dense = count_parameters(model, padded_rows(model))
    sparse = dense["linears"] - first.out * first.width
    # The tied copy of the embedding on the last stage is no tensor of its own, nor are replicated norms and biases.
    counted = {"values": 0, "pattern": 0, "column": 0, "norms": 0}
    for (_, _, replica), (_, found) in ranks.items():
        for name, here, *_, main, parameter in found:
            elements = here[0] * (here[1] if len(here) > 1 else 1)
            assert replica == 0 or not main
            if main:
                kind = "values" if parameter else "pattern" if name.endswith("_pattern") else "column"
                counted[kind] += elements
                counted["norms"] += elements if "norm" in name else 0
    assert counted["values"] == dense["total"] - sparse // 2
    assert counted["pattern"] == sparse // 8
    assert counted["column"] == sparse // 16
    assert counted["norms"] == dense["norms"]
    # 65.7 billion as published, less OPT's two unread positions, plus 32 rows of padding.
    assert dense["total"] == 65_719_701_504 - 2 * 9216 + 32 * 9216


def test_no_gpu_holds_more_than_3_gigabytes_of_parameters(built):
    """Packed, with patterns: what DESIGN's 8 nodes of 40 GB GPUs rest on. Data-parallel replicas hold the same."""
    _, ranks = built
    sizes = {place: sum(size for *_, size, _, _ in found) for place, (_, found) in ranks.items()}
    for (tensor, stage, replica), size in sizes.items():
        assert size == sizes[tensor, stage, 0], replica
        assert size == sizes[0, stage, 0], tensor
    middle = [sizes[0, stage, 0] for stage in range(1, PIPELINE - 1)]
    assert len(set(middle)) == 1
    # The first stage has embeddings and a dense QKV more; the last one the tied copy.
    assert sizes[0, 0, 0] > sizes[0, PIPELINE - 1, 0] > middle[0]
    assert max(sizes.values()) < 3e9
