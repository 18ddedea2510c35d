"""What the experiments compute from their runs, and that these are not repeated."""

import dataclasses
import functools
import itertools
import math
import subprocess
import sys
from pathlib import Path

import cases
import language_model
import members
import numpy as np
import pytest
import results
import train_lm
import tuning
from train_lm import Config
from training import needs_consistent_rms

ROOT = Path(__file__).parent.parent
COMMANDS = [
    path
    for folder in ("benchmarks", "examples", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if "__main__" in path.read_text()
]


@pytest.mark.slow
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.name)
def test_every_command_starts_alone(path):
    """The tests have all folders in their path, and would not miss one there."""
    command = [sys.executable, path, "--help"]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "usage:" in found.stdout


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


BASE = tuning.base(300)


def curve(*losses, **changes):
    count = len(losses)
    return tuning.Curve(
        dataclasses.replace(BASE, **changes),
        steps=np.arange(1, count + 1) * 10,
        losses=np.array(losses),
    )


def test_steps_to_a_loss_are_between_evaluations():
    falling = curve(3.0, 2.0, 1.5)
    assert falling.reached(2.5) == 15
    assert falling.reached(1.75) == 25
    assert falling.reached(3.5) == 10
    assert falling.reached(1.0) == np.inf


def test_a_training_that_does_not_stay_finite_ends_with_an_infinite_loss():
    assert curve(3.0, 1.5).final == 1.5
    assert curve(3.0, np.nan).final == curve(3.0, np.inf).final == np.inf


def test_steps_are_saved_seed_by_seed():
    others = [curve(4.0, 3.0, 2.0), curve(4.0, 3.0, 1.0)]
    found = [curve(3.0, 2.0, 1.5), curve(3.0, 2.0, 1.5)]
    np.testing.assert_allclose(tuning.saved(found, others), [1 / 3, -np.inf])
    assert np.isnan(tuning.saved(found[:1], [curve(4.0, 3.0, np.nan)]))


def test_shorter_trainings_count_by_their_final_losses():
    of_lengths = {
        20: [curve(9.0, 2.5), curve(9.0, 1.5)],
        40: [curve(9.0, 9.0, 2.0, 1.0), curve(9.0, 9.0, 9.0, 1.0)],
    }
    found = language_model.by_length(of_lengths)
    others = [curve(9.0, 9.0, 9.0, 1.75)] * 2
    # The first seed gets there half way, and the second one with 20 steps or fewer.
    assert tuning.saved(found, others).tolist() == [0.25, 0.5]


def test_runs_are_named_by_their_length_and_what_is_not_as_in_the_others():
    config = dataclasses.replace(BASE, seed=3, learning_rate=0.1)
    assert tuning.name_of(config) == "steps=300,learning_rate=0.1,seed=3"
    assert tuning.name_of(tuning.base(1200)) == "steps=1200"


def test_no_configuration_has_two_names():
    up = tuning.shifted(BASE, ["adam_learning_rate"], 1)
    assert (up.learning_rate, up.adam_learning_rate) == (0.03, 0.1)
    assert tuning.shifted(up, ["learning_rate"], 1).adam_learning_rate is None
    assert tuning.shifted(up, ["adam_learning_rate"], -1) == BASE


def test_ladders_end():
    config = dataclasses.replace(BASE, b2=tuning.LADDERS["b2"][-1])
    (lower,) = tuning.neighbours(config, ["b2"])
    assert lower.b2 == tuning.LADDERS["b2"][-2]


@pytest.fixture
def finished(tmp_path):
    """Tables of all rates; losses are lowest at 0.003 and, for Adam, at 0.1."""
    folder = tuning.of_this_machine(tmp_path)
    rates = tuning.LADDERS["learning_rate"]
    for rate, adam, label in itertools.product(rates, rates, ("soap", "adamw")):
        loss = math.log(rate / 0.003) ** 2 + math.log(adam / 0.1) ** 2
        config = dataclasses.replace(BASE, optimizer=label, learning_rate=rate)
        if adam != rate:
            config = dataclasses.replace(config, adam_learning_rate=adam)
        row = {"step": 300, "validation_loss": loss}
        results.write(folder / f"{tuning.name_of(config)}.csv", [row])
    return tmp_path


def test_a_search_ends_where_both_neighbours_are_worse(finished):
    starts = {"a": BASE, "b": dataclasses.replace(BASE, optimizer="adamw")}
    best, tried = tuning.best_settings(finished, starts, ["learning_rate"], seeds=1)
    assert {label: c.learning_rate for label, c in best.items()} == {
        "a": 0.003,
        "b": 0.003,
    }
    of_a = {c.config.learning_rate for label, (c,) in tried if label == "a"}
    assert of_a == {0.1, 0.03, 0.01, 0.003, 0.001}
    assert all(c.config.adam_learning_rate in (None, 0.03) for _, (c,) in tried)
    best, _ = tuning.best_settings(finished, best, ["adam_learning_rate"], seeds=1)
    assert best["a"].adam_learning_rate == 0.1


