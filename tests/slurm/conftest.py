"""One SLURM for all tests of this folder, and what is played on it."""

import os
import sysconfig
from pathlib import Path

import pytest
from small_site import MODEL, Site
from stories import LANES, Stories
from testbed import Testbed, cannot, install


@pytest.fixture(scope="module")
def bed(tmp_path_factory):
    """The running SLURM; a skip with the reason where there can be none."""
    if os.environ.get("SLOPE_TEST_SLURM") != "1":
        pytest.skip("starts SLURM daemons on this machine: tests/run.sh --all does so, without --no-slurm")
    reason = cannot() or install()
    if reason:
        pytest.skip(reason)
    testbed = Testbed(tmp_path_factory.mktemp("slurm") / "bed")
    try:
        reason = testbed.start()
        if reason:
            pytest.skip(reason)
        yield testbed
    finally:
        testbed.stop()


@pytest.fixture(scope="module")
def stories(bed, tmp_path_factory):
    """The stories of `stories.LANES`, begun."""
    from slope_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("site")
    texts = folder / "texts"
    texts.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (texts / path.name).write_bytes(path.read_bytes())
    prepare(str(texts), folder / "data", vocab_size=512, valid_percent=10.0)
    sites = {}
    for partition in LANES:
        own = folder / partition
        own.mkdir()
        (own / "tiny.yaml").write_text(MODEL)
        sites[partition] = Site(bed, partition, own, folder / "data")
    return Stories(sites)
