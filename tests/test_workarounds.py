"""Bugs and habits of JAX, XLA and optax that the library works around.

Each test shows one of them in plain JAX, without the library. Most tests ask for what
would be right and are expected to fail. When one of them passes with the oldest JAX
that is supported, what its reason names may go. Where the behaviour depends on the
version of JAX, the condition of the mark says so.

Some workarounds have no such test:

| workaround | why it has none, and what shows it |
|---|---|
| `_eigenbasis`: a barrier beside blocks | XLA copied first moments in bfloat16 on GPU \
only. No public issue is known. The column `copied_mb` of `make gpu-check` shows it: \
without the barrier it is not 0 in the row `packed, bf16 mu and eigenbases, blocks \
512`. |
| `tests`: donated buffers are compared up to rounding | XLA is free to round \
differently in another program. No small program is known that shows it; \
`test_resume.py::test_donated_buffers` compares both. |
| `benchmarks/pods.py`: reads the dump of XLA | A `jaxlib` cannot print all \
instructions of a newer `libtpu`. No public issue is known. `make tpu-check` shows it, \
if it is changed to read `program.as_text()`. |
| `experiments/vision.py`: a Python loop over steps | Convolutions in a loop of XLA \
are many times slower on CPU (jax-ml/jax#12868). A test of it would compare times. |
| docs/speed.md: XLA's sequential schedule on CPU | No public issue is known. `make \
bench` compares both schedules. |
"""

import os
import re
import subprocess
import sys
from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import P
from jax.sharding import AxisType, NamedSharding

JAX = tuple(map(int, version("jax").split(".")[:2]))
PROCESS_SECONDS = 60

older_xla_copies = pytest.mark.skipif(
    JAX < (0, 10), reason="XLA copies operands of conditionals whatever one does"
)


def expected_to_fail(
    reason, *, issue, room, when=True, raises=AssertionError, strict=True
):
    """Marks what is wrong, where it is reported, and what may go when it is right."""
    reason = f"{reason} ({issue}); when this passes, the workaround in {room} may go"
    return pytest.mark.xfail(when, reason=reason, strict=strict, raises=raises)


# --- conditionals that copy ----------------------------------------------------------


def copies(step, *operands):
    """The lines of the main program that copy, if the first operand may be overwritten.

    JAX 0.12 wraps some copies in fusions, which are named after them.
    """
    compiled = jax.jit(step, donate_argnums=0).lower(*operands).compile()
    text = compiled.as_text()
    entry = re.search(r"^ENTRY .*?^\}", text, re.M | re.S)
    assert entry, f"expected a line that starts with ENTRY, got {text[:200]}"
    return re.findall(
        r"^.*(?: copy(?:-start)?\(|calls=%?wrapped_copy).*$", entry[0], re.M
    )


BASIS, FACTOR, GRADIENT = (np.full((24, 24), x, np.float32) for x in (1, 2, 3))
IS_DUE = np.int32(1)


def keep(basis, step):
    return basis, step


def refresh(basis, step):
    return jnp.sin(FACTOR @ basis), step


def refresh_behind_a_barrier(basis, step):
    return jnp.sin(FACTOR @ basis), jax.lax.optimization_barrier(step)


def chosen_by_switch(is_due, step, basis):
    branches = [keep, refresh_behind_a_barrier]
    return jax.lax.switch(is_due, branches, basis, step)


def chosen_by_switch_in_the_other_order(is_due, step, basis):
    branches = [refresh_behind_a_barrier, keep]
    return jax.lax.switch(1 - is_due, branches, basis, step)


def chosen_by_cond(is_due, step, basis):
    return jax.lax.cond(is_due > 0, refresh_behind_a_barrier, keep, basis, step)


def chosen_by_cond_in_the_other_order(is_due, step, basis):
    return jax.lax.cond(is_due == 0, keep, refresh_behind_a_barrier, basis, step)


def without_a_barrier(is_due, step, basis):
    return jax.lax.switch(is_due, [keep, refresh], basis, step)


def beside_the_conditional(is_due, step, basis):
    branches = [lambda basis: basis, lambda basis: jnp.sin(FACTOR @ basis)]
    return jax.lax.switch(is_due, branches, basis), step


def chosen_after_both(is_due, step, basis):
    return jnp.where(is_due > 0, jnp.sin(FACTOR @ basis), basis), step


