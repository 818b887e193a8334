"""The plugin's ranks choose kernels as one, keep the choices beside the checkpoint and resume with them."""

import types

import torch

from slope_megatron.config import SlopeConfig


def resumed(folder, enabled):
    """One run that saves, and one that loads: what each rank chose, and what the second knew before it chose."""
    import torch.distributed as dist

    from slope_megatron.integrations.megatron_lm import common_choices, plugin
    from slope_megatron.ops import choices
    from slope_megatron.ops.choices import Choice, Key, Product

    args = types.SimpleNamespace(save=str(folder), load=None)
    plugin.settings = lambda: (args, SlopeConfig(enabled=enabled))
    setup = common_choices.with_common_choices(lambda: ([torch.nn.Linear(2, 2)], "optimizer", "scheduler"))
    save = common_choices.with_saved_choices(lambda iteration: "saved")
    key, rank = Key(Product.FORWARD, 128, 192, 32, torch.bfloat16), dist.get_rank()
    choices.clear()
    choices.agree_over(None, True)
    assert setup()[1:] == ("optimizer", "scheduler")
    chosen = choices.decide(key, lambda: Choice(True, rank + 1)).tiles
    assert save(1) == "saved"
    dist.barrier()
    choices.clear()
    args.load = str(folder)
    setup()
    found = choices.find(key)
    choices.clear()
    choices.agree_over(None, True)
    return chosen, found and found.tiles


def test_ranks_agree_and_a_resumed_run_begins_with_the_same_kernels(ranks, tmp_path):
    assert ranks.run(resumed, tmp_path, True, world=2) == [(1, 1), (1, 1)]
    assert [path.name for path in tmp_path.iterdir()] == ["kernel_choices_stage_0.json"]


def test_without_slope_nothing_is_agreed_on_or_written(ranks, tmp_path):
    assert ranks.run(resumed, tmp_path, False, world=2) == [(1, None), (2, None)]
    assert not list(tmp_path.iterdir())


class Expert(torch.nn.Module):
    """As the layers of a mixture say it."""

    is_expert = True


def shapes():
    from slope_megatron.integrations.megatron_lm import common_choices
    from slope_megatron.layers.packed_weight import PackedWeight

    packed = type("PackedExpert", (PackedWeight, Expert), {"__init__": torch.nn.Module.__init__})()
    packed.weight = torch.nn.Parameter(torch.zeros(64, 128))
    packed.weight_pattern = torch.zeros(64, 32, dtype=torch.uint8)
    return common_choices.expert_shapes([torch.nn.Sequential(torch.nn.Linear(2, 2), packed)])


def test_shapes_of_experts_are_those_of_the_dense_weight(ranks):
    assert ranks.run(shapes, world=1) == [{(64, 256)}]
