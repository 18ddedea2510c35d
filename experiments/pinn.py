"""SOAP and Adam on physics-informed neural networks.

    python experiments/pinn.py --out docs/results    # It takes 10 minutes on 2 cores.

A network u(t, x) on [0, 1] x [-1, 1], periodic in x, is trained on the residual of a
partial differential equation at random points, which are new at each step. Both
optimizers have the same network, points, number of steps and schedule. Each has a sweep
of learning rates with the first seed, and the other seeds run at the rate with the
least error. Errors are relative and in L2, on a grid of 101 x 256 points, against a
pseudospectral solution in float64. Finished runs in `<runs>` are not repeated. The
command writes `<out>/pinn.csv` and `<out>/pinn.png`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro
from results import Row, report, run_all

import soap_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

WIDTH, DEPTH, POINTS, SPANS, LOOKS = 64, 3, 256, 32, 40
Field = Callable[[Any, Any], Any]  # u(t, x), of arrays of one shape

OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "Adam": optax.adam,
    "SOAP": soap_optax.soap,
}
RATES = {"Adam": (1e-3, 3e-3, 1e-2, 3e-2), "SOAP": (3e-3, 1e-2, 3e-2)}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """SOAP and Adam on physics-informed neural networks."""

    steps: int = 12_000
    seeds: int = 3
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
        optimizer = self.optimizer.lower()
        return f"{problem}_{optimizer}_{self.rate:g}_seed{self.seed}_{self.steps}"


# --- equations -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Problem:
    """An equation, which is dv/dt = linear v + nonlinear(u) in Fourier space.

    Attributes:
      residual: gives the residual of a field at times and places.
      initial: gives u(0, x) for x and a cosine, which is NumPy's or JAX's.
      modes: how many Fourier modes of x the network is given.
      linear: gives the linear part for the wave numbers.
      nonlinear: gives the nonlinear part in Fourier space, for the values on the grid
        and the wave numbers.
    """

    residual: Callable[[Field, jax.Array, jax.Array], jax.Array]
    initial: Callable[[Any, Callable[[Any], Any]], Any]
    modes: int
    linear: Callable[[np.ndarray], np.ndarray]
    nonlinear: Callable[[np.ndarray, np.ndarray], np.ndarray]


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


def korteweg_de_vries(u: Field, t: jax.Array, x: jax.Array) -> jax.Array:
    """The residual u_t + u u_x + 0.022^2 u_xxx."""
    _, u_t = derivatives(lambda t: u(t, x), t, 1)
    value, u_x, _, u_xxx = derivatives(lambda x: u(t, x), x, 3)
    return u_t + value * u_x + 0.022**2 * u_xxx


PROBLEMS = {
    "Allen-Cahn": Problem(
        allen_cahn,
        initial=lambda x, cos: x**2 * cos(np.pi * x),
        modes=10,
        linear=lambda k: 5 - 1e-4 * k**2,
        nonlinear=lambda u, k: -5 * np.fft.rfft(u**3),
    ),
    "Korteweg-de Vries": Problem(
        korteweg_de_vries,
        initial=lambda x, cos: cos(np.pi * x),
        modes=5,
        linear=lambda k: 0.022**2 * 1j * k**3,
        nonlinear=lambda u, k: -0.5j * k * np.fft.rfft(u**2),
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

    v = np.fft.rfft(problem.initial(grid(size), np.cos))
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
        angles = np.pi * np.arange(1, self.modes + 1) * x[:, None]
        features = jnp.concatenate(
            [t[:, None], jnp.cos(angles), jnp.sin(angles)], axis=-1
        )
        for _ in range(DEPTH):
            features = jnp.tanh(nn.Dense(WIDTH)(features))
        return nn.Dense(1)(features)[:, 0]


def field(problem: Problem, params: Any) -> Field:
    """The field u(0, x) + t network(t, x), for which the initial condition is exact."""
    network = Network(problem.modes)
    return lambda t, x: problem.initial(x, jnp.cos) + t * network.apply(params, t, x)


def make_loss(problem: Problem) -> Callable[[Any, jax.Array], Any]:
    """Makes a loss: the mean squared residual at random points, and it unweighted.

    The points are spread evenly over time. Residuals count less while earlier ones are
    large: their weight is exp(-m), where m sums the means over all earlier spans of
    time, as in arXiv 2203.07404. The second result has no weights.
    """

    def loss(params, key):
        t, x = jax.random.uniform(key, (2, POINTS))
        t = (jnp.arange(POINTS) + t) / POINTS
        residuals = problem.residual(field(problem, params), t, 2 * x - 1)
        means = jnp.mean(jnp.square(residuals).reshape(SPANS, -1), axis=1)
        weights = jnp.exp(means - jnp.cumsum(means))
        return jnp.mean(jax.lax.stop_gradient(weights) * means), jnp.mean(means)

    return loss


def make_advance(
    loss: Callable[..., Any], tx: optax.GradientTransformation
) -> Callable[..., Any]:
    """Makes a function that takes a step for each key and gives losses unweighted."""

    def step(carry, key):
        params, state = carry
        grads, plain = jax.grad(loss, has_aux=True)(params, key)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), plain

    return jax.jit(lambda carry, keys: jax.lax.scan(step, carry, keys))


def make_error(name: str) -> Callable[[Any], jax.Array]:
    """Makes a function that gives the relative error of parameters in L2."""
    times, places = np.meshgrid(np.linspace(0, 1, 101), grid(256), indexing="ij")
    expected = solution(name).ravel()

    def error(params):
        values = field(PROBLEMS[name], params)(times.ravel(), places.ravel())
        return jnp.linalg.norm(values - expected) / np.linalg.norm(expected)

    return jax.jit(error)


def train(job: Job) -> list[Row]:
    """Trains, and gives the error and the mean loss after every so many steps."""
    problem, key = PROBLEMS[job.problem], jax.random.key(job.seed)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, job.rate, job.steps // 20, job.steps
    )
    tx = OPTIMIZERS[job.optimizer](schedule)
    advance, error = make_advance(make_loss(problem), tx), make_error(job.problem)
    params = Network(problem.modes).init(key, jnp.zeros(1), jnp.zeros(1))
    carry, seconds, rows = (params, tx.init(params)), 0.0, []
    keys = jax.random.split(jax.random.fold_in(key, 1), (LOOKS, job.steps // LOOKS))
    advance = advance.lower(carry, keys[0]).compile()
    for look in range(LOOKS):
        since = time.process_time()
        carry, losses = jax.block_until_ready(advance(carry, keys[look]))
        seconds += time.process_time() - since
        rows.append(
            {
                "step": (look + 1) * keys.shape[1],
                "seconds": seconds,
                "loss": float(losses.mean()),
                "error": float(error(carry[0])),
            }
        )
    return rows


# --- table and plot ------------------------------------------------------------------

Runs = dict[str, list[dict[str, str]]]


def final_error(run: list[dict[str, str]]) -> float:
    return float(np.nan_to_num(float(run[-1]["error"]), nan=np.inf))


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
    colors = dict(zip(OPTIMIZERS, ("C7", "C3"), strict=True))
    for row, problem in zip(panels, PROBLEMS, strict=True):
        for job in (job for job in jobs if job.problem == problem):
            label = f"{job.optimizer} ({job.rate:g})" if job.seed == 0 else None
            columns = zip(*(entry.values() for entry in runs[job.name]), strict=True)
            steps, seconds, _, errors = (np.array(c, float) for c in columns)
            for panel, at in zip(row, (steps, seconds), strict=True):
                panel.semilogy(at, errors, color=colors[job.optimizer], label=label)
        for panel, unit in zip(row, ("steps", "seconds on one core"), strict=True):
            panel.set(xlabel=unit, title=f"{problem}: relative error in L2")
            panel.grid(alpha=0.3)
        row[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(experiment: Experiment) -> None:
    train_all = functools.partial(run_all, train, folder=experiment.runs)
    sweeps, tuned = [], []
    for problem in PROBLEMS:
        for optimizer, rates in RATES.items():
            sweeps.append(
                [Job(problem, optimizer, rate, 0, experiment.steps) for rate in rates]
            )
    runs = train_all({job.name: job for sweep in sweeps for job in sweep})
    for sweep in sweeps:
        best = min(sweep, key=lambda job: final_error(runs[job.name]))
        seeds = range(experiment.seeds)
        tuned += [dataclasses.replace(best, seed=seed) for seed in seeds]
    runs |= train_all({job.name: job for job in tuned})
    jobs = dict.fromkeys([job for sweep in sweeps for job in sweep] + tuned)
    rows = [summary(job, runs[job.name]) for job in jobs]
    report(rows, experiment.out / "pinn.csv")
    plot(tuned, runs, experiment.out / "pinn.png")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