ORDER = expected_to_fail(
    "XLA copies unless the branch that keeps its operands is the first",
    issue="jax-ml/jax#16661 and jax-ml/jax#39449",
    room="_eigenbasis and refresh/_stacks: switches with that branch first, no cond",
    when=JAX < (0, 12),
)
READ = expected_to_fail(
    "XLA copies what a conditional overwrites and another product reads",
    issue="no public issue is known; jax-ml/jax#16663 is near",
    room="_eigenbasis: steps that are operands of the conditional, behind a barrier",
)


@older_xla_copies
@pytest.mark.parametrize(
    "refresh_if_due",
    [
        chosen_by_switch,
        chosen_by_cond,
        pytest.param(chosen_by_switch_in_the_other_order, marks=ORDER),
        pytest.param(chosen_by_cond_in_the_other_order, marks=ORDER),
        pytest.param(without_a_barrier, marks=READ),
        pytest.param(beside_the_conditional, marks=READ),
        pytest.param(
            chosen_after_both,
            marks=expected_to_fail(
                "XLA copies what is chosen from two results",
                issue="a habit, no public issue is known",
                room="_eigenbasis: the first step as a branch of a conditional",
            ),
        ),
    ],
)
def test_a_conditional_overwrites_its_operands(refresh_if_due):
    """The first case is the library's."""

    def step(basis, is_due, gradient):
        return refresh_if_due(is_due, basis @ gradient, basis)

    assert not copies(step, BASIS, IS_DUE, GRADIENT)


# --- values --------------------------------------------------------------------------


@expected_to_fail(
    "on CPU the maximum of NaN is minus infinity",
    issue="openxla/xla#21461",
    when=JAX >= (0, 10),
    room="_kronecker and refresh/_methods: finiteness tested with isfinite or a sum",
)
def test_the_maximum_of_nan_is_nan():
    assert jnp.isnan(jnp.max(jnp.full((130, 130), jnp.nan, jnp.float32)))


def test_a_sum_and_isfinite_see_nan():
    """The tests of the library that stand in for a maximum."""
    array = jnp.full((130, 130), jnp.nan, jnp.float32)
    assert not jnp.isfinite(jnp.sum(array))
    assert not jnp.isfinite(array).any()


@expected_to_fail(
    "XLA on CPU makes an array of squares that it sums along two axes",
    issue="no public issue is known",
    room="_kronecker.project_and_measure: each energy from an array of its own",
)
def test_sums_of_squares_along_two_axes_need_no_array():
    def energies(array):
        squares = jnp.square(array)
        return jnp.sum(squares, axis=0), jnp.sum(squares, axis=1)

    array = np.ones((512, 512), np.float32)
    memory = jax.jit(energies).lower(array).compile().memory_analysis()
    assert memory.temp_size_in_bytes < array.nbytes / 2


DECOMPOSE_BATCHES = """
import os
if hasattr(os, "sched_setaffinity"):  # two cores make a pool of two threads
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
import jax, numpy as np
rng = np.random.default_rng(0)
batches = [rng.normal(size=(16, 128 + i, 128 + i)).astype("f4") for i in range(6)]
batches = jax.device_put(batches)
decompose = jax.jit(lambda batches: [jax.numpy.linalg.qr(b)[0] for b in batches])
for _ in range(100):
    jax.block_until_ready(decompose(batches))
"""


