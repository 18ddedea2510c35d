"""The mathematics on one parameter, under strict promotion of dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from soap_optax import _kronecker
from soap_optax._kronecker import RoundOff

TRUE = np.array(True)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def layout(*shape, block_size=None):
    return training.layout(shape, block_size=block_size)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def orthogonal(size, seed=0):
    return jnp.asarray(np.linalg.qr(normal(size, size, seed=seed))[0])


def test_project_is_a_kronecker_product():
    gradient, left, right = normal(4, 3), orthogonal(4), orthogonal(3)
    projected = _kronecker.project(gradient, [left, right], layout(4, 3), None)
    expected = np.kron(left, right).T @ gradient.reshape(-1)  # row-major vec
    np.testing.assert_allclose(projected.reshape(-1), expected, atol=1e-14)


@pytest.mark.parametrize("block_size", [None, 2])
def test_project_back_inverts_project(block_size):
    plan = layout(4, 6, 2, block_size=block_size)
    array = normal(4, 6, 2)
    shapes = plan.factor_shapes()
    bases = [jnp.linalg.qr(normal(*shape, seed=i)).Q for i, shape in enumerate(shapes)]
    there = _kronecker.project(array, bases, plan, "highest")
    back = _kronecker.project_back(there, bases, plan, "highest")
    assert np.abs(there - array).max() > 0.1
    np.testing.assert_allclose(back, array, atol=1e-14)


def test_accumulate_is_the_mean_of_gram_matrices():
    gradient = normal(4, 3, 2)
    factors = [normal(4, 4, seed=1), None, normal(2, 2, seed=2)]
    new = _kronecker.accumulate(factors, [gradient] * 3, layout(4, 3, 2), 0.25, None)
    rows = gradient.reshape(4, 6)
    np.testing.assert_allclose(new[0], 0.75 * factors[0] + 0.25 * rows @ rows.T)
    assert new[1] is None
    rows = gradient.reshape(12, 2)
    np.testing.assert_allclose(new[2], 0.75 * factors[2] + 0.25 * rows.T @ rows)


def change_basis(arrays, old, new, is_new, plan, precision):
    """Turns first moments that have no second moments."""
    (moments,), taken = _kronecker.change_basis(
        [_kronecker.Moments(arrays, [])],
        old,
        new,
        is_new,
        plan,
        _kronecker.BasisChange(TRUE, precision),
    )
    return moments.first, taken


def test_change_basis_is_back_and_there():
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1), orthogonal(3, 2)]
    new = [orthogonal(4, 3), orthogonal(3, 4)]
    (changed,), _ = change_basis([array], old, new, [TRUE, TRUE], plan, None)
    parameter = _kronecker.project_back(array, old, plan, None)
    expected = _kronecker.project(parameter, new, plan, None)
    np.testing.assert_allclose(changed, expected, atol=1e-14)


def test_follow_gives_the_rayleigh_quotients():
    plan, gradient = layout(4, 3), normal(4, 3)
    bases = [orthogonal(4), orthogonal(3)]
    coordinates, energies = _kronecker.project_and_measure(gradient, bases, plan, None)
    np.testing.assert_array_equal(
        coordinates, _kronecker.project(gradient, bases, plan, None)
    )
    followed = _kronecker.follow([jnp.zeros(4), jnp.zeros(3)], energies, [0.5] * 2)
    factors = [0.5 * gradient @ gradient.T, 0.5 * gradient.T @ gradient]
    for energy, factor, q in zip(followed, factors, bases, strict=True):
        np.testing.assert_allclose(energy, np.diag(q.T @ factor @ q), rtol=1e-12)


def test_damp_takes_out_null_directions_only():
    plan, update = layout(3, 2), jnp.ones((3, 2))
    round_off = RoundOff.of(jnp.float64, 2.0**-52)
    eigenvalues = [jnp.array([1.0, 1e-4, 1e-20]), jnp.array([2.0, 1.0])]
    damped = _kronecker.damp(update, eigenvalues, plan, round_off)
    np.testing.assert_allclose(damped[:2], 1, rtol=1e-12)
    assert np.all(damped[2] < 1e-4) and np.all(damped[2] > 0)
    eigenvalues[0] = eigenvalues[0].at[2].set(0)
    damped = _kronecker.damp(update, eigenvalues, plan, round_off)
    np.testing.assert_array_equal(damped[2], 0)
    np.testing.assert_array_equal(
        _kronecker.damp(update, eigenvalues, plan, RoundOff(0.0)), 1
    )
    zeros = [jnp.zeros(3), jnp.zeros(2)]
    np.testing.assert_array_equal(_kronecker.damp(update, zeros, plan, round_off), 1)


@pytest.mark.parametrize("block_size", [None, 2])
def test_clip_rms(block_size):
    plan = layout(4, 2, block_size=block_size)
    update = 10 * jnp.ones((4, 2)).at[:2].set(0.1)
    clipped = _kronecker.clip_rms(update, plan, 5.0)
    if block_size is None:
        np.testing.assert_allclose(clipped, update * 5 / np.sqrt(np.mean(update**2)))
    else:
        np.testing.assert_array_equal(clipped, jnp.minimum(update, 5.0))
    np.testing.assert_array_equal(_kronecker.clip_rms(update, plan, 10.0), update)
    np.testing.assert_allclose(
        _kronecker.clip_rms(1e300 * update, plan, 5.0)[2:],
        (clipped if block_size is None else 5 * update / update[-1, -1])[2:],
    )


def test_clip_rms_keeps_directions_and_shows_what_is_not_finite():
    plan, update = layout(4, 3), normal(4, 3)
    for scale in (10.0, 1e3, 1e200):
        clipped = _kronecker.clip_rms(scale * update, plan, 1.0)
        np.testing.assert_allclose(clipped, update / np.sqrt(np.mean(update**2)))
    infinite = _kronecker.clip_rms(update.at[0, 0].set(jnp.inf), plan, 1.0)
    assert not np.isfinite(infinite[0, 0])
    np.testing.assert_array_equal(_kronecker.clip_rms(0 * update, plan, 1.0), 0)
    half = jnp.full((4, 3), 6e4, jnp.float16)
    np.testing.assert_array_equal(_kronecker.clip_rms(half, plan, 1e3), 1e3)


@pytest.mark.parametrize("size", [1e-30, 1e-24, 1.0, 1e18, 1e30])
@pytest.mark.parametrize("other", [1e-30, 1.0, 1e18])
def test_graft_takes_norms_of_any_size(size, other):
    """Squares of these would underflow or overflow in float32."""
    plan, (array, like) = layout(4, 2, block_size=2), normal(2, 4, 2)
    array, like = array.at[2:].set(0), like.at[:2].multiply(2)
    wide = _kronecker.graft(array, like, plan)
    arrays = (size * array).astype(jnp.float32), (other * like).astype(jnp.float32)
    grafted = _kronecker.graft(*arrays, plan)
    np.testing.assert_allclose(grafted / np.float32(other), wide, rtol=1e-5)
    expected = array[:2] * jnp.linalg.norm(like[:2]) / jnp.linalg.norm(array[:2])
    np.testing.assert_allclose(wide[:2], expected, rtol=1e-12)
    np.testing.assert_array_equal(wide[2:], 0)
    np.testing.assert_array_equal(_kronecker.graft(array, 0 * like, plan), 0)
    bad = _kronecker.graft(array.at[0, 0].set(jnp.nan), like, plan)
    assert not np.isfinite(bad[0, 0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_change_basis_leaves_what_stays(dtype):
    """Bit for bit, also if the columns are orthonormal to three digits only."""
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1).astype(dtype), orthogonal(3, 2).astype(dtype)]
    new = [orthogonal(4, 3).astype(dtype), orthogonal(3, 4).astype(dtype)]
    (changed,), taken = change_basis([array], old, new, [~TRUE, ~TRUE], plan, "highest")
    np.testing.assert_array_equal(changed, array)
    assert not any(taken)


def test_change_basis_takes_nothing_that_would_not_stay_finite():
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1), orthogonal(3, 2)]
    broken = [jnp.full((4, 4), jnp.inf), orthogonal(3, 4)]
    (changed, other), taken = change_basis(
        [array, 2 * array], old, broken, [TRUE, TRUE], plan, None
    )
    assert not any(taken)
    np.testing.assert_array_equal(changed, array)
    np.testing.assert_array_equal(other, 2 * array)


def test_change_basis_block_by_block():
    """A block that would not stay finite stays; one that is not finite is no reason."""
    plan, array = layout(4, 3, block_size=2), normal(4, 3)
    array = array.at[2, 0].set(jnp.nan)
    old = [jnp.stack([orthogonal(2, 1), orthogonal(2, 2)]), None]
    new = [jnp.stack([jnp.full((2, 2), jnp.inf), orthogonal(2, 3)]), None]
    is_new = [jnp.ones(2, bool), None]
    (changed,), (taken, _) = change_basis([array], old, new, is_new, plan, None)
    assert taken.tolist() == [False, True]
    np.testing.assert_array_equal(changed[:2], array[:2])
    expected = new[0][1].T @ old[0][1] @ array[2:]
    np.testing.assert_allclose(changed[2:, 1:], expected[:, 1:], atol=1e-14)
    assert jnp.isnan(changed[2:, 0]).all()
