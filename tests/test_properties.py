"""Properties of SOAP on random trees, shapes, dtypes and options.

`make test` tries a few cases of each, the same every time, `make test-slow` other
2,000 in all.
"""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import soap_optax

STEPS = 6


def cases(slow):
    """Tries `slow` random cases in the profile "slow", else a hundredth, the same."""
    few = max(3, slow // 100)
    is_slow = hypothesis.settings.get_current_profile_name() == "slow"
    return hypothesis.settings(
        max_examples=slow if is_slow else few,
        derandomize=not is_slow,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # each case of a shrinking may compile
        suppress_health_check=list(hypothesis.HealthCheck),
    )


# Options that fix the program, and numbers that it takes as arguments.
STATIC = {
    "basis": st.sampled_from(["previous", "current"]),
    "refresh": st.sampled_from(["qr", "eigh"]),
    "initial_basis": st.sampled_from(["eigh", "identity"]),
}
SHAPED = {
    "one_sided": st.booleans(),
    "merge_dims": st.booleans(),
    "precondition_1d": st.booleans(),
    "block_size": st.sampled_from([None, 2, 3, 4]),
    "max_precond_dim": st.sampled_from([0, 4, 30]),
}
NUMBERS = st.fixed_dictionaries(
    {
        "b1": st.floats(0, 0.95),
        "b2": st.floats(0.9, 0.99),
        "shampoo_beta": st.floats(0.5, 0.99),
        "precondition_frequency": st.integers(1, 4),
    }
)
SEEDS = st.integers(0, 2**31)


@functools.cache
def compiled(options):
    """A run over `[steps, …]` gradients: its updates, first and last state."""

    def run(numbers, grads):
        tx = soap_optax.scale_by_soap(**dict(options), **numbers)
        first = tx.init(jax.tree.map(lambda g: g[0], grads))

        def step(state, grads):
            updates, state = tx.update(grads, state)
            return state, updates

        last, updates = jax.lax.scan(step, first, grads, length=STEPS)
        return updates, first, last

    return jax.jit(run)


@pytest.fixture(autouse=True)
def forget_programs():
    """Thousands of them are more than a process can map."""
    yield
    compiled.cache_clear()
    jax.clear_caches()


def run(options, numbers, grads):
    return jax.tree.map(np.asarray, compiled(tuple(options.items()))(numbers, grads))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


def along(axis, matrix, array):
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)


def assert_same(actual, expected):
    """Up to round-off, which small denominators magnify."""
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# Shapes of which every factor has full rank, so that no eigenbasis is arbitrary.
FULL_RANK = [(1, 1), (2, 2), (3, 3), (5, 5), (9, 9), (2, 2, 2), (2, 3, 4), (3, 1, 3)]
full_rank_shapes = st.sampled_from(FULL_RANK)


