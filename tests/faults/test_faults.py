"""Runs that are struck at random moments: what is resumed must equal, to the bit, what was never disturbed."""

import collections
import dataclasses
import statistics

import pytest
from faults import ranks
from faults.moments import KINDS, PARTS, SAVE_POINTS, Moment, arm, draw

from helpers.servers import fork_server

SEED = 20
MOMENTS = 30


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a fault cost: steps done twice, and losses that differ from the undisturbed run's."""

    lost: int
    wrong: int


def endure(moment: Moment, data, folder, expected: dict[int, float]) -> Outcome:
    """Let the fault happen, check that it was noticed and said, resume as an unattended job does, and compare."""
    from slope_megatron.storage import sums
    from slope_megatron.training.checkpoint import store

    run, logs = folder / "run", folder / "logs"
    patience = {"hang_timeout": ranks.HANG_TIMEOUT} if moment.kind == "stopped" else {}
    ended = ranks.start(ranks.settings(data, run, moment.tensor_parallel, **patience), logs, moment)
    if moment.kind == "disk full":
        assert ended.codes == [0, 0], ended.said
        assert f"step_{moment.step:08d} could not be written (rank {moment.rank}: No space left" in ended.said
        assert "the run goes on" in ended.said
    else:
        assert ended.codes[moment.rank] == -9 and ended.codes[1 - moment.rank] == 70, f"{ended.codes}: {ended.said}"
        verb = "hangs: no progress" if moment.kind == "stopped" else "died; the run stops"
        named = [line for line in ended.said.splitlines() if line.startswith("slope: error: ")]
        assert len(named) == 1 and f"rank {moment.rank} (process" in named[0] and verb in named[0], ended.said
        assert "is complete: the same command with --resume goes on from it" in named[0]
    reached = max(ranks.losses(run))
    if moment.kind in ("truncated", "corrupted"):
        newest = store.complete_checkpoints(run)[-1]
        name = ranks.damage(newest, moment.kind, seed=str(moment))
        with pytest.raises(sums.Damaged, match=f"its file {name} .*remove .* to resume from step_"):
            store.refuse(newest, sums.find_damage(newest))
    good = [folder for folder in store.complete_checkpoints(run) if sums.find_damage(folder) is None]
    resumed_from = int(good[-1].name.removeprefix("step_"))
    if moment.kind != "disk full":
        again = ranks.start(ranks.settings(data, run, moment.tensor_parallel, auto_resume=True), logs)
        assert again.codes == [0, 0], again.said
        if moment.kind in ("truncated", "corrupted"):
            assert f"{newest} is corrupt: its file {name}" in again.said and "set aside" in again.said
    found = ranks.losses(run)
    assert found.keys() == expected.keys()
    assert not list((run / "checkpoints").glob("*.partial"))
    assert (run / "DONE").is_file()
    assert sums.find_damage(store.newest(run)) is None
    wrong = sum(found[step] != loss for step, loss in expected.items())
    return Outcome(lost=max(0, reached - resumed_from), wrong=wrong)


def table(outcomes: dict[str, list[Outcome]], drawn: collections.Counter) -> str:
    lines = [f"{'fault':12}{'count':>7}{'survived':>10}{'steps lost: mean':>18}{'max':>5}{'wrong bits':>12}"]
    for kind in KINDS:
        lost = [outcome.lost for outcome in outcomes[kind]] or [0]
        wrong = sum(outcome.wrong for outcome in outcomes[kind])
        survived = len(outcomes[kind])
        lines.append(f"{kind:12}{drawn[kind]:>7}{survived:>10}{statistics.mean(lost):>18.1f}{max(lost):>5}{wrong:>12}")
    return "\n".join(lines)


FEW = [
    Moment(0, "killed", 0, 4, "in the file", 1),
    Moment(1, "corrupted", 0, 7, "batch", 1),
    Moment(2, "disk full", 0, 4, "index", 1),
    Moment(3, "corrupted", 0, 6, "sealing", 1),
    Moment(4, "killed", 0, 4, "pointer", 1),
]


@pytest.mark.parametrize("moment", FEW, ids=str)
def test_a_fault_costs_steps_but_no_bit(moment, fault_data, undisturbed, tmp_path):
    assert endure(moment, fault_data, tmp_path, undisturbed(moment.tensor_parallel)).wrong == 0


@pytest.mark.parametrize("point", [*PARTS, *SAVE_POINTS])
def test_every_moment_is_one_of_the_program(point):
    """What is to be struck there exists; in a process of its own, which stays armed."""
    process = fork_server().Process(target=arm, args=(Moment(0, "killed", 0, 4, point, 1),))
    process.start()
    process.join(ranks.PATIENCE)
    assert process.exitcode == 0


@pytest.mark.slow
def test_thirty_random_moments(fault_data, undisturbed, tmp_path, capsys):
    """Killed, stopped, truncated, corrupted, disk full: six of each, on two layouts, half of them during a save."""
    outcomes, drawn, failures = collections.defaultdict(list), collections.Counter(), []
    for number in range(MOMENTS):
        moment = draw(number, SEED)
        drawn[moment.kind] += 1
        try:
            outcome = endure(moment, fault_data, tmp_path / str(number), undisturbed(moment.tensor_parallel))
            outcomes[moment.kind].append(outcome)
            said = f"{outcome.lost} steps lost, {outcome.wrong} wrong"
        except AssertionError as error:
            failures.append(f"{moment}: {error}")
            said = "NOT SURVIVED"
        with capsys.disabled():
            print(f"\n{moment}: {said}", end="")
    with capsys.disabled():
        print(f"\nseed {SEED}\n{table(outcomes, drawn)}")
    assert not failures, "\n\n".join(failures)
    assert sum(outcome.wrong for kind in outcomes.values() for outcome in kind) == 0
