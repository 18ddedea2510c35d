"""Properties of SOAP and Shampoo on random trees, shapes, dtypes and options.

`make test` tries a few cases of each property, the same every time; `make test-slow`
tries 2,400 others in all.

The member of the family that a case draws is `"soap"` or `"shampoo"`. Its options are
drawn from the strategies in `PROGRAM`, `LAYOUT` and `NUMBERS`, and `NOT_DRAWN` says why
the others are not.
"""

import functools
import inspect

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import soap_optax
from soap_optax import _triangles

STEPS = 6
IS_SLOW = hypothesis.settings.get_current_profile_name() == "slow"


def cases(slow, few):
    """Tries `slow` random cases in the profile "slow", else `few`, always the same."""
    return hypothesis.settings(
        max_examples=slow if IS_SLOW else few,
        derandomize=not IS_SLOW,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.generate],  # each case of a shrinking may compile
        suppress_health_check=list(hypothesis.HealthCheck),
    )


def only_matrices(params):
    """Is a `mask` of the parameters that decay."""
    return jax.tree.map(lambda param: param.ndim > 1, params)


def last_two_axes(params):
    """Makes `dimension_numbers` by which all axes but the last two are batch axes."""
    numbers = soap_optax.DimensionNumbers((-2, -1))
    return jax.tree.map(lambda param: numbers if param.ndim > 1 else None, params)


# These options fix the program, whatever the shape of a parameter.
PROGRAM = {
    "basis": st.sampled_from(["previous", "current"]),
    "refresh": st.sampled_from(["qr", "cholesky_qr", "eigh"]),
    "initial_basis": st.sampled_from(["eigh", "identity"]),
    "factors": st.sampled_from(["shampoo", "kl"]),
    "stagger": st.booleans(),
    "pack_factors": st.booleans(),
    "factorized": st.booleans(),
    "nesterov": st.booleans(),
    "grafting": st.sampled_from(["adam", None]),
}
# These options decide which axes and blocks have factors.
LAYOUT = {
    "one_sided": st.booleans(),
    "merge_dims": st.booleans(),
    "precondition_1d": st.booleans(),
    "block_size": st.sampled_from([None, 2, 3, 4]),
    "max_precond_dim": st.sampled_from([30, 10, 4, 0]),
    "dimension_numbers": st.sampled_from([None, last_two_axes]),
}
# These options decide to what the state is rounded.
DTYPES = {
    "mu_dtype": st.sampled_from([None, "bfloat16"]),
    "precond_dtype": st.sampled_from([None, "bfloat16", "float64"]),
}
# A program takes these numbers as arguments, and is another one where they are None.
NUMBERS = {
    "b1": st.floats(0, 0.95),
    "b2": st.floats(0.9, 0.99),
    "shampoo_beta": st.none() | st.floats(0.5, 0.99),
    "precondition_frequency": st.integers(1, 4),
    "refresh_tolerance": st.none() | st.floats(0, 0.5),
    "rcond": st.sampled_from([None, 0.0, 1e-12, 1e-8]),
    "clip_update_rms": st.sampled_from([None, 1.0, 10.0]),
    "update_rms": st.sampled_from([None, 0.2, 1.0]),
    "power": st.floats(0, 0.5),
    "adam_b1": st.none() | st.floats(0, 0.95),
    "adam_b2": st.none() | st.floats(0.9, 0.99),
}
# These numbers have a scale or a coordinate system of their own.
SCALES = {
    "learning_rate": st.floats(1e-3, 1),
    "weight_decay": st.floats(0, 1),
    "eps": st.sampled_from([1e-8, 1e-3]),
    "eps_root": st.sampled_from([0.0, 1e-12, 1e-3]),
    "adam_eps": st.sampled_from([1e-8, 1e-3]),
    "adam_learning_rate": st.none() | st.floats(1e-3, 1),
    "adam_weight_decay": st.none() | st.floats(0, 1),
}
MASKS = {"mask": st.sampled_from([None, only_matrices])}
STRATEGIES = {**PROGRAM, **LAYOUT, **DTYPES, **NUMBERS, **SCALES, **MASKS}
NOT_DRAWN = {
    "precision": "The products of a CPU are as precise whatever it says.",
    "refresh_precision": "The products of a CPU are as precise whatever it says.",
    "params_sharding": "It needs a mesh, see test_sharding.py.",
    "refresh_axes": "It needs a mesh, see test_sharding.py.",
}
SEEDS = st.integers(0, 2**31)


