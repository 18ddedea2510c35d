"""SOAP, Adam and NAdam on physics-informed neural networks.

    python experiments/pinn.py --out docs/results  # It trains for 49 minutes.

A network u(t, x) on [0, 1] x [-1, 1], periodic in x, is trained on the residual of a
partial differential equation at random points, which are new at each step. Where the
equation is hard, [0, 1] is split into windows of time, and each window has a network of
its own, which starts from the field at the end of the window before. All optimizers
have the same network, points, number of steps and schedule. Learning rates are searched
with the first seed until the rates to both sides have larger errors, and the other
seeds run at the rate with the least error. Errors are relative and in L2, on a grid of
100 x 256 points, against a pseudospectral solution in float64. Finished runs in
`<runs>` are not repeated. The command writes `<out>/pinn.csv` and `<out>/pinn.png`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import emulation
import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from results import Row, report, run_all
from search import at_next_rates, climb

import soap_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, DEPTH, SPANS, LOOKS, TIMES, SEEDS = 64, 3, 32, 40, 100, 3
Field = Callable[[Any, Any], Any]  # u(t, x), of arrays of one shape

_recipe = functools.partial(
    soap_optax.soap,
    nesterov=True,
    precondition_frequency=1,
    basis="current",
    factors="kl",
    precision="highest",
)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "Adam": optax.adam,
    "NAdam": optax.nadam,
    "SOAP, as published": soap_optax.soap,
    "SOAP, recipe": _recipe,
    "SOAP, recipe, TF32": functools.partial(_recipe, precision="TF32_TF32_F32"),
}
COLORS = dict(zip(OPTIMIZERS, ("C7", "C0", "C1", "C3", "C4"), strict=True))
RATES, FIRST_RATE = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-2


@dataclasses.dataclass(frozen=True)
class Experiment:
    """SOAP, Adam and NAdam on physics-informed neural networks."""

    out: Path = Path("runs/pinn")
    """The folder of the table and the plot."""
    runs: Path = Path("runs/pinn")
    """The folder in which runs are kept."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    problem: str
    optimizer: str
    rate: float
    seed: int
    steps: int

    @property
    def name(self) -> str:
        problem = self.problem.lower().replace(" ", "-")
        optimizer = self.optimizer.lower().replace(", ", "-").replace(" ", "-")
        return f"{problem}_{optimizer}_{self.rate:g}_seed{self.seed}_{self.steps}"


