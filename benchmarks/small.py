"""Times of optimizer steps of small models, in a `jax.lax.scan` and under `jax.vmap`.

    python benchmarks/small.py --out docs/results

Physics-informed networks, agents and ensembles have small matrices, and many steps in
one program. The part `loops` times steps in a `jax.lax.scan`, and steps that are
programs of their own, with a state that is donated. The part `ensembles` times steps of
8 members at once, beside 8 steps of one. All ways take their turns, and times are
medians. The command writes tables as CSV files.
"""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro

import soap_optax

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
from results import machine, report, require_known
from steps import seconds

Sizes = list[tuple[int, ...]]
MLP: Sizes = [(2, 64), (64,), *[(64, 64), (64,)] * 3, (64, 1), (1,)]
MEMBERS = 8
ENSEMBLES: dict[str, Sizes] = {
    "MLP of width 128": [(64, 128), (128,), (128, 128), (128,), (128, 10), (10,)],
    "128 x 128, 128 x 256": [(128, 128), (128, 256)],
}
soap = functools.partial(soap_optax.soap, 1e-4)
NEVER = 2**30  # No count of steps is a multiple of it.
LOOPS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": lambda: optax.adam(1e-4),
    "muon": lambda: optax.contrib.muon(1e-4),
    "soap without refreshes": lambda: soap(precondition_frequency=NEVER),
    "soap f=10": soap,
    "soap f=1": lambda: soap(precondition_frequency=1),
}


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure."""

    parts: tuple[str, ...] = ("loops", "ensembles")
    turns: int = 16
    """How many turns are timed, after one that warms up."""
    steps: int = 200
    """How many steps the part `loops` takes in a turn."""
    out: Path = Path("runs/bench")


def normal(sizes: Sizes, lead: tuple[int, ...] = ()) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(sizes))
    pairs = zip(keys, sizes, strict=True)
    return [jax.random.normal(key, lead + size) for key, size in pairs]


def in_turns(ways: Mapping[str, Callable[[], float]], turns: int) -> dict[str, float]:
    """The median of what each way returns, of all turns but the first."""
    found = [{name: take() for name, take in ways.items()} for _ in range(turns + 1)]
    return {name: float(np.median([row[name] for row in found[1:]])) for name in ways}


def loops(bench: Bench) -> Iterator[dict[str, Any]]:
    """A network 2-64-64-64-64-1: microseconds of a step, gradients not included."""
    ways: dict[str, Callable[[], float]] = {}
    for name, make in LOOPS.items():
        ways[f"{name}, scan"] = in_scan(make(), bench.steps)
        ways[f"{name}, one by one"] = one_by_one(make(), bench.steps)
    median = in_turns(ways, bench.turns)
    bound = median["soap without refreshes, scan"]
    for name in LOOPS:
        scan = median[f"{name}, scan"]
        yield {
            "optimizer": name,
            "scan_us": 1e6 * scan,
            "one_by_one_us": 1e6 * median[f"{name}, one by one"],
            "scan_over_soap_without_refreshes": scan / bound,
        }


def next_state(tx: optax.GradientTransformation, state: Any, count: Any) -> Any:
    """Takes a step along gradients that cost hardly anything and are never the same."""
    params, opt_state = state
    grads = jax.tree.map(lambda p: p * (1 + 0.1 * jnp.cos(count)), params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


def in_scan(tx: optax.GradientTransformation, steps: int) -> Callable[[], float]:
    """Times a `jax.lax.scan` of steps, and returns the seconds of one."""

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: Any) -> Any:
        body = lambda state, count: (next_state(tx, state, count), None)  # noqa: E731
        return jax.lax.scan(body, state, jnp.arange(steps))[0]

    params = normal(MLP)
    state = (params, tx.init(params))

    def take() -> float:
        nonlocal state
        spent, state = seconds(run, state)
        return spent / steps

    return take


def one_by_one(tx: optax.GradientTransformation, steps: int) -> Callable[[], float]:
    """Times steps that are programs of their own, and returns the seconds of one."""
    step = jax.jit(functools.partial(next_state, tx), donate_argnums=0)
    params = normal(MLP)
    state = (params, tx.init(params))

    def run(state: Any) -> Any:
        for count in range(steps):
            state = step(state, count)
        return state

    def take() -> float:
        nonlocal state
        spent, state = seconds(run, state)
        return spent / steps

    return take


def ensembles(bench: Bench) -> Iterator[dict[str, Any]]:
    """Steps of 8 members at once, beside 8 steps of one: means of a cycle of f = 10."""
    for model, sizes in ENSEMBLES.items():
        tx = soap()
        updates = {
            "one": tx.update,
            "vmap": jax.vmap(tx.update),
            "lax.map": lambda *xs: jax.lax.map(lambda x: tx.update(*x), xs),  # noqa: B023
        }
        ways = {
            name: cycle(tx, update, sizes, () if name == "one" else (MEMBERS,))
            for name, update in updates.items()
        }
        median = in_turns(ways, bench.turns)
        yield {
            "model": model,
            "members": MEMBERS,
            "one_ms": 1e3 * median["one"],
            "vmap_ms": 1e3 * median["vmap"],
            "lax_map_ms": 1e3 * median["lax.map"],
            "vmap_over_members": median["vmap"] / (MEMBERS * median["one"]),
        }


def cycle(
    tx: optax.GradientTransformation,
    update: Callable[..., Any],
    sizes: Sizes,
    lead: tuple[int, ...],
) -> Callable[[], float]:
    """Times the steps of a cycle, and returns the mean seconds of one."""
    params = normal(sizes, lead)
    state = jax.vmap(tx.init)(params) if lead else tx.init(params)
    step = jax.jit(update, donate_argnums=1)

    def take() -> float:
        nonlocal state
        spent = []
        for _ in range(10):
            one, (_, state) = seconds(step, params, state, params)
            spent.append(one)
        return float(np.mean(spent))

    return take


PARTS = {part.__name__: part for part in (loops, ensembles)}


def main(bench: Bench) -> None:
    require_known("parts", bench.parts, PARTS)
    threads = os.environ.get("OPENBLAS_NUM_THREADS", "default")
    about = {**machine(), "lapack_threads": threads}
    for part in bench.parts:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}", flush=True)
        path = bench.out / f"bench_small_{jax.default_backend()}_{part}.csv"
        report(PARTS[part](bench), path, about)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