@st.composite
def shapes(draw):
    shape, size = [], 1
    for _ in range(draw(st.integers(0, 5))):
        shape.append(draw(st.integers(0, max(1, min(9, 400 // max(1, size))))))
        size *= shape[-1]
    return tuple(shape)


leaves = st.tuples(shapes(), st.sampled_from(["bfloat16", "float16", "f4", "f8"]))
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=3,
)


@cases(500)
@hypothesis.given(
    tree=trees,
    options=st.fixed_dictionaries({**STATIC, **SHAPED}),
    numbers=NUMBERS,
    exponent=st.integers(-4, 4),
    rank_one=st.booleans(),
    seed=SEEDS,
)
def test_any_tree(tree, options, numbers, exponent, rank_one, seed):
    def one(leaf):
        shape, dtype = leaf
        grads = normal(seed, STEPS, *shape)
        if rank_one:
            grads = functools.reduce(
                np.multiply,
                [
                    normal(
                        seed + axis,
                        STEPS,
                        *np.where(np.arange(len(shape)) == axis, shape, 1),
                    )
                    for axis in range(len(shape))
                ],
                np.ones((STEPS, *shape)),
            )
        return jnp.asarray(grads * 10.0**exponent, dtype)

    is_leaf = lambda node: isinstance(node, tuple)  # noqa: E731
    grads = jax.tree.map(one, tree, is_leaf=is_leaf)
    updates, first, last = run(options, numbers, grads)
    types = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert types(updates) == types(grads)
    assert types(first) == types(last)
    for leaf in jax.tree.leaves((updates, last)):
        assert np.isfinite(leaf.astype(np.float32)).all()
    for leaf in jax.tree.leaves(updates):
        if leaf.size:
            squares = np.square(leaf.astype(np.float64)).reshape(STEPS, -1)
            assert np.sqrt(squares.mean(axis=1)).max() <= 10.1
    for factor, basis, values in zip(
        *map(jax.tree.leaves, (last.factors, last.eigenbases, last.eigenvalues)),
        strict=True,
    ):
        eye = np.broadcast_to(np.eye(basis.shape[-1]), basis.shape)
        np.testing.assert_allclose(basis.mT @ basis, eye, atol=1e-5)
        np.testing.assert_allclose(factor, factor.mT, rtol=1e-4, atol=1e-30)
        exact = np.linalg.eigvalsh(factor.astype(np.float64))
        assert np.all(exact >= -1e-5 * exact[..., -1:])
        assert np.all(values >= 0)
    assert jax.tree.map(jnp.shape, last.inner_state.mu) == jax.tree.map(
        lambda leaf: leaf[0], tree, is_leaf=is_leaf
    )


@cases(500)
@hypothesis.given(
    shape=full_rank_shapes,
    basis=STATIC["basis"],
    refresh=STATIC["refresh"],
    numbers=NUMBERS,
    seed=SEEDS,
)
def test_a_rotated_problem_gives_the_rotated_trajectory(
    shape, basis, refresh, numbers, seed
):
    options = {"basis": basis, "refresh": refresh}
    grads = normal(seed, STEPS, *shape)

    def rotated(array):
        for axis, size in enumerate(shape):
            if size > 1:
                array = along(axis + 1, orthogonal(seed + axis + 1, size), array)
        return array

    expected = rotated(run(options, numbers, grads)[0])
    assert_same(run(options, numbers, rotated(grads))[0], expected)


@cases(400)
@hypothesis.given(
    shape=full_rank_shapes,
    options=st.fixed_dictionaries(STATIC),
    numbers=NUMBERS,
    scale=st.floats(1e-9, 1e9),
    seed=SEEDS,
)
def test_the_scale_of_the_gradients_does_not_matter(
    shape, options, numbers, scale, seed
):
    grads, numbers = normal(seed, STEPS, *shape), {**numbers, "eps": 1e-100}
    expected = run(options, numbers, grads)[0]
    actual = run(options, numbers, scale * grads)[0]
    # The first gradient is diagonal in its own eigenbasis; Adam scales the round-off
    # beside the diagonal to full-size steps where nothing is added to its denominator.
    first = 1 if options["basis"] == "current" else 0
    assert_same(actual[first:], expected[first:])


@cases(200)
@hypothesis.given(
    shape=full_rank_shapes,
    order=st.permutations(range(3)),
    options=st.fixed_dictionaries({**STATIC, "block_size": SHAPED["block_size"]}),
    numbers=NUMBERS,
    seed=SEEDS,
)
def test_axes_can_be_permuted(shape, order, options, numbers, seed):
    axes = [0, *(axis + 1 for axis in order if axis < len(shape))]
    grads = normal(seed, STEPS, *shape)
    expected = run(options, numbers, grads)[0].transpose(axes)
    assert_same(run(options, numbers, grads.transpose(axes))[0], expected)


@cases(200)
@hypothesis.given(
    shape=full_rank_shapes,
    count=st.integers(1, 3),
    position=st.integers(0, 2),
    options=st.fixed_dictionaries(STATIC),
    numbers=NUMBERS,
    seed=SEEDS,
)
def test_a_batch_axis_is_a_loop(shape, count, position, options, numbers, seed):
    grads = normal(seed, count, STEPS, *shape)
    axis = min(position, len(shape))
    named = [i for i in range(len(shape) + 1) if i != axis]
    of_batch = {
        **options,
        "dimension_numbers": soap_optax.DimensionNumbers(tuple(named)),
    }
    together = run(of_batch, numbers, np.moveaxis(grads, 0, axis + 1))[0]
    for i in range(count):
        alone = run(options, numbers, grads[i])[0]
        assert_same(np.take(together, i, axis + 1), alone)


@cases(200)
@hypothesis.given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(2, 4),
    options=st.fixed_dictionaries(STATIC),
    numbers=NUMBERS,
    seed=SEEDS,
)
def test_blocks_are_parameters_of_their_own(grid, size, options, numbers, seed):
    rows, columns = grid
    grads = normal(seed, STEPS, rows * size, columns * size)
    together = run({**options, "block_size": size}, numbers, grads)[0]
    for i in range(rows):
        for j in range(columns):
            block = np.s_[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert_same(together[block], run(options, numbers, grads[block])[0])
