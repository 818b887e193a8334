"""Prepared data for small runs, and their undisturbed losses."""

import pytest
from data.conftest import write_corpus


@pytest.fixture(scope="session")
def fault_data(tmp_path_factory):
    from slope_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("fault_data") / "data"
    texts = write_corpus(tmp_path_factory.mktemp("fault_texts"), documents=40)
    prepare(str(texts), folder, vocab_size=300, valid_percent=10, workers=1)
    return folder


@pytest.fixture(scope="session")
def undisturbed(fault_data, tmp_path_factory):
    """`undisturbed(tensor_parallel)`: the losses of a run that nothing happens to; each layout runs once."""
    from faults import ranks

    known = {}

    def losses(tensor_parallel: int) -> dict[int, float]:
        if tensor_parallel not in known:
            folder = tmp_path_factory.mktemp("undisturbed")
            ended = ranks.start(ranks.settings(fault_data, folder / "run", tensor_parallel), folder / "logs")
            assert ended.codes == [0, 0], ended.said
            known[tensor_parallel] = ranks.losses(folder / "run")
            assert sorted(known[tensor_parallel]) == list(range(1, ranks.STEPS + 1))
        return known[tensor_parallel]

    return losses
