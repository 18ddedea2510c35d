"""The example trainer, run as a user would."""

import csv
import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from train_lm import (
    PRESETS,
    Config,
    Corpus,
    Preset,
    Row,
    main,
    make_model,
    make_state,
    read_rows,
    read_tokens,
    route,
    train,
    write_rows,
)
from training import needs_consistent_rms

EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = Config(
    preset="smallest",
    learning_rate=3e-3,
    precondition_frequency=2,
    steps=6,
    warmup=2,
    batch=4,
    context=32,
    eval_every=2,
    eval_batches=1,
    seed=1,
)


@pytest.fixture(autouse=True)
def smallest(monkeypatch):
    """A model of one narrow layer compiles in a third of the time."""
    preset = Preset(1, 32, 16, context=32, batch=4, steps=6, warmup=2)
    monkeypatch.setitem(PRESETS, "smallest", preset)


def rows(config):
    return list(train(config))


# Several tests compare with the same training.
rows_once = functools.cache(rows)


def losses(config, rows=rows):
    return [(row.step, row.train_loss, row.validation_loss) for row in rows(config)]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": "soap"},
        {"optimizer": "adamw"},
        pytest.param({"optimizer": "muon"}, marks=needs_consistent_rms),
        *cases.slow(
            {"optimizer": "shampoo"},
            {"optimizer": "shampoo", "factors": "kl"},
            {"optimizer": "lion"},
        ),
    ],
)
def test_every_optimizer_trains(changes):
    result = rows_once(dataclasses.replace(SMALL, **changes))
    assert [row.step for row in result] == [2, 4, 6]
    assert result[-1].validation_loss < result[0].validation_loss < 6.5


EXPERTS = dataclasses.replace(
    SMALL,
    preset="tiny-experts",
    scan=True,
    initial_basis="identity",
    block_size=32,
    diagnose=False,
)


@pytest.mark.parametrize("optimizer", ["adamw", *cases.slow("soap")])
def test_experts_train(optimizer):
    changes = {"optimizer": optimizer, "steps": 12, "learning_rate": 3e-3}
    result = rows(dataclasses.replace(EXPERTS, **changes))
    assert result[-1].validation_loss < 3.5 < result[0].validation_loss < 6.5


def test_experts_have_factors_and_routers_have_none():
    config = dataclasses.replace(EXPERTS, block_size=None).filled()
    state = jax.eval_shape(lambda: make_state(config, make_model(config)))
    factors = optax.tree.get(state.opt_state, "factors")["blocks"]["experts"]
    assert not any(factors["router"]["kernel"])
    rows, columns = factors["experts_in"]
    assert (rows.shape, columns.shape) == ((2, 8, 128, 128), (2, 8, 256, 256))


def test_tokens_go_to_the_best_experts_until_these_have_enough():
    scores = jnp.array([[[4.0, 1.0, 0.1], [4.0, 0.1, 1.0], [3.0, 1.0, 0.1]]])
    taken, weights = route(scores, active=2, capacity=2)
    places = {tuple(map(int, place)) for place in np.argwhere(taken[0])}
    # The first expert has enough with two tokens, and the last token passes it by.
    assert places == {(0, 0, 0), (0, 1, 0), (1, 0, 1), (1, 2, 0), (2, 1, 1)}
    expected = [[0.8, 0.2, 0], [0.8, 0, 0.2], [0.75, 0.25, 0]]
    np.testing.assert_allclose(weights[0], expected, rtol=1e-6)


@pytest.mark.slow
def test_no_token_depends_on_later_ones():
    config = EXPERTS.filled()
    model = make_model(config)
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    apply = jax.jit(lambda tokens: model.apply({"params": params}, tokens))
    other = np.where(np.arange(32) < 20, tokens, 7)
    np.testing.assert_allclose(
        apply(tokens)[:, :20], apply(other)[:, :20], rtol=1e-5, atol=1e-5
    )


def test_what_is_not_said_is_tuned():
    tuned = Config(optimizer="muon").filled()
    assert (tuned.learning_rate, tuned.adam_learning_rate) == (0.03, 0.1)
    own = Config(optimizer="muon", learning_rate=0.01).filled()
    assert (own.learning_rate, own.adam_learning_rate) == (0.01, None)
    soap = Config().filled()
    assert (soap.precondition_frequency, soap.factors) == (5, "kl")
    assert Config(factors="shampoo").filled().factors == "shampoo"
    with pytest.raises(ValueError, match=r"--optimizer must be of soap, .* got sgd"):
        Config(optimizer="sgd").filled()


