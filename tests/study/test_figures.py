"""Optima, spreads, lines and crossings of made-up losses; the report that shows them."""

import dataclasses

import pytest
from study.conftest import CONTENT
from study.test_runs import finish, planned, sweep

from slope_megatron.study import figures
from slope_megatron.study.charts import styles_of
from slope_megatron.study.report import crossing, speedups_of, warnings_of, write_report
from slope_megatron.study.rows import Rows


@pytest.fixture
def finished(study_of, no_rows):
    """The study with all its rows: dense loses 0.5 from size to size, others 0.45; the second seed is 0.02 higher."""
    study = study_of()
    sweep(study, no_rows, {"dense": [4.0, 3.0, None], "static": [4.0, 3.5, 3.1]})
    for run in planned(study, no_rows):
        if no_rows.find(run.key) is None:
            gain = 0.0 if run.size == "s" else 0.5 if run.method == "dense" else 0.45
            finish(no_rows, run, 3.1 - gain + 0.02 * (run.seed - 1) - 0.1 * (run.method == "dense"))
    return study, planned(study, no_rows), no_rows


def pairs_of(runs, rows):
    return [(run, rows.find(run.key)) for run in runs]


def test_the_optimum_and_its_edge(finished):
    _, runs, rows = finished
    dense, static = figures.cells(pairs_of(runs, rows))[:2]
    assert (dense.best_lr, dense.loss, dense.optimum_at_edge) == (2e-3, 3.0, False)
    assert dense.losses == {1e-3: 4.0, 2e-3: 3.0, 4e-3: None}
    assert (static.best_lr, static.optimum_at_edge) == (4e-3, True)


def test_the_spread_is_over_seeds_of_equal_settings(finished):
    _, runs, rows = finished
    found = {(one.size, one.method): one for one in figures.spreads(pairs_of(runs, rows))}
    assert found.keys() == {(size, method) for size in "sm" for method in ("dense", "static", "adapted", "narrow")}
    dense = found["s", "dense"]
    # One seed trained in the sweep, the other in the ladder.
    assert dense.losses == (3.0, 3.02) and dense.mean == pytest.approx(3.01)
    assert dense.deviation == pytest.approx(0.02 / 2**0.5)


def test_a_line_in_logarithms():
    line = figures.fit((x, 7.0 * x**-0.3) for x in (1e9, 3e10, 1e12))
    assert line.slope == pytest.approx(-0.3) and line.at(5.0) == pytest.approx(7.0 * 5.0**-0.3)
    other = figures.fit((x, 9.0 * x**-0.35) for x in (1e9, 1e12))
    where = (9.0 / 7.0) ** (1 / 0.05)
    assert line.crossing(other) == pytest.approx(where) == other.crossing(line)
    assert line.at(where) == pytest.approx(other.at(where))
    assert line.crossing(dataclasses.replace(line, log_at_one=1.0)) is None
    assert line.crossing(figures.Line(1e6, line.slope + 1e-3)) is None


def test_ladders_go_over_sizes(finished):
    _, runs, rows = finished
    found = {one.method: one for one in figures.ladders(figures.cells(pairs_of(runs, rows)))}
    assert found.keys() == {"dense", "static", "adapted", "narrow"}
    dense = found["dense"]
    assert dense.sizes == ("s", "m") and [loss for _, loss in dense.points] == pytest.approx([3.01, 2.51])
    # A model that is as fast as the dense one of 1.2 times the compute is further left.
    for flops, loss in dense.points:
        assert dense.line(1.2).at(flops / 1.2) == pytest.approx(loss)
        assert dense.parameters_at(flops) in (pytest.approx(number) for number in dense.parameters)


def test_complete_sweeps_without_an_optimum_are_named(finished):
    _, runs, rows = finished
    warning = "sweep: s static: optimum at the high edge: widen the sweep"
    assert warnings_of(runs, rows) == [warning]
    part = Rows(rows.path, [row for row in rows.rows if row.lr != 1e-3])
    assert warnings_of(runs, part) == []


def test_the_report(finished, tmp_path):
    study, runs, rows = finished
    text = write_report(study, runs, rows, tmp_path / "out").read_text()
    for picture in ("sweep.png", "ladder-lines.png", "costs.png"):
        assert f"]({picture})" in text
        assert (tmp_path / "out" / picture).read_bytes().startswith(b"\x89PNG")
    assert "| s | dense | 4.0000 | **3.0000** | diverged |  |" in text
    assert "| s | static | 4.0000 | 3.5000 | **3.1000** | optimum at the high edge: widen the sweep |" in text
    assert "| dense | 3.0100 | 2.5100 |" in text and "| static | time of whole | 1.2 |" in text
    assert "3.0100 | 0.0141 | 3.0000 to 3.0200 |" in text
    assert "Not trained yet" not in text


