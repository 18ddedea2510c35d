"""Matrices on the spheres of their initial norms."""

import functools
import re

import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import soap_optax


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def run(tx, params, updates, steps=1):
    """The parameters after some steps along the same updates, and the state."""
    state = tx.init(params)
    for _ in range(steps):
        update, state = tx.update(updates, state, params)
        params = optax.apply_updates(params, update)
    return params, state


def moved(w, u, rate):
    """R n(W - rate R n(U)) in float64, of one matrix."""
    w, u = np.float64(w), np.float64(u)
    radius = np.linalg.norm(w)
    target = w - rate * radius * u / np.linalg.norm(u)
    return radius * target / np.linalg.norm(target)


@pytest.mark.parametrize("rate", [1e-4, 0.018, 0.5])
@pytest.mark.parametrize("size", [1e-10, 1.0, 1e10])
def test_one_step_is_the_formula(rate, size):
    w, u = normal(0, (5, 7)), normal(1, (5, 7))
    after, _ = run(soap_optax.hyperball(rate), w, size * u)
    np.testing.assert_allclose(after, moved(w, u, rate), rtol=1e-5, atol=1e-6)


def test_every_index_along_a_batch_axis_is_a_matrix_of_its_own():
    w, u = normal(0, (3, 5, 2, 7)), normal(1, (3, 5, 2, 7))
    numbers = soap_optax.DimensionNumbers((1, 3))
    after, state = run(soap_optax.hyperball(0.1, dimension_numbers=numbers), w, u)
    for batch in np.ndindex(3, 2):
        index = (batch[0], slice(None), batch[1])
        expected = moved(w[index], u[index], 0.1)
        np.testing.assert_allclose(after[index], expected, rtol=1e-5, atol=1e-6)
    assert jax.tree.leaves(state.radii)[0].shape == (3, 1, 2, 1)


