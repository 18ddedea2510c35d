"""Trainings that differ in numbers alone, as members of one program on an accelerator.

A small model leaves most of an accelerator idle, and compiling takes as long as the
training. So configurations that differ only in their seed, learning rates and b2 are
trained at once: `jax.vmap` goes over the whole step, with the optimizer. On a CPU,
where this gains nothing, each training has a core of its own (`results.run_all`).
"""

import concurrent.futures
import dataclasses
import functools
import multiprocessing
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import recipes  # noqa: F401  This adds optimizers and models to the trainer.
from results import Row, write
from train_lm import (
    Config,
    Corpus,
    TrainState,
    cross_entropy,
    first_state,
    make_model,
    make_optimizer,
    read_tokens,
    train_step,
)

# Several processes share an accelerator, so that none may take all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
NUMBERS = {"seed": 0, "learning_rate": 1.0, "adam_learning_rate": None, "b2": 0.5}
"""Settings that may differ between the members, with values that stand for them all."""
MEMBERS = 9
"""How many members a program has: three seeds of three configurations."""
PROCESSES = 4
"""How many programs are traced, compiled and run at a time."""


def run_together(jobs: Mapping[str, Config], folder: Path) -> None:
    """Trains the configurations that have no table in the folder, and writes theirs.

    Programs are made by several processes, and what one of them cannot do does not end
    the others.
    """
    pending = [
        _processes().submit(train_and_write, group, folder)
        for group in groups(jobs, folder)
    ]
    concurrent.futures.wait(pending)
    for done in pending:
        done.result()


def groups(jobs: Mapping[str, Config], folder: Path) -> list[dict[str, Config]]:
    """The jobs without a table, put together where one program serves them."""
    found: dict[Config, dict[str, Config]] = defaultdict(dict)
    for name, config in jobs.items():
        if not (folder / f"{name}.csv").exists():
            found[without_numbers(config)][name] = config
    return [*found.values()]


@functools.cache
def _processes() -> concurrent.futures.ProcessPoolExecutor:
    return concurrent.futures.ProcessPoolExecutor(
        PROCESSES, multiprocessing.get_context("spawn")
    )


def without_numbers(config: Config) -> Config:
    """What the members of a program have in common."""
    return dataclasses.replace(config, **NUMBERS)


def train_and_write(group: Mapping[str, Config], folder: Path) -> None:
    """Trains a group, as many at a time as a program has members.

    Tables that another command has written meanwhile are written once more.
    """
    names, configs = [*group], [*group.values()]
    for i in range(0, len(configs), MEMBERS):
        members = configs[i : i + MEMBERS]
        # A later round of a search, which has fewer members, finds a program compiled.
        spare = MEMBERS - len(members)
        tables = train_together([*members, *[members[-1]] * spare])
        for name, rows in zip(names[i : i + MEMBERS], tables, strict=False):
            write(folder / f"{name}.csv", rows)
            print(f"{name}: done", file=sys.stderr, flush=True)


def train_together(configs: Sequence[Config]) -> list[list[Row]]:
    """The steps and the validation losses of each configuration."""
    filled = [config.filled() for config in configs]
    common = filled[0]
    numbers = {
        "learning_rate": jnp.array([c.learning_rate for c in filled]),
        "adam_learning_rate": jnp.array([c.adam_peak for c in filled]),
        "b2": jnp.array([c.b2 for c in filled]),
    }
    seeds = sorted({config.seed for config in filled})
    seed_of = np.array([seeds.index(config.seed) for config in filled])
    tokens = _tokens(common.data)
    corpora = [Corpus(tokens, dataclasses.replace(common, seed=s)) for s in seeds]
    init, advance, validate = _programs(without_numbers(configs[0]))
    held_out = _stack(
        [
            [c.batch(i, min(common.batch, 128), validation=True) for c in corpora]
            for i in range(common.eval_batches)
        ]
    )
    carry = init(numbers, jnp.array([config.seed for config in filled]))
    rows: list[list[Row]] = [[] for _ in filled]
    done = 0
    while done < common.steps:
        steps = range(done, min(done + common.eval_every, common.steps))
        batches = _stack([[c.micro_batches(i) for c in corpora] for i in steps])
        carry = advance(numbers, carry, batches, seed_of)
        done = steps.stop
        losses = np.asarray(validate(carry[0], held_out, seed_of))
        for row, loss in zip(rows, losses, strict=True):
            row.append({"step": done, "validation_loss": float(loss)})
    return rows


@functools.cache
def _tokens(data: str) -> np.ndarray:
    return read_tokens(data)


def _stack(arrays: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    return np.stack([np.stack(of_seeds) for of_seeds in arrays])


@functools.cache
def _programs(config: Config) -> tuple[Callable[..., Any], ...]:
    """The programs of a group: to start, to take steps, and to validate.

    Tokens `[steps, seeds, …]` are given once for all members with the same seed, and
    `seed_of` says for each member which of the seeds is its own.
    """
    filled = config.filled()
    model = make_model(filled)

    def optimizer(numbers):
        return make_optimizer(dataclasses.replace(filled, **numbers))

    def start(numbers, seed):
        state = first_state(model, optimizer(numbers), jax.random.key(seed))
        return state.params, state.opt_state

    def step(numbers, carry, tokens):
        params, opt_state = carry
        # The state of Flax holds the optimizer, so that it cannot leave this function.
        state = TrainState(0, model.apply, params, optimizer(numbers), opt_state)
        state, _ = train_step(state, tokens, model=model, z_loss=filled.z_loss)
        return state.params, state.opt_state

    def advance(numbers, carry, tokens, seed_of):
        def body(carry, of_seeds):
            return jax.vmap(step)(numbers, carry, of_seeds[seed_of]), None

        return jax.lax.scan(body, carry, tokens)[0]

    def validate(params, tokens, seed_of):
        def one(of_seeds):
            loss = functools.partial(cross_entropy, model)
            return jax.vmap(loss)(params, of_seeds[seed_of])[0]

        return jnp.mean(jax.lax.map(one, tokens), axis=0)

    return (
        jax.jit(jax.vmap(start)),
        jax.jit(advance, donate_argnums=1),
        jax.jit(validate),
    )