# --- equations -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation, which is dv/dt = linear v + nonlinear(u) in Fourier space.

    Attributes:
      residual: gives the residual of a field at times and places.
      initial: gives u(0, x) for x, with the functions of NumPy or of JAX.
      linear: gives the linear part for the wave numbers.
      nonlinear: gives the nonlinear part in Fourier space, for the values on the grid
        and the wave numbers.
      modes: how many Fourier modes of x the network is given.
      windows: how many windows of time there are, each with a network of its own.
      handed_on: how many Fourier modes a window takes over from the one before.
      points: how many random points there are in a step.
      steps: how many steps there are in a window.
    """

    residual: Callable[[Field, jax.Array, jax.Array], jax.Array]
    initial: Callable[[Any, Any], Any]
    linear: Callable[[np.ndarray], np.ndarray]
    nonlinear: Callable[[np.ndarray, np.ndarray], np.ndarray]
    modes: int = 10
    windows: int = 1
    handed_on: int = 0
    points: int = 256
    steps: int = 8_000


def derivatives(function: Callable[[Any], Any], at: jax.Array, order: int) -> list[Any]:
    """The values of an elementwise function and of its derivatives up to an order."""
    if order == 0:
        return [function(at)]

    def derivative(x):
        return jax.jvp(function, (x,), (jnp.ones_like(x),))[1]

    return [function(at), *derivatives(derivative, at, order - 1)]


def allen_cahn(u: Field, t: jax.Array, x: jax.Array) -> jax.Array:
    """The residual u_t - 1e-4 u_xx - 5 u + 5 u^3."""
    _, u_t = derivatives(lambda t: u(t, x), t, 1)
    value, _, u_xx = derivatives(lambda x: u(t, x), x, 2)
    return u_t - 1e-4 * u_xx - 5 * value + 5 * value**3


def burgers(u: Field, t: jax.Array, x: jax.Array) -> jax.Array:
    """The residual u_t + u u_x - (0.01 / pi) u_xx."""
    _, u_t = derivatives(lambda t: u(t, x), t, 1)
    value, u_x, u_xx = derivatives(lambda x: u(t, x), x, 2)
    return u_t + value * u_x - 0.01 / np.pi * u_xx


def korteweg_de_vries(u: Field, t: jax.Array, x: jax.Array) -> jax.Array:
    """The residual u_t + u u_x + 0.022^2 u_xxx."""
    _, u_t = derivatives(lambda t: u(t, x), t, 1)
    value, u_x, _, u_xxx = derivatives(lambda x: u(t, x), x, 3)
    return u_t + value * u_x + 0.022**2 * u_xxx


PROBLEMS = {
    "Allen-Cahn": Problem(
        allen_cahn,
        initial=lambda x, xp: x**2 * xp.cos(np.pi * x),
        linear=lambda k: 5 - 1e-4 * k**2,
        nonlinear=lambda u, k: -5 * np.fft.rfft(u**3),
    ),
    "Burgers": Problem(
        burgers,
        initial=lambda x, xp: -xp.sin(np.pi * x),
        linear=lambda k: -0.01 / np.pi * k**2,
        nonlinear=lambda u, k: -0.5j * k * np.fft.rfft(u**2),
    ),
    "Korteweg-de Vries": Problem(
        korteweg_de_vries,
        initial=lambda x, xp: xp.cos(np.pi * x),
        linear=lambda k: 0.022**2 * 1j * k**3,
        nonlinear=lambda u, k: -0.5j * k * np.fft.rfft(u**2),
        windows=10,
        handed_on=64,
        points=512,
        steps=1_000,
    ),
}


def grid(size: int) -> np.ndarray:
    return -1 + 2 * np.arange(size) / size


@functools.cache
def solution(name: str, size: int = 1024, steps: int = 4000) -> np.ndarray:
    """The solution at 101 times and 256 places.

    It is computed by an exponential Runge-Kutta method of fourth order, ETDRK4 of Cox
    and Matthews, with the means over circles of Kassam and Trefethen.
    """
    problem, h = PROBLEMS[name], 1 / steps
    k = np.pi * np.arange(size // 2 + 1)
    linear = problem.linear(k).astype(complex)
    z = h * linear[:, None] + np.exp(2j * np.pi * (np.arange(32) + 0.5) / 32)
    half, whole = np.exp(h * linear / 2), np.exp(h * linear)
    middle = h * np.mean((np.exp(z / 2) - 1) / z, 1)
    first = h * np.mean((-4 - z + np.exp(z) * (4 - 3 * z + z**2)) / z**3, 1)
    inner = h * np.mean((4 + 2 * z + np.exp(z) * (2 * z - 4)) / z**3, 1)
    last = h * np.mean((-4 - 3 * z - z**2 + np.exp(z) * (4 - z)) / z**3, 1)

    def slope(v):
        return problem.nonlinear(np.fft.irfft(v, size), k) * (k < k[-1] * 2 / 3)

    v = np.fft.rfft(problem.initial(grid(size), np))
    values = [v]
    for _ in range(steps):
        at_start = slope(v)
        a = half * v + middle * at_start
        at_a = slope(a)
        at_b = slope(half * v + middle * at_a)
        at_c = slope(half * a + middle * (2 * at_b - at_start))
        v = whole * v + first * at_start + inner * (at_a + at_b) + last * at_c
        values.append(v)
    return np.fft.irfft(values, size)[:: steps // 100, :: size // 256]


# --- training ------------------------------------------------------------------------


class Network(nn.Module):
    """An MLP of time and Fourier modes of place, from `[points]` and `[points]`."""

    modes: int

    @nn.compact
    def __call__(self, t, x):
        angles = jnp.outer(x, np.pi * np.arange(1, self.modes + 1))
        features = jnp.concatenate(
            [t[:, None], jnp.cos(angles), jnp.sin(angles)], axis=-1
        )
        for _ in range(DEPTH):
            features = jnp.tanh(nn.Dense(WIDTH)(features))
        return nn.Dense(1)(features)[:, 0]


def field(problem: Problem, params: Any, start: Any) -> Field:
    """The field of a window, with time counted from the window's start.

    It is u(0, x) + series(x) + t network(t / length, x), so that it is given at t = 0.
    The series is what the windows before have added to u(0, x). Its cosines have the
    coefficients `start[0]`, and its sines `start[1]`; a first window has zeros there.
    """
    network = Network(problem.modes)

    def u(t, x):
        angles = jnp.outer(x, np.pi * np.arange(problem.handed_on))
        series = jnp.cos(angles) @ start[0] + jnp.sin(angles) @ start[1]
        grown = t * network.apply(params, t * problem.windows, x)
        return problem.initial(x, jnp) + series + grown

    return u


def handed_on(problem: Problem, params: Any, start: Any) -> Any:
    """The coefficients `start` of the window that follows."""
    x, modes = grid(256), np.arange(problem.handed_on)
    values = field(problem, params, start)(np.full(256, 1 / problem.windows), x)
    angles = np.pi * np.outer(modes, x)
    waves = np.stack([np.cos(angles), np.sin(angles)])
    weights = np.where(modes == 0, 1, 2)[:, None] / len(x)
    return jnp.asarray(weights * waves) @ (values - problem.initial(x, np))


def make_loss(problem: Problem) -> Callable[[Any, Any, jax.Array], Any]:
    """Makes a loss: the mean squared residual at random points, and it unweighted.

    The points are spread evenly over time. Residuals count less while earlier ones are
    large: their weight is exp(-m), where m sums the means over all earlier spans of
    time, as in arXiv 2203.07404. The second result has no weights.
    """

    def loss(params, start, key):
        t, x = jax.random.uniform(key, (2, problem.points))
        t = (jnp.arange(problem.points) + t) / (problem.points * problem.windows)
        u = field(problem, params, start)
        residuals = problem.residual(u, t, 2 * x - 1)
        means = jnp.mean(jnp.square(residuals).reshape(SPANS, -1), axis=1)
        weights = jnp.exp(means - jnp.cumsum(means))
        return jnp.mean(jax.lax.stop_gradient(weights) * means), jnp.mean(means)

    return loss


def make_advance(
    loss: Callable[..., Any], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """Makes a function that takes a step for each key and gives losses unweighted."""

    def advance(carry, start, keys):
        def step(carry, key):
            params, state = carry
            grads, plain = jax.grad(loss, has_aux=True)(params, start, key)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), plain

        return jax.lax.scan(step, carry, keys)

    return jax.jit(advance)


def make_values(problem: Problem) -> Callable[[Any, Any], jax.Array]:
    """Makes a function that gives the field of a window as `[times, 256]`."""
    length = 1 / problem.windows
    ends = np.linspace(0, length, 1 + TIMES // problem.windows)[1:]
    times, places = np.meshgrid(ends, grid(256), indexing="ij")

    def values(params, start):
        u = field(problem, params, start)(times.ravel(), places.ravel())
        return u.reshape(times.shape)

    return jax.jit(values)


def relative_error(found: list[Any], name: str) -> float:
    """The relative error in L2 of the values of some windows, the first ones."""
    values = np.concatenate(found)
    expected = solution(name)[1 : len(values) + 1]
    return float(np.linalg.norm(values - expected) / np.linalg.norm(expected))


def train(job: Job) -> list[Row]:
    """Trains one window after another, and gives errors and losses at `LOOKS` steps.

    The errors are those over all times until the end of the window that is trained. A
    CPU emulates TF32, so that the seconds say nothing of it.
    """
    with emulation.on_cpu():
        return train_windows(job)


def train_windows(job: Job) -> list[Row]:
    problem, key = PROBLEMS[job.problem], jax.random.key(job.seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, job.rate, job.steps // 20, job.steps
    )
    tx = OPTIMIZERS[job.optimizer](schedule)
    values, advance = make_values(problem), make_advance(make_loss(problem), tx)
    looks = LOOKS // problem.windows
    shape = looks, job.steps // looks
    start, found, seconds, rows = jnp.zeros((2, problem.handed_on)), [], 0.0, []
    for window in range(problem.windows):
        key, for_params = jax.random.split(key)
        params = Network(problem.modes).init(for_params, jnp.zeros(1), jnp.zeros(1))
        carry = params, tx.init(params)
        keys = jax.random.split(jax.random.fold_in(key, 1), shape)
        if window == 0:
            advance = advance.lower(carry, start, keys[0]).compile()
        for look in range(looks):
            since = time.process_time()
            carry, losses = jax.block_until_ready(advance(carry, start, keys[look]))
            seconds += time.process_time() - since
            error = relative_error([*found, values(carry[0], start)], job.problem)
            step = (window * looks + look + 1) * shape[1]
            loss = float(losses.mean())
            rows.append(
                {"step": step, "seconds": seconds, "loss": loss, "error": error}
            )
        found.append(values(carry[0], start))
        start = handed_on(problem, carry[0], start)
    return rows


# --- table and plot ------------------------------------------------------------------

Runs = dict[str, list[dict[str, str]]]


def final_error(run: list[dict[str, str]]) -> float:
    return float(run[-1]["error"])


def summary(job: Job, run: list[dict[str, str]]) -> Row:
    return {
        "problem": job.problem,
        "optimizer": job.optimizer,
        "learning rate": job.rate,
        "seed": job.seed,
        "steps": job.steps,
        "relative L2 error": float(run[-1]["error"]),
        "final loss": float(run[-1]["loss"]),
        "seconds": float(run[-1]["seconds"]),
    }


def plot(jobs: list[Job], runs: Runs, path: Path) -> None:
    """Draws errors against steps and seconds, in a row of panels for each problem."""
    count = len(PROBLEMS)
    figure, panels = plt.subplots(
        count, 2, figsize=(10, 3.5 * count), layout="constrained"
    )
    for row, problem in zip(panels, PROBLEMS, strict=True):
        for job in (job for job in jobs if job.problem == problem):
            label = f"{job.optimizer} ({job.rate:g})" if job.seed == 0 else None
            columns = zip(*(entry.values() for entry in runs[job.name]), strict=True)
            steps, seconds, _, errors = (np.array(c, float) for c in columns)
            for panel, at in zip(row, (steps, seconds), strict=True):
                panel.semilogy(at, errors, color=COLORS[job.optimizer], label=label)
        for panel, unit in zip(row, ("steps", "seconds on one core"), strict=True):
            panel.set(xlabel=unit, title=f"{problem}: relative error in L2")
            panel.grid(alpha=0.3)
        row[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(experiment: Experiment) -> None:
    jobs: dict[str, Job] = {}
    runs: Runs = {}

    def train_all(some: Sequence[Job]) -> list[list[dict[str, str]]]:
        named = {job.name: job for job in some}
        jobs.update(named)
        runs.update(run_all(train, named, experiment.runs))
        return [runs[job.name] for job in some]

    starts = {
        (name, optimizer): Job(name, optimizer, FIRST_RATE, 0, problem.steps)
        for name, problem in PROBLEMS.items()
        for optimizer in OPTIMIZERS
    }
    best, _ = climb(
        starts, lambda job: at_next_rates(job, RATES), train_all, final_error
    )
    tuned = [
        dataclasses.replace(job, seed=seed)
        for job in best.values()
        for seed in range(SEEDS)
    ]
    train_all(tuned)
    rows = [summary(job, runs[name]) for name, job in jobs.items()]
    report(rows, experiment.out / "pinn.csv")
    plot(tuned, runs, experiment.out / "pinn.png")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
