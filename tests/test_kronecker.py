"""The mathematics on one parameter, under strict promotion of dtypes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

from soap_optax import _kronecker
from soap_optax._layout import make_layout

TRUE = np.array(True)


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def layout(*shape, block_size=None):
    return make_layout(
        shape,
        max_precond_dim=100,
        merge_dims=False,
        precondition_1d=False,
        one_sided=False,
        block_size=block_size,
    )


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


def test_change_basis_is_back_and_there():
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1), orthogonal(3, 2)]
    new = [orthogonal(4, 3), orthogonal(3, 4)]
    (changed,), _ = _kronecker.change_basis([array], old, new, [TRUE, TRUE], plan, None)
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
    followed = _kronecker.follow([jnp.zeros(4), jnp.zeros(3)], energies, 0.5)
    factors = [0.5 * gradient @ gradient.T, 0.5 * gradient.T @ gradient]
    for energy, factor, q in zip(followed, factors, bases, strict=True):
        np.testing.assert_allclose(energy, np.diag(q.T @ factor @ q), rtol=1e-12)


def test_damp_takes_out_null_directions_only():
    plan, update = layout(3, 2), jnp.ones((3, 2))
    eigenvalues = [jnp.array([1.0, 1e-4, 1e-20]), jnp.array([2.0, 1.0])]
    damped = _kronecker.damp(update, eigenvalues, plan, None)
    np.testing.assert_allclose(damped[:2], 1, rtol=1e-12)
    assert np.all(damped[2] < 1e-4) and np.all(damped[2] > 0)
    eigenvalues[0] = eigenvalues[0].at[2].set(0)
    damped = _kronecker.damp(update, eigenvalues, plan, None)
    np.testing.assert_array_equal(damped[2], 0)
    np.testing.assert_array_equal(_kronecker.damp(update, eigenvalues, plan, 0.0), 1)
    zeros = [jnp.zeros(3), jnp.zeros(2)]
    np.testing.assert_array_equal(_kronecker.damp(update, zeros, plan, None), 1)


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


def test_angles_are_between_lines():
    basis = orthogonal(3)
    turned = basis @ jnp.array([[0, -1, 0], [1, 0, 0], [0, 0, -1.0]])
    angles = _kronecker.angles(basis, turned)
    np.testing.assert_allclose(angles, [np.pi / 2, np.pi / 2, 0], atol=1e-7)
    np.testing.assert_allclose(_kronecker.angles(basis, -basis), 0, atol=1e-7)


def test_quality_of_what_is_singular_up_to_round_off():
    factors = jnp.stack([jnp.diag(jnp.array([1.0, x])) for x in (1e-3, 1e-17, -1e-17)])
    bases = jnp.broadcast_to(jnp.eye(2), factors.shape)
    condition, off_diagonal = _kronecker.quality(factors, bases, None)
    np.testing.assert_allclose(condition, [1e3, np.inf, np.inf])
    np.testing.assert_allclose(off_diagonal, 0, atol=1e-16)


def test_what_is_orthonormal():
    basis = orthogonal(40)
    broken = [
        basis.at[:, 3].multiply(1.001),
        basis.at[:, 3].set(basis[:, 4]),
        basis.at[:, 3].set(0),
        basis.at[:, 3].add(1e-3 * basis[:, 4]),
        basis.at[0, 0].set(jnp.nan),
        basis.at[0, 0].set(jnp.inf),
        jnp.full_like(basis, jnp.nan),
    ]
    sound = _kronecker.is_orthonormal(jnp.stack([basis, -basis, *broken]))
    assert sound.tolist() == [True, True] + [False] * len(broken)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float64])
def test_change_basis_leaves_what_stays(dtype):
    """Bit for bit, also if the columns are orthonormal to three digits only."""
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1).astype(dtype), orthogonal(3, 2).astype(dtype)]
    new = [orthogonal(4, 3).astype(dtype), orthogonal(3, 4).astype(dtype)]
    (changed,), taken = _kronecker.change_basis(
        [array], old, new, [~TRUE, ~TRUE], plan, "highest"
    )
    np.testing.assert_array_equal(changed, array)
    assert not any(taken)


def test_change_basis_takes_nothing_that_would_not_stay_finite():
    plan, array = layout(4, 3), normal(4, 3)
    old = [orthogonal(4, 1), orthogonal(3, 2)]
    broken = [jnp.full((4, 4), jnp.inf), orthogonal(3, 4)]
    (changed, other), taken = _kronecker.change_basis(
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
    (changed,), (taken, _) = _kronecker.change_basis(
        [array], old, new, is_new, plan, None
    )
    assert taken.tolist() == [False, True]
    np.testing.assert_array_equal(changed[:2], array[:2])
    expected = new[0][1].T @ old[0][1] @ array[2:]
    np.testing.assert_allclose(changed[2:, 1:], expected[:, 1:], atol=1e-14)
    assert jnp.isnan(changed[2:, 0]).all()


def refresh(factor, basis, method, precision):
    zeros = jnp.zeros(
        factor.shape[:-1], factor.dtype if factor.dtype == jnp.float64 else jnp.float32
    )
    return training.refresh(factor, basis, zeros, method, precision)[:2]


def spectrum_and_basis(size):
    basis = orthogonal(size, seed=5)
    values = np.linspace(1, 3, size) ** 4
    return basis @ jnp.diag(jnp.asarray(values)) @ basis.T, basis, values


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_refresh_keeps_the_identity_of_coordinates(method):
    factor, basis, values = spectrum_and_basis(6)
    shuffle = np.random.default_rng(0).permutation(6)
    near = jnp.linalg.qr(basis[:, shuffle] + 0.01 * normal(6, 6)).Q
    new, eigenvalues = refresh(factor, near, method, None)
    overlap = np.abs(basis[:, shuffle].T @ new)
    np.testing.assert_allclose(overlap, np.eye(6), atol=0.05)
    np.testing.assert_allclose(eigenvalues, values[shuffle], rtol=0.05)
    np.testing.assert_allclose(new.T @ new, np.eye(6), atol=1e-14)


def test_qr_refreshes_converge_to_the_eigenbasis():
    factor, _, values = spectrum_and_basis(6)
    basis = jnp.eye(6)
    for _ in range(100):
        basis, eigenvalues = refresh(factor, basis, "qr", None)
    rotated = basis.T @ factor @ basis
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-9)
    np.testing.assert_allclose(np.sort(eigenvalues), values, rtol=1e-9)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_refresh_of_a_batch_is_the_refresh_of_each(method):
    rows = normal(3, 5, 8)
    factors = rows @ rows.transpose(0, 2, 1)
    bases = jnp.linalg.qr(normal(3, 5, 5, seed=1)).Q
    together = refresh(factors, bases, method, None)
    for i in range(3):
        alone = refresh(factors[i], bases[i], method, None)
        for batch, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(batch[i], one, atol=1e-13)


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_refresh_of_zero_and_of_bfloat16(method):
    new, eigenvalues = refresh(jnp.zeros((4, 4)), jnp.eye(4), method, None)
    np.testing.assert_allclose(new.T @ new, np.eye(4), atol=1e-15)
    np.testing.assert_array_equal(eigenvalues, 0)
    factor = jnp.eye(4, dtype=jnp.bfloat16)
    new, eigenvalues = refresh(factor, factor, method, None)
    assert new.dtype == jnp.bfloat16
    assert eigenvalues.dtype == jnp.float32


@pytest.mark.parametrize("method", ["qr", "cholesky_qr", "eigh"])
def test_a_refresh_that_fails_changes_nothing(method):
    basis, eigenvalues = jnp.eye(4)[None], jnp.arange(4.0)[None]
    factors = jnp.stack([jnp.full((4, 4), jnp.inf), jnp.diag(jnp.arange(1.0, 5))])
    bases, values = (jnp.concatenate([x, x]) for x in (basis, eigenvalues))
    new, after, failed = training.refresh(factors, bases, values, method, None)
    assert failed.tolist() == [[1], [0]]
    np.testing.assert_array_equal(new[0], basis[0])
    np.testing.assert_array_equal(after[0], eigenvalues[0])
    np.testing.assert_allclose(after[1], np.arange(1.0, 5))