def options_of(member):
    return inspect.signature(getattr(soap_optax, member)).parameters


def test_every_option_is_drawn_or_has_a_reason_not_to_be():
    options = {*options_of("soap"), *options_of("shampoo")}
    assert {*STRATEGIES, *NOT_DRAWN} == options
    assert not STRATEGIES.keys() & NOT_DRAWN.keys()


@st.composite
def members(draw, names, members=("soap", "shampoo")):
    """Draws a member of the family and those options of it that are among `names`."""
    member = draw(st.sampled_from(members))
    names = [name for name in names if name in options_of(member)]
    options = {name: draw(STRATEGIES[name]) for name in names}
    return member, options


@functools.cache
def compiled(member, program):
    """Compiles a run over `[steps, …]` gradients, of parameters of ones.

    It returns the updates, and the state before the first and after the last step.
    """

    def run(numbers, grads):
        options = {"learning_rate": 1.0, **dict(program), **numbers}
        tx = getattr(soap_optax, member)(**options)
        params = jax.tree.map(lambda g: jnp.ones_like(g[0]), grads)
        first = tx.init(params)

        def step(state, grads):
            updates, state = tx.update(grads, state, params)
            return state, updates

        last, updates = jax.lax.scan(step, first, grads, length=STEPS)
        return updates, first, last

    return jax.jit(run)


@pytest.fixture(autouse=True, scope="function" if IS_SLOW else "module")
def forget_programs():
    """Thousands of programs are more than a process can map."""
    yield
    compiled.cache_clear()
    jax.clear_caches()


def run(member, options, grads):
    numbers = {k: v for k, v in options.items() if k in NUMBERS or k in SCALES}
    if options.get("stagger"):
        del numbers["precondition_frequency"]  # it has to be static
    program = tuple((k, v) for k, v in options.items() if k not in numbers)
    return jax.tree.map(np.asarray, compiled(member, program)(numbers, grads))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def orthogonal(seed, size):
    return np.linalg.qr(normal(seed, size, size))[0]


def along(axis, matrix, array):
    return np.moveaxis(np.tensordot(matrix, array, (1, axis)), 0, axis)


def assert_same(actual, expected):
    """Compares up to round-off, which small denominators magnify."""
    np.testing.assert_allclose(actual, expected, atol=1e-5)


# Shapes of which every factor has full rank, so that no eigenbasis is arbitrary.
FULL_RANK = [(2, 3, 4), (2, 2), (3, 3), (5, 5), (9, 9), (2, 2, 2), (3, 1, 3), (1, 1)]
full_rank_shapes = st.sampled_from(FULL_RANK)