def run_python(text, **variables):
    """Runs a program in a process of its own, which is killed if it takes too long.

    The cache of compiled programs is off there: with it, batches of decompositions
    have not been seen to wait.
    """
    inherited = {k: v for k, v in os.environ.items() if "CACHE" not in k}
    return subprocess.run(
        [sys.executable, "-c", text],
        env={**inherited, "JAX_PLATFORMS": "cpu", **variables},
        timeout=PROCESS_SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@expected_to_fail(
    "on CPU batches of decompositions in one program wait for one another for ever",
    issue="no public issue is known; PyAutoLabs/PyAutoFit#1530 is the like with FFTs",
    room="refresh/_stacks: chunks of one matrix on CPU",
    when=JAX < (0, 11),
    raises=subprocess.TimeoutExpired,
    strict=False,  # about one process in four ends: it depends on who comes first
)
def test_batches_of_decompositions_end():
    """A process takes some seconds; one that waits for ever uses no CPU any more."""
    for _ in range(4):
        result = run_python(DECOMPOSE_BATCHES, XLA_FLAGS="", OPENBLAS_NUM_THREADS="1")
        assert result.returncode == 0, result.stderr


# --- several devices -----------------------------------------------------------------


def mesh_of(kind, *sizes):
    names = ("x", "y")[: len(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(kind,) * len(sizes))


@expected_to_fail(
    "jax.shard_map closes over no array of an explicit mesh",
    issue="jax-ml/jax#29162",
    room="mesh/_spread and refresh/_stacks: scalars that are operands",
    raises=NotImplementedError,
)
def test_shard_map_closes_over_a_scalar():
    mesh = mesh_of(AxisType.Explicit, 8)
    array = jax.device_put(np.arange(8.0), NamedSharding(mesh, P("x")))
    scalar = jax.device_put(np.float64(2), NamedSharding(mesh, P()))

    @jax.jit
    def scale(array, scalar):
        scale_shard = lambda shard: scalar * shard  # noqa: E731
        return jax.shard_map(scale_shard, mesh=mesh, in_specs=P("x"), out_specs=P("x"))(
            array
        )

    np.testing.assert_array_equal(scale(array, scalar), 2 * np.arange(8.0))


@expected_to_fail(
    "jax.shard_map does not see that all devices have the same after an exchange",
    issue="a habit that JAX documents",
    room="mesh/_mesh: check_vma=False",
    raises=ValueError,
)
def test_shard_map_sees_that_an_exchange_makes_equal():
    """Every device owns a part, and hands it back to all."""
    mesh = mesh_of(AxisType.Auto, 8)

    def exchange(array):
        part = jax.lax.dynamic_slice_in_dim(array, jax.lax.axis_index("x"), 1)
        return jax.lax.all_gather(part, "x", tiled=True)

    exchanged = jax.shard_map(exchange, mesh=mesh, in_specs=P(), out_specs=P())
    np.testing.assert_array_equal(jax.jit(exchanged)(np.arange(8.0)), np.arange(8.0))


@pytest.mark.parametrize("sizes", [(2, 4), (4, 2), (1, 8)])
@pytest.mark.parametrize(
    ("block", "spec"), [(8, P("y", "x")), (6, P("x", "y")), (12, P(("x", "y"), None))]
)
def test_products_of_blocks_that_cut_across_shards(block, spec, sizes):
    """They are right: XLA has been seen to be wrong, but no program is known now.

    The library gathers such blocks (mesh/_placement). If this fails, that is why; no
    public issue is known.
    """
    grid, size = (24 // block, 24 // block), 24
    rng = np.random.default_rng(0)
    gradient = rng.normal(size=(size, size))
    left, right = rng.normal(size=(2, *grid, block, block))

    def products(gradient):
        blocks = gradient.reshape(grid[0], block, grid[1], block)
        factor = jnp.einsum("iajb,icjb->ijac", blocks, blocks)
        turned = jnp.einsum("iajb,ijac->icjb", blocks, left)
        turned = jnp.einsum("icjb,ijbd->icjd", turned, right)
        return factor, turned.reshape(size, size)

    sharding = NamedSharding(mesh_of(AxisType.Auto, *sizes), spec)
    sharded = jax.jit(products)(jax.device_put(gradient, sharding))
    for found, expected in zip(sharded, products(gradient), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-12)


# --- optax, and the tests themselves -------------------------------------------------


@expected_to_fail(
    "optax.inject_hyperparams traces integers that decide shapes",
    issue="google-deepmind/optax#412",
    room="_options: a default of max_precond_dim that is None",
    raises=jax.errors.TracerBoolConversionError,
)
def test_integers_stay_static_in_inject_hyperparams():
    def optimizer(learning_rate, max_size=10_000):
        del learning_rate

        def init(params):
            return [p for p in jax.tree.leaves(params) if p.size <= max_size]

        return optax.GradientTransformation(init, lambda updates, state, params: ...)

    tx = optax.inject_hyperparams(optimizer)(0.1)
    assert len(jax.jit(tx.init)(jnp.ones(3)).inner_state) == 1


@expected_to_fail(
    "optax.tree.map_params calls init with a tree that has no leaves",
    issue="a habit, no public issue is known",
    room="parameters/_tree.nest and _inner: one leaf that stands for all",
)
def test_map_params_calls_init_with_leaves():
    seen = []
    optax.tree.map_params(lambda params: seen.append(params), lambda leaf: leaf, None)
    assert jax.tree.leaves(seen)


@pytest.mark.slow
@pytest.mark.xfail(
    JAX >= (0, 11),
    reason="newer XLA does not know the flag, which tests/conftest.py sets before JAX "
    "0.11 only; its line may go when no older JAX is supported",
    strict=True,
)
def test_older_emitters_can_be_had():
    text = "import jax; jax.devices()"
    flag = "--xla_cpu_use_fusion_emitters=false"
    assert run_python(text, XLA_FLAGS=flag).returncode == 0
