"""A prepare that was killed goes on behind what it finished, and ends with the same bytes."""

import errno
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from conftest import VOCABULARY

from helpers.death import die
from slope_megatron.data import corpus as corpus_module
from slope_megatron.data import encode as encode_module
from slope_megatron.data import prepare as prepare_module
from slope_megatron.data.prepare import prepare

PART = 20_000
SETTINGS = {"vocab_size": VOCABULARY, "valid_percent": 10, "test_percent": 5}
# A process that kills itself the way the machine would: the N-th time a part of text or tokens is about to get its
# name, or when the manifest is about to be written.
KILLED = """
import os, signal, sys
from slope_megatron.data import corpus, encode, prepare, scratch
corpus.PART = {part}
seals = 0
rename = os.rename
def counted(*paths):
    global seals
    seals += 1
    if seals == {at}:
        os.kill(os.getpid(), signal.SIGKILL)
    rename(*paths)
os.rename = os.replace = counted
prepare.prepare({source!r}, {out!r}, workers=1, deduplicate=True, vocab_size={vocabulary}, valid_percent=10,
    test_percent=5)
"""


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(corpus_module, "PART", PART)


def kill_at(source, out, at):
    code = KILLED.format(part=PART, at=at, source=str(source), out=str(out), vocabulary=VOCABULARY)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).returncode


def test_killed_anywhere_it_goes_on_to_the_same_bytes(corpus_folder, tmp_path, small_parts, monkeypatch):
    whole = tmp_path / "whole"
    prepare(str(corpus_folder), whole, deduplicate=True, workers=1, **SETTINGS)
    out = tmp_path / "data"
    work = out.with_name(".data.preparing")
    # What gets a name, in order: the work folder's identity, 4 parts of text, their end, the tokenizer, 4 parts of
    # tokens, the result. Each start counts from what it finds: killed at text 1, text 3, the tokenizer, tokens 1 and 2.
    finished: dict = {}
    for at in (3, 3, 3, 3, 2):
        assert kill_at(corpus_folder, out, at) == -signal.SIGKILL
        assert not out.exists()
        here = {path: path.stat().st_mtime_ns for path in work.rglob("*/bytes.npy")}
        here |= {path: path.stat().st_mtime_ns for path in work.glob("tokens_0/*/train.bin")}
        here = {path: stamp for path, stamp in here.items() if ".partial" not in str(path)}
        assert finished.items() <= here.items(), "a finished part was written again"
        finished = here
    assert {path.parent.parent.name for path in finished} == {"text_0", "tokens_0"}
    encoded = []
    encode = encode_module.encode_part
    monkeypatch.setattr(encode_module, "encode_part", lambda *task: encoded.append(task[2].name) or encode(*task))
    prepare(str(corpus_folder), out, deduplicate=True, workers=1, **SETTINGS)
    assert content(out) == content(whole)
    before = {path.parent.name for path in finished if path.name == "train.bin"}
    assert encoded and before and not before & set(encoded)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "whole"]


def test_other_text_or_settings_begin_anew(corpus_folder, tmp_path, small_parts):
    out = tmp_path / "data"
    assert kill_at(corpus_folder, out, 10) == -signal.SIGKILL
    prepare(str(corpus_folder), out, workers=1, **SETTINGS)
    expected = tmp_path / "expected"
    prepare(str(corpus_folder), expected, workers=1, **SETTINGS)
    assert content(out) == content(expected)


