"""Exact resume and determinism, for every combination of options."""

import functools
import itertools

import cases
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import soap_optax

OPTIONS = {
    "basis": ("previous", "current"),
    "refresh": ("qr", "eigh"),
    "initial_basis": ("eigh", "identity"),
    "one_sided": (False, True),
    "merge_dims": (False, True),
    "precondition_1d": (False, True),
    "block_size": (None, 2),
    "mu_dtype": (None, jnp.bfloat16),
    "precond_dtype": (None, jnp.bfloat16),
}
DEFAULTS = {name: values[0] for name, values in OPTIONS.items()}
OTHERS = {name: values[1] for name, values in OPTIONS.items()}
EVERY = [
    dict(zip(OPTIONS, values, strict=True))
    for values in itertools.product(*OPTIONS.values())
]
FEW = [DEFAULTS, OTHERS, {**DEFAULTS, "block_size": 2, "mu_dtype": jnp.bfloat16}]
CASES = cases.some(EVERY, FEW)

PARAMS = {
    "w": jnp.ones((4, 6), jnp.float32),
    "t": jnp.ones((2, 3, 4), jnp.float32),
    "v": [jnp.ones(4, jnp.float32), jnp.ones((), jnp.float32)],
}
STEPS, SAVED = 7, 4


def grads(seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: jnp.asarray(rng.normal(size=p.shape), p.dtype), PARAMS
    )


def step_of(tx, **jit_options):
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step, **jit_options)


def run(step, params, state, steps):
    for i in steps:
        params, state = step(params, state, grads(i))
    return params, state


def assert_equal(some, other):
    assert jax.tree.structure(some) == jax.tree.structure(other)
    jax.tree.map(np.testing.assert_array_equal, some, other)


def through_orbax(tree, folder):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", tree)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
        return checkpointer.restore(folder / "state", target)


def through_flax(tree, tx):
    saved = flax.serialization.to_bytes(tree)
    return flax.serialization.from_bytes((PARAMS, tx.init(PARAMS)), saved)


@pytest.mark.parametrize("options", CASES)
def test_resume(options, tmp_path):
    """Saved and restored in the middle: bitwise as if never stopped."""
    tx = soap_optax.soap(0.01, weight_decay=0.1, precondition_frequency=2, **options)
    step = step_of(tx)
    middle = run(step, PARAMS, tx.init(PARAMS), range(SAVED))
    expected = run(step, *middle, range(SAVED, STEPS))
    for restored in (through_flax(middle, tx), through_orbax(middle, tmp_path)):
        assert_equal(restored, middle)
        assert_equal(run(step, *restored, range(SAVED, STEPS)), expected)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(expected))


@pytest.mark.parametrize(
    "tx",
    [
        soap_optax.soap(0.01, precondition_frequency=lambda count: 1 + count // 3),
        soap_optax.soap(optax.cosine_decay_schedule(0.01, 10), rcond=0),
        soap_optax.soap(0.01, clip_update_rms=None, max_precond_dim=4),
        soap_optax.in_eigenbasis(optax.scale_by_lion()),
        soap_optax.in_eigenbasis(optax.scale_by_factored_rms()),
        optax.apply_if_finite(soap_optax.soap(0.01), 3),
        optax.MultiSteps(soap_optax.soap(0.01), 2),
        optax.inject_hyperparams(soap_optax.soap)(0.01),
        optax.masked(
            soap_optax.soap(0.01), {"w": True, "t": False, "v": [False, True]}
        ),
    ],
    ids=range(9),
)
@pytest.mark.slow
def test_resume_of_others(tx, tmp_path):
    step = step_of(tx)
    middle = run(step, PARAMS, tx.init(PARAMS), range(SAVED))
    expected = run(step, *middle, range(SAVED, STEPS))
    for restored in (through_flax(middle, tx), through_orbax(middle, tmp_path)):
        assert_equal(run(step, *restored, range(SAVED, STEPS)), expected)


@pytest.mark.parametrize("options", cases.some(FEW, FEW[:1]))
def test_deterministic(options):
    """The same program gives the same bits twice."""
    tx = soap_optax.scale_by_soap(precondition_frequency=2, **options)
    runs = [run(step_of(tx), PARAMS, tx.init(PARAMS), range(STEPS)) for _ in range(2)]
    assert_equal(*runs)


@pytest.mark.parametrize("basis", ["previous", "current"])
def test_eager_and_jit_agree(basis):
    params = {"w": jnp.ones((4, 4)), "v": jnp.ones(4)}  # in float64
    tx = soap_optax.scale_by_soap(precondition_frequency=2, basis=basis)
    state, jitted = tx.init(params), tx.init(params)
    for i in range(5):
        rng = np.random.default_rng(i)
        updates = jax.tree.map(lambda p, rng=rng: rng.normal(size=p.shape), params)
        eager, state = tx.update(updates, state)
        expected, jitted = jax.jit(tx.update)(updates, jitted)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), eager, expected
        )


@pytest.mark.parametrize("options", cases.some(FEW, FEW[:1]))
def test_donated_buffers(options):
    """Donation changes nothing, and without it the inputs stay as they are."""
    tx = soap_optax.scale_by_soap(precondition_frequency=2, **options)
    start = PARAMS, tx.init(PARAMS)
    copies = jax.tree.map(np.array, start)
    expected = run(step_of(tx), *start, range(STEPS))
    assert_equal(jax.tree.map(np.array, start), copies)
    params, state = jax.tree.map(jnp.array, start)
    donated = run(step_of(tx, donate_argnums=(0, 1)), params, state, range(STEPS))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((params, state)))
    # Another program, in which XLA may round otherwise.
    close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)
    jax.tree.map(close, donated, expected)


def test_a_fresh_state_can_be_donated():
    """No buffer stands in it twice."""
    tx = soap_optax.scale_by_soap(block_size=2)
    step = step_of(tx, donate_argnums=1)
    run(step, PARAMS, tx.init(PARAMS), range(2))
