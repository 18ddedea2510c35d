"""The invariants of the design, each by name."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from training import normal, trained

import soap_optax

PARAMS = {
    "dense": {"kernel": jnp.ones((8, 6)), "bias": jnp.ones(6)},
    "conv": jnp.ones((3, 3, 2, 4)),
    "scale": jnp.ones(()),
}


@pytest.mark.parametrize(
    "options", [{}, {"block_size": 4}, {"merge_dims": True}, {"one_sided": True}]
)
def test_1_moments_have_the_parameters_shape(options):
    state = trained(soap_optax.scale_by_soap(**options), PARAMS)
    for name in ("mu", "nu"):
        moments = optax.tree.get(state, name)
        assert jax.tree.map(jnp.shape, moments) == jax.tree.map(jnp.shape, PARAMS)


def test_2_coordinates_keep_their_identity():
    """A refresh does not touch the second moment, and reorders no coordinate."""
    tx = soap_optax.scale_by_soap(precondition_frequency=4, shampoo_beta=0.9)
    params = jnp.zeros((6, 6))
    scale = jnp.logspace(0, -2, 6)[:, None]
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(4):
        _, state = update(scale * normal(6, 6, seed=i), state, params)
    before = state
    refreshing = scale * normal(6, 6, seed=4)
    _, after = update(refreshing, before, params)
    projected = before.eigenbases[0].T @ refreshing @ before.eigenbases[1]
    nu = 0.95 * before.inner_state.nu + 0.05 * projected**2
    np.testing.assert_allclose(after.inner_state.nu, nu, rtol=1e-5)
    overlap = before.eigenbases[0].T @ after.eigenbases[0]
    assert np.abs(overlap - jnp.eye(6)).max() > 1e-4  # it was a refresh
    assert np.all(np.argmax(np.abs(overlap), axis=0) == np.arange(6))


def test_3_two_clocks():
    params = jnp.ones((4, 3))
    tx = soap_optax.scale_by_soap()
    state = tx.init(params)
    updates, state = tx.update(normal(4, 3), state, params)
    np.testing.assert_array_equal(updates, 0)
    assert (state.count, state.inner_state.count) == (1, 0)
    np.testing.assert_array_equal(state.inner_state.nu, 0)
    updates, state = tx.update(normal(4, 3, seed=1), state, params)
    assert (state.count, state.inner_state.count) == (2, 1)
    assert np.abs(updates).max() > 0.5
    tx = soap_optax.scale_by_soap(basis="current")
    updates, state = tx.update(normal(4, 3), tx.init(params), params)
    assert (state.count, state.inner_state.count) == (1, 1)
    assert np.abs(updates).max() > 0.5


def test_4_no_special_cases():
    """Biases, scalars, size-1 and oversized axes have no factor."""
    params = {
        "bias": jnp.ones(5),
        "scalar": jnp.ones(()),
        "row": jnp.ones((1, 4)),
        "tall": jnp.ones((30, 4)),
        "empty": jnp.ones((0, 4)),
    }
    state = trained(soap_optax.scale_by_soap(max_precond_dim=20), params)
    shapes = jax.tree.map(jnp.shape, state.factors)
    assert shapes == {
        "bias": (None,),
        "scalar": (),
        "row": (None, (4, 4)),
        "tall": (None, (4, 4)),
        "empty": (None, None),
    }


def branches_with(primitive, tx, params):
    """Primitives named so inside and outside `cond`, in the program of a step."""
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    inside, outside = 0, 0

    def visit(jaxpr, in_cond):
        nonlocal inside, outside
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == primitive:
                inside, outside = inside + in_cond, outside + (not in_cond)
            for value in jax.tree.leaves(
                list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "jaxpr")
            ):
                if hasattr(value, "jaxpr"):
                    visit(value.jaxpr, in_cond or eqn.primitive.name == "cond")

    visit(jaxpr.jaxpr, False)
    return inside, outside


@pytest.mark.parametrize(
    "make", [soap_optax.scale_by_soap, soap_optax.scale_by_shampoo]
)
def test_parameters_are_not_projected_for_adam(make):
    params, tx = {"w": jnp.ones((4, 3))}, make()
    state = tx.init(params)
    with_params = jax.make_jaxpr(tx.update)(params, state, params)
    without = jax.make_jaxpr(tx.update)(params, state)
    assert str(with_params).count("dot_general") == str(without).count("dot_general")


def test_5_a_refresh_is_a_branch_of_cond():
    params = {"w": jnp.ones((4, 3))}
    assert branches_with("qr", soap_optax.scale_by_soap(), params) == (2, 0)
    assert branches_with("eigh", soap_optax.scale_by_soap(), params) == (2, 0)


@pytest.mark.parametrize("basis", ["previous", "current"])
def test_5_between_refreshes_the_eigenbases_stay(basis):
    tx = soap_optax.scale_by_soap(precondition_frequency=3, basis=basis)
    state = tx.init(jnp.ones((4, 3)))
    for i in range(7):
        _, new = jax.jit(tx.update)(normal(4, 3, seed=i), state)
        same = np.array_equal(new.eigenbases[0], state.eigenbases[0])
        assert same == (i % 3 != 0)
        state = new


def test_5_identity_basis_needs_no_eigh():
    params = {"w": jnp.ones((4, 3)), "v": jnp.ones((2, 3, 4))}
    for basis in ("previous", "current"):
        tx = soap_optax.soap(1e-2, initial_basis="identity", basis=basis)
        state = tx.init(params)
        lowered = jax.jit(tx.update).lower(params, state, params)
        calls = re.findall(r'custom_call_target="(\w+)"', lowered.compile().as_text())
        assert any("geqrf" in call for call in calls)
        assert not any("syev" in call for call in calls)


def test_6_blocks_are_equal_and_not_padded():
    state = trained(soap_optax.scale_by_soap(block_size=4), {"w": jnp.ones((8, 6))})
    assert [f.shape for f in state.factors["w"]] == [(2, 2, 4, 4), (2, 2, 3, 3)]


@pytest.mark.parametrize("axis_type", list(jax.sharding.AxisType)[:2])
def test_6_aligned_blocks_need_no_communication(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type,) * 2)
    sharding = NamedSharding(mesh, jax.P("x", "y"))
    blocks = NamedSharding(mesh, jax.P("x", "y", None, None))
    rows = NamedSharding(mesh, jax.P("x", "y", None))
    replicated = NamedSharding(mesh, jax.P())
    tx = soap_optax.scale_by_soap(block_size=4, params_sharding=sharding)
    with jax.set_mesh(mesh):
        params = jax.device_put(normal(16, 16), sharding)
        state = jax.eval_shape(tx.init, params)
        by_rank = {0: replicated, 2: sharding, 3: rows, 4: blocks}
        shardings = jax.tree.map(lambda x: by_rank[x.ndim], state)
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        step = jax.jit(tx.update, out_shardings=(sharding, shardings))
        text = step.lower(params, state, params).compile().as_text()
        for collective in ("all-reduce", "all-gather", "all-to-all", "permute"):
            assert collective not in text
        updates, state = step(params, state, params)
        other = jax.device_put(normal(16, 16, seed=1), sharding)
        updates, state = step(other, state, params)
    tx = soap_optax.scale_by_soap(block_size=4)
    alone, update = tx.init(normal(16, 16)), jax.jit(tx.update)
    _, alone = update(normal(16, 16), alone)
    expected, _ = update(normal(16, 16, seed=1), alone)
    np.testing.assert_allclose(updates, expected, atol=1e-4)


def test_7_batch_axes_are_native():
    """A layer of a stack does what it does alone, and a Muon configuration plugs in."""
    tx = soap_optax.scale_by_soap(
        dimension_numbers=lambda params: jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers(1, 2) if p.ndim == 3 else None,
            params,
        )
    )
    params = {"stack": jnp.ones((5, 4, 3)), "embed": jnp.ones((7, 4))}
    state = trained(tx, params)
    assert [f.shape for f in state.factors["stack"]] == [(5, 4, 4), (5, 3, 3)]
    assert state.factors["embed"] == (None, None)
