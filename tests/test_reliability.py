"""Nothing poisons the state: round-off, overflow, gradients that are not finite."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference

import soap_optax

SHAPE = (16, 12)
STEPS = 60


def normal(seed, *shape):
    gradient = np.random.default_rng(seed).normal(size=shape or SHAPE)
    return gradient.astype(np.float32)


def with_one(value):
    gradients = [normal(i) for i in range(STEPS)]
    gradients[20] = np.full(SHAPE, value, np.float32)
    return gradients


BAD = {
    "nan": with_one(np.nan),
    "inf": with_one(-np.inf),
    "overflow": with_one(1e30),
    "underflow": [normal(i) * np.float32(1e-42) for i in range(STEPS)],
    "zero": [np.zeros(SHAPE, np.float32)] * STEPS,
    "alternating": [
        normal(i) * np.float32(10.0 ** (20 * (i % 2) - 10)) for i in range(STEPS)
    ],
    "rank one": [normal(0, 16, 1) @ normal(1, 1, 12)] * STEPS,
    "nan first": [normal(0) * np.nan, *(normal(i) for i in range(1, STEPS))],
}


def run(tx, gradients):
    state = tx.init(jnp.zeros(gradients[0].shape, jnp.float32))
    update = jax.jit(tx.update)
    updates = []
    for gradient in gradients:
        step, state = update(jnp.asarray(gradient), state)
        updates.append(np.asarray(step))
    return updates, state


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("options", [{}, {"basis": "current", "refresh": "eigh"}])
def test_factors_and_eigenbases_survive(name, options):
    tx = soap_optax.scale_by_soap(precondition_frequency=5, **options)
    updates, state = run(tx, BAD[name])
    kept = (state.factors, state.eigenbases, state.eigenvalues)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    for basis in state.eigenbases:
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=3e-5)
    finite = [u for u in updates if np.isfinite(u).all()]
    assert max(np.sqrt(np.mean(u**2)) for u in finite or [np.zeros(1)]) <= 10


@pytest.mark.parametrize("name", ["overflow", "alternating"])
def test_training_goes_on(name):
    updates, _ = run(soap_optax.scale_by_soap(), BAD[name])
    assert np.isfinite(updates).all() and np.abs(updates[-1]).max() > 1e-3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_not_hidden(value):
    updates, state = run(soap_optax.scale_by_soap(), with_one(value))
    assert np.isfinite(updates[:20]).all()
    assert not np.isfinite(updates[20]).any()
    assert not np.isfinite(state.inner_state.mu).any()  # as in optax.adam


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("basis", ["previous", "current"])
def test_apply_if_finite_skips_the_step(value, basis):
    """At a step that refreshes; the run goes on as if it had never been."""
    soap = soap_optax.scale_by_soap(precondition_frequency=5, basis=basis)
    gradients = with_one(value)
    updates, state = run(optax.apply_if_finite(soap, 3), gradients)
    del gradients[20]
    expected, expected_state = run(soap, gradients)
    np.testing.assert_array_equal(updates[20], 0)
    np.testing.assert_array_equal(updates[:20] + updates[21:], expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, expected_state)


def test_zero_nans_before():
    tx = optax.chain(optax.zero_nans(), soap_optax.scale_by_soap())
    updates, _ = run(tx, with_one(np.nan))
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("scale", [1, 1e-3, 1e-5])
@pytest.mark.parametrize(("size", "rank"), [(64, 4), (256, 16)])
def test_no_steps_into_the_null_space(size, rank, scale):
    """In float32; without the mend most of the update is there at scale 1."""
    rng = np.random.default_rng(0)
    left, right = rng.normal(size=(size, rank)), rng.normal(size=(rank, size))
    span = np.linalg.qr(left)[0]

    def null_share(update):
        update = update.astype(np.float64)
        return np.linalg.norm(update - span @ (span.T @ update)) / np.linalg.norm(
            update
        )

    gradients = [left @ rng.normal(size=(rank, rank)) @ right for _ in range(40)]
    gradients = [(g * scale / np.sqrt(np.mean(g**2))).astype("f4") for g in gradients]
    updates, _ = run(soap_optax.scale_by_soap(), gradients)
    assert np.median([null_share(u) for u in updates[1:]]) <= 0.01
    if scale == 1:
        published, _ = run(soap_optax.scale_by_soap(rcond=0), gradients)
        assert np.median([null_share(u) for u in published[1:]]) > 0.8


def test_rows_with_small_gradients_are_not_held_back():
    """In float32, a row with gradients 1000 times smaller trains as in float64."""
    scales = np.logspace(0, -3, 8)[:, None]
    gradients = [normal(i, 8, 8) * scales.astype(np.float32) for i in range(STEPS)]
    expected = sum(reference.run(np.stack(gradients).astype(np.float64)))
    actual = sum(run(soap_optax.scale_by_soap(), gradients)[0])
    error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.1


@pytest.mark.parametrize("rcond", [0.0, 1e-25])
def test_tiny_rcond(rcond):
    gradients = [np.array([[1 + i / 10, 0.3], [0, 1e-12]], "f4") for i in range(8)]
    tx = soap_optax.scale_by_soap(rcond=rcond, precondition_frequency=1)
    assert np.isfinite(run(tx, gradients)[0]).all()


def test_float16_factors_that_would_overflow():
    gradients = [600 * normal(0), 600 * normal(1), *(normal(i) for i in range(2, 14))]
    tx = soap_optax.scale_by_soap(precond_dtype=jnp.float16)
    updates, state = run(tx, gradients)
    assert all(np.isfinite(f).all() for f in state.factors)
    assert np.isfinite(updates).all() and np.any(updates[-1])


def test_eager_and_jit_agree_on_singular_factors():
    """The first null space keeps its basis, in place of one that round-off chooses."""
    gradients = [normal(i, 12, 3) for i in range(12)]
    tx = soap_optax.scale_by_soap()
    updates, _ = run(tx, gradients)
    state = tx.init(jnp.zeros((12, 3), jnp.float32))
    for gradient, expected in zip(gradients, updates, strict=True):
        step, state = tx.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(step, expected, atol=1e-3)
