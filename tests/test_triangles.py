"""Factors that are stored as triangles."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import soap_optax
from soap_optax import _triangles


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape)


@pytest.mark.parametrize("side", range(1, 9))
def test_packed_and_whole_again(side):
    matrix = normal(side, 3, 2, side, side)
    matrix += jnp.swapaxes(matrix, -2, -1)
    packed = _triangles.pack(matrix)
    assert packed.shape == _triangles.packed_shape(matrix.shape)
    np.testing.assert_array_equal(_triangles.whole(packed, side), matrix)
    np.testing.assert_array_equal(_triangles.whole(matrix, side), matrix)


@pytest.mark.parametrize(("side", "entries"), [(8, 36), (9, 55), (10, 55)])
def test_half_of_the_memory(side, entries):
    """They are those of a triangle, for an odd side that of the next even one."""
    assert np.prod(_triangles.packed_shape((side, side))) == entries


# Sides of 7 and 8 have packed factors of one shape.
PARAMS = {"matrix": (7, 8), "stack": (2, 5, 5), "bias": (4,)}


def make(make_tx=soap_optax.soap, **options):
    matrices = soap_optax.matrices(exclude="bias")
    defaults = {"precondition_frequency": 3, "dimension_numbers": matrices}
    return make_tx(0.01, **defaults | options)


def tree(seed):
    return {name: normal(seed + i, *s) for i, (name, s) in enumerate(PARAMS.items())}


@functools.partial(jax.jit, static_argnums=0)
def trained(tx, params):
    """The parameters and the state after eight noisy steps towards 0."""

    def step(carry, seed):
        params, state = carry
        grads = jax.tree.map(jnp.add, params, tree(seed))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jnp.arange(8))[0]


OPTIONS = {
    "as published": {},
    "KL-SOAP": {"factors": "kl", "basis": "current", "precondition_frequency": 1},
    "blocks": {"block_size": 4, "stagger": True},
    "Cholesky": {"refresh": "cholesky_qr", "initial_basis": "identity"},
    "one-sided": {"refresh_tolerance": 0.1, "one_sided": True, "factorized": True},
    "Shampoo": {"make_tx": soap_optax.shampoo, "precond_dtype": jnp.float64},
    "merged": {"merge_dims": True, "dimension_numbers": None, "precondition_1d": True},
}


@pytest.mark.parametrize("options", cases.named(OPTIONS, "KL-SOAP", "merged"))
def test_a_training_with_packed_factors(options):
    """It is that with whole factors, and the state has them in half of the memory."""
    (params, state), (expected, whole) = (
        trained(make(pack_factors=pack, **options), tree(100)) for pack in (True, False)
    )
    for name, value in expected.items():
        np.testing.assert_allclose(params[name], value, atol=1e-9)
    pairs = zip(
        jax.tree.leaves(optax.tree.get(state, "factors")),
        jax.tree.leaves(optax.tree.get(whole, "factors")),
        strict=True,
    )
    for packed, factor in pairs:
        assert packed.shape == _triangles.packed_shape(factor.shape)
        unpacked = _triangles.whole(packed, factor.shape[-1])
        np.testing.assert_allclose(unpacked, factor, atol=1e-9)
    figures = (jax.tree.leaves(soap_optax.diagnostics(s)) for s in (state, whole))
    for found, expected in zip(*figures, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


def test_ensembles():
    """Each member trains as it does alone."""
    tx = make(pack_factors=True)
    members = [tree(seed) for seed in (100, 200)]
    stacked = jax.tree.map(lambda *of_members: jnp.stack(of_members), *members)
    together, _ = jax.vmap(functools.partial(trained, tx))(stacked)
    for i, member in enumerate(members):
        alone, _ = trained(tx, member)
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i], value, atol=1e-9)


def test_other_states_are_refused():
    """Both shapes are named, so that the option that differs can be guessed."""
    params = tree(0)
    whole, packed = make(), make(pack_factors=True)
    with pytest.raises(ValueError, match=r"\(9, 4\).*\(7, 7\)"):
        packed.update(params, whole.init(params), params)
    with pytest.raises(ValueError, match=r"\(7, 7\).*\(9, 4\)"):
        whole.update(params, packed.init(params), params)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_cut_across_devices_are_refused(kind):
    mesh = jax.make_mesh((2,), ("x",), axis_types=(kind,), devices=jax.devices()[:2])
    shardings = {"w": jax.NamedSharding(mesh, jax.P("x", None))}
    params = jax.device_put({"w": jnp.ones((8, 6))}, shardings)
    tx = soap_optax.soap(0.01, pack_factors=True, params_sharding=shardings)
    message = "^pack_factors must be False where factors are cut.*'w'.*got True"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    blocks = soap_optax.soap(
        0.01, pack_factors=True, block_size=4, params_sharding=shardings
    )
    with jax.set_mesh(mesh):
        state = jax.jit(blocks.init)(params)
        updates, _ = jax.jit(blocks.update)(params, state, params)
    assert updates["w"].shape == (8, 6)