@st.composite
def shapes(draw):
    shape, size = [], 1
    for _ in range(draw(st.integers(0, 5))):
        shape.append(draw(st.integers(0, max(1, min(9, 400 // max(1, size))))))
        size *= shape[-1]
    return tuple(shape)


dtypes = st.sampled_from(["f4", "bfloat16", "float16", "f8"])
leaves = st.tuples(shapes(), dtypes)
matrices = st.tuples(st.tuples(st.integers(2, 9), st.integers(2, 9)), dtypes)
trees = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=2)
    ),
    max_leaves=3,
)
# Most random trees are empty or have vectors only.
trees_with_matrices = st.fixed_dictionaries({"matrix": matrices, "other": trees})


def is_pair(node):
    return isinstance(node, tuple)


def normal_gradients(seed, shape):
    return normal(seed, STEPS, *shape)


def gradients_of_rank_one(seed, shape):
    vectors = [normal(seed + axis, size) for axis, size in enumerate(shape)]
    product = functools.reduce(np.multiply.outer, vectors, np.ones(()))
    return normal(seed, STEPS, *[1] * len(shape)) * product


def gradients_with_unused_rows(seed, shape):
    """Makes gradients that are zero at every other index of each axis."""
    is_used = np.all(np.indices(shape) % 2 == seed % 2, axis=0)
    return normal(seed, STEPS, *shape) * is_used


GRADIENTS = (normal_gradients, gradients_of_rank_one, gradients_with_unused_rows)


def types(tree):
    return jax.tree.map(lambda array: (array.shape, array.dtype), tree)


def root_mean_square(updates):
    squares = np.square(updates.astype(np.float64)).reshape(STEPS, -1)
    return np.sqrt(squares.mean(axis=1)).max()


def eigenbasis_state(state):
    """Finds the state of `in_eigenbasis` in that of a member."""
    is_found = lambda node: isinstance(node, soap_optax.EigenbasisState)  # noqa: E731
    (found,) = filter(is_found, jax.tree.leaves(state, is_leaf=is_found))
    return found


def assert_sound(factor, basis, values):
    """Checks one factor, its eigenbasis `[grid…, b, b]` and its eigenvalues.

    Rounding the entries of a matrix to a dtype changes it by at most `unit` of its
    Frobenius norm. That happens once to an eigenbasis, and at every step to a factor.
    """
    factor = _triangles.whole(factor, basis.shape[-1])
    of_factor, unit = (float(jnp.finfo(x.dtype).eps) / 2 for x in (factor, basis))
    factor, basis = (matrix.astype(np.float64) for matrix in (factor, basis))
    eye = np.broadcast_to(np.eye(basis.shape[-1]), basis.shape)
    np.testing.assert_allclose(basis.mT @ basis, eye, atol=1e-5 + 2 * unit + unit**2)
    symmetric = 1e-4 + 2 * STEPS * of_factor
    np.testing.assert_allclose(factor, factor.mT, rtol=symmetric, atol=1e-30)
    exact = np.linalg.eigvalsh(factor)
    norm = np.linalg.norm(exact, axis=-1, keepdims=True)
    assert np.all(exact >= -1e-5 * exact[..., -1:] - STEPS * of_factor * norm)
    assert np.all(values >= 0)


@cases(600, few=10)
@hypothesis.given(
    tree=trees | trees_with_matrices,
    drawn=members(STRATEGIES),
    exponent=st.integers(-4, 4),
    make=st.sampled_from(GRADIENTS),
    seed=SEEDS,
)
def test_any_tree(tree, drawn, exponent, make, seed):
    member, options = drawn

    def one(leaf):
        shape, dtype = leaf
        if dtype == "float16" and options.get("grafting", "adam") is None:
            dtype = "f4"  # small gradients make updates that are too large for float16
        grads = make(seed, shape) * 10.0**exponent
        return jnp.asarray(np.clip(grads, -6e4, 6e4), dtype)  # finite in float16

    grads = jax.tree.map(one, tree, is_leaf=is_pair)
    updates, first, last = run(member, options, grads)
    assert types(updates) == types(grads)
    assert types(first) == types(last)
    for leaf in jax.tree.leaves((updates, last)):
        assert np.isfinite(leaf.astype(np.float32)).all()
    state = eigenbasis_state(last)
    if not jax.tree.leaves(grads):
        return  # numbers may stand in the state for what it has none of
    for kinds in zip(
        *map(jax.tree.leaves, (state.factors, state.eigenbases, state.eigenvalues)),
        strict=True,
    ):
        assert_sound(*kinds)
    if member == "soap":
        assert jax.tree.map(jnp.shape, state.inner_state.mu) == jax.tree.map(
            lambda leaf: leaf[0], tree, is_leaf=is_pair
        )
        assert_bounded(updates, state, options)


def assert_bounded(updates, state, options):
    """Checks the bounds of an update: the option's with factors, Adam's without.

    The bound of Adam is for STEPS gradients and the moments that `NUMBERS` draws.
    """
    factors = jax.tree.leaves(state.factors, is_leaf=is_pair)
    for leaf, of_leaf in zip(jax.tree.leaves(updates), factors, strict=True):
        if not leaf.size:
            continue
        bound = 10.0
        if any(factor is not None for factor in of_leaf):
            bound = options["clip_update_rms"]
        if bound is not None:
            bound = options["learning_rate"] * (bound + options["weight_decay"])
            assert root_mean_square(leaf) <= 1.01 * bound


# With these options a problem may be turned, permuted or put into a batch. Those in
# LAYOUT depend on the axes, and those in DTYPES round the results otherwise.
TURNING = [*PROGRAM, *NUMBERS, *SCALES]


def without(names, *others):
    return [name for name in names if name not in others]


@cases(500, few=5)
@hypothesis.given(
    shape=full_rank_shapes,
    # Weight decay and the Adam of grafting do not turn with the gradients, nor does the
    # identity, which a tolerance may keep.
    drawn=members(without(TURNING, "weight_decay", "grafting", "refresh_tolerance")),
    seed=SEEDS,
)
def test_a_rotated_problem_gives_the_rotated_trajectory(shape, drawn, seed):
    member, options = drawn
    if member == "shampoo":
        options |= {"grafting": None}
    if options["refresh"] != "eigh":
        options |= {"initial_basis": "eigh"}  # the identity does not turn either
    grads = normal(seed, STEPS, *shape)

    def rotated(array):
        for axis, size in enumerate(shape):
            if size > 1:
                array = along(axis + 1, orthogonal(seed + axis + 1, size), array)
        return array

    expected = rotated(run(member, options, grads)[0])
    assert_same(run(member, options, rotated(grads))[0], expected)


def growth(shape, member, options):
    """The exponent of the scale of the gradients in that of the updates.

    Without grafting each factor of Shampoo takes `2 * power` from it; KL's factors,
    whose product has the scale of one of Shampoo's, take as much together.
    """
    factors = sum(size > 1 for size in shape)
    if member == "soap" or options["grafting"] == "adam" or not factors:
        return 0
    if options["update_rms"] is not None:
        return 0
    return 1 - 2 * options["power"] * (1 if options["factors"] == "kl" else factors)


@cases(400, few=4)
@hypothesis.given(
    shape=full_rank_shapes,
    drawn=members([*PROGRAM, *DTYPES, *NUMBERS]),
    scale=st.floats(1e-9, 1e9),
    seed=SEEDS,
)
def test_the_scale_of_the_gradients_does_not_matter(shape, drawn, scale, seed):
    member, options = drawn
    options |= {"eps": 1e-100, "adam_eps": 1e-100}
    if any(options[name] is not None for name in DTYPES):
        # Multiplying by a power of 2 commutes with rounding. KL's factors are products
        # of k-th roots of the scale, where k is 2 or 3.
        scale = 2.0 ** (6 * round(np.log2(scale) / 6))
    grads = normal(seed, STEPS, *shape)
    expected = run(member, options, grads)[0]
    actual = run(member, options, scale * grads)[0]
    actual = actual / scale ** growth(shape, member, options)
    # The first gradient is diagonal in its own eigenbasis; Adam scales the round-off
    # beside the diagonal to full-size steps where nothing is added to its denominator.
    first = 1 if options.get("basis") == "current" else 0
    assert_same(actual[first:], expected[first:])


@cases(300, few=3)
@hypothesis.given(
    shape=full_rank_shapes,
    order=st.permutations(range(3)),
    drawn=members([*TURNING, "block_size", "max_precond_dim", "one_sided"]),
    seed=SEEDS,
)
def test_axes_can_be_permuted(shape, order, drawn, seed):
    member, options = drawn
    if options["block_size"] or len(set(shape)) < len(shape):
        options |= {"one_sided": False}  # it takes the first of equal sides
    axes = [0, *(axis + 1 for axis in order if axis < len(shape))]
    grads = normal(seed, STEPS, *shape)
    expected = run(member, options, grads)[0].transpose(axes)
    assert_same(run(member, options, grads.transpose(axes))[0], expected)


@cases(300, few=3)
@hypothesis.given(
    shape=full_rank_shapes,
    count=st.integers(1, 3),
    position=st.integers(0, 2),
    drawn=members([*TURNING, "block_size", "max_precond_dim", "one_sided"]),
    seed=SEEDS,
)
def test_a_batch_axis_is_a_loop(shape, count, position, drawn, seed):
    member, options = drawn
    grads = normal(seed, count, STEPS, *shape)
    axis = min(position, len(shape))
    named = tuple(i for i in range(len(shape) + 1) if i != axis)
    of_batch = {**options, "dimension_numbers": soap_optax.DimensionNumbers(named)}
    together = run(member, of_batch, np.moveaxis(grads, 0, axis + 1))[0]
    for i in range(count):
        alone = run(member, options, grads[i])[0]
        assert_same(np.take(together, i, axis + 1), alone)


@cases(300, few=3)
@hypothesis.given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(2, 4),
    drawn=members([*TURNING, "max_precond_dim", "one_sided"]),
    seed=SEEDS,
)
def test_blocks_are_parameters_of_their_own(grid, size, drawn, seed):
    member, options = drawn
    rows, columns = grid
    grads = normal(seed, STEPS, rows * size, columns * size)
    together = run(member, {**options, "block_size": size}, grads)[0]
    for i in range(rows):
        for j in range(columns):
            block = np.s_[:, i * size : (i + 1) * size, j * size : (j + 1) * size]
            assert_same(together[block], run(member, options, grads[block])[0])
