"""Complex parameters: SOAP on real and imaginary parts, and on complex matrices.

    python experiments/complex_parameters.py --out docs/results

A Fourier neural operator (arXiv 2010.08895) learns to map u(0, x) to u(1, x) for
Burgers' equation, u_t + u u_x = 0.05 u_xx, periodic in x. Each layer multiplies the low
Fourier modes by complex matrices `[modes, width, width]`. These optimizers train it:

    Adam, complex     optax's, with one second moment for both parts of a number
    Adam, split       real and imaginary parts are parameters of their own, by
                      `optax.contrib.split_real_and_imaginary`
    SOAP, complex     Hermitian factors and unitary eigenbases: `complex_soap` below
    SOAP, prototype   the same on real and imaginary parts, which differs in this alone
    SOAP, split       `soap_optax.scale_by_soap` on real and imaginary parts

All SOAPs decompose their factors by `eigh` at every tenth step. Learning rates are
sought with the first seed until the rates to both sides are worse. Finished runs in
`--runs` are not repeated. The command writes `<out>/complex_parameters.csv`, and all
rates that were tried in `<out>/complex_parameters_sweep.csv`.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from results import Row, report, run_all
from search import at_next_rates, climb

import soap_optax

WIDTH, MODES, LAYERS, POINTS, VISCOSITY = 16, 12, 3, 64, 0.05
STEPS, BATCH, TRAINING, HELD_OUT = 800, 16, 512, 256
RATES, FIRST_RATE = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), 1e-2
BETA, EPS, FREQUENCY = 0.95, 1e-8, 10


class ComplexSoapState(NamedTuple):
    """State of `complex_soap`; each tree has the structure of the parameters.

    `factors` and `eigenbases` have a pair of arrays `[..., m, m]`, `[..., n, n]` for a
    parameter `[..., m, n]`, and `mu` and `nu` are moments in the eigenbases.
    """

    count: jax.Array
    factors: Any
    eigenbases: Any
    mu: Any
    nu: Any


def complex_soap() -> optax.GradientTransformation:
    """SOAP with L = E[G G^H], R = E[G^H G] and unitary eigenbases, for this comparison.

    Moments in the eigenbases are Adam's of complex numbers: second moments are means of
    |Q_L^H G Q_R|^2. As published, the first step only makes the eigenbases. Parameters
    with fewer than two axes are Adam's.
    """

    def init_fn(params: Any) -> ComplexSoapState:
        def pairs(make: Callable[[Any], Any]) -> Any:
            return jax.tree.map(
                lambda p: (make(p), make(_adjoint(p))) if p.ndim > 1 else (), params
            )

        return ComplexSoapState(
            count=jnp.zeros([], jnp.int32),
            factors=pairs(lambda p: 0 * (p @ _adjoint(p))),
            eigenbases=pairs(lambda p: 0 * (p @ _adjoint(p)) + jnp.eye(p.shape[-2])),
            mu=jax.tree.map(jnp.zeros_like, params),
            nu=jax.tree.map(lambda p: jnp.zeros_like(p, p.real.dtype), params),
        )

    def update_fn(updates: Any, state: ComplexSoapState, params: Any = None) -> Any:
        leaves, treedef = jax.tree.flatten(updates)
        others = [treedef.flatten_up_to(tree) for tree in state[1:]]
        one = functools.partial(_complex_step, state.count)
        found = [one(*of_leaf) for of_leaf in zip(leaves, *others, strict=True)]
        steps, *trees = (treedef.unflatten(x) for x in zip(*found, strict=True))
        return steps, ComplexSoapState(state.count + 1, *trees)

    return optax.GradientTransformation(init_fn, update_fn)


def _complex_step(
    count: jax.Array, gradient: Any, factors: Any, bases: Any, mu: Any, nu: Any
) -> tuple[Any, ...]:
    """The update of one parameter and its new state."""
    is_later = count > 0
    weight = 1 - BETA ** jnp.maximum(count, 1).astype(jnp.float32)
    coordinates = _project(gradient, bases)
    mu = jnp.where(is_later, BETA * mu + (1 - BETA) * coordinates, mu)
    square = jnp.square(jnp.abs(coordinates))
    nu = jnp.where(is_later, BETA * nu + (1 - BETA) * square, nu)
    step = (mu / weight) / (jnp.sqrt(nu / weight) + EPS)
    step = jnp.where(is_later, _project_back(step, bases), 0)
    if not factors:
        return step, factors, bases, mu, nu
    grams = gradient @ _adjoint(gradient), _adjoint(gradient) @ gradient
    factors = tuple(
        BETA * factor + (1 - BETA) * gram
        for factor, gram in zip(factors, grams, strict=True)
    )

    def refresh(mu: Any) -> tuple[Any, Any]:
        new = tuple(jnp.linalg.eigh(factor)[1][..., ::-1] for factor in factors)
        return new, _project(_project_back(mu, bases), new)

    is_due = count % FREQUENCY == 0
    bases, mu = jax.lax.cond(is_due, refresh, lambda mu: (bases, mu), mu)
    return step, factors, bases, mu, nu


def _adjoint(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -2, -1).conj()


def _project(matrix: jax.Array, bases: Any) -> jax.Array:
    return _adjoint(bases[0]) @ matrix @ bases[1] if bases else matrix


def _project_back(matrix: jax.Array, bases: Any) -> jax.Array:
    return bases[0] @ matrix @ _adjoint(bases[1]) if bases else matrix


split = optax.contrib.split_real_and_imaginary
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "Adam, complex": lambda: optax.scale_by_adam(BETA, BETA),
    "Adam, split": lambda: split(optax.scale_by_adam(BETA, BETA)),
    "SOAP, complex": complex_soap,
    "SOAP, prototype": lambda: split(complex_soap()),
    "SOAP, split": lambda: split(
        soap_optax.scale_by_soap(
            refresh="eigh", dimension_numbers=soap_optax.matrices()
        )
    ),
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """SOAP on real and imaginary parts, and on complex matrices."""

    out: Path = Path("runs/complex_parameters")
    """The folder of the table."""
    runs: Path = Path("runs/complex_parameters")
    """The folder in which runs are kept."""
    seeds: int = 3


@dataclasses.dataclass(frozen=True)
class Job:
    """One training."""

    optimizer: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        optimizer = self.optimizer.lower().replace(", ", "_")
        return f"{optimizer}_{self.rate:g}_seed{self.seed}_{STEPS}"


# --- data and network ----------------------------------------------------------------


@functools.cache
def fields() -> tuple[np.ndarray, np.ndarray]:
    """Random smooth fields u(0, x), and u(1, x), `[fields, POINTS]`, in float64.

    The equation is solved in Fourier space by the classical Runge-Kutta method with the
    viscous part as an integrating factor, and products are dealiased.
    """
    rng, count = np.random.default_rng(0), TRAINING + HELD_OUT
    waves = np.arange(POINTS // 2 + 1)
    sizes = np.where((waves > 0) & (waves <= 6), POINTS / (1 + waves), 0)
    shape = count, len(waves)
    start = sizes * (rng.normal(size=shape) + 1j * rng.normal(size=shape)) / 4
    steps, mask = 400, waves < POINTS // 3
    half = np.exp(-VISCOSITY * waves**2 / (2 * steps))

    def slope(v: np.ndarray) -> np.ndarray:
        u = np.fft.irfft(v, POINTS)
        return -0.5j * waves * mask * np.fft.rfft(u * u) / steps

    v = start
    for _ in range(steps):
        a = slope(v)
        b = slope(half * (v + a / 2))
        c = slope(half * v + b / 2)
        d = slope(half * half * v + half * c)
        v = half * half * (v + a / 6) + half * (b + c) / 3 + d / 6
    return np.fft.irfft(start, POINTS), np.fft.irfft(v, POINTS)


def first_params(key: jax.Array) -> Any:
    keys = iter(jax.random.split(key, 3 * LAYERS + 3))

    def matrix(rows: int, columns: int) -> jax.Array:
        return jax.random.normal(next(keys), (rows, columns)) / rows**0.5

    def spectral() -> jax.Array:
        shape = MODES, WIDTH, WIDTH
        return jax.random.normal(next(keys), shape, jnp.complex64) / WIDTH

    return {
        "lift": matrix(2, WIDTH),
        "layers": [
            {
                "spectral": spectral(),
                "here": matrix(WIDTH, WIDTH),
                "bias": jnp.zeros(WIDTH),
            }
            for _ in range(LAYERS)
        ],
        "out": [matrix(WIDTH, 2 * WIDTH), matrix(2 * WIDTH, 1)],
    }


def network(params: Any, start: jax.Array) -> jax.Array:
    """The field u(1, x) for u(0, x), both `[fields, POINTS]`."""
    places = jnp.broadcast_to(jnp.linspace(0, 1, POINTS), start.shape)
    x = jnp.stack([start, places], axis=-1) @ params["lift"]
    for layer in params["layers"]:
        low = jnp.fft.rfft(x, axis=1)[:, :MODES]
        low = jnp.einsum("bmi,mio->bmo", low, layer["spectral"])
        there = jnp.fft.irfft(low, POINTS, axis=1)
        x = jax.nn.gelu(there + x @ layer["here"] + layer["bias"])
    hidden, last = params["out"]
    return (jax.nn.gelu(x @ hidden) @ last)[..., 0]


def relative_error(params: Any, start: jax.Array, end: jax.Array) -> jax.Array:
    """The mean over fields of the relative error in L2."""
    norm = functools.partial(jnp.linalg.norm, axis=-1)
    return jnp.mean(norm(network(params, start) - end) / norm(end))


# --- training ------------------------------------------------------------------------


def train(job: Job) -> list[Row]:
    """The errors of a training on its own fields and on held-out ones."""
    start, end = (jnp.asarray(x, jnp.float32) for x in fields())
    schedule = optax.warmup_cosine_decay_schedule(0.0, job.rate, STEPS // 20, STEPS)
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        OPTIMIZERS[job.optimizer](),
        optax.scale_by_learning_rate(schedule),
    )
    for_params, for_batches = jax.random.split(jax.random.key(job.seed))
    params = first_params(for_params)

    @jax.jit
    def run(params: Any, state: Any) -> Any:
        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.choice(key, TRAINING, (BATCH,), replace=False)
            grads = jax.grad(relative_error)(params, start[rows], end[rows])
            # Gradients of JAX are conjugates of the directions of steepest ascent.
            grads = jax.tree.map(jnp.conj, grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(for_batches, STEPS)
        return jax.lax.scan(step, (params, state), keys)[0]

    params, _ = run(params, tx.init(params))
    mine, held_out = slice(TRAINING), slice(TRAINING, None)
    return [
        {
            "training error": float(relative_error(params, start[mine], end[mine])),
            "error": float(relative_error(params, start[held_out], end[held_out])),
        }
    ]


def error(run: list[dict[str, str]]) -> float:
    return float(run[-1]["error"])


def summary(runs: Sequence[list[dict[str, str]]]) -> Row:
    """The figures of some seeds."""
    errors = [error(run) for run in runs]
    training = [float(run[-1]["training error"]) for run in runs]
    return {
        "seeds": len(errors),
        "error": float(np.mean(errors)),
        "lowest": min(errors),
        "highest": max(errors),
        "training error": float(np.mean(training)),
    }


def main(experiment: Experiment) -> None:
    def train_all(jobs: Sequence[Job]) -> list[list[dict[str, str]]]:
        found = run_all(train, {job.name: job for job in jobs}, experiment.runs)
        return [found[job.name] for job in jobs]

    starts = {name: Job(name, FIRST_RATE, 0) for name in OPTIMIZERS}
    near = functools.partial(at_next_rates, rates=RATES)
    best, tried = climb(starts, near, train_all, error)

    def row(job: Job, runs: Sequence[list[dict[str, str]]]) -> Row:
        settings = {"optimizer": job.optimizer, "learning rate": job.rate}
        return {**settings, **summary(runs)}

    rows = [row(job, [run]) for (_, job), run in tried.items()]
    report(rows, experiment.out / "complex_parameters_sweep.csv")
    seeds = range(experiment.seeds)
    rows = [
        row(job, train_all([dataclasses.replace(job, seed=seed) for seed in seeds]))
        for job in best.values()
    ]
    report(rows, experiment.out / "complex_parameters.csv")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
