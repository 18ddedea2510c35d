"""What a state says about its eigenbases, against NumPy."""

import dataclasses
import functools
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from flax import nnx

import soap_optax
from soap_optax import Diagnostics

normal = functools.partial(training.normal, dtype=np.float64)
trained = functools.partial(training.trained, steps=9, dtype=np.float64)


def test_against_numpy():
    state = trained(
        soap_optax.scale_by_soap(precondition_frequency=4), jnp.ones((5, 4))
    )
    figures = jax.jit(soap_optax.diagnostics)(state)
    for i in range(2):
        factor, basis = np.asarray(state.factors[i]), np.asarray(state.eigenbases[i])
        rotated = basis.T @ factor @ basis
        quotients = np.diag(rotated)
        off = np.linalg.norm(rotated - np.diag(quotients)) / np.linalg.norm(factor)
        refreshed = np.linalg.qr(factor @ basis[:, rank := np.argsort(-quotients)])[0]
        cosines = np.abs(np.sum(basis[:, rank] * refreshed, axis=0))
        rotation = np.sqrt(np.mean(np.arccos(cosines) ** 2))
        expected = Diagnostics(quotients.max() / quotients.min(), off, rotation, 0)
        np.testing.assert_allclose(figures[i], expected, rtol=1e-5)
        assert off > 0.01 and rotation > 0.01


def test_an_exact_eigenbasis():
    tx = soap_optax.scale_by_soap(refresh="eigh", precondition_frequency=1)
    for figures in soap_optax.diagnostics(trained(tx, jnp.ones((4, 4)))):
        assert figures.off_diagonal < 1e-7 and figures.rotation < 1e-6
        assert 1 < figures.condition < np.inf


def test_structure_and_blocks():
    params = {"a": {"w": jnp.ones((4, 6)), "b": jnp.ones(3)}, "c": [jnp.ones((1, 2))]}
    state = trained(soap_optax.soap(1e-3, block_size=2), params)
    figures = soap_optax.diagnostics(state)
    shapes = jax.tree.map(jnp.shape, figures)
    assert shapes["a"]["w"] == (Diagnostics(*[(2, 3)] * 4),) * 2
    assert figures["a"]["b"] == (None,)
    assert figures["c"]["0"][0] is None
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(figures)}
    assert dtypes == {jnp.dtype("float32")}


def test_before_the_first_step_and_of_zero_gradients():
    state = soap_optax.scale_by_soap().init(jnp.ones((3, 2)))
    for figures in soap_optax.diagnostics(state):
        assert figures == (np.inf, 0, 0, 0)


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_no_overflow(scale):
    tx = soap_optax.scale_by_soap(precondition_frequency=4)
    state, scaled = tx.init(jnp.ones((3, 3), "f4")), tx.init(jnp.ones((3, 3), "f4"))
    for i in range(6):
        grad = normal(3, 3, seed=i).astype(jnp.float32)
        _, state = jax.jit(tx.update)(grad, state)
        _, scaled = jax.jit(tx.update)(scale * grad, scaled)
    expected = soap_optax.diagnostics(state)
    for figures, of_unit in zip(soap_optax.diagnostics(scaled), expected, strict=True):
        np.testing.assert_allclose(figures, of_unit, rtol=1e-3)


def test_skipped_refreshes():
    tx = soap_optax.scale_by_soap(precondition_frequency=2)
    state = trained(tx, jnp.ones((3, 2)), steps=3)
    broken = jnp.full_like(state.factors[0], jnp.inf)
    state = state._replace(factors=(broken, state.factors[1]))
    before = state
    for i in range(2):
        _, state = jax.jit(tx.update)(normal(3, 2, seed=i), state)
    assert state.refreshes == 3
    assert [skipped.tolist() for skipped in state.skipped] == [[1], [0]]
    rows, columns = soap_optax.diagnostics(state._replace(factors=before.factors))
    np.testing.assert_allclose([rows.skipped, columns.skipped], [1 / 3, 0])
    np.testing.assert_array_equal(state.eigenbases[0], before.eigenbases[0])
    assert not np.array_equal(state.eigenbases[1], before.eigenbases[1])