def test_embedding_and_head_are_left_to_adam():
    config = dataclasses.replace(SMALL, preset="tiny", scan=True).filled()
    state = jax.eval_shape(lambda: make_state(config, make_model(config)))
    factors = optax.tree.get(state.opt_state, "factors")
    assert factors["embed"]["embedding"] == (None, None)
    assert factors["unembed"]["kernel"] == (None, None)
    for name in ("query", "attention_out", "mlp_in"):
        rows, columns = factors["blocks"][name]["kernel"]
        m, n = state.params["blocks"][name]["kernel"].shape[1:]
        assert (rows.shape, columns.shape) == ((2, m, m), (2, n, n))


def test_resuming_continues_bit_for_bit(tmp_path):
    config = dataclasses.replace(SMALL, checkpoint_dir=tmp_path, checkpoint_every=4)
    whole = losses(SMALL, rows_once)
    assert losses(config) == whole
    for step in ("6", "4"):
        assert (tmp_path / step).exists()
    # As if stopped after step 4: the last checkpoint goes, the run continues from 4.
    subprocess.run(["rm", "-r", str(tmp_path / "6")], check=True)
    assert losses(dataclasses.replace(config, resume=True)) == whole[2:]
    # All done: nothing is left to train.
    assert losses(dataclasses.replace(config, resume=True)) == []
    with pytest.raises(ValueError, match="--checkpoint-dir must be empty unless"):
        losses(config)


def test_micro_batches_are_one_batch():
    small = dataclasses.replace(SMALL, optimizer="adamw")
    whole = losses(small, rows_once)
    parts = losses(dataclasses.replace(small, accumulate=4))
    np.testing.assert_allclose(whole, parts, rtol=1e-3)


def test_bf16_computes_in_bf16_and_keeps_float32():
    config = dataclasses.replace(SMALL, bf16=True).filled()
    model = make_model(config)
    state = make_state(config, model)
    kept = jax.tree.leaves((state.params, state.opt_state))
    assert {str(leaf.dtype) for leaf in kept} == {"float32", "int32"}
    config = dataclasses.replace(config, optimizer="adamw")
    assert rows(config)[-1].validation_loss < 6.5


@pytest.mark.parametrize(
    ("preset", "millions"),
    [("tiny", 0.46), ("210m", 217), ("360m", 368), ("660m", 661)],
)
def test_presets_have_the_sizes_they_are_named_by(preset, millions):
    config = Config(preset=preset, vocab=256 if preset == "tiny" else 32128).filled()
    state = jax.eval_shape(lambda: make_state(config, make_model(config)))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert size / 1e6 == pytest.approx(millions, rel=0.02)
    assert PRESETS[preset].width % PRESETS[preset].head_dim == 0


@pytest.mark.parametrize(
    ("preset", "billions", "active"),
    [
        ("llama-8b", 8.03, 8.03),
        ("llama-70b", 70.55, 70.55),
        ("qwen3-235b", 235.1, 22.2),
    ],
)
def test_presets_of_models_that_others_published(preset, billions, active):
    config = Config(preset=preset, scan=True, optimizer="adamw").filled()
    state = jax.eval_shape(lambda: make_state(config, make_model(config)))
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    experts = state.params["blocks"].get("experts", {})
    of_experts = sum(experts[name].size for name in experts if name != "router")
    sizes = PRESETS[preset]
    idle = of_experts and of_experts * (1 - sizes.active_experts / sizes.experts)
    assert size / 1e9 == pytest.approx(billions, abs=0.05)
    assert (size - idle) / 1e9 == pytest.approx(active, abs=0.05)


def test_corpora(tmp_path):
    text = np.arange(30_000) % 251
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.txt").write_bytes(bytes(text[:100].tolist()))
    (tmp_path / "folder" / "b.txt").write_bytes(bytes(text[100:].tolist()))
    text.astype(np.uint16).tofile(tmp_path / "tokens.bin")
    for name in ("folder", "tokens.bin"):
        np.testing.assert_array_equal(read_tokens(str(tmp_path / name)), text)
    config = dataclasses.replace(
        SMALL,
        data=str(tmp_path / "tokens.bin"),
        vocab=256,
        context=16,
        optimizer="adamw",
    )
    assert len(rows(config)) == 3


def test_batches_do_not_overlap_validation():
    config = dataclasses.replace(SMALL, vocab=40_000, context=16).filled()
    corpus = Corpus(np.arange(40_000), config)
    seen = {int(t) for i in range(40) for t in corpus.batch(i, 64).reshape(-1)}
    held_out = corpus.batch(0, 256, validation=True)
    assert not seen & {int(t) for t in held_out.reshape(-1)}
    assert held_out.shape == (256, 17)
    np.testing.assert_array_equal(corpus.batch(3, 8), corpus.batch(3, 8))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data": "/nowhere"}, FileNotFoundError, "--data must be a file, a folder"),
        ({"accumulate": 3}, ValueError, "--accumulate must divide the batch of 4"),
        ({"vocab": 100}, ValueError, "--vocab must exceed every token, got 100"),
        ({"accumulate": 0}, ValueError, "--accumulate must be at least 1, got 0"),
        (
            {"optimizer": "adamw", "adam_learning_rate": 0.1},
            ValueError,
            "--adam-learning-rate must be left out with adamw and lion",
        ),
        ({"eval_every": 0}, ValueError, "--eval-every must be at least 1, got 0"),
        ({"data": __file__, "context": 4096}, ValueError, "--data must hold at least"),
    ],
)
def test_clear_errors(changes, error, message):
    with pytest.raises(error, match=message):
        rows(dataclasses.replace(SMALL, **changes))


