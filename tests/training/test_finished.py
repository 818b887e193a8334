"""A finished run that is resumed stays as it is; a resumed run's totals are those of all its attempts."""

import json

from helpers import commands

RUN = (
    "--num-layers 2 --hidden-size 64 --num-attention-heads 4 --seq-length 32 --global-batch-size 8 --steps 4 "
    "--eval-samples 8 --warmup-steps 1 --log-interval 1 --slope-adapter-rank 0 --brief"
).split()


def on_disk(folder):
    """Content and time of every file, and the time of every folder."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in (folder, *folder.rglob("*"))
    }


def test_a_finished_run_is_left_as_it_is(corpus, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain", "--data", corpus, "--out", run, *RUN]
    begun = commands.slope(*command, "--stop-at", 2)
    assert begun.returncode == 0, begun.stderr
    stopped = on_disk(run)
    again = commands.slope(*command, "--stop-at", 2, "--resume")
    said = f"slope: {run} was finished at step 2: nothing was changed; to go on towards step 4, give a later --stop-at"
    assert again.returncode == 0 and f"{said}, or none\n" in again.stderr
    assert on_disk(run) == stopped

    first = json.loads((run / "summary.json").read_text())
    assert commands.slope(*command, "--resume").returncode == 0
    summary = json.loads((run / "summary.json").read_text())
    earlier, last = summary["attempts"]
    assert (earlier["from_step"], earlier["to_step"], last["from_step"], last["to_step"]) == (0, 2, 2, 4)
    assert earlier["ranks"] == last["ranks"] == 1
    assert summary["train_seconds"] == earlier["train_seconds"] + last["train_seconds"] > first["train_seconds"]
    assert summary["wall_seconds"] > last["wall_seconds"] > 0
    assert summary["tokens_per_second"] == summary["tokens"] / summary["train_seconds"]

    done = on_disk(run)
    for flag in ("--resume", "--auto-resume"):
        again = commands.slope(*command, flag)
        assert again.returncode == 0
        assert (
            f"slope: {run} was finished at step 4: nothing was changed; for more steps, start another run"
            in again.stderr
        )
    assert on_disk(run) == done
    other = commands.slope(*command, "--resume", "--num-layers", 3)
    assert other.returncode == 2 and "model.num_layers: 2 then, 3 now" in other.stderr
    assert on_disk(run) == done

    # Killed between the last checkpoint and the summary: this one is written, with what the steps took.
    (run / "summary.json").unlink()
    assert commands.slope(*command, "--resume").returncode == 0
    rewritten = json.loads((run / "summary.json").read_text())
    for key in ("tokens", "tokens_per_second", "train_seconds", "val_loss", "bad_steps"):
        assert rewritten[key] == summary[key]


def test_a_run_goes_where_its_link_leads(corpus, tmp_path):
    """Trained, resumed and overwritten, without the link being replaced."""
    (tmp_path / "large").mkdir()
    run = tmp_path / "run"
    run.symlink_to(tmp_path / "large")
    command = ["pretrain", "--data", corpus, "--out", run, *RUN]
    for flags in (["--stop-at", 1], ["--stop-at", 2, "--resume"], ["--stop-at", 1, "--overwrite"]):
        done = commands.slope(*command, *flags)
        assert done.returncode == 0, done.stderr
        assert run.is_symlink() and (tmp_path / "large" / "summary.json").is_file()
    assert json.loads((run / "summary.json").read_text())["steps"] == 1
    run.unlink()
    run.symlink_to(tmp_path / "gone")
    refused = commands.slope(*command)
    assert refused.returncode == 2
    assert f"slope: error: --out {run} is a link to {tmp_path}/gone, which does not exist; make that" in refused.stderr
    assert not (tmp_path / "gone").exists()
