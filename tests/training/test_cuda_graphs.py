"""CUDA graphs of micro-batches: what is captured, replayed and dropped, and that nothing computed changes.

Without a GPU: the graphs are fakes (`helpers.fake_graphs`).
"""

import dataclasses
import logging

import pytest
import torch

from helpers.fake_graphs import FakeGraph, fake_graphs
from helpers.models import build_engine, small_config, step_batches
from slope_megatron.training import cuda_graphs
from slope_megatron.training.cuda_graphs import Graphs, addresses


class OneRank:
    def size(self) -> int:
        return 1


class Doubled(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([2.0]))

    def forward(self, batch, count):
        return (batch["x"] * self.weight / count).sum()


def graphs(model) -> Graphs:
    return Graphs(model.modules(), OneRank(), torch.device("cpu"))


def batch(value: float) -> dict:
    return {"x": torch.tensor([value, 1.0])}


def test_a_step_is_captured_once_nothing_has_changed_since_the_last():
    model, count = Doubled(), torch.tensor(4.0)
    with fake_graphs() as made:
        step = graphs(model).function(model, "training")
        outputs = []
        for number in range(4):
            step.begin([batch(0.0), batch(1.0)], "key")
            outputs += [step(batch(number), count), step(batch(number + 10), count)]
        assert [float(output) for output in outputs] == [(n + 1) / 2 for n in (0, 10, 1, 11, 2, 12, 3, 13)]
        # The first step has nothing to compare with.
        assert [graph.replays for graph in made] == [6]


def test_outputs_are_not_overwritten_by_the_next_replay():
    model = Doubled()
    with fake_graphs():
        step = graphs(model).function(lambda batch: batch["x"], "training")
        for _ in range(2):
            step.begin([batch(1.0)])
            first, second = step(batch(1.0)), step(batch(2.0))
        assert first.tolist() == [1.0, 1.0] and second.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("change", ["key", "parameter", "operands", "host value", "buffer"])
def test_what_a_graph_has_taken_for_granted_changes(change):
    class Operands:
        __module__ = "slope_megatron.ops"

        def __init__(self):
            self.values, self.targets = {"forward": [torch.ones(3)]}, {"forward": 3}

    class Kept:
        def __init__(self):
            self.operands = Operands()

    model = Doubled()
    model.register_buffer("pattern", torch.ones(2))
    model._kept = Kept()
    with fake_graphs() as made:
        step = graphs(model).function(model, "training")
        for number in range(6):
            if number == 3:
                if change == "parameter":
                    model.weight.data = model.weight.data.clone()
                elif change == "operands":
                    model._kept.operands.values["forward"][0] = torch.ones(3)
                elif change == "host value":
                    model._kept.operands.targets["forward"] = 4
                elif change == "buffer":
                    model.pattern = torch.ones(2)
            step.begin([batch(0.0)], "other" if change == "key" and number >= 3 else "key")
            assert float(step(batch(number), torch.tensor(1.0))) == 2 * number + 2
            assert (step.graph is not None) == (number not in (0, 3))
        assert len(made) == 2


def test_values_may_change_in_place():
    model = Doubled()
    before = addresses(model.modules())
    with torch.no_grad():
        model.weight.add_(1.0)
    assert addresses(model.modules()) == before


def test_a_capture_that_fails_ends_the_run_with_the_way_out():
    def fails(function, _pool):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    model = Doubled()
    with fake_graphs(fails):
        step = graphs(model).function(model, "training")
        step.begin([batch(1.0)])
        assert float(step(batch(1.0), 1.0)) == 4.0
        step.begin([batch(1.0)])
        with pytest.raises(
            RuntimeError, match=r"captured \(operation not .* capturing\): go on with --cuda-graphs off"
        ):
            step(batch(1.0), 1.0)


def test_graphs_of_one_stream_go_together():
    """What cuBLAS keeps for a stream is freed with any graph of it, and the others read it."""
    model = Doubled()
    with fake_graphs() as made:
        shared = graphs(model)
        training, validation = shared.function(model, "training"), shared.function(model, "validation")
        for _ in range(2):
            for function in (training, validation):
                function.begin([batch(1.0)])
                function(batch(1.0), 1.0)
        assert len(made) == 2 and training.graph and validation.graph
        validation.begin([batch(1.0)], "another phase")
        assert training.graph is None and validation.graph is None
        # Nothing has changed for the other.
        training.begin([batch(1.0)])
        assert float(training(batch(3.0), 1.0)) == 8.0 and training.graph is made[2]


def test_steps_that_never_settle_are_said(caplog):
    model = Doubled()
    with fake_graphs() as made, caplog.at_level(logging.INFO):
        step = graphs(model).function(model, "training")
        for number in range(2 * cuda_graphs.RESTLESS):
            step.begin([batch(0.0)], number)
            step(batch(1.0), 1.0)
    assert not made
    assert [record.message for record in caplog.records] == [
        "CUDA graphs: training runs eagerly as long as its operands change in each step"
    ]


