"""Against the NumPy reference, where the golden trajectories do not reach."""

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import soap_optax

STEPS = 25

# Shapes are such that the first gradient makes every factor regular: eigenvectors of
# a null space are any, and with others Adam takes another path. A gradient of zero but
# for round-off is divided by eps, which is therefore larger than usual here.
EPS = 1e-4


def gradients(*shape, seed=0):
    """Gradients with different scales along each axis, so that the order is clear."""
    rng = np.random.default_rng(seed)
    grads = rng.normal(size=(STEPS, *shape))
    for axis, size in enumerate(shape):
        mixed = np.moveaxis(grads, axis + 1, -1)
        mixed = mixed @ (rng.normal(size=(size, size)) * np.linspace(0.3, 2, size))
        grads = np.moveaxis(mixed, -1, axis + 1)
    return grads


def run(tx, grads):
    """The library's directions, float64."""
    params = jnp.zeros(grads.shape[1:])
    state = tx.init(params)
    update = jax.jit(tx.update)
    result = []
    for grad in grads:
        direction, state = update(jnp.asarray(grad), state, params)
        result.append(direction)
    return np.stack(result)


def scale_by_soap(**options):
    return soap_optax.scale_by_soap(eps=EPS, **options)


def expected_directions(grads, **options):
    return reference.run(grads, eps=EPS, **options)


def assert_same(actual, expected, tolerance=1e-8):
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)
    assert np.abs(expected[-1]).max() > 0.1


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("refresh", ["qr", "eigh"])
@pytest.mark.parametrize("initial_basis", ["eigh", "identity"])
@pytest.mark.parametrize("shape", [*cases.slow([5, 5]), [3, 5, 4]], ids=str)
def test_bases(basis, refresh, initial_basis, shape):
    options = {"basis": basis, "refresh": refresh, "initial_basis": initial_basis}
    grads = gradients(*shape)
    tx = scale_by_soap(precondition_frequency=3, **options)
    assert_same(run(tx, grads), expected_directions(grads, frequency=3, **options))


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("frequency", [1, 4, 7])
def test_frequency_and_betas(basis, frequency):
    options = {"b1": 0.8, "b2": 0.97, "shampoo_beta": 0.9, "basis": basis}
    grads = gradients(6, 6)
    tx = scale_by_soap(precondition_frequency=frequency, **options)
    assert_same(
        run(tx, grads), expected_directions(grads, frequency=frequency, **options)
    )


@pytest.mark.parametrize("basis", ["previous", "current"])
def test_frequency_schedule(basis):
    grads = gradients(5, 5)

    def schedule(count):
        return jnp.where(count < 6, 1, 5)

    tx = scale_by_soap(precondition_frequency=schedule, basis=basis)
    expected = expected_directions(
        grads, frequency=lambda count: 1 if count < 6 else 5, basis=basis
    )
    assert_same(run(tx, grads), expected)


def test_frequency_schedule_of_floats_rounds_down():
    grads = gradients(5, 5)
    tx = scale_by_soap(precondition_frequency=lambda count: 3.9)
    assert_same(run(tx, grads), expected_directions(grads, frequency=3))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5), (5, 3, 4)])
def test_one_sided(shape):
    grads = gradients(*shape)
    tx = scale_by_soap(one_sided=True, precondition_frequency=3)
    assert_same(run(tx, grads), expected_directions(grads, one_sided=True, frequency=3))


# A vector's factor is singular at first. With short memories it is forgotten.
FORGETFUL = {"b1": 0.2, "b2": 0.2, "shampoo_beta": 0.9, "refresh": "eigh"}


def test_precondition_1d():
    grads = gradients(6)
    tx = scale_by_soap(precondition_1d=True, precondition_frequency=1, **FORGETFUL)
    expected = expected_directions(
        grads, precondition_1d=True, frequency=1, **FORGETFUL
    )
    assert_same(run(tx, grads)[20:], expected[20:])


@pytest.mark.parametrize("options", [{}, {"basis": "current"}, {"one_sided": True}])
def test_blocks_are_parameters_of_their_own(options):
    grads = gradients(8, 12)
    tx = scale_by_soap(block_size=5, precondition_frequency=3, **options)
    expected = np.empty_like(grads)  # both axes in blocks of 4
    for rows in (slice(0, 4), slice(4, 8)):
        for columns in (slice(0, 4), slice(4, 8), slice(8, 12)):
            block = grads[:, rows, columns]
            expected[:, rows, columns] = expected_directions(
                block, frequency=3, **options
            )
    assert_same(run(tx, grads), expected)