def test_without_dimension_numbers_all_axes_are_one_matrix():
    w, u = normal(0, (3, 3, 2, 4)), normal(1, (3, 3, 2, 4))
    after, _ = run(soap_optax.hyperball(0.1), w, u)
    np.testing.assert_allclose(after, moved(w, u, 0.1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_norms_do_not_drift(dtype):
    """A bfloat16 matrix is rounded in every step, but always from the same sphere."""
    w = normal(0, (16, 16), dtype)
    tx = soap_optax.hyperball(0.1)
    state, params = tx.init(w), w
    step = jax.jit(tx.update)
    for seed in range(300):
        updates, state = step(normal(seed, w.shape, dtype), state, params)
        assert updates.dtype == dtype
        params = optax.apply_updates(params, updates)
    norms = [np.linalg.norm(np.float32(x)) for x in (w, params)]
    np.testing.assert_allclose(*norms, rtol=1e-5 if dtype == jnp.float32 else 5e-3)
    assert not np.allclose(np.float32(w), np.float32(params), atol=0.5)


def test_other_parameters_have_decay_and_rates_as_usual():
    params = {"w": normal(0, (4, 4)), "b": normal(1, (4,)), "embed": normal(2, (6, 4))}
    updates = jax.tree.map(lambda p: p + 1, params)
    tx = soap_optax.hyperball(
        0.1,
        adam_learning_rate=0.01,
        adam_weight_decay=0.5,
        dimension_numbers=soap_optax.matrices(exclude="embed"),
    )
    after, _ = run(tx, params, updates)
    for name in ("b", "embed"):
        expected = params[name] - 0.01 * (updates[name] + 0.5 * params[name])
        np.testing.assert_allclose(after[name], expected, rtol=1e-6)
    expected = moved(params["w"], updates["w"], 0.1)
    np.testing.assert_allclose(after["w"], expected, rtol=1e-5, atol=1e-6)


def test_the_rate_of_others_is_that_of_matrices_by_default():
    after, _ = run(soap_optax.hyperball(0.1), jnp.ones(3), jnp.ones(3))
    np.testing.assert_allclose(after, 0.9, rtol=1e-6)


def test_a_matrix_that_starts_at_zero_is_updated_like_the_others():
    w = normal(0, (2, 3, 4)).at[1].set(0)
    u = normal(1, w.shape)
    tx = soap_optax.hyperball(
        0.1, adam_learning_rate=0.01, dimension_numbers=soap_optax.matrices()
    )
    after, _ = run(tx, w, u, steps=2)
    np.testing.assert_allclose(after[1], -0.02 * u[1], rtol=1e-6)
    twice = moved(moved(w[0], u[0], 0.1), u[0], 0.1)
    np.testing.assert_allclose(after[0], twice, rtol=1e-5, atol=1e-6)


def test_a_zero_update_leaves_the_matrix_as_it_is():
    w = normal(0, (5, 7))
    after, _ = run(soap_optax.hyperball(0.1), w, jnp.zeros_like(w), steps=3)
    np.testing.assert_array_equal(after, w)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_is_not_hidden(bad):
    w = normal(0, (2, 3, 4))
    u = normal(1, w.shape).at[0, 1, 1].set(bad)
    tx = soap_optax.hyperball(0.1, dimension_numbers=soap_optax.matrices())
    after, _ = run(tx, w, u)
    assert not np.any(np.isfinite(after[0]))
    np.testing.assert_allclose(after[1], moved(w[1], u[1], 0.1), rtol=1e-5, atol=1e-6)
    safe = optax.apply_if_finite(tx, 3)
    after, _ = run(safe, w, u)
    np.testing.assert_array_equal(after, w)


def test_both_rates_can_be_schedules_or_injected():
    params = {"w": normal(0, (4, 4)), "b": normal(1, (4,))}
    updates = jax.tree.map(jnp.ones_like, params)
    schedules = [optax.linear_schedule(peak, 0.0, 10) for peak in (0.1, 0.01)]
    tx = soap_optax.hyperball(schedules[0], adam_learning_rate=schedules[1])
    after, state = run(tx, params, updates, steps=3)
    assert state.count == 3
    injected = optax.inject_hyperparams(
        soap_optax.hyperball, static_args=("dimension_numbers",)
    )(schedules[0], adam_learning_rate=schedules[1])
    again, _ = run(injected, params, updates, steps=3)
    expected = np.float64(params["w"])
    for count in range(3):
        expected = moved(expected, updates["w"], float(schedules[0](count)))
    for found in (after, again):
        np.testing.assert_allclose(found["w"], expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found["b"], params["b"] - 0.027, rtol=1e-5)


def test_an_optimizer_of_nnx_keeps_norms():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    tx = optax.chain(soap_optax.scale_by_soap(), soap_optax.hyperball(0.1))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    norm = np.linalg.norm(model.kernel[...])
    loss = lambda m: jnp.sum(m(jnp.ones((2, 3))) ** 2)  # noqa: E731
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
    np.testing.assert_allclose(np.linalg.norm(model.kernel[...]), norm, rtol=1e-5)


def test_members_under_vmap_and_behind_a_mask_move_as_alone():
    members, updates = normal(0, (3, 4, 5)), normal(1, (3, 4, 5))
    one = soap_optax.hyperball(0.1)
    together, _ = jax.vmap(functools.partial(run, one))(members, updates)
    alone = [run(one, *pair)[0] for pair in zip(members, updates, strict=True)]
    np.testing.assert_allclose(together, alone, rtol=1e-6, atol=1e-7)

    params = {"w": members[0], "frozen": members[1]}
    masked = optax.masked(one, {"w": True, "frozen": False})
    after, _ = run(masked, params, {"w": updates[0], "frozen": 0 * updates[0]})
    np.testing.assert_allclose(after["w"], alone[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("w", [jnp.zeros((2, 2)), jnp.eye(2)])
@pytest.mark.parametrize("u", [jnp.zeros((2, 2)), jnp.ones((2, 2))])
def test_a_step_has_finite_derivatives(w, u):
    def after(w, u, rate):
        return jnp.sum(run(soap_optax.hyperball(rate), w, u)[0] ** 3)

    slopes = jax.grad(after, argnums=(0, 1, 2))(w, u, 0.1)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_mesh_sums_three_numbers_for_each_matrix(kind):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(kind,) * 2)
    params = {"w": normal(0, (3, 8, 4)), "embed": normal(1, (8, 4))}
    updates = jax.tree.map(lambda p: p + 1, params)
    numbers = soap_optax.matrices(exclude="embed")
    tx = soap_optax.hyperball(0.1, dimension_numbers=numbers)
    expected, _ = run(tx, params, updates)
    specs = {"w": jax.P(None, "x", "y"), "embed": jax.P("x", "y")}
    shardings = {name: jax.NamedSharding(mesh, spec) for name, spec in specs.items()}
    placed, updates = jax.device_put((params, updates), (shardings, shardings))
    state = soap_optax.state_sharding(tx, params, shardings)
    with jax.set_mesh(mesh):
        init = jax.jit(tx.init, out_shardings=state)
        update = jax.jit(tx.update, out_shardings=(shardings, state))
        program = update.lower(updates, init(placed), placed).compile()
        found, _ = program(updates, init(placed), placed)
    for name, sharding in shardings.items():
        assert found[name].sharding.is_equivalent_to(sharding, params[name].ndim)
        after = params[name] + found[name]
        np.testing.assert_allclose(after, expected[name], rtol=1e-5, atol=1e-6)
    of_mesh = r"= (.*) (all-\w+|reduce-scatter|collective-\w+)(?:-start)?\("
    found = re.findall(of_mesh, program.as_text())
    assert len(found) == 2  # one for each axis of the mesh
    for result, kind in found:
        assert kind == "all-reduce"
        assert re.findall(r"f32\[([\d,]*)\]", result) == ["3"] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"learning_rate": "fast"}, "learning_rate must be a finite number"),
        ({"adam_learning_rate": np.nan}, "adam_learning_rate must be a finite number"),
        ({"adam_weight_decay": -1}, "adam_weight_decay must be a finite number, at"),
        ({"dimension_numbers": 3}, "dimension_numbers must be"),
    ],
)
def test_bad_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        soap_optax.hyperball(**{"learning_rate": 0.1, **options})


def test_an_update_that_does_not_fit_is_named():
    tx = soap_optax.hyperball(0.1)
    w = jnp.ones((3, 4))
    state = tx.init({"w": w})
    with pytest.raises(ValueError, match="params must be given"):
        tx.update({"w": w}, state)
    with pytest.raises(ValueError, match=r"\['v'\] must have the shape and the dim"):
        tx.update({"v": w}, state, {"v": w})
    with pytest.raises(ValueError, match="must have every parameter for which init"):
        tx.update({}, state, {})
    with pytest.raises(ValueError, match="must have the shape of its parameter"):
        tx.update({"w": w.T}, state, {"w": w})
