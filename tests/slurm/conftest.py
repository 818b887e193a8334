"""One SLURM for all tests of this folder; a small site on it, with data."""

import os
import sysconfig
from pathlib import Path

import pytest
from small_site import MODEL, Site
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
def site(bed, tmp_path_factory):
    from slope_megatron.data.prepare import prepare

    folder = tmp_path_factory.mktemp("site")
    texts = folder / "texts"
    texts.mkdir()
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))[:40]:
        (texts / path.name).write_bytes(path.read_bytes())
    prepare(str(texts), folder / "data", vocab_size=512, valid_percent=10.0)
    (folder / "tiny.yaml").write_text(MODEL)
    return Site(bed, folder, folder / "data")


@pytest.fixture(autouse=True)
def no_job_is_left(request):
    """A failed test must not disturb the next one."""
    yield
    if "bed" in request.fixturenames and request.session.testsfailed:
        request.getfixturevalue("bed").end_jobs()


@pytest.fixture(scope="module")
def undisturbed(site):
    """The losses of 60 steps that nothing interrupts."""
    number = site.submit("undisturbed", "--steps", 60)
    assert site.bed.wait_for_end(number)["JobState"] == "COMPLETED", site.log("undisturbed")
    losses = site.losses("undisturbed")
    assert list(losses) == list(range(1, 61))
    return losses