def test_crossings_far_from_the_sizes_are_not_told():
    flops, parameters = (1e12, 4e12, 16e12), (10**6, 2 * 10**6, 4 * 10**6)

    def ladder(method, losses):
        return figures.Ladder("g", method, ("a", "b", "c"), tuple(zip(flops, losses, strict=True)), parameters)

    dense = ladder("dense", [7.0 * x**-0.05 for x in flops])
    # Steeper, and as good as the dense model of 8 million parameters, which takes 64e12 FLOPs.
    near = ladder("near", [7.0 * 64e12**0.01 * x**-0.06 for x in flops])
    *_, where, left_out, loss = crossing(dense, near, "", 1.0)
    assert (where, left_out) == ("from 8e+06", "8e+06; 8e+06; 8e+06")
    assert float(loss) == pytest.approx(7.0 * 64e12**-0.05, abs=1e-3)
    far = ladder("far", [7.0 * 1e16**0.01 * x**-0.06 for x in flops])
    assert crossing(dense, far, "", 1.0)[3:] == ["from beyond 4e+07", "; ".join(["beyond 4e+07"] * 3), "-"]
    small = ladder("small", [7.0 * 1e8**0.01 * x**-0.06 for x in flops])
    assert crossing(dense, small, "", 1.0)[3] == "from below 1e+05"
    # Two sizes tell a line, and nothing of how sure it is.
    assert crossing(dense.without("a"), near.without("a"), "", 1.0)[4] == "-"


def test_adapted_is_timed_as_static(finished, tmp_path):
    """`time_as`: the time that the other's speed-up leaves."""
    study, runs, rows = finished
    lines = write_report(study, runs, rows, tmp_path).read_text().partition("## Time and memory")[2].splitlines()
    times = {tuple(line.split(" | ")[:2]): line.split(" | ")[-1] for line in lines if line.startswith("| m | ")}
    assert times["| m", "adapted"] == times["| m", "static"] != times["| m", "dense"]


def test_costs_are_of_the_means_and_of_this_studys_names(finished, tmp_path):
    """A row that two methods of equal settings share has the name of the first one."""
    study, _, rows = finished
    group = dataclasses.replace(study.groups["ladder"], methods=("dense", "again"))
    methods = {**study.methods, "again": dataclasses.replace(study.methods["dense"], like="dense", time_as="static")}
    study = dataclasses.replace(study, methods=methods, groups={**study.groups, "ladder": group})
    text = write_report(study, planned(study, rows), rows, tmp_path).read_text()
    text = text.partition("## Time and memory")[2].partition("## Spread")[0]
    costs = {tuple(cells[:2]): cells for line in text.splitlines() if len(cells := line.strip("| ").split(" | ")) == 8}
    # The sweep has as many tokens, and one seed, at 3.0.
    assert costs["s", "dense"][2] == costs["s", "again"][2] == "3.0100"
    assert costs["m", "again"][2:7] == costs["m", "dense"][2:7] and costs["m", "again"][2] == "2.5100"
    assert costs["m", "again"][7] != costs["m", "dense"][7]


def test_a_rate_of_fewer_seeds_is_no_optimum(study_of, no_rows):
    group = {"sizes": ["s"], "methods": ["dense"], "lr": [1e-3, 2e-3], "tokens_per_parameter": 10, "seeds": [1, 2]}
    study = study_of(groups={"sweep": group})
    for run, loss in zip(planned(study, no_rows)[:3], (3.0, 3.2, 2.9), strict=True):
        finish(no_rows, run, loss)
    (cell,) = figures.cells(pairs_of(planned(study, no_rows)[:3], no_rows))
    assert (cell.best_lr, cell.loss) == (1e-3, pytest.approx(3.1))
    finish(no_rows, planned(study, no_rows)[3], 2.9)
    (cell,) = figures.cells(pairs_of(planned(study, no_rows), no_rows))
    assert cell.best_lr == 2e-3


def test_dense_steps_gain_nothing(study_of, no_rows):
    slope = {"slope": {"method": "fst", "fst_dense_tail": 0.25}}
    study = study_of(methods=CONTENT["methods"] | {"adapted": {**slope, "like": "static", "time_as": "static"}})
    found = speedups_of(study, planned(study, no_rows))
    expected = {"dense": 1.0, "narrow": 1.0, "static": 1.2, "adapted": 1 / (0.75 / 1.2 + 0.25)}
    assert found == {"whole": pytest.approx(expected)}


def test_a_report_of_nothing_is_refused_and_of_a_part_says_so(finished, tmp_path):
    study, runs, rows = finished
    nothing = Rows(tmp_path / "none.csv", [])
    with pytest.raises(ValueError, match=r"none\.csv has no row of these runs"):
        write_report(study, runs, nothing, tmp_path)
    part = Rows(tmp_path / "part.csv", rows.rows[:4])
    text = write_report(study, planned(study, part), part, tmp_path).read_text()
    # The best of the dense sweep is a run of the ladder, too.
    assert "5 of 22 runs have a row" in text and "sweep/s-static-lr0.002-seed1" in text.partition("Not trained yet")[2]


def test_many_methods_are_told_apart():
    styles = styles_of([str(number) for number in range(30)])
    assert len({(style["color"], style["marker"]) for style in styles.values()}) == 30
