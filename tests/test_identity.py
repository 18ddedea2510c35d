"""Without factors the wrapper is the inner transformation, bit for bit."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_optax

INNERS = {
    "adam": lambda: optax.scale_by_adam(0.9, 0.99),
    "nadam": lambda: optax.scale_by_adam(0.9, 0.99, nesterov=True),
    "amsgrad": lambda: optax.scale_by_amsgrad(),
    "lion": lambda: optax.scale_by_lion(),
    "rms": lambda: optax.scale_by_rms(),
    "factored_rms": lambda: optax.scale_by_factored_rms(min_dim_size_to_factor=2),
    "momentum": lambda: optax.trace(0.9),
    "adamw": lambda: optax.adamw(1e-2),
    "chain": lambda: optax.chain(optax.trace(0.9), optax.scale_by_rms()),
}


def params():
    return {"w": jnp.ones((4, 3)), "b": jnp.ones(3), "t": jnp.ones((2, 3, 2))}


def gradients(steps=6, dtype=None):
    rng = np.random.default_rng(0)
    return [
        jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), params())
        for _ in range(steps)
    ]


def run(tx, grads, *, jit):
    x = params()
    x = jax.tree.map(lambda p, g: p.astype(g.dtype), x, grads[0])
    state = tx.init(x)
    update = jax.jit(tx.update) if jit else tx.update
    trace = []
    for grad in grads:
        updates, state = update(grad, state, x)
        x = optax.apply_updates(x, updates)
        trace.append(x)
    return trace


def assert_equal(actual, expected):
    assert len(actual) == len(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("jit", [*cases.slow(False), True])
@pytest.mark.parametrize("dtype", ["float32", *cases.slow("float64")])
@pytest.mark.parametrize("name", INNERS)
def test_in_eigenbasis(name, dtype, jit):
    inner = INNERS[name]()
    grads = gradients(dtype=dtype)
    wrapped = soap_optax.in_eigenbasis(inner, max_precond_dim=0, basis="current")
    assert_equal(run(wrapped, grads, jit=jit), run(inner, grads, jit=jit))


@pytest.mark.parametrize(
    ("name", "jit"),
    [*((name, False) for name in INNERS), ("adam", True), ("lion", True)],
)
def test_in_eigenbasis_one_step_later(name, jit):
    """In the published order the inner transformation never sees the first gradient.

    Skipping it is one more operation, with which XLA may fuse, and round, others anew.
    """
    inner = INNERS[name]()
    grads = gradients(dtype="float32")
    wrapped = soap_optax.in_eigenbasis(inner, max_precond_dim=0)
    trace = run(wrapped, grads, jit=jit)
    jax.tree.map(lambda p: np.testing.assert_array_equal(p, 1), trace[0])
    assert_equal(trace[1:], run(inner, grads[1:], jit=jit))


@pytest.mark.parametrize("jit", [False, True])
def test_soap_is_adamw(jit):
    schedule = optax.linear_schedule(1e-2, 1e-3, 5)
    options = {"weight_decay": 0.1, "mask": {"w": True, "b": False, "t": True}}
    soap = soap_optax.soap(
        schedule, 0.9, 0.99, 1e-6, **options, max_precond_dim=0, basis="current"
    )
    adamw = optax.adamw(schedule, 0.9, 0.99, 1e-6, **options)
    grads = gradients(dtype="float32")
    assert_equal(run(soap, grads, jit=jit), run(adamw, grads, jit=jit))


@pytest.mark.parametrize("name", ["soap", "factorized", "shampoo"])
@pytest.mark.parametrize("eps_root", [0.0, 1e-3])
def test_nesterov_and_eps_root_are_those_of_adamw(name, eps_root):
    options = {"eps_root": eps_root, "weight_decay": 0.1, "nesterov": True}
    makes = {
        "soap": functools.partial(soap_optax.soap, eps=1e-6, basis="current"),
        "factorized": functools.partial(
            soap_optax.soap, eps=1e-6, basis="current", factorized=True
        ),
        "shampoo": functools.partial(soap_optax.shampoo, adam_eps=1e-6),
    }
    tx = makes[name](1e-2, 0.9, 0.99, max_precond_dim=0, **options)
    adamw = optax.adamw(1e-2, 0.9, 0.99, eps=1e-6, **options)
    grads = gradients(dtype="float32")
    actual, expected = run(tx, grads, jit=False), run(adamw, grads, jit=False)
    if name == "factorized":  # whose second moment passes through its root
        close = functools.partial(np.testing.assert_allclose, rtol=1e-5)
        jax.tree.map(close, actual, expected)
    else:
        assert_equal(actual, expected)


def test_mu_dtype_is_that_of_optax():
    grads = gradients(dtype="float32")
    soap = soap_optax.soap(
        1e-2, 0.9, 0.99, max_precond_dim=0, basis="current", mu_dtype=jnp.bfloat16
    )
    adam = optax.adamw(1e-2, 0.9, 0.99, weight_decay=0, mu_dtype=jnp.bfloat16)
    assert_equal(run(soap, grads, jit=False), run(adam, grads, jit=False))


@pytest.mark.parametrize("name", INNERS)
def test_every_inner_transformation_takes_rotations_along(name):
    """Inner transformations train in an eigenbasis, momentum follows its refreshes."""
    rng = np.random.default_rng(1)
    hidden = jnp.asarray(rng.normal(size=(6, 4)) * np.logspace(0, -1, 4)[None, :])
    inputs = jnp.asarray(rng.normal(size=(32, 6)) * np.logspace(0, -1, 6)[None, :])

    def loss(w):
        return jnp.mean((inputs @ (w - hidden)) ** 2)

    descend = optax.scale(1.0 if name == "adamw" else -1e-2)
    tx = optax.chain(
        soap_optax.in_eigenbasis(INNERS[name](), precondition_frequency=3), descend
    )
    w = jnp.zeros((6, 4))
    state = tx.init(w)

    @jax.jit
    def step(w, state):
        updates, state = tx.update(jax.grad(loss)(w), state, w)
        return optax.apply_updates(w, updates), state

    for _ in range(200):
        w, state = step(w, state)
    assert loss(w) < 0.2 * loss(jnp.zeros((6, 4)))


def test_momentum_does_not_notice_the_eigenbasis():
    """Momentum is linear, so that rotations cancel if a refresh carries it along."""
    grads = gradients(steps=12)
    inner = optax.trace(0.9)
    wrapped = soap_optax.in_eigenbasis(inner, basis="current", precondition_frequency=3)
    actual, expected = run(wrapped, grads, jit=True), run(inner, grads, jit=True)
    jax.tree.map(
        lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9), actual, expected
    )


def test_weight_decay_inside_decays_the_parameters():
    """Parameters reach the inner transformation in the coordinates of the updates."""
    tx = soap_optax.in_eigenbasis(optax.add_decayed_weights(0.1), basis="current")
    x, zero = jnp.arange(12.0).reshape(4, 3), jnp.zeros((4, 3))
    rng = np.random.default_rng(0)
    _, state = tx.update(jnp.asarray(rng.normal(size=(4, 3))), tx.init(x), x)
    updates, _ = tx.update(zero, state, x)
    # The gradient spans 3 of the 4 dimensions of the columns' space.
    basis, keep = state.eigenbases[0], state.eigenvalues[0] > 1e-9
    span = basis[:, keep] @ basis[:, keep].T
    np.testing.assert_allclose(updates, 0.1 * span @ x, atol=1e-9)
