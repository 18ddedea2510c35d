"""What the scripts of this folder share: the recipe, text, and the comparison."""

import importlib.metadata
import inspect
import math
import typing
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax

RECIPE = {
    "nesterov": True,
    "precondition_frequency": 1,
    "basis": "current",
    "factors": "kl",
}
"""The options of docs/recipes.md for language models and PINNs, without the names."""


def schedule(peak: float, steps: int) -> optax.Schedule:
    """Warms up for a tenth of the steps, and decays by a cosine."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)


def nadam(rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Makes Adam with Nesterov's momentum and with the decays of SOAP."""
    return optax.nadam(rate, b1=0.95, b2=0.95)


def text(batches: int, rows: int, context: int, module: Any = typing) -> np.ndarray:
    """Draws tokens `[batches, rows, context + 1]`, bytes of a module of Python."""
    code = np.frombuffer(inspect.getsource(module).encode(), np.uint8)
    shape = (batches, rows, 1)
    starts = np.random.default_rng(0).integers(0, len(code) - context, shape)
    return code[starts + np.arange(context + 1)].astype(np.int32)


def compare(
    package: str,
    task: str,
    train: Callable[[optax.GradientTransformation], float],
    steps: int | None = None,
    limit: float | None = None,
    **optimizers: tuple[Callable[..., optax.GradientTransformation], Sequence[float]],
) -> None:
    """Trains with each optimizer at each of its rates, and prints a row of a table.

    An optimizer is a function of the learning rate, with its rates. With `steps`, rates
    are the peaks of a schedule. The program fails if SOAP ends over `limit`, which is
    the lowest loss of the others if it is not given.
    """
    figures, lowest = [], {}
    for name, (make, rates) in optimizers.items():
        used = {r: schedule(r, steps) if steps else r for r in rates}
        losses = {rate: float(train(make(used[rate]))) for rate in rates}
        print(f"{package}, {name}, loss at each learning rate: {losses}", flush=True)
        finite = {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
        rate = min(finite, key=finite.__getitem__)
        lowest[name] = finite[rate]
        figures.append(f"{name} {finite[rate]:.4g} at {rate:g}")
    version = f"{package} {importlib.metadata.version(package)}, JAX {jax.__version__}"
    print(f"| {version} | {task} | {', '.join(figures)} |", flush=True)
    ours = lowest.pop("SOAP")
    limit = min(lowest.values()) if limit is None else limit
    if not ours <= limit:
        raise SystemExit(f"{package}: SOAP ended at {ours}, which is over {limit}")
