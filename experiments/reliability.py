"""Measures what docs/reliability.md promises.

    python experiments/reliability.py                 # All parts take half an hour.
    python experiments/reliability.py --parts spikes drift

Each part prints a table and writes it to `<out>/reliability_<part>.csv`.
"""

import dataclasses
import functools
import itertools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from results import Row, read, report, require_known

import soap_optax

SHAPE = (16, 12)
APART = 10**6  # It is added to steps where other random numbers are needed.
Gradient = Callable[..., jax.Array]  # Its arguments are a key, the step, and more.


# --- gradients that optimizers are afraid of -----------------------------------------


def normal(key: jax.Array, step: jax.Array) -> jax.Array:
    return jax.random.normal(jax.random.fold_in(key, step), SHAPE, jnp.float32)


def now_and_then(value: float, every: int) -> Gradient:
    """Normal gradients times `value` in the middle of every `every` steps."""

    def gradient(key, step):
        factor = jnp.where(step % every == every // 2, jnp.float32(value), 1)
        return factor * normal(key, step)

    return gradient


def rank_one_spikes(key: jax.Array, step: jax.Array) -> jax.Array:
    spike = normal(key, step + APART)[:, :1] * normal(key, step + APART)[:1]
    return normal(key, step) + jnp.where(step % 1000 == 500, 1e6, 0) * spike


def turning_rank_one(key: jax.Array, step: jax.Array) -> jax.Array:
    angle = 1e-3 * step
    left = normal(key, 0) * jnp.cos(angle) + normal(key, 1) * jnp.sin(angle)
    return left[:, :1] * left[:1]


BAD_GRADIENTS: dict[str, Gradient] = {
    "normal": normal,
    "nan": now_and_then(np.nan, 100),
    "inf": now_and_then(-np.inf, 100),
    "1e30": now_and_then(1e30, 100),
    "1e-42": lambda key, step: jnp.float32(1e-42) * normal(key, step),
    "zero": lambda key, step: jnp.zeros(SHAPE, jnp.float32),
    "1e10 and 1e-10 in turn": lambda key, step: (
        jnp.where(step % 2 == 1, jnp.float32(1e10), jnp.float32(1e-10))
        * normal(key, step)
    ),
    "1e6 spikes": now_and_then(1e6, 1000),
    "1e6 spikes of rank one": rank_one_spikes,
    "rank one": turning_rank_one,
    "vanishing": lambda key, step: 10 ** (-0.001 * step) * normal(key, step),
    "growing": lambda key, step: 10 ** (0.001 * step) * normal(key, step),
}


def rms(array: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.mean(jnp.square(array)))


def simulation(
    tx: optax.GradientTransformation, gradient: Gradient, steps: int
) -> Callable[..., tuple[np.ndarray, Any]]:
    """Makes a function that takes `steps` steps.

    Its arguments are a seed and what else `gradient` takes; its results are the root
    mean squares of all updates, and the last state.
    """

    @jax.jit
    def run(seed, *more):
        def step(state, i):
            grads = gradient(jax.random.key(seed), i, *more)
            updates, state = tx.update(grads, state)
            return state, rms(updates)

        state = tx.init(jnp.zeros(SHAPE, jnp.float32))
        return jax.lax.scan(step, state, jnp.arange(steps))[::-1]

    return lambda *arguments: jax.tree.map(np.asarray, run(*arguments))


def orthonormality(state: soap_optax.EigenbasisState) -> float:
    """The largest entry of |Q^T Q - I|, infinite if an entry is not finite."""
    errors = [
        np.abs(np.swapaxes(q, -2, -1) @ q - np.eye(q.shape[-1])).max()
        for q in (np.asarray(q, np.float64) for q in jax.tree.leaves(state.eigenbases))
    ]
    return float(np.nan_to_num(max(errors), nan=np.inf))


def bad_gradients() -> Iterator[Row]:
    """Takes 10,000 steps on gradients of each kind with `scale_by_soap()`."""
    for name, gradient in BAD_GRADIENTS.items():
        tx = optax.apply_if_finite(soap_optax.scale_by_soap(), 10)
        sizes, state = simulation(tx, gradient, 10_000)(0)
        yield {
            "gradients": name,
            "orthonormality": orthonormality(state.inner_state),
            "largest update": sizes.max(),
            "last update": sizes[-1],
            "steps skipped": int(state.total_notfinite),
        }


# --- round-off -----------------------------------------------------------------------


def null_shares(
    size: int,
    rank: int,
    scale: float,
    rcond: float | None,
    steps: int = 40,
    *,
    dtype: Any = jnp.float32,
    make: Callable[..., optax.GradientTransformation] = soap_optax.scale_by_soap,
    **options: Any,
) -> list[float]:
    """The shares of updates' norms that lie outside of the span of the gradients."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(size, rank)), rng.normal(size=(rank, size))
    span = np.linalg.qr(left)[0]
    tx = make(rcond=rcond, **options)
    state, update = tx.init(jnp.zeros((size, size), jnp.float32)), jax.jit(tx.update)
    shares = []
    for i in range(steps):
        gradient = left @ rng.normal(size=(rank, rank)) @ right
        gradient *= scale / np.sqrt(np.mean(gradient**2))
        step, state = update(jnp.asarray(gradient, jnp.float32).astype(dtype), state)
        step = np.asarray(step, np.float64)
        outside = step - span @ (span.T @ step)
        if i > 0:  # The first step only builds the basis.
            shares.append(np.linalg.norm(outside) / np.linalg.norm(step))
    return shares


PRECISIONS = ("precision", "refresh_precision")
LOW_PRECISION: dict[str, dict[str, Any]] = {
    "bfloat16 gradients": {"dtype": jnp.bfloat16},
    "float16 gradients": {"dtype": jnp.float16},
    "bfloat16 eigenbases": {"precond_dtype": jnp.bfloat16},
    "all in bfloat16": {"dtype": jnp.bfloat16, "precond_dtype": jnp.bfloat16},
    "products of TensorFloat-32": dict.fromkeys(PRECISIONS, "TF32_TF32_F32"),
    "products of bfloat16": dict.fromkeys(PRECISIONS, "BF16_BF16_F32"),
}


def low_precision() -> Iterator[Row]:
    """Null-space shares where gradients, eigenbases or operands have few digits."""
    for (size, rank), (name, low) in itertools.product(
        ((64, 4), (256, 16)), LOW_PRECISION.items()
    ):
        for scale, rcond in itertools.product((1, 1e-5), (None, 0)):
            with emulation.on_cpu():
                shares = null_shares(size, rank, scale, rcond, **low)
            yield {
                "size": size,
                "rank": rank,
                "rounded": name,
                "gradient": scale,
                "rcond": rcond,
                "median share": np.median(shares),
                "median share from step 21": np.median(shares[20:]),
            }


def round_off() -> Iterator[Row]:
    """Null-space shares with damping and, by `rcond=0`, as published without it."""
    for size, rank in ((64, 4), (256, 16)):
        for scale in (1, 1e-3, 1e-5):
            for rcond in (None, 0):
                shares = null_shares(size, rank, scale, rcond)
                yield {
                    "size": size,
                    "rank": rank,
                    "gradient": scale,
                    "rcond": rcond,
                    "median share": np.median(shares),
                    "largest share": max(shares),
                }


def loss(seeds: tuple[int, ...] = (0, 1, 2)) -> Iterator[Row]:
    """Trains the tiny language model with and without damping, for the final losses.

    Finished runs in runs/reliability are not repeated.
    """
    trainer = Path(__file__).parent.parent / "examples" / "train_lm.py"
    for seed in seeds:
        row: Row = {"seed": seed}
        for rcond in (None, 0):
            metrics = Path(f"runs/reliability/loss_seed{seed}_rcond{rcond}.csv")
            if not metrics.exists() or read(metrics)[-1]["step"] != "600":
                options = (
                    "--no-nesterov --adam --precondition-frequency 10 --factors shampoo"
                    f" --basis previous --seed {seed} --rcond {rcond} --metrics"
                )
                command = [sys.executable, str(trainer), *options.split(), str(metrics)]
                subprocess.run(command, check=True)
            row[f"rcond={rcond}"] = float(read(metrics)[-1]["validation_loss"])
        yield row


# --- spikes --------------------------------------------------------------------------


def spiking(
    key: jax.Array, step: jax.Array, at: int, size: float, rank_one: bool
) -> jax.Array:
    """A constant gradient plus noise of its size, and a spike at one step."""
    steady = normal(key, APART) + normal(key, step)
    direction = normal(key, APART + 1)
    outer = direction[:, :1] * direction[:1]
    spike = jnp.where(rank_one, outer, direction)
    return steady + jnp.where(step == at, size, 0.0) * spike


def spikes(at: int = 300, steps: int = 2000, seeds: int = 5) -> Iterator[Row]:
    """Counts steps until updates stay within 10% of their size without the spike."""
    adam, soap = optax.scale_by_adam, soap_optax.scale_by_soap
    clip = optax.clip_by_global_norm(20.0)  # Steady gradients have this norm.
    for name, tx in {
        "adam, b2=0.95": adam(0.95, 0.95),
        "adam, b2=0.99": adam(0.95, 0.99),
        "adam, b2=0.999": adam(0.95, 0.999),
        "soap": soap(),
        "soap, b2=0.99": soap(b2=0.99),
        "soap, f=1": soap(precondition_frequency=1),
        "soap, clip_update_rms=1": soap(clip_update_rms=1.0),
        "soap, clip_update_rms=None": soap(clip_update_rms=None),
        "soap, rcond=0": soap(rcond=0),
        "clip_by_global_norm, soap": optax.chain(clip, soap()),
    }.items():
        run = simulation(tx, spiking, steps)
        for size, rank_one in itertools.product((1e3, 1e6), (False, True)):
            recovery, largest = [], []
            for seed in range(seeds):
                steady, _ = run(seed, at, 0.0, rank_one)
                sizes, _ = run(seed, at, size, rank_one)
                off = np.abs(sizes[at:] / steady[at:] - 1) > 0.1
                recovery.append(np.flatnonzero(off).max(initial=-1) + 1)
                largest.append(sizes[at:].max())
            median = int(np.median(recovery))
            yield {
                "optimizer": name,
                "spike": f"{size:g}, rank one" if rank_one else f"{size:g}",
                "steps to recover": median if median < steps - at else f"over {median}",
                "largest update": max(largest),
            }


# --- rows that rarely have a gradient ------------------------------------------------


def rare(
    tx: optax.GradientTransformation, shape: tuple[int, int], steps: int
) -> np.ndarray:
    """The largest entry of each update where one row has a gradient in each step."""

    @jax.jit
    def run(state):
        def step(state, i):
            keys = jax.random.split(jax.random.key(i))
            row = jax.random.randint(keys[0], (), 0, shape[0])
            gradient = jax.random.normal(keys[1], shape[1:], jnp.float32)
            grads = jnp.zeros(shape, jnp.float32).at[row].set(gradient)
            updates, state = tx.update(grads, state)
            return state, jnp.abs(updates).max()

        return jax.lax.scan(step, state, jnp.arange(steps))[1]

    return np.asarray(run(tx.init(jnp.zeros(shape, jnp.float32))))


def rare_rows() -> Iterator[Row]:
    """Takes 300 steps on a matrix of which one row has a gradient in each step."""
    second = {"second_moments": ("nu",)}
    adam = optax.scale_by_adam(0.95, 0.95)
    for name, tx in {
        "adam": adam,
        "soap": soap_optax.scale_by_soap(),
        "soap, f=1": soap_optax.scale_by_soap(precondition_frequency=1),
        "soap, max_precond_dim=8": soap_optax.scale_by_soap(max_precond_dim=8),
        "soap, current basis": soap_optax.scale_by_soap(basis="current"),
        "soap, KL": soap_optax.scale_by_soap(factors="kl"),
        "soap, factorized": soap_optax.scale_by_soap(factorized=True),
        "Adam in the eigenbasis": soap_optax.in_eigenbasis(adam),
        "the same with second_moments": soap_optax.in_eigenbasis(adam, **second),
    }.items():
        largest = rare(tx, (500, 8), 300)
        yield {
            "optimizer": name,
            "median": np.median(largest[4:]),
            "largest": largest[4:].max(),
            "largest of the first four": largest[:4].max(),
        }


def rare_words(
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4, 5),
    rates: tuple[float, ...] = (0.02, 0.03, 0.05, 0.1),
) -> Iterator[Row]:
    """Trains a bigram model of 2,000 words of width 16, most of which are rare."""
    soap = functools.partial(soap_optax.soap, max_precond_dim=16)
    by_adam = {"embedding": "adam", "head": "soap"}
    makes: dict[str, Callable[[Any], optax.GradientTransformation]] = {
        "adam": lambda rate: optax.adam(rate, 0.95, 0.95),
        "soap": soap,
        "soap, embedding by adam": lambda rate: optax.partition(
            {"adam": optax.adam(rate, 0.95, 0.95), "soap": soap(rate)}, by_adam
        ),
    }
    for name, make in makes.items():
        for seed in seeds:
            losses = {rate: train_bigrams(make, rate, seed) for rate in rates}
            best = min(losses, key=losses.__getitem__)
            yield {
                "optimizer": name,
                "seed": seed,
                "learning rate": best,
                "loss": losses[best],
            }


def bigrams(seed: int, steps: int, words: int = 2000, batch: int = 64) -> np.ndarray:
    """Texts `[batch, steps]`: each word has 20 successors, mostly frequent words."""
    numbers = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, words + 1)
    frequency /= frequency.sum()
    successors = numbers.choice(words, (words, 20), p=frequency)
    chances = numbers.dirichlet(np.full(20, 0.3), words).cumsum(axis=1)
    texts = [numbers.choice(words, batch, p=frequency)]
    for _ in range(steps - 1):
        drawn = numbers.random((batch, 1)) > chances[texts[-1]]
        chosen = np.minimum(drawn.sum(axis=1), 19)
        texts.append(successors[texts[-1], chosen])
    return np.stack(texts, axis=1)


def train_bigrams(
    make: Callable[[Any], optax.GradientTransformation],
    rate: float,
    seed: int,
    steps: int = 2000,
) -> float:
    """The loss, in nats per word, of the 64 batches after the training."""
    texts = jnp.asarray(bigrams(seed, steps + 65))
    tx = make(optax.linear_schedule(rate, 0, steps))
    keys = jax.random.split(jax.random.key(seed))

    def loss(params, i):
        of_word = params["embedding"][texts[:, i]]
        logits = of_word @ params["head"]
        losses = optax.softmax_cross_entropy_with_integer_labels(
            logits, texts[:, i + 1]
        )
        return losses.mean()

    def step(carry, i):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, i), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def run():
        params = {
            "embedding": 0.3 * jax.random.normal(keys[0], (2000, 16), jnp.float32),
            "head": 0.1 * jax.random.normal(keys[1], (16, 2000), jnp.float32),
        }
        start = params, tx.init(params)
        params, _ = jax.lax.scan(step, start, jnp.arange(steps))[0]
        return jnp.mean(jax.lax.map(lambda i: loss(params, i), steps + jnp.arange(64)))

    return float(run())


# --- drift ---------------------------------------------------------------------------


def drift(marks: tuple[int, ...] = (1_000, 10_000, 100_000)) -> Iterator[Row]:
    """Descends with noise on a quadratic that turns around once in 100,000 steps."""
    for name, options in {
        "f=1": {"precondition_frequency": 1},
        "f=10": {},
        "f=100": {"precondition_frequency": 100},
        "f=10, eigh": {"refresh": "eigh"},
        "f=10, bfloat16 eigenbases": {"precond_dtype": jnp.bfloat16},
    }.items():
        tx = soap_optax.soap(1e-3, **options)
        advance = jax.jit(functools.partial(turning_quadratic, tx), static_argnums=2)
        params = jnp.ones((32, 24), jnp.float32)
        carry = params, tx.init(params)
        done = 0
        for mark in marks:
            carry = advance(carry, done, mark - done)
            done = mark
            state = carry[1][0]
            figures = jax.tree.leaves(
                soap_optax.diagnostics(state),
                is_leaf=lambda x: isinstance(x, soap_optax.Diagnostics),
            )
            yield {
                "optimizer": name,
                "steps": done,
                "orthonormality": orthonormality(state),
                "off-diagonal": np.mean([f.off_diagonal for f in figures]),
                "rotation": np.mean([f.rotation for f in figures]),
                "largest parameter": np.abs(carry[0]).max(),
            }


def turning_quadratic(
    tx: optax.GradientTransformation, carry: Any, first: jax.Array, steps: int
) -> Any:
    """Takes `steps` steps from step `first` on, on a quadratic that turns.

    Its curvatures are from 1 to 1e-3 on both sides.
    """
    rows, columns = carry[0].shape
    turn = (
        jnp.zeros((rows, rows))
        .at[jnp.arange(0, rows, 2), jnp.arange(1, rows, 2)]
        .set(1)
    )
    turn = turn - turn.T  # It turns in the planes of two neighbours.

    def step(carry, i):
        params, state = carry
        angle = 2 * jnp.pi * i / 100_000
        axes = jnp.cos(angle) * jnp.eye(rows) + jnp.sin(angle) * turn
        left = (axes * jnp.logspace(0, -3, rows)) @ axes.T
        noise = jax.random.normal(jax.random.key(i), params.shape)
        grads = left @ params * jnp.logspace(0, -3, columns) + 0.01 * noise
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, carry, first + jnp.arange(steps))[0]


# --- checkpoints ---------------------------------------------------------------------


def checkpoints(steps: int = 204) -> Iterator[Row]:
    """How the next update changes if a state is restored without its eigenbases.

    The missing eigenbases are made from the factors by `eigh`, in the order of the
    eigenvalues, as the first step makes them.
    """
    for name, make in {
        "SOAP": soap_optax.scale_by_soap,
        "recipe": functools.partial(
            soap_optax.scale_by_soap, basis="current", factors="kl", nesterov=True
        ),
    }.items():
        tx = make()
        _, state = simulation(tx, uneven, steps)(0)
        whole = jax.tree.map(jnp.asarray, state)
        without = whole._replace(eigenbases=jax.tree.map(eigenvectors, whole.factors))
        gradient = uneven(jax.random.key(0), jnp.asarray(steps))
        update, other = (tx.update(gradient, one)[0] for one in (whole, without))
        sizes = [x.nbytes for x in jax.tree.leaves(whole)]
        missing = [x.nbytes for x in jax.tree.leaves(whole.eigenbases)]
        yield {
            "optimizer": name,
            "share of the eigenbases in the state": sum(missing) / sum(sizes),
            "difference of the update": float(rms(update - other) / rms(update)),
        }


def uneven(key: jax.Array, step: jax.Array) -> jax.Array:
    """A steady gradient with noise that is larger in some directions than in others."""
    rows, columns = (10.0 ** jnp.linspace(0, -2, size) for size in SHAPE)
    noise = rows[:, None] * normal(key, step) * columns
    left, right = (jnp.linalg.qr(jax.random.normal(key, (s, s)))[0] for s in SHAPE)
    return left @ (noise + 0.1 * rows[:, None] * columns) @ right


def eigenvectors(factor: jax.Array) -> jax.Array:
    return jnp.linalg.eigh(factor)[1][..., ::-1]


# --- command -------------------------------------------------------------------------

PARTS: dict[str, Callable[[], Iterator[Row]]] = {
    "bad_gradients": bad_gradients,
    "round_off": round_off,
    "low_precision": low_precision,
    "spikes": spikes,
    "drift": drift,
    "rare_rows": rare_rows,
    "rare_words": rare_words,
    "loss": loss,
    "checkpoints": checkpoints,
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Measures what docs/reliability.md promises."""

    parts: tuple[str, ...] = tuple(PARTS)
    out: Path = Path("runs/reliability")


def main(experiment: Experiment) -> None:
    print(f"{platform.machine()}, {jax.default_backend()}, JAX {jax.__version__}")
    require_known("parts", experiment.parts, PARTS)
    for part in experiment.parts:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}")
        report(PARTS[part](), experiment.out / f"reliability_{part}.csv")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
