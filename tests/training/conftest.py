"""A corpus for whole runs."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A small prepared corpus: some files of the standard library."""
    import sysconfig

    from slope_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("texts")
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (folder / path.name).write_bytes(path.read_bytes())
    prepare(str(folder), tmp_path_factory.mktemp("prepared") / "data", vocab_size=512, valid_percent=10.0)
    return next(tmp_path_factory.getbasetemp().glob("prepared*/data"))