@pytest.mark.parametrize("module", [corpus_module, encode_module])
def test_a_full_disk_is_one_sentence_and_keeps_what_is_finished(
    corpus_folder, prepared, tmp_path, small_parts, monkeypatch, module
):
    """ENOSPC while the third part is written: nothing looks finished that is not, and the next start completes it."""
    out = tmp_path / "data"
    real = module.np.save if module is corpus_module else module.np.savez_compressed
    calls = []

    def full(path, *arguments, **keywords):
        calls.append(path)
        if len(calls) == 8:
            real(path, *arguments, **keywords)
            path.write_bytes(path.read_bytes()[:10])
            raise OSError(errno.ENOSPC, "No space left on device")
        real(path, *arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(module.np, "save" if module is corpus_module else "savez_compressed", full)
        with pytest.raises(ValueError, match=r"did not finish: the disk of .* is full .*: free some space and run the"):
            prepare(str(corpus_folder), out, workers=1, **SETTINGS)
    assert not out.exists()
    kind = "text_0" if module is corpus_module else "tokens_0"
    parts = (tmp_path / ".data.preparing" / kind).iterdir()
    assert sorted(path.name for path in parts if path.is_dir()) == ["000000", "000001", "000002.partial"]
    prepare(str(corpus_folder), out, workers=1, **SETTINGS)
    assert content(out) == content(prepared)


@pytest.mark.parametrize("failure", [OSError("quota"), KeyboardInterrupt()])
def test_a_failure_leaves_the_output_as_it_was(corpus_folder, prepared, tmp_path, monkeypatch, failure):
    def fail(*_):
        raise failure

    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module.manifests, "write_manifest", fail)
        expected = KeyboardInterrupt if isinstance(failure, KeyboardInterrupt) else ValueError
        with pytest.raises(expected):
            prepare(str(corpus_folder), out, **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == [".data.preparing"]
    prepare(str(corpus_folder), out, **SETTINGS)
    assert content(out) == content(prepared)


def test_bad_input_leaves_nothing(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "good"}\n{\n')
    with pytest.raises(ValueError, match="no JSON"):
        prepare(str(tmp_path / "c.jsonl"), tmp_path / "data", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["c.jsonl"]


def test_one_folder_has_one_writer(tmp_path):
    from slope_megatron.data.scratch import workspace_beside

    with workspace_beside(tmp_path / "data", {}):
        second = workspace_beside(tmp_path / "data", {})
        with pytest.raises(ValueError, match=r"another process is preparing .*data: wait for it"):
            second.__enter__()
        assert (tmp_path / ".data.preparing" / "identity.json").is_file()


def test_a_dead_worker_is_an_error_and_the_rest_goes_on(corpus_folder, prepared, tmp_path, small_parts, monkeypatch):
    out = tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(encode_module, "encode_part", die)
        with pytest.raises(ValueError, match="a worker was killed, for want of memory perhaps: fewer --workers"):
            prepare(str(corpus_folder), out, workers=2, **SETTINGS)
    prepare(str(corpus_folder), out, workers=2, **SETTINGS)
    assert content(out) == content(prepared)


@pytest.mark.slow
def test_killed_at_any_moment_with_workers(tmp_path):
    """The real command, killed as it gets on, workers and all; none of them outlives it."""
    folder = tmp_path / "many"
    folder.mkdir()
    for number in range(16):
        (folder / f"{number:02}.txt").write_text(f"{number} " + "some words and some more words\n" * 10_000)
    settings = "workers=2, tokenizer='bpe', vocab_size=300"
    code = f"from slope_megatron.data import corpus, prepare; corpus.PART = 300_000; prepare.prepare({str(folder)!r}, "
    command = [sys.executable, "-c", code + "{!r}, " + settings + ")"]

    def start(out):
        return subprocess.Popen([*command[:-1], command[-1].format(str(out))], stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    out, workers = tmp_path / "data", []
    work = out.with_name(".data.preparing")
    # 217 at the end: parts of text, then of tokens.
    for entries in (20, 70, 130, 180):
        process = start(out)
        while sum(len(inside) for _, *both in os.walk(work) for inside in both) < entries:
            assert process.poll() is None, f"ended before there were {entries} files and folders"
            time.sleep(0.005)
        workers += psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
    _, alive = psutil.wait_procs(workers, timeout=300)
    assert not alive, "workers outlive the process that started them"
    assert start(out).wait() == 0
    assert workers and content(out) == content(tmp_path / "whole")
