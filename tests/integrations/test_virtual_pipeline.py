"""Parts of a model that take turns on a pipeline's stages are the same model."""

import dataclasses

import pytest

from helpers.megatron_training import Host, train

HOST = Host(steps=5, slope={"backward_mask_interval": 2}, look_at=(4,))


@pytest.mark.slow
def test_two_stages_of_two_parts_are_one_rank(ranks):
    (whole,) = ranks.run(train, HOST, world=1)
    adapters = {**HOST.slope, "adapter_rank": 4, "lazy_fraction": 0.4}
    virtual = dataclasses.replace(HOST, chunks=2)
    parts = ranks.run(train, virtual, world=2, pipeline_parallel=2)
    for found in parts:
        assert found.losses == pytest.approx(whole.losses, rel=1e-5)
        assert found.evaluations == pytest.approx(whole.evaluations, rel=1e-5)
    assert [len(found.states[0]) for found in parts] == [7, 8], "the first QKV is dense"
    joined = ranks.run(train, dataclasses.replace(virtual, slope=adapters), world=2, pipeline_parallel=2)
    (alone,) = ranks.run(train, dataclasses.replace(HOST, slope=adapters), world=1)
    assert joined[0].losses == pytest.approx(alone.losses, rel=1e-5) and alone.losses[4] != whole.losses[4]
