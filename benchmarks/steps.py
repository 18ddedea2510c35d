"""Times and memory of optimizer steps beside the products no SOAP step can do without.

    python benchmarks/steps.py                       # width 384, 4 layers
    python benchmarks/steps.py --preset 24-layers --rows soap
    python benchmarks/steps.py --preset 360m         # GPU
    python benchmarks/steps.py --parts peers         # heavyball, pytorch-optimizer

The table of steps has a row for each optimizer: the medians of a step without refresh
and of what a refresh adds, the mean and the 99th percentile over cycles, the seconds of
tracing and of compiling, the size of the program and its memory. The six bare products
are timed after each step, so that a ratio holds where the machine's speed drifts. The
command writes tables as CSV files, and plots.

In all tables, those of `gpus.py` and `pods.py` too, `compile_s` are the seconds of
compiling alone; tracing and lowering come before, and are in `trace_s` here.
"""

import collections
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
import tyro

import soap_optax

# `_stacks` is private; `leaf_by_leaf` changes it to see what stacks are good for.
from soap_optax.refresh import METHODS, _stacks

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "experiments"))
import emulation
import programs
from results import machine, report, require_known

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HIGHEST = jax.lax.Precision.HIGHEST
Tree = Any


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder-only transformer; its MLP is four times as wide."""

    width: int
    layers: int
    vocab: int
    head_dim: int = 64
    stacked: bool = False
    """Whether equal parameters of all layers are one, `[layers, …]`."""


PRESETS = {
    "tiny": Shape(16, 1, 32, head_dim=8),  # It is for tests.
    "tiny-stacked": Shape(16, 2, 32, head_dim=8, stacked=True),
    "default": Shape(384, 4, 256),
    "24-layers": Shape(384, 24, 256),
    "768x12": Shape(768, 12, 256),
    "768x12-stacked": Shape(768, 12, 256, stacked=True),
    "360m": Shape(1024, 24, 32128),
    "660m": Shape(1408, 24, 32128),
}

soap = functools.partial(
    soap_optax.soap, 3e-3, dimension_numbers=soap_optax.matrices(exclude=("norm",))
)
IDENTITY = {"initial_basis": "identity"}  # It leaves eigh out of the program.
DEFAULT_METHOD = "qr"  # The row "soap" refreshes by it.
ROWS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adamw": lambda: optax.adamw(3e-3),
    "muon": lambda: optax.contrib.muon(3e-3),
    "soap": soap,
    **{
        name: functools.partial(soap, refresh=name)
        for name in METHODS
        if name != DEFAULT_METHOD
    },
    "identity start": lambda: soap(**IDENTITY),
    "blocks 512": lambda: soap(block_size=512),
    "blocks 256": lambda: soap(block_size=256),
    **{
        f"products {precision}": functools.partial(
            soap, precision=precision, **IDENTITY
        )
        for precision in ("highest", "high", "default", "bfloat16")
    },
    "staggered": lambda: soap(stagger=True),
    "tolerance 0.1": lambda: soap(refresh_tolerance=0.1),
    "one-sided": lambda: soap(one_sided=True),
    "bf16 mu": lambda: soap(mu_dtype=jnp.bfloat16),
    "bf16 eigenbases": lambda: soap(precond_dtype=jnp.bfloat16),
    "packed": lambda: soap(pack_factors=True),
    "packed, bf16 eigenbases": lambda: soap(
        pack_factors=True, precond_dtype=jnp.bfloat16
    ),
    "packed, bf16 mu and eigenbases, blocks 512": lambda: soap(
        pack_factors=True,
        mu_dtype=jnp.bfloat16,
        precond_dtype=jnp.bfloat16,
        block_size=512,
    ),
}

DEFAULT_PARTS = (
    "steps",
    "refreshes",
    "compiling",
    "precisions",
    "training",
)


@dataclasses.dataclass(frozen=True)
class Bench:
    """What to measure."""

    preset: str = "default"
    rows: tuple[str, ...] = tuple(ROWS)
    parts: tuple[str, ...] = DEFAULT_PARTS
    cycles: int = 4
    """How many cycles of f = 10 steps are timed, after one that warms up."""
    out: Path = Path("runs/bench")
    sequence: int = 256
    """How many tokens a sequence of the part `training` has."""
    batches: tuple[int, ...] = (2, 8, 32)
    """How many sequences a step of the part `training` has; each gives a row."""
    layers: tuple[int, ...] = (4, 24)
    """How many layers the models of the part `compiling` have; each gives rows."""


# --- trees and programs --------------------------------------------------------------


def shapes(shape: Shape) -> Tree:
    """The shapes of the parameters of a transformer."""
    width = shape.width
    layer = {
        **{name: (width, width) for name in ("query", "key", "value", "out")},
        **{"mlp_in": (width, 4 * width), "mlp_out": (4 * width, width)},
        **{name: (width,) for name in ("attention_norm", "mlp_norm")},
    }
    ends = {"embed": (shape.vocab, width), "unembed": (width, shape.vocab)}
    layers: Tree = [layer] * shape.layers
    if shape.stacked:
        layers = {name: (shape.layers, *of_one) for name, of_one in layer.items()}
    return {**ends, "layers": layers, "norm": (width,)}


def normal(shape: Shape, seed: int) -> Tree:
    """Random gradients of a transformer, float32."""
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    leaves, treedef = jax.tree.flatten(shapes(shape), is_leaf=is_shape)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    arrays = [jax.random.normal(k, s) for k, s in zip(keys, leaves, strict=True)]
    return treedef.unflatten(arrays)


def nbytes(tree: Tree) -> int:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def seconds(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
    start = time.perf_counter()
    result = jax.block_until_ready(function(*args))
    return time.perf_counter() - start, result


def compiled(
    tx: optax.GradientTransformation, shape: Shape
) -> tuple[dict[str, float], Any]:
    """The seconds of tracing and of compiling a step, and its program.

    The program may overwrite the state, which is donated.
    """
    params = jax.eval_shape(lambda: normal(shape, 0))
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(tx.update, donate_argnums=1)
    tracing, lowered = programs.timed_trace(step, params, state, params)
    compiling, program = programs.timed_compile(lowered)
    return {"trace_s": tracing, "compile_s": compiling}, program


@functools.partial(jax.jit, static_argnames="axes")
def bare_products(gradient: jax.Array, bases: tuple[Any, ...], axes: tuple[int, ...]):
    """The products of a step with factors along `axes` of the last two.

    For a matrix with two factors there are six: two project it, two project back and
    two are the Gram matrices that the factors accumulate.
    """
    multiply = functools.partial(jnp.matmul, precision=HIGHEST)
    array = gradient
    for transposed in (True, False):
        for axis, q in zip(axes, bases, strict=True):
            matrix = q.mT if transposed else q
            array = multiply(matrix, array) if axis == 0 else multiply(array, matrix.mT)
    grams = [multiply(gradient, gradient.mT), multiply(gradient.mT, gradient)]
    return array, [grams[axis] for axis in axes]


def identities(batch: tuple[int, ...], size: int) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(size), (*batch, size, size)).copy()


def bare_step(shape: Shape, limit: int = 10_000) -> Callable[[], Any]:
    """A program of all bare products of a step, which takes no arguments."""
    by_path = jax.tree_util.tree_leaves_with_path(normal(shape, 0))
    grads = [g for path, g in by_path if "norm" not in jax.tree_util.keystr(path)]
    axes = [tuple(a for a in range(2) if g.shape[a - 2] <= limit) for g in grads]
    bases = [
        tuple(identities(g.shape[:-2], g.shape[a - 2]) for a in ax)
        for g, ax in zip(grads, axes, strict=True)
    ]
    every = jax.jit(
        lambda grads, bases: [
            bare_products(*of_one) for of_one in zip(grads, bases, axes, strict=True)
        ]
    )
    return functools.partial(every, grads, bases)


# --- parts ---------------------------------------------------------------------------


def steps(bench: Bench) -> Iterator[dict[str, Any]]:
    """Steps of each optimizer, in turn with the products that SOAP cannot avoid."""
    shape = PRESETS[bench.preset]
    bare = bare_step(shape)
    jax.block_until_ready(bare())
    for name in bench.rows:
        yield steps_of(name, shape, bare, bench.cycles)


def steps_of(
    name: str, shape: Shape, bare: Callable[[], Any], cycles: int
) -> dict[str, Any]:
    """The row of one optimizer: its program, and its steps in turn with products."""
    tx = ROWS[name]()
    spent_before, program = compiled(tx, shape)
    memory, text = programs.memory_of(program), program.as_text()
    params = normal(shape, 1)
    state = jax.jit(tx.init)(params)
    row = {
        "optimizer": name,
        "state_mb": nbytes(state) / 1e6,
        "temporary_mb": memory.temp_size_in_bytes / 1e6,
        "temporary_share": memory.temp_size_in_bytes / nbytes(state),
        # XLA on CPU does not tell the size of its code; that of the text stands for it.
        "program_mb": (memory.generated_code_size_in_bytes or len(text)) / 1e6,
        **spent_before,
        **programs.decompositions(text),
    }
    gradients = [normal(shape, seed) for seed in range(2, 4)]

    def step(count: int) -> float:
        nonlocal state
        spent, (_, state) = seconds(program, gradients[count % 2], state, params)
        return spent

    return row | in_turn(step, bare, cycles)


def peers(bench: Bench) -> Iterator[dict[str, Any]]:
    """Steps of this SOAP and of those for PyTorch, which must be installed."""
    import heavyball
    import pytorch_optimizer

    if jax.default_backend() != "cpu":
        sys.exit("error: peers are compared on CPU")
    shape = PRESETS[bench.preset]
    bare = bare_step(shape)
    jax.block_until_ready(bare())
    yield steps_of("soap", shape, bare, bench.cycles)
    options = {"lr": 3e-3, "precondition_frequency": 10}
    of_all = {"max_precond_dim": 10_000, "merge_dims": False}
    makers = {
        "pytorch-optimizer": functools.partial(pytorch_optimizer.SOAP, **options),
        "heavyball": functools.partial(heavyball.SOAP, **options, **of_all),
    }
    for package, make in makers.items():
        names = ", ".join(f"{name} {version(name)}" for name in (package, "torch"))
        yield {"optimizer": names, **torch_steps(make, shape, bare, bench.cycles)}


def torch_steps(
    make: Callable[[list[Any]], Any],
    shape: Shape,
    bare: Callable[[], Any],
    cycles: int,
) -> dict[str, Any]:
    """The row of an optimizer for PyTorch, made of a list of parameters."""
    import torch

    def tensors(seed: int) -> list[Any]:
        leaves = jax.tree.leaves(normal(shape, seed))
        return [torch.tensor(np.asarray(leaf)) for leaf in leaves]

    params = [torch.nn.Parameter(tensor) for tensor in tensors(1)]
    gradients = [tensors(seed) for seed in range(2, 4)]
    optimizer = make(params)

    def step(count: int) -> float:
        for param, gradient in zip(params, gradients[count % 2], strict=True):
            param.grad = gradient.clone()  # HeavyBall changes it in place.
        return seconds(optimizer.step)[0]

    for count in range(20):
        step(count)  # HeavyBall compiles the first step and the first refresh.
    times = in_turn(step, bare, cycles)
    state = [x for of in optimizer.state.values() for x in jax.tree.leaves(of)]
    tensors_of_state = [x for x in state if isinstance(x, torch.Tensor)]
    return {
        "state_mb": sum(x.numel() * x.element_size() for x in tensors_of_state) / 1e6,
        **times,
    }


def in_turn(
    step: Callable[[int], float], bare: Callable[[], Any], cycles: int
) -> dict[str, float]:
    """The figures of steps that are run in turn with bare products."""
    times: list[float] = []
    products: list[float] = []
    for count in range(10 * (cycles + 1)):
        times.append(step(count))
        products.append(seconds(bare)[0])
    return timings(times, products)


def timings(times: list[float], products: list[float]) -> dict[str, float]:
    """The figures of all cycles but the first, which warms up.

    The ratio is the median of that of each step to the products right after it.
    """
    after, bounds = np.array(times[10:]), np.array(products[10:])
    is_refresh = np.arange(len(after)) % 10 == 0
    step = float(np.median(after[~is_refresh]))
    return {
        "bare_ms": 1e3 * float(np.median(bounds)),
        "step_ms": 1e3 * step,
        "step_over_bare": float(np.median((after / bounds)[~is_refresh])),
        "refresh_ms": 1e3 * (float(np.median(after[is_refresh])) - step),
        "mean_ms": 1e3 * float(after.mean()),
        "p99_ms": 1e3 * float(np.percentile(after, 99)),
    }


def refreshes(bench: Bench) -> Iterator[dict[str, Any]]:
    """What refreshes add to a step, beside a bare power step and QR decomposition.

    The bare ones take all factors of one size as a batch, and the sizes in turn.
    """
    shape = PRESETS[bench.preset]
    every = jax.jit(lambda m, q: jnp.linalg.qr(jnp.matmul(m, q, precision=HIGHEST))[0])
    state, _ = refreshing(shape, {})
    batches = batches_of(state)
    bare = lambda: [jax.block_until_ready(every(*batch)) for batch in batches]  # noqa: E731
    bare()
    baseline: list[float] = []
    for name, options in {
        **{name: {"refresh": name} for name in METHODS},
        "qr, blocks 512": {"block_size": 512},
        "qr, blocks 256": {"block_size": 256},
    }.items():
        state, run = refreshing(shape, options)
        plain: list[float] = []
        added: list[float] = []
        bound: list[float] = []
        for _ in range(2 * bench.cycles):
            plain.append(run(10))
            added.append(run(1) - plain[-1])
            bound.append(seconds(bare)[0])
        median = float(np.median(added))
        baseline.append(median)
        yield {
            "refresh": name,
            "refresh_ms": 1e3 * median,
            "bare_ms": 1e3 * float(np.median(bound)),
            "refresh_over_bare": median / float(np.median(bound)),
            "qr_over_this": baseline[0] / median,
            "state_mb": nbytes(state) / 1e6,
        }


def refreshing(
    shape: Shape, options: dict[str, Any]
) -> tuple[Any, Callable[[int], float]]:
    """A state after some refreshes, and a function that times a step from it.

    The function takes f: the step refreshes if f is 1, and does not if it is 10.
    """
    params = normal(shape, 1)
    gradients = [normal(shape, seed) for seed in range(2, 6)]

    optimizers = {
        frequency: soap(precondition_frequency=frequency, **IDENTITY, **options)
        for frequency in (1, 10)
    }

    steps = {
        frequency: jax.jit(tx.update, donate_argnums=1)
        for frequency, tx in optimizers.items()
    }
    state, count = jax.jit(optimizers[1].init)(params), 0

    def run(frequency: int) -> float:
        nonlocal state, count
        count += 1
        grads = gradients[count % len(gradients)]
        state = set_count(state, frequency)
        spent, (_, state) = seconds(steps[frequency], grads, state, params)
        return spent

    for frequency in (1, 1, 1, 10):
        run(frequency)
    return state, run


def set_count(state: Any, frequency: int) -> Any:
    """The state with a count for which a refresh is due if `frequency` is 1."""
    count = jnp.asarray(20 if frequency == 1 else 21, jnp.int32)
    return jax.tree.map(
        lambda node: node._replace(count=count) if is_of_soap(node) else node,
        state,
        is_leaf=is_of_soap,
    )


def is_of_soap(node: Any) -> bool:
    return isinstance(node, soap_optax.EigenbasisState)


def batches_of(state: Any) -> list[tuple[jax.Array, jax.Array]]:
    """A batch of factors and one of eigenbases for each size."""
    nodes = jax.tree.leaves(state, is_leaf=is_of_soap)
    (state,) = filter(is_of_soap, nodes)
    by_size = collections.defaultdict(list)
    pairs = zip(
        jax.tree.leaves(state.factors), jax.tree.leaves(state.eigenbases), strict=True
    )
    for factor, basis in pairs:
        by_size[factor.shape[-1]].append((factor, basis))
    return [
        tuple(jnp.stack(x) for x in zip(*pairs, strict=True))
        for pairs in by_size.values()
    ]


def compiling(bench: Bench) -> Iterator[dict[str, Any]]:
    """Programs of few and many layers, which refresh in batches or leaf by leaf."""
    for layers in bench.layers:
        shape = dataclasses.replace(PRESETS[bench.preset], layers=layers)
        for name, options in {"eigh start": {}, "identity start": IDENTITY}.items():
            for in_batches in (True, False):
                with contextlib.nullcontext() if in_batches else leaf_by_leaf():
                    spent, program = compiled(soap(**options), shape)
                memory, text = programs.memory_of(program), program.as_text()
                state = jax.eval_shape(
                    soap(**options).init, jax.eval_shape(lambda s=shape: normal(s, 0))
                )
                yield {
                    "layers": layers,
                    "program": name,
                    "refreshes": "in batches" if in_batches else "leaf by leaf",
                    **spent,
                    "temporary_share": memory.temp_size_in_bytes / nbytes(state),
                    "program_mb": len(text) / 1e6,
                    **programs.decompositions(text),
                }


@contextlib.contextmanager
def leaf_by_leaf() -> Iterator[None]:
    """Makes refreshes do without stacks and slots, as where shardings are not known."""
    with (
        mock.patch.object(_stacks.Refresh, "_stacks", []),
        mock.patch.object(_stacks, "_SLOTS", 1),
    ):
        yield


def precisions(bench: Bench) -> Iterator[dict[str, Any]]:
    """Errors of Rayleigh quotients by the precision of products, and their times.

    A CPU emulates the products of accelerators, and these are not timed.
    """
    size = min(1024, 4 * PRESETS[bench.preset].width)
    rng = np.random.default_rng(0)
    basis = np.linalg.qr(rng.normal(size=(size, size)))[0]
    values = np.logspace(0, -5, size)
    exact = np.sort(values)[::-1]
    matrix = jnp.asarray((basis * values) @ basis.T, jnp.float32)
    q = jnp.asarray(basis, jnp.float32)
    presets = [
        *jax.lax.Precision,
        *(jax.lax.DotAlgorithmPreset[name] for name in emulation.EMULATED),
    ]
    for precision in presets:

        def quotients(m, q, precision=precision):
            return jnp.sum(q * jnp.matmul(m, q, precision=precision), axis=0)

        on_cpu = jax.default_backend() == "cpu"
        is_emulated = on_cpu and precision.name in emulation.EMULATED
        row = {"precision": precision.name, "emulated": is_emulated}
        try:
            with emulation.on_cpu():
                program = jax.jit(quotients).lower(matrix, q).compile()
        except Exception as error:  # This device has no products of this precision.
            yield {**row, "error": str(error).splitlines()[0][:60]}
            continue
        found = np.asarray(program(matrix, q))
        relative = np.abs(found - exact) / exact
        times = [seconds(program, matrix, q)[0] for _ in range(10)]
        yield {
            **row,
            "largest_error": float(np.abs(found - exact).max()),
            "median_relative_error": float(np.median(relative)),
            "negative_quotients": int((found < 0).sum()),
            **({} if is_emulated else {"ms": 1e3 * float(np.median(times))}),
        }


def training(bench: Bench) -> Iterator[dict[str, Any]]:
    """The share of the optimizer in a step of training, against tokens a step."""
    shape = PRESETS[bench.preset]
    params, gradient = model_of(shape)
    optimizers = {
        "adamw": ROWS["adamw"](),
        "soap f=10": soap(),
        "soap f=1": soap(precondition_frequency=1),
    }
    cost = {name: optimizer_seconds(tx, params) for name, tx in optimizers.items()}
    for batch in bench.batches:
        tokens = jax.random.randint(
            jax.random.key(1), (batch, bench.sequence + 1), 0, shape.vocab
        )
        jax.block_until_ready(gradient(params, tokens))
        times = [seconds(gradient, params, tokens)[0] for _ in range(3)]
        spent = float(np.median(times))
        count = batch * bench.sequence
        base = spent + cost["adamw"]
        yield {
            "tokens": count,
            "gradient_ms": 1e3 * spent,
            **{f"{name} ms": 1e3 * value for name, value in cost.items()},
            **{
                f"{name} adds to adamw": (spent + cost[name]) / base - 1
                for name in cost
                if name != "adamw"
            },
            "products over gradient": products_over_gradient(params, count),
        }


def model_of(shape: Shape) -> tuple[Tree, Callable[..., Any]]:
    """The parameters of the trainer's model, and the gradient of its loss.

    It computes in float32 on CPU and in bfloat16 elsewhere.
    """
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
    import train_lm

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    sizes = dataclasses.replace(
        train_lm.PRESETS["tiny"],
        depth=shape.layers,
        width=shape.width,
        head_dim=shape.head_dim,
    )
    model = train_lm.Transformer(shape.vocab, sizes, dtype)
    tokens = jnp.zeros((1, 8), jnp.int32)
    params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
    loss = lambda params, tokens: train_lm.cross_entropy(model, params, tokens)[0]  # noqa: E731
    return params, jax.jit(jax.grad(loss))


def products_over_gradient(params: Tree, tokens: int) -> float:
    """The operations of SOAP's products over those of the gradient of so many tokens.

    They are 6 products of m n (m + n), and 6 m n for each token of the gradient.
    """
    matrices = [p.shape for p in jax.tree.leaves(params) if p.ndim == 2]
    size = sum(m * n for m, n in matrices)
    sides = sum(m * n * sum(x for x in (m, n) if x <= 10_000) for m, n in matrices)
    return 6 * sides / (6 * size * tokens)


def optimizer_seconds(tx: optax.GradientTransformation, params: Tree) -> float:
    """Mean seconds of an update over a cycle of 10 steps."""
    step = jax.jit(tx.update, donate_argnums=1)
    state = jax.jit(tx.init)(params)
    spent = []
    for count in range(21):
        grads = jax.tree.map(lambda p, k=count: p + 1e-3 * jnp.sin(p + k), params)
        one, (_, state) = seconds(step, grads, state, params)
        spent.append(one)
    return float(np.mean(spent[11:]))


PARTS = {
    part.__name__: part
    for part in (steps, refreshes, compiling, precisions, training, peers)
}


# --- output --------------------------------------------------------------------------


def plot(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """Draws a bar for each step without refresh, and what refreshes add on average."""
    names = [row["optimizer"] for row in rows]
    step = np.array([row["step_ms"] for row in rows])
    mean = np.array([row["mean_ms"] for row in rows])
    figure, panels = plt.subplots(
        1, 2, figsize=(11, 0.4 * len(rows) + 1.5), sharey=True
    )
    panels[0].barh(names, step, label="step without refresh")
    panels[0].barh(
        names, np.maximum(mean - step, 0), left=step, label="refreshes, mean"
    )
    bare = float(np.median([row["bare_ms"] for row in rows]))
    panels[0].axvline(bare, color="black", linestyle=":", label="six bare products")
    panels[0].set_xlabel("milliseconds")
    state, temporary = (
        np.array([row[f"{kind}_mb"] for row in rows]) for kind in ("state", "temporary")
    )
    panels[1].barh(names, state, label="state")
    panels[1].barh(names, temporary, left=state, label="temporary")
    panels[1].set_xlabel("megabytes")
    panels[0].invert_yaxis()
    for panel in panels:
        panel.legend(fontsize="small")
        panel.grid(axis="x", alpha=0.3)
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(bench: Bench) -> None:
    require_known("parts", bench.parts, PARTS)
    require_known("rows", bench.rows, ROWS)
    require_known("preset", [bench.preset], PRESETS)
    about = {
        **machine(),
        "lapack_threads": os.environ.get("OPENBLAS_NUM_THREADS", "default"),
        "xla_flags": os.environ.get("XLA_FLAGS", "default"),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    for part in bench.parts:
        print(f"\n{part}: {PARTS[part].__doc__.splitlines()[0]}", flush=True)
        name = f"bench_{bench.preset}_{jax.default_backend()}_{part}"
        rows = report(PARTS[part](bench), bench.out / f"{name}.csv", about)
        if part == "steps" and len(rows) > 1:
            title = ", ".join(f"{key} {value}" for key, value in about.items())
            title = f"{bench.preset}: {title}"
            plot(rows, bench.out / f"{name}.png", title)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))
