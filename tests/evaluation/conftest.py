"""The small encoder that fine-tuning starts from, made once."""

import pytest


@pytest.fixture(scope="session")
def bert(ranks, tmp_path_factory):
    """See `helpers.small_bert.exported_bert`."""
    from helpers.small_bert import exported_bert

    return exported_bert(ranks, tmp_path_factory.mktemp("bert"))
