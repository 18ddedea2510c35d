"""The experiment on complex parameters; what it finds is in docs/results.md."""

import complex_parameters
import jax
import jax.numpy as jnp
import numpy as np
import training

import soap_optax


def test_the_complex_prototype_is_published_soap_on_real_matrices():
    """Up to the second refresh, where the library returns columns to their places."""
    params = {"w": jnp.zeros((4, 3)), "b": jnp.zeros(3)}
    theirs = soap_optax.scale_by_soap(
        refresh="eigh", clip_update_rms=None, rcond=0.0, precond_dtype=jnp.float64
    )
    mine = complex_parameters.complex_soap()
    states = [tx.init(params) for tx in (mine, theirs)]
    for step in range(10):
        grads = {
            "w": training.normal(4, 3, seed=step),
            "b": training.normal(3, seed=step),
        }
        found, states[0] = jax.jit(mine.update)(grads, states[0], params)
        expected, states[1] = jax.jit(theirs.update)(grads, states[1], params)
        for name in params:
            np.testing.assert_allclose(found[name], expected[name], atol=1e-6)


def test_a_phase_of_the_gradient_is_that_of_the_update():
    tx = complex_parameters.complex_soap()
    params = jnp.zeros((4, 3), jnp.complex128)
    phase = np.exp(0.7j)
    turned, plain = tx.init(params), tx.init(params)
    for step in range(13):
        gradient = training.normal(4, 3, seed=step) * np.exp(1j * step)
        update, plain = jax.jit(tx.update)(gradient, plain, params)
        other, turned = jax.jit(tx.update)(phase * gradient, turned, params)
        np.testing.assert_allclose(other, phase * update, atol=1e-6)
    assert np.abs(update).max() > 0.1


def test_fields_satisfy_burgers_equation():
    """The mean stays, and the energy falls by the viscosity alone."""
    start, end = complex_parameters.fields()
    np.testing.assert_allclose(start.mean(axis=1), end.mean(axis=1), atol=1e-12)
    assert np.all(np.linalg.norm(end, axis=1) < np.linalg.norm(start, axis=1))
    assert np.isfinite(end).all() and 0.1 < end.std() < start.std()


def test_a_training_lowers_the_error(monkeypatch):
    monkeypatch.setattr(complex_parameters, "STEPS", 20)
    with jax.numpy_rank_promotion("allow"):
        job = complex_parameters.Job("SOAP, split", 1e-2, 0)
        (row,) = complex_parameters.train(job)
        start, end = (jnp.asarray(x, jnp.float32) for x in complex_parameters.fields())
        first = complex_parameters.first_params(jax.random.key(0))
        before = complex_parameters.relative_error(first, start, end)
    assert row["error"] < 0.7 * before
