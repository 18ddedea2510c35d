"""The mathematics of refreshes, under strict promotion of dtypes."""

import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training
from test_kronecker import normal, orthogonal

from soap_optax._options import FamilyOptions
from soap_optax.refresh import METHODS, _methods


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def test_angles_are_between_lines():
    basis = orthogonal(3)
    turned = basis @ jnp.array([[0, -1, 0], [1, 0, 0], [0, 0, -1.0]])
    angles = _methods.angles(basis, turned)
    np.testing.assert_allclose(angles, [np.pi / 2, np.pi / 2, 0], atol=1e-7)
    np.testing.assert_allclose(_methods.angles(basis, -basis), 0, atol=1e-7)


def test_quality_of_what_is_singular_up_to_round_off():
    factors = jnp.stack([jnp.diag(jnp.array([1.0, x])) for x in (1e-3, 1e-17, -1e-17)])
    bases = jnp.broadcast_to(jnp.eye(2), factors.shape)
    condition, off_diagonal = _methods.quality(factors, bases, None)
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
    sound = _methods.is_orthonormal(jnp.stack([basis, -basis, *broken]))
    assert sound.tolist() == [True, True] + [False] * len(broken)


def refresh(factor, basis, method, precision):
    zeros = jnp.zeros(
        factor.shape[:-1], factor.dtype if factor.dtype == jnp.float64 else jnp.float32
    )
    return training.refresh(factor, basis, zeros, method, precision)[:2]


def spectrum_and_basis(size):
    basis = orthogonal(size, seed=5)
    values = np.linspace(1, 3, size) ** 4
    return basis @ jnp.diag(jnp.asarray(values)) @ basis.T, basis, values


@pytest.mark.parametrize("method", METHODS)
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


@pytest.mark.parametrize("method", METHODS)
def test_refresh_of_a_batch_is_the_refresh_of_each(method):
    rows = normal(3, 5, 8)
    factors = rows @ rows.transpose(0, 2, 1)
    bases = jnp.linalg.qr(normal(3, 5, 5, seed=1)).Q
    together = refresh(factors, bases, method, None)
    for i in range(3):
        alone = refresh(factors[i], bases[i], method, None)
        for batch, one in zip(together, alone, strict=True):
            np.testing.assert_allclose(batch[i], one, atol=1e-13)


@pytest.mark.parametrize("method", METHODS)
def test_refresh_of_zero_and_of_bfloat16(method):
    new, eigenvalues = refresh(jnp.zeros((4, 4)), jnp.eye(4), method, None)
    np.testing.assert_allclose(new.T @ new, np.eye(4), atol=1e-15)
    np.testing.assert_array_equal(eigenvalues, 0)
    basis = jnp.eye(4, dtype=jnp.bfloat16)
    factor = basis.astype(jnp.float32)
    new, eigenvalues = refresh(factor, basis, method, None)
    assert new.dtype == jnp.bfloat16
    assert eigenvalues.dtype == jnp.float32


@pytest.mark.parametrize("method", METHODS)
def test_a_refresh_that_fails_changes_nothing(method):
    basis, eigenvalues = jnp.eye(4)[None], jnp.arange(4.0)[None]
    factors = jnp.stack([jnp.full((4, 4), jnp.inf), jnp.diag(jnp.arange(1.0, 5))])
    bases, values = (jnp.concatenate([x, x]) for x in (basis, eigenvalues))
    new, after, failed = training.refresh(factors, bases, values, method, None)
    assert failed.tolist() == [[1], [0]]
    np.testing.assert_array_equal(new[0], basis[0])
    np.testing.assert_array_equal(after[0], eigenvalues[0])
    np.testing.assert_allclose(after[1], np.arange(1.0, 5))


def test_the_first_decomposition_is_that_of_the_factor():
    """Also where the eigenbasis is not the identity, as after a count is set back."""
    factor, _, values = spectrum_and_basis(6)
    for method in METHODS.values():
        request = _methods.RefreshRequest(decompose=jnp.asarray(True))
        wanted = jnp.ones(1, bool)
        refresh = jax.jit(method.refresh)
        new = refresh(factor[None], orthogonal(6)[None], wanted, request)
        rotated = new.eigenbases[0].T @ factor @ new.eigenbases[0]
        np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-11)
        np.testing.assert_allclose(np.sort(new.eigenvalues[0]), values, rtol=1e-11)


def test_type_checkers_know_every_name():
    hint = typing.get_type_hints(FamilyOptions)["refresh"]
    names, method = typing.get_args(hint)
    assert set(typing.get_args(names)) == set(METHODS)
    assert method is _methods.RefreshMethod