def test_a_moment_along_a_skipped_refresh_stays():
    """With b1 near 1 it would not, had the refresh that failed turned it."""
    tx = soap_optax.scale_by_soap(precondition_frequency=4, b1=1 - 1e-12)
    state = trained(tx, jnp.ones((3, 2)), steps=4)
    moment = normal(3, 2, seed=9)
    state = state._replace(
        factors=tuple(jnp.full_like(f, jnp.nan) for f in state.factors),
        inner_state=state.inner_state._replace(mu=moment),
    )
    _, after = jax.jit(tx.update)(jnp.zeros((3, 2)), state)
    assert [skipped.tolist() for skipped in after.skipped] == [[1], [1]]
    np.testing.assert_allclose(after.inner_state.mu, moment, rtol=1e-11)


@pytest.mark.parametrize("block_size", [2, *cases.slow(None)])
def test_on_an_explicit_mesh(block_size):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = soap_optax.scale_by_soap(block_size=block_size)
    grad = normal(16, 16)
    expected = soap_optax.diagnostics(jax.jit(tx.update)(grad, tx.init(grad))[1])
    with jax.set_mesh(mesh):
        rows = jax.sharding.NamedSharding(mesh, jax.P("x", None))
        sharded = jax.device_put(grad, rows)
        state = tx.init(sharded)
        _, after = jax.jit(tx.update)(sharded, state)
        assert jax.tree.map(jax.typeof, after) == jax.tree.map(jax.typeof, state)
        figures = jax.jit(soap_optax.diagnostics)(after)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), figures, expected
    )


def test_inside_of_other_states():
    params = {"a": jnp.ones((4, 3)), "c": jnp.ones((6, 6))}
    some, other = (soap_optax.soap(1e-3, block_size=b) for b in (None, 3))
    tx = optax.partition({"a": some, "c": other}, {"a": "a", "c": "c"})
    tx = optax.MultiSteps(optax.chain(optax.clip(1.0), tx), every_k_schedule=1)
    figures = soap_optax.diagnostics(trained(tx, params))
    assert [f.condition.shape for f in figures["a"]] == [(), ()]
    assert [f.condition.shape for f in figures["c"]] == [(2, 2), (2, 2)]


def test_inside_of_nnx():
    model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, soap_optax.soap(3e-3), wrt=nnx.Param)
    figures = soap_optax.diagnostics(optimizer.opt_state)
    assert isinstance(figures["kernel"][0], Diagnostics)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """A module with a parameter whose name is that of the box of Flax."""

    value: Any
    other: Any


def test_partitioned_parameters_that_are_called_value():
    """Each optimizer sees the others' parameters as empty nodes, and is told apart."""
    pair = Pair(normal(4, 3), normal(3, 2, seed=1))
    params = {"pair": pair, "box": {"value": normal(2, 2, seed=2)}, "value": normal(3)}
    labels = {"pair": Pair("a", "b"), "box": {"value": "b"}, "value": "a"}
    soap = functools.partial(soap_optax.soap, 1e-3, precondition_frequency=4)
    split = optax.partition({"a": soap(), "b": soap()}, labels)
    found, expected = (
        soap_optax.diagnostics(trained(tx, params)) for tx in (split, soap())
    )
    assert set(found["pair"]) == {"other", "value"}
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_states_without_and_with_two():
    params = {"a": {"w": jnp.ones((3, 2))}}
    message = "state must be an optax state that holds an EigenbasisState"
    with pytest.raises(ValueError, match=message):
        soap_optax.diagnostics(optax.adam(1e-3).init(params))
    twice = optax.chain(soap_optax.scale_by_soap(), soap_optax.scale_by_soap())
    message = r"state must hold one EigenbasisState of \['a'\]\['w'\], got two"
    with pytest.raises(ValueError, match=message):
        soap_optax.diagnostics(twice.init(params))