def test_batches_of_several_shapes_run_eagerly():
    model = Doubled()
    with fake_graphs() as made:
        step = graphs(model).function(model, "training")
        for _ in range(3):
            batches = [batch(1.0), {"x": torch.ones(3)}]
            step.begin(batches)
            assert [float(step(one, 1.0)) for one in batches] == [4.0, 6.0]
    assert not made


# -- whole steps -------------------------------------------------------------------------------------------------------


AUTO = {
    "one GPU": ({}, 1, torch.bfloat16, ""),
    "tensor-parallel": ({"tensor_parallel": 2}, 1, torch.bfloat16, "with tensor-parallel ranks yet; --cuda-graphs on"),
    "replicas": ({}, 2, torch.bfloat16, "with several replicas yet; --cuda-graphs on"),
    "dropout": ({"dropout": 0.1}, 1, torch.bfloat16, ""),
    "fp16": ({}, 1, torch.float16, "only bf16 training adds gradients up in place"),
    "stages": ({"pipeline_parallel": 2}, 1, torch.bfloat16, "it has pipeline stages"),
}


@pytest.mark.parametrize("case", AUTO)
def test_auto_captures_what_gpu_tests_have_run_and_says_why_not(monkeypatch, caplog, case):
    settings, replicas, dtype, reason = AUTO[case]
    config = small_config(**{name: value for name, value in settings.items() if name != "dropout"})
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=settings.get("dropout", 0.0)))
    monkeypatch.setattr(cuda_graphs.parallel_state, "get_data_parallel_world_size", lambda: replicas)
    with caplog.at_level(logging.INFO):
        assert cuda_graphs.wanted(config, dtype, torch.device("cuda")) is not bool(reason)
    assert (not reason and not caplog.messages) or reason in caplog.messages[0]


def graphs_on_and_off(config):
    """`(loss, norm)` of each step and the validation losses, eagerly and replayed; and how often graphs replayed."""

    from megatron.core import parallel_state

    def trained(engine):
        replica, replicas = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        found = []
        for step in range(config.train.steps):
            result = engine.train_step(step_batches(config, step, replica, replicas))
            found.append((result.loss, result.grad_norm, engine.evaluate(step_batches(config, 90, replica, replicas))))
        masters = [flat.double().sum().item() for flat in engine.optimizer.fp32_groups_flat_partition]
        return found, masters

    eager = trained(build_engine(config, torch.bfloat16))
    with fake_graphs() as made:
        engine = build_engine(config, torch.bfloat16)
        replayed = trained(engine)
    live = [function.graph is not None for function in engine.graphs.functions]
    return eager, replayed, live, [graph.replays for graph in made]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        ({"slope": {"adapter_rank": 4, "lazy_fraction": 0.5, "mode": "full"}}, {"world": 1}),
        ({"slope": {"backward_mask_interval": 3}, "recompute": "full"}, {"world": 2, "tensor_parallel": 2}),
        ({"slope": {"enabled": False}}, {"world": 2}),
        ({"slope": {"method": "extended-srste"}}, {"world": 1}),
        ({"slope": {"method": "sste"}}, {"world": 1}),
        ({"slope": {"method": "fst", "fst_mask_interval": 3, "fst_dense_tail": 0.0}}, {"world": 1}),
    ],
    ids=["adapters join", "new column pattern, TP2", "dense, DP2", "extended srste", "sste", "fst"],
)
def test_replayed_steps_are_the_eager_ones_to_the_bit(ranks, settings, layout):
    config = small_config(steps=8, **settings)
    for eager, replayed, live, graphs in ranks.run(graphs_on_and_off, config, **layout):
        assert replayed == eager and len({loss for loss, *_ in eager[0]}) == 8
        assert all(live) and sum(graphs) > 8


def test_a_refresh_that_cannot_be_captured_runs_eagerly(ranks):
    """Nothing is lost: the losses are those of a run without graphs, and the log says it once."""
    eager, fallen_back, said = ranks.run(refreshed_in_spite_of_a_failure, small_config(steps=6), world=1)[0]
    assert fallen_back == eager
    assert (
        len(said) == 1 and "the refresh of operands could not be captured (no): go on with --cuda-graphs off" in said[0]
    )


def refreshed_in_spite_of_a_failure(config):
    from unittest import mock

    def losses(engine):
        return [engine.train_step(step_batches(config, step, 0, 1)).loss for step in range(config.train.steps)]

    def capture(graphs, function, what):
        if "refresh" in what:
            raise RuntimeError(f"{what} could not be captured (no): go on with --cuda-graphs off")
        return FakeGraph(function, graphs.modules)

    eager = losses(build_engine(config, torch.bfloat16))
    with (
        fake_graphs(),
        mock.patch.object(Graphs, "capture", capture),
        mock.patch("slope_megatron.training.refresh.logger") as log,
    ):
        fallen_back = losses(build_engine(config, torch.bfloat16))
    return eager, fallen_back, [call.args[0] % call.args[1:] for call in log.warning.call_args_list]
