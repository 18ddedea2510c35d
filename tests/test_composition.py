"""SOAP among optax's other parts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_optax

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(64, 6)), jnp.float32)
TARGETS = jnp.tanh(INPUTS @ jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32))


def initial():
    rng = np.random.default_rng(1)
    normal = lambda *shape: jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)  # noqa: E731
    return {"in": normal(6, 16), "bias": jnp.zeros(16), "out": normal(16, 3)}


def loss_fn(params):
    hidden = jnp.tanh(INPUTS @ params["in"] + params["bias"][None])
    return jnp.mean((hidden @ params["out"] - TARGETS) ** 2)


def train(tx, steps=60, evaluate=lambda state, params: params):
    params = initial()
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    for _ in range(steps):
        params, state, _ = step(params, state)
    return loss_fn(evaluate(state, params)) / loss_fn(initial()), state


SOAP = {"b1": 0.9, "precondition_frequency": 5}
SCHEDULE = optax.warmup_cosine_decay_schedule(0.0, 0.02, 10, 60)


@pytest.mark.parametrize(
    "tx",
    [
        optax.chain(
            optax.clip_by_global_norm(1.0),
            soap_optax.scale_by_soap(**SOAP),
            optax.add_decayed_weights(1e-4),
            optax.scale_by_learning_rate(SCHEDULE),
        ),
        optax.chain(optax.clip_by_global_norm(1.0), soap_optax.soap(SCHEDULE, **SOAP)),
        optax.chain(  # A mask hands the other gradients through as they are.
            optax.masked(
                soap_optax.soap(0.02, **SOAP), {"in": True, "bias": False, "out": True}
            ),
            optax.masked(optax.sgd(0.02), {"in": False, "bias": True, "out": False}),
        ),
        optax.partition(
            {"soap": soap_optax.soap(0.02, **SOAP), "adam": optax.adam(0.02)},
            {"in": "soap", "bias": "adam", "out": "soap"},
        ),
        optax.apply_if_finite(soap_optax.soap(0.02, **SOAP), max_consecutive_errors=3),
        optax.MultiSteps(soap_optax.soap(0.02, **SOAP), every_k_schedule=1),
        optax.chain(optax.zero_nans(), soap_optax.soap(0.02, **SOAP)),
        soap_optax.in_eigenbasis(
            optax.chain(optax.scale_by_adam(), optax.scale(-0.02)),
            precondition_frequency=5,
        ),
    ],
    ids=[
        "chain",
        "clip_and_soap",
        "masked",
        "partition",
        "apply_if_finite",
        "multi_steps",
        "zero_nans",
        "inner",
    ],
)
def test_trains(tx):
    ratio, _ = train(tx)
    assert ratio < 0.3


def test_schedule_free():
    tx = optax.contrib.schedule_free(
        soap_optax.soap(0.05, b1=0.0, precondition_frequency=5), 0.05, b1=0.9
    )
    ratio, _ = train(tx, evaluate=optax.contrib.schedule_free_eval_params)
    assert ratio < 0.3


def test_lookahead():
    tx = optax.lookahead(
        soap_optax.soap(0.05, **SOAP), sync_period=5, slow_step_size=0.5
    )
    params = optax.LookaheadParams.init_synced(initial())
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss_fn)(params.fast)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(60):
        params, state = step(params, state)
    assert loss_fn(params.slow) < 0.3 * loss_fn(initial())


def test_masked_parameters_have_no_state():
    mask = {"in": True, "bias": False, "out": False}
    _, state = train(optax.masked(soap_optax.soap(0.02), mask), steps=2)
    assert set(state.inner_state[0].factors) == {"in"}


def test_dimension_numbers_of_masked_parameters():
    """A tree for all parameters serves where some are masked."""
    numbers = {
        "in": optax.contrib.MuonDimensionNumbers(),
        "bias": None,
        "out": soap_optax.DimensionNumbers((0,)),
    }
    soap = soap_optax.soap(0.02, dimension_numbers=numbers, **SOAP)
    mask = {"in": False, "bias": True, "out": True}
    _, state = train(optax.masked(soap, mask), steps=2)
    shapes = jax.tree.map(jnp.shape, state.inner_state[0].factors)
    assert shapes == {"bias": (None,), "out": ((3, 16, 16),)}


@pytest.mark.parametrize("boxed", [False, True])
def test_dimension_numbers_as_a_prefix(boxed):
    """One entry for a whole layer, or for a parameter in a box, as Muon takes it."""
    muon = optax.contrib.MuonDimensionNumbers(1, 2)
    box = (lambda x: nn.Partitioned(x, (None,) * x.ndim)) if boxed else (lambda x: x)
    layer = {"q": box(jnp.ones((5, 4, 3))), "k": box(jnp.ones((5, 3, 2)))}
    params = {"layer": layer, "rest": {"w": box(jnp.ones((4, 3)))}}
    numbers = {"layer": muon, "rest": {"w": None}}
    tx = soap_optax.scale_by_soap(dimension_numbers=numbers)
    _, state = tx.update(params, tx.init(params))
    assert jax.tree.map(jnp.shape, state.factors) == {
        "layer": {"q": ((5, 4, 4), (5, 3, 3)), "k": ((5, 3, 3), (5, 2, 2))},
        "rest": {"w": (None, None)},
    }


def test_partition_with_muon_dimension_numbers():
    """One configuration for both optimizers."""

    def numbers(params):
        return jax.tree.map(
            lambda p: optax.contrib.MuonDimensionNumbers() if p.ndim == 2 else None,
            params,
        )

    muon = optax.contrib.muon(0.02, muon_weight_dimension_numbers=numbers)
    muon_ratio, _ = train(muon)
    ratio, _ = train(soap_optax.soap(0.02, dimension_numbers=numbers, **SOAP))
    assert ratio < 0.3 and muon_ratio < 0.3


def test_apply_if_finite_skips_as_if_never_seen():
    tx = optax.apply_if_finite(soap_optax.soap(0.02, **SOAP), max_consecutive_errors=3)
    params = initial()
    grads = jax.grad(loss_fn)(params)
    bad = jax.tree.map(lambda g: g.at[..., 0].set(jnp.nan), grads)
    _, state = jax.jit(tx.update)(grads, tx.init(params), params)
    updates, after = jax.jit(tx.update)(bad, state, params)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)


@pytest.mark.parametrize("max_precond_dim", [0, 100])
def test_first_moments_of_another_shape(max_precond_dim):
    """They are not of the parameter's coordinates, and stay."""

    def init(params):
        rows = jax.tree.map(lambda p: jnp.zeros(p.shape[0], p.dtype), params)
        return optax.TraceState(trace=rows)

    def update(updates, state, params=None):
        rows = jax.tree.map(lambda g, t: g.mean(axis=1) + t, updates, state.trace)
        return updates, optax.TraceState(trace=rows)

    tx = soap_optax.in_eigenbasis(
        optax.GradientTransformation(init, update),
        max_precond_dim=max_precond_dim,
        coordinatewise=("trace",),
    )
    params = {"w": jnp.ones((4, 3))}
    state = tx.init(params)
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state)
    assert state.inner_state.trace["w"].shape == (4,)