def test_blocks_of_a_merged_axis():
    grads = gradients(2, 4, 4)
    tx = scale_by_soap(
        block_size=5,
        precondition_frequency=3,
        dimension_numbers=soap_optax.DimensionNumbers(((0, 1), 2)),
    )
    matrix = grads.reshape(STEPS, 8, 4)
    blocks = [expected_directions(matrix[:, i : i + 4], frequency=3) for i in (0, 4)]
    expected = np.concatenate(blocks, axis=1).reshape(grads.shape)
    assert_same(run(tx, grads), expected)


@pytest.mark.parametrize(
    "numbers",
    [
        soap_optax.DimensionNumbers((1, 2)),
        soap_optax.DimensionNumbers((-1, -2)),
        optax.contrib.MuonDimensionNumbers(1, 2),
        optax.contrib.MuonDimensionNumbers((1,), (2,)),
    ],
)
def test_axes_not_named_are_batch_axes(numbers):
    grads = gradients(3, 4, 4)
    tx = scale_by_soap(dimension_numbers=numbers, precondition_frequency=3)
    expected = [expected_directions(grads[:, i], frequency=3) for i in range(3)]
    assert_same(run(tx, grads), np.stack(expected, axis=1))


def test_batch_axis_between_blocks():
    grads = gradients(6, 2, 3)
    tx = scale_by_soap(
        dimension_numbers=soap_optax.DimensionNumbers((0, 2)),
        block_size=3,
        precondition_frequency=3,
    )
    expected = np.empty_like(grads)  # the axis of 6 in blocks of 3
    for layer in range(2):
        for rows in (slice(0, 3), slice(3, 6)):
            block = grads[:, rows, layer]
            expected[:, rows, layer] = expected_directions(block, frequency=3)
    assert_same(run(tx, grads), expected)


def test_factor_of_axes_that_are_not_adjacent():
    grads = gradients(3, 6, 2)
    tx = scale_by_soap(
        dimension_numbers=soap_optax.DimensionNumbers(((0, 2), 1)),
        precondition_frequency=3,
    )
    matrix = np.moveaxis(grads, 3, 2).reshape(STEPS, 6, 6)
    expected = expected_directions(matrix, frequency=3).reshape(STEPS, 3, 2, 6)
    assert_same(run(tx, grads), np.moveaxis(expected, 3, 2))


def test_one_factor_only():
    grads = gradients(3, 4)
    tx = scale_by_soap(
        dimension_numbers=soap_optax.DimensionNumbers((1,)),
        precondition_frequency=1,
        **FORGETFUL,
    )
    rows = [
        expected_directions(grads[:, i], precondition_1d=True, frequency=1, **FORGETFUL)
        for i in range(3)
    ]
    assert_same(run(tx, grads)[20:], np.stack(rows, axis=1)[20:])


def test_merge_dims():
    grads = gradients(3, 2, 6)
    tx = scale_by_soap(merge_dims=True, max_precond_dim=6, precondition_frequency=3)
    merged = grads.reshape(STEPS, 6, 6)
    expected = expected_directions(merged, frequency=3).reshape(grads.shape)
    assert_same(run(tx, grads), expected)


def test_max_precond_dim():
    grads = gradients(4, 7)
    tx = scale_by_soap(max_precond_dim=5, precondition_frequency=3)
    expected = expected_directions(grads, max_precond_dim=5, frequency=3)
    assert_same(run(tx, grads), expected)


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("factorized", [False, True])
@pytest.mark.parametrize("factors", [*cases.slow("shampoo"), "kl"])
def test_nesterov_and_eps_root(basis, factorized, factors):
    grads = gradients(5, 5)
    options = {"basis": basis, "factorized": factorized, "factors": factors}
    options |= {"nesterov": True, "eps_root": 1e-3, "refresh": "eigh"}
    tx = scale_by_soap(b1=0.9, precondition_frequency=3, **options)
    expected = expected_directions(grads, b1=0.9, frequency=3, **options)
    assert_same(run(tx, grads), expected)
