"""Ranks of a stage take over the saved choices all together or not at all, and go on deciding as one."""

import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist


def key_of(tokens: int):
    from slope_megatron.ops.choices import Key, Product

    return Key(Product.FORWARD, 128, 192, tokens, torch.bfloat16)


def resumed(run: Path, who: int, trouble: str):
    """Two ranks share a table that one of them cannot use; then both meet an old product and a new one."""
    from slope_megatron.ops import choices
    from slope_megatron.ops.choices import Choice
    from slope_megatron.training import kernel_choices

    rank, read_text = dist.get_rank(), Path.read_text
    if rank == 0:
        choices.record(key_of(32), Choice(True, 2))
        kernel_choices.save(run)
        choices.clear()
    dist.barrier()

    def refuse(path, *arguments, **keywords):
        if path.name.startswith("kernel_choices"):
            raise OSError(5, "Input/output error")
        return read_text(path, *arguments, **keywords)

    here = choices.machine()
    troubles = {
        "none": mock.patch.object(choices, "machine", lambda: here),
        "unreadable": mock.patch.object(Path, "read_text", refuse),
        "missing": mock.patch.object(os.path, "exists", lambda path: False),
        "another machine": mock.patch.object(choices, "machine", lambda: {**here, "torch": "0.1"}),
    }
    with troubles[trouble if rank == who else "none"]:
        kernel_choices.share(run, resumed=True)
    found = [choices.find(key_of(tokens)) for tokens in (32, 64)]
    for tokens in (32, 64):
        if choices.find(key_of(tokens)) is None:
            choices.decide(key_of(tokens), lambda: Choice(True, 4))
    return found, [choices.find(key_of(tokens)).tiles for tokens in (32, 64)]


@pytest.mark.parametrize(
    ("who", "trouble", "tiles"),
    [
        (0, "none", 2),
        (1, "unreadable", 2),
        (1, "missing", 2),
        (0, "unreadable", 4),
        (0, "another machine", 4),
        (1, "another machine", 4),
    ],
)
def test_a_saved_table_is_taken_over_by_all_ranks_or_by_none(ranks, tmp_path, who, trouble, tiles):
    results = ranks.run(resumed, tmp_path, who, trouble, world=2)
    for (old, new), decided in results:
        assert new is None and (old is not None) == (tiles == 2)
        assert decided == [tiles, 4]


def met_by_one_rank_alone():
    """Rank 1 meets another number of an expert's tokens than rank 0, between two products that both meet."""
    from slope_megatron.ops import choices
    from slope_megatron.ops.choices import Choice, Key, Product
    from slope_megatron.training import kernel_choices

    choices.clear()
    kernel_choices.share(Path("none"), resumed=False, own={(64, 256)})
    rank = dist.get_rank()
    expert = Key(Product.DGRAD, 256, 64, 16 * (rank + 1), torch.bfloat16)
    tiles = [choices.decide(key, lambda: Choice(True, rank + 1)).tiles for key in (key_of(32), expert, key_of(64))]
    augmented = [Key(Product.FORWARD, 64, 272, 32, torch.bfloat16, augmented=augmented) for augmented in (True, False)]
    return tiles, [kernel_choices.is_common({(64, 256)}, key) for key in augmented]


def test_experts_products_are_each_ranks_own_and_nobody_waits(ranks):
    first, second = ranks.run(met_by_one_rank_alone, world=2)
    assert first == ([1, 1, 1], [False, True]) and second == ([1, 2, 1], [False, True])