def test_rates_move_together(finished):
    rates = ("learning_rate", "adam_learning_rate")
    best, tried = tuning.best_settings(finished, {"a": BASE}, rates, seeds=1)
    assert best["a"].learning_rate in (0.01, 0.03)
    assert {c.config.adam_learning_rate for _, (c,) in tried} == {None}


def test_a_search_compares_means_over_seeds(tmp_path):
    folder = tuning.of_this_machine(tmp_path)
    losses = {0.01: (1.0, 4.0), 0.03: (2.0, 2.0), 0.1: (3.0, 3.0)}
    for (rate, of_seeds), seed in itertools.product(losses.items(), range(2)):
        config = dataclasses.replace(BASE, learning_rate=rate, seed=seed)
        config = dataclasses.replace(config, adam_learning_rate=0.3)
        row = {"step": 300, "validation_loss": of_seeds[seed]}
        results.write(folder / f"{tuning.name_of(config)}.csv", [row])
    start = dataclasses.replace(BASE, learning_rate=0.03, adam_learning_rate=0.3)
    best, tried = tuning.best_settings(
        tmp_path, {"a": start}, ["learning_rate"], seeds=2
    )
    assert best == {"a": start}
    assert [[c.final for c in of_seeds] for _, of_seeds in tried] == [
        [2.0, 2.0],
        [1.0, 4.0],
        [3.0, 3.0],
    ]


@pytest.mark.parametrize("label", language_model.OPTIMIZERS)
def test_every_optimizer_of_the_comparison_is_a_configuration(label):
    config = dataclasses.replace(BASE, **language_model.OPTIMIZERS[label]).filled()
    assert isinstance(config, Config)
    longer = language_model.at_length(config, 1200)
    assert (longer.steps, longer.warmup, longer.eval_every) == (1200, 120, 40)
    short = language_model.at_batch(config, 300, 512)
    assert (short.steps, short.eval_every, short.eval_batches) == (18, 1, 1)


SHORT = Config(
    optimizer="muon",
    learning_rate=0.03,
    b2=0.95,
    steps=5,
    warmup=2,
    batch=4,
    context=32,
    eval_every=2,
    eval_batches=2,
    scan=True,
)
# Several tests compare with the same trainings.
run_alone = functools.cache(tuning.run)


@pytest.mark.parametrize(
    "optimizer",
    [
        pytest.param("soap_muon", marks=needs_consistent_rms),
        *cases.slow("splus", "soap_spheres"),
    ],
)
def test_recipes_train_stacked_layers(optimizer):
    config = dataclasses.replace(
        SHORT, optimizer=optimizer, steps=12, eval_every=6, eval_batches=1
    )
    first, last = train_lm.train(config)
    assert last.validation_loss < first.validation_loss < 5.5


def differing(**changes):
    return [
        dataclasses.replace(SHORT, **changes),
        dataclasses.replace(SHORT, seed=1, learning_rate=0.01, **changes),
        dataclasses.replace(SHORT, seed=1, b2=0.8, **changes),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "rtol"),
    [
        ({"optimizer": "adamw"}, 1e-4),
        pytest.param({"optimizer": "muon"}, 1e-4, marks=needs_consistent_rms),
        # SOAP's first steps enlarge round-off, and more so in larger blocks. Losses of
        # members that are taken for one another differ by more than a tenth.
        ({"optimizer": "soap", "block_size": 8, "precondition_frequency": 2}, 1e-2),
    ],
    ids=str,
)
def test_members_of_a_program_train_as_they_do_alone(changes, rtol):
    configs = differing(**changes)
    together = members.train_together(configs)
    for config, rows in zip(configs, together, strict=True):
        alone = run_alone(config)
        assert [row["step"] for row in rows] == [2, 4, 5]
        for field in ("step", "validation_loss"):
            of_both = ([row[field] for row in table] for table in (rows, alone))
            np.testing.assert_allclose(*of_both, rtol=rtol)


@needs_consistent_rms
def test_what_differs_in_numbers_alone_is_trained_in_one_program(tmp_path):
    configs = [*differing(adam_learning_rate=0.1), *differing(preset="width-64")]
    jobs = {tuning.name_of(config): config for config in configs}
    groups = members.groups(jobs, tmp_path)
    assert [len(group) for group in groups] == [3, 3]
    results.write(tmp_path / f"{tuning.name_of(configs[0])}.csv", [{"step": 1}])
    assert [len(group) for group in members.groups(jobs, tmp_path)] == [2, 3]


@pytest.mark.slow
def test_every_member_gets_its_own_table(tmp_path, monkeypatch):
    """Also in the second round of a program that has fewer members than jobs."""
    monkeypatch.setattr(members, "MEMBERS", 3)
    configs = differing(optimizer="adamw")
    jobs = dict(zip("abcd", [*configs, configs[1]], strict=True))
    members.train_and_write(jobs, tmp_path)
    for name, config in jobs.items():
        *_, last = results.read(tmp_path / f"{name}.csv")
        *_, alone = run_alone(config)
        loss = float(last["validation_loss"])
        assert loss == pytest.approx(alone["validation_loss"], rel=1e-3)


def test_an_optimizer_without_tuned_settings_needs_its_own():
    with pytest.raises(ValueError, match="--learning-rate must be given for splus"):
        Config(optimizer="splus").filled()
