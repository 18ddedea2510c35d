"""What products of lower precision do to the updates of SOAP.

    python experiments/precisions.py --out docs/results

SOAP gets the gradients of the first steps of the small language model of
`language_model.py`, the same with each precision. The table has, for each precision of
the products of a step (`precision`) and of a refresh (`refresh_precision`), the error
of an update and how far the last eigenbases are from diagonalizing their factors. The
error is the distance from the update in float64 that starts from the same state, as a
share of its norm, and the median of the last steps. The other figure is `off_diagonal`
of `soap_optax.diagnostics`, the mean of all factors. A CPU emulates the precisions of
accelerators, see `emulation.py`.
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import emulation
import jax
import jax.numpy as jnp
import numpy as np
import tyro
from results import Row, report, require_known

import soap_optax

sys.path.append(str(Path(__file__).parent.parent / "examples"))
import train_lm
import tuning
from recipes import KL_SOAP

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "recipe, f=1": KL_SOAP,
    **{f"SOAP, f={f}": {"precondition_frequency": f} for f in (1, 10, 100)},
}
KEPT = 10
"""How many of the last steps are compared."""


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What products of lower precision do to the updates of SOAP."""

    steps: int = 110
    """How many steps there are; at f=100 the last refresh is that of step 100."""
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    precisions: tuple[str, ...] = ("TF32_TF32_F32", "BF16_BF16_F32_X3", "BF16_BF16_F32")
    """Which precisions there are beside float32."""
    out: Path = Path("runs/precisions")


def gradients(steps: int) -> list[list[jax.Array]]:
    """Those of the hidden matrices, float32, from the first steps of a training."""
    config = tuning.base(300).filled()
    model = train_lm.make_model(config)
    state = train_lm.make_state(config, model)
    corpus = train_lm.Corpus(train_lm.read_tokens(config.data), config)

    @jax.jit
    def step(state, tokens):
        loss = lambda params: train_lm.cross_entropy(model, params, tokens)[0]  # noqa: E731
        grads = jax.grad(loss)(state.params)
        return state.apply_gradients(grads=grads), grads

    is_matrix = [
        numbers is not None
        for numbers in jax.tree.leaves(
            train_lm.matrices(config.adam)(state.params), is_leaf=train_lm.is_numbers
        )
    ]
    found = []
    for i in range(steps):
        state, grads = step(state, corpus.batch(i, config.batch))
        leaves = zip(jax.tree.leaves(grads), is_matrix, strict=True)
        found.append([leaf for leaf, is_one in leaves if is_one])
    return found


class Run(NamedTuple):
    """What a run with one precision leaves behind.

    Attributes:
      last: the gradients of the last steps, and the states that met them.
      off_diagonal: the mean of all factors after the last step.
    """

    last: list[tuple[list[jax.Array], Any]]
    off_diagonal: float


def run(update: Callable[..., Any], tx: Any, grads: list[list[jax.Array]]) -> Run:
    state = jax.jit(tx.init)(grads[0])
    last = []
    for i, of_step in enumerate(grads):
        if i >= len(grads) - KEPT:
            last.append((of_step, state))
        _, state = update(of_step, state)
    is_one = lambda node: isinstance(node, soap_optax.Diagnostics)  # noqa: E731
    figures = jax.jit(soap_optax.diagnostics)(state)
    shares = [one.off_diagonal for one in jax.tree.leaves(figures, is_leaf=is_one)]
    return Run(last, float(np.mean(shares)))


def as_dtype(tree: Any, dtype: Any) -> Any:
    """The tree with floating-point arrays of a dtype."""

    def cast(x):
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(cast, tree)


def distance(found: list[jax.Array], exact: list[jax.Array]) -> float:
    """The norm of the difference of two updates over that of the second."""
    one, other = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in leaves])
        for leaves in (found, exact)
    )
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def rows(experiment: Experiment) -> Iterator[Row]:
    grads = gradients(experiment.steps)
    for name in experiment.optimizers:
        for row in rows_of(OPTIMIZERS[name], grads, experiment.precisions):
            yield {"optimizer": name, **row}


def rows_of(
    options: dict[str, Any], grads: list[list[jax.Array]], precisions: tuple[str, ...]
) -> Iterator[Row]:
    """The rows of one optimizer, beginning with float64."""
    make = functools.partial(
        soap_optax.scale_by_soap, b1=0.95, b2=0.95, nesterov=True, **options
    )
    with jax.enable_x64(True):
        update = jax.jit(make().update)
        exact = run(update, make(), as_dtype(grads, jnp.float64))
        exact_updates = [update(*pair)[0] for pair in exact.last]
        starts = [as_dtype(pair, jnp.float32) for pair in exact.last]
    yield row_of("float64", "float64", [0.0], exact)
    for precision, of_refresh in (
        ("highest", "highest"),
        *((one, "highest") for one in precisions),
        *((one, one) for one in precisions),
    ):
        tx = make(precision=precision, refresh_precision=of_refresh)
        update = jax.jit(tx.update)
        errors = [
            distance(update(*start)[0], of_one)
            for start, of_one in zip(starts, exact_updates, strict=True)
        ]
        yield row_of(precision, of_refresh, errors, run(update, tx, grads))


def row_of(precision: str, of_refresh: str, errors: list[float], run: Run) -> Row:
    return {
        "precision": precision,
        "refresh_precision": of_refresh,
        "error of an update": float(np.median(errors)),
        "off-diagonal": run.off_diagonal,
    }


def main(experiment: Experiment) -> None:
    require_known("optimizers", experiment.optimizers, OPTIMIZERS)
    require_known("precisions", experiment.precisions, emulation.EMULATED)
    with emulation.on_cpu():
        report(rows(experiment), experiment.out / "precisions.csv")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