def test_resuming_from_nothing(tmp_path):
    config = dataclasses.replace(SMALL, checkpoint_dir=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="--resume needs a checkpoint"):
        rows(config)
    with pytest.raises(ValueError, match="--resume needs --checkpoint-dir"):
        rows(dataclasses.replace(SMALL, resume=True))


def test_seconds_leave_out_checkpoints_but_nothing_else(tmp_path):
    changes = {"preset": "tiny", "optimizer": "adamw", "eval_every": 6}
    config = dataclasses.replace(SMALL, **changes)
    (plain,) = rows(config)
    checkpointed = dataclasses.replace(
        config, checkpoint_dir=tmp_path, checkpoint_every=5
    )
    (row,) = rows(checkpointed)
    for r in (plain, row):
        assert r.tokens_per_second == pytest.approx(6 * 4 * 32 / r.seconds, rel=0.05)


def test_resumed_metrics_keep_the_rows_before(tmp_path):
    config = dataclasses.replace(
        SMALL,
        optimizer="adamw",
        metrics=tmp_path / "metrics.csv",
        checkpoint_dir=tmp_path / "checkpoints",
    )
    main(dataclasses.replace(config, steps=4))
    main(dataclasses.replace(config, resume=True))
    assert [row.step for row in read_rows(config.metrics)] == [2, 4, 6]


def test_a_death_leaves_the_metrics_as_they_were(tmp_path):
    """A row that cannot be written ends the writing, as the end of a process does."""
    path = tmp_path / "metrics.csv"
    first, second = (Row(step, 1.0, 2.0, 2.0, 9.0) for step in (1, 2))
    write_rows(path, [first])
    with pytest.raises(TypeError):
        write_rows(path, [first, second, None])
    assert [row.step for row in read_rows(path)] == [1]
    write_rows(path, [first, second])
    assert [row.step for row in read_rows(path)] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"odd"])
def test_bin_files_that_are_not_tokens(tmp_path, content):
    (tmp_path / "tokens.bin").write_bytes(content)
    with pytest.raises(ValueError, match=r"--data must be a \.bin of uint16 tokens"):
        read_tokens(str(tmp_path / "tokens.bin"))


def test_an_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data must hold files"):
        rows(dataclasses.replace(SMALL, data=str(tmp_path)))


def run_example(name, *arguments):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


SHORT = ["--steps=4", "--warmup=1", "--batch=4", "--context=32", "--eval-every=2"]


def test_command_line(tmp_path):
    """AdamW compiles fast; SOAP trains in the processes of other tests."""
    more = ["--optimizer", "adamw", "--metrics", tmp_path / "metrics.csv"]
    output = run_example("train_lm.py", *SHORT, *more)
    assert "adamw: validation loss" in output
    with (tmp_path / "metrics.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [row["step"] for row in table] == ["2", "4"]
    assert float(table[-1]["tokens_per_second"]) > 0


def test_command_line_errors_are_one_line():
    command = [sys.executable, str(EXAMPLES / "train_lm.py"), "--data", "/nowhere"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "error: --data must be a file, a folder" in result.stderr
    assert "Traceback" not in result.stderr


@needs_consistent_rms
def test_comparison(tmp_path):
    short = [a.replace("--", "--config.") for a in (*SHORT, "--scan")]
    output = run_example("compare_lm.py", *short, "--out", tmp_path)
    for name in ("NAdamW", "Muon", "SOAP"):
        assert f"{name}: validation loss" in output
    for name in ("NAdamW", "Muon"):
        assert re.search(rf"SOAP (reached|did not reach) {name}'s final", output)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"adamw.csv", "muon.csv", "soap.csv", "compare.png"}


def test_a_comparison_refuses_what_it_cannot_do_before_it_trains(tmp_path):
    command = [sys.executable, str(EXAMPLES / "compare_lm.py"), "--out", str(tmp_path)]
    result = subprocess.run(
        [*command, "--optimizers", "adamw", "sgd"], capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "error: --optimizer must be of soap" in result.stderr
    assert "Traceback" not in result.stderr
    assert not list(tmp_path.iterdir())
