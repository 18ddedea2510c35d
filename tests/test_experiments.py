"""What the experiments compute from their runs, and that these are not repeated."""

import language_model
import numpy as np
import pytest
import results


def one_row(value):
    return [{"value": value, "float": value / 3}]


def test_finished_runs_are_not_repeated(tmp_path):
    results.write(tmp_path / "known.csv", [{"value": 1, "float": 0.5}])
    found = results.run_all(one_row, {"known": 2, "new": 3}, tmp_path)
    assert found == {
        "known": [{"value": "1", "float": "0.5"}],
        "new": [{"value": "3", "float": "1"}],
    }
    assert results.run_all(None, {"known": 2, "new": 3}, tmp_path) == found


def test_a_run_that_fails_leaves_no_table(tmp_path):
    with pytest.raises(TypeError):
        results.run_all(one_row, {"bad": "text"}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_report_has_what_there_is_and_the_machine(tmp_path):
    def rows():
        yield {"value": 1}
        assert [row["value"] for row in results.read(tmp_path / "a.csv")] == ["1"]
        yield {"other": 2.0}

    found = results.report(rows(), tmp_path / "a.csv")
    assert found == [{"value": 1}, {"other": 2.0}]
    first, second = results.read(tmp_path / "a.csv")
    assert first.items() >= {"value": "1", "other": "", **results.machine()}.items()
    assert second.items() >= {"value": "", "other": "2", **results.machine()}.items()


def test_what_there_is_not_cannot_be_asked_for():
    results.require_known("parts", ["a"], ["a", "b"])
    message = "error: --parts must be of a, b, got c, d"
    with pytest.raises(SystemExit, match=message):
        results.require_known("parts", ["c", "a", "d"], ["a", "b"])


def test_steps_and_seconds_to_a_loss_are_between_evaluations():
    curve = language_model.Curve(
        language_model.BASE,
        steps=np.array([10, 20, 30]),
        seconds=np.array([1.0, 2.0, 4.0]),
        losses=np.array([3.0, 2.0, 1.5]),
    )
    assert curve.reached(2.5) == (15, 1.5)
    assert curve.reached(1.75) == (25, 3.0)
    assert curve.reached(3.5) == (10, 1.0)
    assert curve.reached(1.0) == (np.inf, np.inf)


def test_runs_are_named_by_what_is_not_as_in_the_others():
    config = language_model.dataclasses.replace(
        language_model.BASE, seed=3, learning_rate=0.1
    )
    assert language_model.name_of(config) == "learning_rate=0.1,seed=3"
    assert language_model.name_of(language_model.BASE) == "base"


def test_the_best_of_a_sweep():
    def curve(optimizer, rate, loss):
        config = language_model.dataclasses.replace(
            language_model.BASE, optimizer=optimizer, learning_rate=rate
        )
        nothing = np.zeros(1)
        return language_model.Curve(config, nothing, nothing, np.array([loss]))

    sweep = [curve("soap", 1, 3.0), curve("soap", 2, 2.0), curve("adamw", 3, 2.5)]
    best = language_model.best_of(sweep)
    assert {k: c.learning_rate for k, c in best.items()} == {"soap": 2, "adamw": 3}
