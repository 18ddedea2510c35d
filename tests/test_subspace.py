"""Refreshes within the span of a part of the eigenvectors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_sharding
from test_kronecker import normal, orthogonal

import soap_optax
from soap_optax import QR, CholeskyQR, RefreshRequest, Subspace
from soap_optax.refresh import _methods

QRS = [QR(), CholeskyQR()]


def refresh(method, factors, bases, **request):
    wanted = jnp.ones(factors.shape[:-2], bool)
    return method.refresh(factors, bases, wanted, RefreshRequest(**request))


def factor_of(basis, values):
    return basis @ jnp.diag(jnp.asarray(values)) @ basis.T


def near(basis, size=0.02):
    return jnp.linalg.qr(basis + size * normal(*basis.shape, seed=7)).Q


@pytest.mark.parametrize("method", QRS)
def test_all_columns_are_refreshed_as_by_the_method(method):
    factors = factor_of(orthogonal(6), np.geomspace(1, 1e-3, 6))[None]
    bases = near(orthogonal(6))[None]
    for request in ({}, {"decompose": True}, {"decompose": jnp.asarray(True)}):
        found = refresh(Subspace(1.0, method), factors, bases, **request)
        jax.tree.map(
            np.testing.assert_array_equal,
            found,
            refresh(method, factors, bases, **request),
        )


@pytest.mark.parametrize("method", QRS)
def test_the_columns_that_are_correlated_are_turned_and_the_others_stay(method):
    """A pair of small eigenvalues is chosen before columns that are not correlated."""
    basis, values = orthogonal(8), [1.0, 0.5, 0.2, 0.1, 0.05, 0.01, 0.004, 0.001]
    inside = jnp.diag(jnp.asarray(values)).at[2, 6].set(0.02).at[6, 2].set(0.02)
    factors = (basis @ inside @ basis.T)[None]
    found = refresh(Subspace(0.25, method), factors, basis[None])
    assert found.is_new.all()
    is_turned = np.abs(found.eigenbases[0] - basis).max(axis=0) > 1e-3
    assert np.flatnonzero(is_turned).tolist() == [2, 6]
    others = np.array([0, 1, 3, 4, 5, 7])
    np.testing.assert_array_equal(found.eigenbases[0][:, others], basis[:, others])
    np.testing.assert_allclose(
        found.eigenvalues[0][others], np.array(values)[others], rtol=1e-9
    )
    # Within these two it is the power step of the whole.
    whole = refresh(method, factors, basis[None])
    np.testing.assert_allclose(found.eigenbases, whole.eigenbases, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.25, 0.5])
def test_it_converges_and_stays_orthonormal(fraction):
    basis, values = orthogonal(16), np.geomspace(1, 1e-3, 16)
    factors = factor_of(basis, values).astype(jnp.float32)[None]
    bases = near(basis, 0.1).astype(jnp.float32)[None]
    one = jax.jit(functools.partial(refresh, Subspace(fraction), factors))
    for _ in range(2000):
        bases = (found := one(bases)).eigenbases
        assert found.is_new.all()
    gram = bases[0].T @ bases[0]
    np.testing.assert_allclose(gram, np.eye(16), atol=5e-6)
    np.testing.assert_allclose(np.abs(bases[0].T @ basis), np.eye(16), atol=1e-3)
    np.testing.assert_allclose(found.eigenvalues[0], values, rtol=1e-3)


def test_null_directions_are_null_and_what_fails_is_not_new():
    wide = normal(8, 3)
    factors = jnp.stack([wide @ wide.T, jnp.zeros((8, 8)), jnp.full((8, 8), jnp.nan)])
    bases = jnp.stack([near(jnp.linalg.eigh(factors[0])[1]), *[jnp.eye(8)] * 2])
    for _ in range(60):
        found = refresh(Subspace(0.5), factors, bases)
        bases = jnp.where(found.is_new[:, None, None], found.eigenbases, bases)
    assert found.is_new.tolist() == [True, True, False]
    assert np.sum(np.asarray(found.eigenvalues[0]) > 0) == 3
    np.testing.assert_array_equal(found.eigenvalues[1], 0)


@pytest.mark.parametrize("size", [8, 64])
@pytest.mark.parametrize("method", QRS)
def test_what_is_stored_in_bfloat16_is_refreshed(method, size):
    """Columns that stay are made as orthonormal as those that turn."""
    values = jnp.geomspace(1, 1e-3, size)
    factors = factor_of(orthogonal(size), values).astype(jnp.bfloat16)[None]
    bases = near(orthogonal(size)).astype(jnp.bfloat16)[None]
    _, before = _methods.quality(factors, bases, "highest")
    for _ in range(20):
        found = refresh(Subspace(0.5, method), factors, bases)
        assert found.is_new.all()
        bases = found.eigenbases.astype(jnp.bfloat16)
    _, after = _methods.quality(factors, bases, "highest")
    assert after < before / 2


@pytest.mark.parametrize("size", [1, 2, 3])
def test_small_matrices_turn_at_least_two_columns(size):
    basis = orthogonal(size)
    factors = factor_of(basis, jnp.geomspace(1, 1e-2, size))[None]
    bases = jnp.eye(size)[None]
    for _ in range(50):
        bases = refresh(Subspace(0.25), factors, bases).eigenbases
    _, off_diagonal = _methods.quality(factors, bases, "highest")
    assert off_diagonal < 1e-6


def test_a_tolerance_keeps_what_is_diagonal_enough():
    factors = factor_of(orthogonal(6), np.geomspace(1, 1e-2, 6))[None]
    bases = orthogonal(6)[None]
    found = refresh(Subspace(0.5), factors, bases, tolerance=1e-3)
    assert found.is_kept.all() and not found.is_new.any()
    np.testing.assert_allclose(found.eigenvalues[0], np.geomspace(1, 1e-2, 6))
    found = refresh(Subspace(0.5), factors, near(bases[0])[None], tolerance=1e-3)
    assert found.is_new.all() and not found.is_kept.any()


PARAMS = {"w": jnp.zeros((12, 8)), "stack": jnp.zeros((3, 8, 8)), "b": jnp.zeros(8)}
NUMBERS = {
    "w": soap_optax.DimensionNumbers((0, 1)),
    "stack": soap_optax.DimensionNumbers((1, 2)),
    "b": None,
}
OPTIONS = [
    {},
    {"block_size": 4},
    {"stagger": True, "precondition_frequency": 3},
    {"factors": "kl", "basis": "current", "precondition_frequency": 1},
    {"precond_dtype": "bfloat16"},
]


def updates(refresh, steps=8, **options):
    options = {"precondition_frequency": 2, "dimension_numbers": NUMBERS, **options}
    tx = soap_optax.scale_by_soap(refresh=refresh, **options)
    state, found = tx.init(PARAMS), []
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: normal(*p.shape, seed=i), PARAMS)
        out, state = update(grads, state, PARAMS)
        found.append(out)
    return found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_with_all_columns_is_that_of_the_method(options):
    of_both = (updates(refresh, **options) for refresh in ("qr", Subspace(1.0)))
    jax.tree.map(np.testing.assert_array_equal, *of_both)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_training_with_a_part_of_the_columns(options):
    """Its updates are finite, differ from those of all columns, and are near them."""
    whole, part = (updates(refresh, **options) for refresh in ("qr", Subspace(0.5)))
    differences = [
        float(jnp.linalg.norm(a["w"] - b["w"]) / jnp.linalg.norm(a["w"]))
        for a, b in zip(whole[1:], part[1:], strict=True)
    ]
    assert 1e-4 < max(differences) < 1.5


def test_members_are_as_if_alone():
    tx = soap_optax.scale_by_soap(refresh=Subspace(0.5), precondition_frequency=2)
    grads = normal(3, 5, 8, 6)  # three members, five steps

    def last_update(grads):
        state = tx.init(grads[0])
        for gradient in grads:
            update, state = tx.update(gradient, state)
        return update

    together = jax.jit(jax.vmap(last_update))(grads)
    alone = jnp.stack([jax.jit(last_update)(of_one) for of_one in grads])
    np.testing.assert_allclose(together, alone, atol=1e-6)


def test_on_a_mesh_it_is_as_on_one_device():
    mesh = test_sharding.make_mesh((1, 2, 4))
    sharding = jax.NamedSharding(mesh, jax.P("x", "y"))
    make = functools.partial(
        soap_optax.scale_by_soap, refresh=Subspace(0.5), precondition_frequency=2
    )
    grads = [normal(8, 16, seed=i) for i in range(5)]

    def last_update(tx, place):
        params = place(jnp.zeros((8, 16)))
        state = jax.jit(tx.init)(params)
        for gradient in map(place, grads):
            update, state = jax.jit(tx.update)(gradient, state, params)
        return np.asarray(update)

    one = last_update(make(), lambda x: x)
    many = last_update(
        make(params_sharding=sharding), lambda x: jax.device_put(x, sharding)
    )
    np.testing.assert_allclose(many, one, atol=1e-6)


@pytest.mark.parametrize("fraction", [0, -0.5, 1.5, "half", None, np.nan])
def test_a_fraction_is_a_share(fraction):
    message = f"fraction must be a number above 0 and at most 1, got {fraction!r}"
    with pytest.raises(ValueError, match=message):
        Subspace(fraction)


def test_small_matrices_are_refreshed_by_products_or_by_qr():
    with pytest.raises(ValueError, match=r"method must be soap_optax\.QR"):
        Subspace(0.5, "qr")
    assert Subspace() == Subspace(np.float32(0.5), QR())
