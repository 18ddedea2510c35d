"""Uses of optimizers by other programs, each with the public report that tells of it.

Each report says that some optimizer was broken, slow or surprising in such a use. The
test replays the use with this library and asserts the right value.
"""

import functools
import logging
import pickle
import re
from pathlib import Path
from typing import Any, NamedTuple

import cases
import equinox as eqx
import flax.core
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import reference
from flax import nnx
from flax.training.dynamic_scale import DynamicScale

import soap_optax
from soap_optax import DimensionNumbers

MAKES = {
    "soap": functools.partial(soap_optax.soap, 0.1, precondition_frequency=2),
    "shampoo": functools.partial(soap_optax.shampoo, 0.1, precondition_frequency=2),
    "lion": functools.partial(
        soap_optax.in_eigenbasis, optax.scale_by_lion(), precondition_frequency=2
    ),
}
PAGE = Path(__file__).parents[1] / "docs" / "reliability.md"


def of(address):
    """Gives a test the address of the public report that tells of the use."""

    def with_report(test):
        test.report = f"https://github.com/{address}"
        return test

    return with_report


@functools.cache
def make_tx(name, **options):
    """Makes the same optimizer each time, so that its step is compiled once."""
    return MAKES[name](**options)


def of_makes(*names):
    """Runs a test with several optimizers; all but SOAP are for make test-slow."""
    makes = {name: functools.partial(make_tx, name) for name in names}
    return pytest.mark.parametrize("make", cases.named(makes, names[0]))


soap, both, every = of_makes("soap"), of_makes("soap", "shampoo"), of_makes(*MAKES)


def normal(*shape, seed=0, dtype=np.float64):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def normal_like(tree, seed, dtype=np.float64):
    leaves, treedef = jax.tree.flatten(tree)
    keys = range(1000 * seed, 1000 * seed + len(leaves))
    drawn = [
        normal(*np.shape(x), seed=k, dtype=dtype)
        for k, x in zip(keys, leaves, strict=True)
    ]
    return treedef.unflatten(drawn)


def plain_step(tx, params, state, gradient):
    updates, state = tx.update(gradient, state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def step_of(tx):
    return jax.jit(functools.partial(plain_step, tx))


def run(tx, params, gradients, state=None):
    """Takes a step with each gradient; gives the parameters and the state."""
    state = tx.init(params) if state is None else state
    for gradient in gradients:
        params, state = step_of(tx)(params, state, gradient)
    return params, state


def alone(tx, params, gradients):
    """Trains each parameter by itself, as a tree of one array."""
    leaves, treedef = jax.tree.flatten(params)
    of_leaves = zip(*map(jax.tree.leaves, gradients), strict=True)
    pairs = zip(leaves, of_leaves, strict=True)
    return treedef.unflatten(run(tx, leaf, gs)[0] for leaf, gs in pairs)


def gradients_of(params, steps, dtype=np.float64):
    return [normal_like(params, seed, dtype) for seed in range(1, steps + 1)]


def pairs_of(gradients):
    return list(zip(gradients[::2], gradients[1::2], strict=True))


def assert_close(a, b, **tolerances):
    tolerances = tolerances or {"rtol": 1e-9, "atol": 1e-10}
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), a, b)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def types(tree):
    """The shapes, dtypes and weak types of a tree, which `lax.scan` compares."""
    return jax.tree.map(jax.typeof, jax.tree.map(jnp.asarray, tree))


def at(tree, index):
    return jax.tree.map(lambda x: x[index], tree)


# ---------------------------------------------------------------- gradients of zero


@of("pytorch/pytorch/issues/18404")
@both
def test_words_without_a_gradient_stay(make):
    """Rows of an embedding that no batch has ever had do not move."""
    start = normal(32, 8, dtype=np.float32)
    used = jnp.arange(32)[:, None] < 8
    gradients = [g * used for g in gradients_of(start, 12, np.float32)]
    params, _ = run(make(), start, gradients)
    moved = np.abs(params - start).max(axis=1)
    assert moved[8:].max() <= 1e-5 * moved[:8].min()


@of("pytorch/FBGEMM/issues/1545")
def test_rare_words_get_bounded_updates():
    """Each batch has one word of the vocabulary; Adam's bound is 1 for an entry."""
    tx = soap_optax.scale_by_soap()
    rng = np.random.default_rng(1)
    words = rng.integers(100, size=200)
    gradients = np.zeros((200, 100, 8), np.float32)
    gradients[np.arange(200), words] = rng.normal(size=(200, 8))

    def step(state, gradient):
        updates, state = tx.update(gradient, state)
        return state, jnp.abs(updates).max()

    _, largest = jax.lax.scan(step, tx.init(jnp.asarray(gradients[0])), gradients)
    assert 0.1 < largest.max() < 4


@of("lucidrains/mixture-of-experts/issues/7")
@soap
def test_experts_without_tokens(make):
    """One of three experts gets no tokens; the others do not notice it."""
    start = normal(3, 4, 4)
    tx = make(dimension_numbers=DimensionNumbers((1, 2)))
    gradients = [g.at[1].set(0) for g in gradients_of(start, 5)]
    params, _ = run(tx, start, gradients)
    np.testing.assert_array_equal(params[1], start[1])
    for expert in (0, 2):
        expected, _ = run(make(), start[expert], at(gradients, expert))
        assert_close(params[expert], expected)


@of("nanowell/AdEMAMix-Optimizer-Pytorch/pull/3")
def test_shampoo_after_a_zero_gradient():
    """The first gradient of a factor of LoRA is zero, because the other one is."""
    tx = soap_optax.scale_by_shampoo(grafting=None)
    start = jnp.zeros((6, 5), np.float32)
    gradients = [jnp.zeros_like(start), *gradients_of(start, 12, np.float32)]
    state, largest = tx.init(start), []
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state)
        largest.append(np.abs(updates).max())
    assert largest[0] == 0
    assert min(largest[1:]) > 0.01 and max(largest[1:]) < 10


@of("microsoft/LoRA/issues/59")
@soap
def test_lora(make):
    """Both factors of a low-rank update train, also the one that starts at zero."""
    weight, target = normal(8, 8), normal(8, 8, seed=1)
    params = {"A": normal(2, 8, seed=2), "B": jnp.zeros((8, 2))}
    inputs = normal(64, 8, seed=3)

    def loss(params):
        change = inputs @ (weight + params["B"] @ params["A"] - target)
        return jnp.mean(change**2)

    tx = optax.chain(make(), optax.scale(0.1))

    def step(carry, _):
        params, state = carry
        return plain_step(tx, params, state, jax.grad(loss)(params)), None

    (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=200)
    u, s, v = np.linalg.svd(target - weight)
    best = (u[:, :2] * s[:2]) @ v[:2]
    lowest = np.mean((inputs @ (weight + best - target)) ** 2)
    assert loss(trained) < lowest + 0.3 * (loss(params) - lowest)


@of("nikhilvyas/SOAP/issues/14")
@soap
def test_a_factor_never_has_nan(make):
    """A gradient that overflows when it is squared does not end the training."""
    start = normal(4, 4, dtype=np.float32)
    gradients = gradients_of(start, 6, np.float32)
    gradients[2] = gradients[2].at[1, 1].set(jnp.inf)
    gradients[3] = gradients[3] * 1e30
    _, state = run(make(), start, gradients)
    factors = jax.tree.leaves(optax.tree.get(state, "factors"))
    bases = jax.tree.leaves(optax.tree.get(state, "eigenbases"))
    assert all(np.isfinite(factor).all() for factor in factors)
    for basis in bases:
        np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)


@of("deepspeedai/DeepSpeed/pull/7736")
@soap
def test_empty_parameters(make):
    """A parameter without entries disturbs no other parameter."""
    params = {"w": normal(4, 4), "none": jnp.zeros((0, 3)), "nothing": jnp.zeros(0)}
    gradients = gradients_of(params, 4)
    trained, _ = run(make(), params, gradients)
    assert_close(trained["w"], alone(make(), params["w"], [g["w"] for g in gradients]))
    assert trained["none"].shape == (0, 3) and trained["nothing"].shape == (0,)


# ------------------------------------------------------- vmap, scan, grad, no jit


@of("patrick-kidger/equinox/issues/693")
def test_an_ensemble_with_its_own_learning_rates():
    """A model of several members, each with its own rate, trains as they do alone."""
    keys, rates = jax.random.split(jax.random.key(0), 3), [1e-3, 1e-2, 1e-1]
    targets = normal(64, seed=1)
    tx = optax.inject_hyperparams(soap_optax.soap)(1.0, precondition_frequency=2)

    def make_model(key):
        return eqx.nn.MLP(4, "scalar", 4, 1, activation=jnp.tanh, key=key)

    @eqx.filter_grad
    def gradient_of_loss(model, inputs):
        return jnp.mean((jax.vmap(model)(inputs) - targets) ** 2)

    def start(model, rate):
        state = tx.init(eqx.filter(model, eqx.is_inexact_array))
        state.hyperparams["learning_rate"] = rate
        return state

    def step(model, state, inputs):
        params = eqx.filter(model, eqx.is_inexact_array)
        gradient = gradient_of_loss(model, inputs)
        updates, state = tx.update(gradient, state, params)
        return eqx.apply_updates(model, updates), state

    def train(model, rate, start=start, step=step):
        state = start(model, rate)
        for seed in range(6):
            model, state = step(model, state, normal(64, 4, seed=seed))
        return eqx.filter(model, eqx.is_array)

    together = train(
        eqx.filter_vmap(make_model)(keys),
        jnp.asarray(rates),
        eqx.filter_vmap(start),
        eqx.filter_jit(eqx.filter_vmap(step, in_axes=(eqx.if_array(0), 0, None))),
    )
    step = eqx.filter_jit(step)
    for i, (key, rate) in enumerate(zip(keys, rates, strict=True)):
        expected = train(make_model(key), jnp.asarray(rate), step=step)
        assert_close(at(together, i), expected)


@of("jax-ml/jax/issues/8409")
@pytest.mark.parametrize("stagger", [False, True])
def test_members_that_are_due_at_different_steps(stagger):
    """Under `vmap` each member is refreshed when it is due, inside `lax.scan`."""
    tx = soap_optax.soap(0.1, precondition_frequency=3, stagger=stagger)
    params = {"w": normal(4, 4), "v": normal(3)}
    earlier = [run(tx, params, gradients_of(params, count)) for count in (1, 3, 5)]
    later = gradients_of(params, 7)

    def train(params, state):
        def step(carry, gradient):
            return plain_step(tx, *carry, gradient), None

        gradients = jax.tree.map(lambda *x: jnp.stack(x), *later)
        return jax.lax.scan(step, (params, state), gradients)[0]

    stacked = jax.tree.map(lambda *x: jnp.stack(x), *earlier)
    together = jax.jit(jax.vmap(train))(*stacked)
    for i, (params, state) in enumerate(earlier):
        assert_close(at(together, i), run(tx, params, later, state))


@of("Drenderer/klax/pull/111")
@soap
def test_whole_trainings_under_vmap(make):
    """Seeds are trained side by side, with `init` and all steps under `vmap`."""
    tx = make()

    def train(key):
        params = jax.random.normal(key, (4, 4), np.float64)
        state = tx.init(params)

        def step(carry, key):
            params, state = carry
            gradient = params + jax.random.normal(key, (4, 4), np.float64)
            return plain_step(tx, params, state, gradient), None

        (params, _), _ = jax.lax.scan(step, (params, state), jax.random.split(key, 5))
        return params

    seeds = jax.random.split(jax.random.key(0), 3)
    together, alone = jax.jit(jax.vmap(train))(seeds), jax.jit(train)
    assert_close(together, jnp.stack([alone(seed) for seed in seeds]))


@of("google/flax/issues/2618")
@every
def test_scanned_layers_have_their_own_statistics(make):
    """Layers in one array train as layers in arrays of their own."""
    start = normal(3, 4, 4)
    tx = make(dimension_numbers=DimensionNumbers((1, 2)))
    gradients = gradients_of(start, 5)
    params, state = run(tx, start, gradients)
    factors = jax.tree.leaves(optax.tree.get(state, "factors"))
    assert [factor.shape for factor in factors] == [(3, 4, 4), (3, 4, 4)]
    for layer in range(3):
        expected, _ = run(make(), start[layer], at(gradients, layer))
        assert_close(params[layer], expected)


@of("borisdayma/dalle-mini/pull/166")
@soap
def test_vmap_of_the_optimizer_over_layers(make):
    """`vmap` over scanned layers gives what batch axes give."""
    start, gradients = normal(3, 4, 4), gradients_of(normal(3, 4, 4), 5)
    tx, batched = make(), make(dimension_numbers=DimensionNumbers((1, 2)))
    over_layers = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    params, _ = run(over_layers, start, gradients)
    assert_close(params, run(batched, start, gradients)[0])


@of("PaddlePaddle/PaddleScience/pull/1102")
def test_the_first_steps_of_a_full_batch():
    """Where the first two gradients are one, round-off does not choose the update."""

    def first_update(dtype):
        tx, gradient = make_tx("soap"), normal(16, 16).astype(dtype)
        start = jnp.zeros_like(gradient)
        return np.asarray(run(tx, start, [gradient] * 2)[0], np.float64)

    narrow, wide = first_update(np.float32), first_update(np.float64)
    cosine = np.vdot(narrow, wide) / np.linalg.norm(narrow) / np.linalg.norm(wide)
    assert cosine > 0.99


@of("haydn-jones/SOAP_JAX/issues/1")
@both
def test_deep_models_compile_as_few_decompositions(make):
    """The number of decompositions in a program does not grow with the layers."""

    def decompositions(layers):
        params = {
            str(i): {"q": normal(4, 4), "up": normal(4, 8)} for i in range(layers)
        }
        tx = make()
        state = jax.eval_shape(tx.init, params)
        text = jax.jit(tx.update).lower(params, state, params).as_text()
        return len(re.findall(r"custom_call @\w*(?:geqrf|syev)", text))

    # For each of the two sizes, one to begin with and one at refreshes.
    assert decompositions(2) == decompositions(6) == 4


@of("google-deepmind/optax/issues/1210")
@soap
def test_scan_with_checkpoints_in_x64(make):
    """The state of float32 parameters keeps its types, inside `lax.scan` with remat."""
    tx, target = make(), normal(4, 4, dtype=np.float32)
    loss = lambda w: jnp.sum((w - target) ** 2)  # noqa: E731
    params = jnp.zeros_like(target)
    state = tx.init(params)

    @jax.checkpoint
    def step(carry, _):
        params, state = carry
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(
            grad, state, params, value=value, grad=grad, value_fn=loss
        )
        return (optax.apply_updates(params, updates), state), None

    scanned = jax.jit(lambda c: jax.lax.scan(step, c, length=6)[0])((params, state))
    expected, jitted = (params, state), jax.jit(step)
    for _ in range(6):
        expected, _ = jitted(expected, None)
    assert types(scanned) == types((params, state))
    assert_close(scanned[0], expected[0], rtol=1e-4, atol=1e-5)


@of("google-deepmind/optax/issues/1207")
def test_while_loop_with_a_value_of_another_dtype():
    """The count of the state ends the loop, and no dtype follows the loss's."""
    tx = soap_optax.soap(0.1)
    params = normal(4, 4, dtype=jnp.bfloat16)

    def step(carry):
        params, state = carry
        value = jnp.asarray(1.0, jnp.float64)
        updates, state = tx.update(params, state, params, value=value)
        return optax.apply_updates(params, updates), state

    start = (params, tx.init(params))
    trained, state = jax.jit(
        lambda carry: jax.lax.while_loop(lambda c: c[1][0].count < 10, step, carry)
    )(start)
    assert state[0].count == 10 and trained.dtype == jnp.bfloat16
    assert types((trained, state)) == types(start)
    assert jnp.abs(trained).mean() < 0.8 * jnp.abs(params).mean()


def inner_loop(tx, params, inputs, rate, steps=4):
    """Trains a linear model inside of a loss, as in meta-learning."""
    targets = normal(16, 3, seed=8)
    loss = lambda w: jnp.mean((inputs @ w - targets) ** 2)  # noqa: E731
    state = tx.init(params)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (params - rate * updates, state), None

    (params, _), _ = jax.lax.scan(jax.checkpoint(step), (params, state), length=steps)
    return loss(params)


@of("google-deepmind/optax/issues/882")
def test_meta_gradients_of_the_learning_rate():
    """They agree with finite differences while the basis stays."""
    tx = soap_optax.scale_by_soap(eps_root=1e-8, precondition_frequency=100)
    loss = jax.jit(functools.partial(inner_loop, tx, normal(4, 3), normal(16, 4)))
    derivative = jax.jit(jax.grad(loss))(0.1)
    difference = (loss(0.1 + 1e-5) - loss(0.1 - 1e-5)) / 2e-5
    np.testing.assert_allclose(derivative, difference, rtol=1e-6)


@of("metaopt/torchopt/issues/26")
def test_meta_gradients_of_the_parameters_are_finite():
    """Two inputs are always zero, so that a factor is singular."""
    tx = soap_optax.scale_by_soap(eps_root=1e-8, precondition_frequency=2)
    inputs = normal(16, 4).at[:, 2:].set(0)
    loss = lambda w: inner_loop(tx, w, inputs, 0.1)  # noqa: E731
    derivative = jax.jit(jax.grad(loss))(normal(4, 3))
    assert np.abs(derivative).max() < 100 and np.any(derivative)


@of("jax-ml/jax/issues/5698")
@both
def test_no_spurious_nan_for_debug_nans(make):
    """Steps that are not compiled divide by no zero, also after gradients of zero."""
    params, tx = normal(4, 4), make()
    gradients = [0 * params, jnp.outer(normal(4), normal(4)), normal(4, 4, seed=1)]
    expected = run(tx, params, gradients)
    state = tx.init(params)
    with jax.debug_nans(True), jax.debug_infs(True):
        for gradient in gradients:
            params, state = plain_step(tx, params, state, gradient)
    assert_close((params, state), expected)


@of("netket/netket/pull/2045")
def test_eager_steps_compile_nothing_after_the_first(caplog):
    """A driver without `jit` compiles no branch again, and computes the same."""
    tx, params = make_tx("soap"), normal(4, 4)
    gradients = gradients_of(params, 8)
    state, eager = tx.init(params), params
    for i, gradient in enumerate(gradients):
        with jax.log_compiles(i >= 4), caplog.at_level(logging.WARNING):
            updates, state = tx.update(gradient, state, eager)
            eager = optax.apply_updates(eager, updates)
    assert not re.findall(r"Compiling (\S+)", caplog.text)
    assert_close(eager, run(tx, params, gradients)[0])


@of("patrick-kidger/optimistix/pull/77")
@soap
def test_as_a_minimiser_with_a_stopping_rule(make):
    """The state is arrays alone, so that a minimiser can carry it until it stops."""
    tx = optax.chain(make(), optax.scale(0.3))
    target = {"w": normal(4, 4), "bias": normal(3)}
    y = jax.tree.map(jnp.zeros_like, target)
    state = tx.init(y)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    error = lambda y: optax.tree.norm(optax.tree.sub(y, target))  # noqa: E731

    def step(carry):
        y, state, steps = carry
        return *plain_step(tx, y, state, optax.tree.sub(y, target)), steps + 1

    proceed = lambda c: (error(c[0]) > 0.1) & (c[2] < 2000)  # noqa: E731
    y, _, steps = jax.lax.while_loop(proceed, step, (y, state, 0))
    assert error(y) <= 0.1 and steps > 10


# ------------------------------------------------------------------------- dtypes


@of("google/flax/issues/924")
@both
def test_float32_stays_float32_in_x64(make):
    params = normal(4, 4, dtype=np.float32)
    trained, state = run(make(), params, gradients_of(params, 3, np.float32))
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves((trained, state))}
    assert dtypes == {"float32", "int32"}


@of("pasteurlabs/mosaic/pull/19")
@both
def test_gradients_that_numpy_has_projected(make):
    """NumPy's float64 gradients without x64 are float32, and no warning is raised."""
    with jax.enable_x64(False):
        params, tx = normal(4, 4, dtype=np.float32), make()
        wide = [np.random.default_rng(i).normal(size=(4, 4)) for i in range(3)]
        narrow = [jnp.asarray(gradient, np.float32) for gradient in wide]
        expected = run(tx, params, narrow)
        state = tx.init(params)
        for gradient in wide:
            params, state = plain_step(tx, params, state, gradient)
        assert_close((params, state), expected, rtol=1e-4, atol=1e-4)


@of("google-deepmind/optax/issues/1405")
@pytest.mark.parametrize("scalar", [float, np.asarray])
def test_learning_rates_of_several_types(scalar):
    """The dtype of an update does not depend on the type of the learning rate."""
    rate = scalar(2.0**-7)
    if scalar is not float:
        rate = rate.astype(jnp.bfloat16)
    tx = soap_optax.soap(rate)
    params = normal(4, 4, dtype=jnp.bfloat16)
    _, state = run(tx, params, gradients_of(params, 2, jnp.bfloat16))
    updates, _ = jax.jit(tx.update)(params, state, params)
    assert updates.dtype == jnp.bfloat16 and np.any(updates)


@of("google-deepmind/optax/pull/1755")
def test_zero_gradients_in_float16():
    """The epsilon does not vanish in float16, and zeros give updates of zero."""
    params = {"w": jnp.ones((4, 4), np.float16), "v": jnp.ones(3, np.float16)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    makes = [soap_optax.soap, soap_optax.shampoo]
    for make in (soap_optax.soap, *map(optax.inject_hyperparams, makes)):
        assert_equal(run(make(0.1), params, [zeros] * 2)[0], params)


@of("google-deepmind/optax/issues/1414")
def test_injected_decays_that_bfloat16_would_round_to_one():
    """The state of bfloat16 parameters may have hyperparameters in float32."""
    options = {"b2": 0.999, "shampoo_beta": 0.99}
    tx = optax.inject_hyperparams(soap_optax.soap, hyperparam_dtype=jnp.float32)(
        0.1, **options
    )
    params = normal(4, 4, dtype=jnp.bfloat16)
    gradients = gradients_of(params, 5, jnp.bfloat16)
    trained, state = run(tx, params, gradients)
    assert state.hyperparams["b2"] == np.float32(0.999)
    expected, _ = run(soap_optax.soap(0.1, **options), params, gradients)
    assert_close(trained, expected, atol=0.02)


@of("google/tunix/pull/1880")
def test_injected_low_precision_moments_stay_so():
    """Accumulated steps keep the dtypes of moments that are stored in bfloat16."""
    inject = optax.inject_hyperparams(soap_optax.soap, static_args="mu_dtype")
    tx = optax.MultiSteps(inject(0.1, mu_dtype=jnp.bfloat16), 2)
    params = normal(4, 4, dtype=np.float32)
    gradients = gradients_of(params, 6, np.float32)
    dtypes = lambda tree: jax.tree.map(jnp.result_type, tree)  # noqa: E731
    trained, state = run(tx, params, gradients)
    assert dtypes(state) == dtypes(tx.init(params))
    assert optax.tree.get(state, "mu").dtype == jnp.bfloat16
    means = [(a + b) / 2 for a, b in pairs_of(gradients)]
    assert_close(trained, run(soap_optax.soap(0.1), params, means)[0], atol=0.01)


@of("google-deepmind/optax/pull/1039")
@both
def test_accumulation_of_bfloat16_gradients(make):
    """Updates have the gradients' dtype, so that both branches of a step agree."""
    tx = optax.MultiSteps(make(), 2).gradient_transformation()
    params = normal(4, 4, dtype=jnp.bfloat16)
    before = types(tx.init(params))
    trained, state = run(tx, params, gradients_of(params, 4, jnp.bfloat16))
    assert types(state) == before and trained.dtype == jnp.bfloat16
    assert np.any(trained != params)


@of("google-deepmind/optax/issues/1038")
def test_accumulation_around_schedule_free():
    tx = optax.contrib.schedule_free(soap_optax.soap(0.1, b1=0.0), 0.1, b1=0.9)
    params = normal(4, 4)
    gradients = gradients_of(params, 6)
    means = [(a + b) / 2 for a, b in pairs_of(gradients)]
    trained, _ = run(optax.MultiSteps(tx, 2), params, gradients)
    assert_close(trained, run(tx, params, means)[0], atol=1e-6)


@of("sanchit-gandhi/seq2seq-speech/pull/12")
def test_a_state_that_is_stored_in_bfloat16():
    """A program may round all of a state between steps, and widen it again."""
    tx, target = soap_optax.soap(0.05), normal(4, 4, dtype=np.float32)

    def cast(tree, old, new):
        return jax.tree.map(lambda x: x.astype(new) if x.dtype == old else x, tree)

    @jax.jit
    def step(params, stored, gradient):
        state = cast(stored, jnp.bfloat16, jnp.float32)
        updates, state = tx.update(gradient, state, params)
        stored = cast(state, jnp.float32, jnp.bfloat16)
        return optax.apply_updates(params, updates), stored

    params = jnp.zeros_like(target)
    stored = cast(tx.init(params), jnp.float32, jnp.bfloat16)
    for noise in gradients_of(params, 60, np.float32):
        params, stored = step(params, stored, params - target + 0.1 * noise)
    assert jnp.abs(params - target).mean() < 0.2 * jnp.abs(target).mean()


@of("google/flax/issues/2547")
def test_dynamic_loss_scaling_in_float16():
    """Steps whose scaled gradients overflow are as if they had never been."""
    tx, start = soap_optax.soap(0.05), normal(4, 4, dtype=np.float32)
    inputs = normal(8, 4, seed=1, dtype=np.float16)

    def loss(params):
        return jnp.mean((inputs @ params.astype(np.float16)) ** 2)

    @jax.jit
    def step(scale, params, state):
        scale, is_finite, _, gradient = scale.value_and_grad(loss)(params)
        updates, new = tx.update(gradient, state, params)
        choose = functools.partial(jnp.where, is_finite)
        state = jax.tree.map(choose, new, state)
        moved = optax.apply_updates(params, updates)
        return scale, choose(moved, params), state, is_finite, gradient

    scale = DynamicScale(growth_factor=2.0**6, growth_interval=2)
    params, state, kept = start, tx.init(start), []
    for _ in range(12):
        scale, params, state, is_finite, gradient = step(scale, params, state)
        kept += [gradient] if is_finite else []
    assert 4 <= len(kept) < 12 and state[0].count == len(kept)
    assert_close(params, run(tx, start, kept)[0], rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------- wrappers


@of("google-deepmind/optax/issues/1532")
@pytest.mark.parametrize("make", [soap_optax.soap, soap_optax.shampoo])
def test_injected_hyperparameters_give_the_same_trajectory(make):
    params = normal(4, 4)
    schedule = optax.linear_schedule(0.1, 0.01, 8)
    injected = optax.inject_hyperparams(make)(schedule)
    gradients = gradients_of(params, 6)
    trained, _ = run(injected, params, gradients)
    assert_close(trained, run(make(schedule), params, gradients)[0], atol=1e-6)


class Net(eqx.Module):
    """A model that can be called."""

    linear: eqx.nn.Linear

    def __call__(self, x):
        return self.linear(x)


def callable_net():
    net = Net(eqx.nn.Linear(4, 4, key=jax.random.key(0)))
    biases = lambda net: [net.linear.bias]  # noqa: E731
    mask = eqx.tree_at(biases, jax.tree.map(lambda _: True, net), [False])
    return net, mask


@of("google-deepmind/optax/issues/1373")
def test_injection_with_a_mask_that_can_be_called():
    net, mask = callable_net()
    inject = optax.inject_hyperparams(soap_optax.soap, static_args="mask")
    schedule = optax.cosine_decay_schedule(0.1, 10)
    tx = inject(schedule, weight_decay=0.5, mask=mask)
    gradients = gradients_of(net, 4)
    trained, _ = run(tx, net, gradients)
    plain = soap_optax.soap(schedule, weight_decay=0.5, mask=lambda _: mask)
    assert_close(trained, run(plain, net, gradients)[0])


@of("google-deepmind/optax/issues/1007")
@pytest.mark.parametrize("make", [soap_optax.soap, soap_optax.shampoo])
def test_weight_decay_masked_by_a_model(make):
    """Only the parameters decay that the mask, a model of bools, names."""
    net, mask = callable_net()
    still = [jax.tree.map(jnp.zeros_like, net)] * 3
    trained, _ = run(make(0.1, weight_decay=0.5, mask=mask), net, still)
    np.testing.assert_allclose(
        trained.linear.weight, net.linear.weight * 0.95**3, rtol=1e-12
    )
    np.testing.assert_array_equal(trained.linear.bias, net.linear.bias)


@of("google-deepmind/optax/issues/412")
@pytest.mark.parametrize("make", [soap_optax.soap, soap_optax.shampoo])
def test_init_with_injected_hyperparameters_can_be_compiled(make):
    tx, params = optax.inject_hyperparams(make)(0.1), normal(4, 4)
    assert_equal(jax.jit(tx.init)(params), tx.init(params))


@of("google-deepmind/optax/issues/145")
def test_accumulation_with_weight_decay():
    """The parameters reach the decay through the accumulation."""
    tx = soap_optax.soap(0.1, weight_decay=0.5)
    params, gradients = normal(4, 4), gradients_of(normal(4, 4), 6)
    means = [(a + b) / 2 for a, b in pairs_of(gradients)]
    trained, _ = run(optax.MultiSteps(tx, 2), params, gradients)
    assert_close(trained, run(tx, params, means)[0], atol=1e-6)


@of("google-deepmind/optax/issues/828")
def test_accumulation_with_zeroed_nan():
    tx = optax.MultiSteps(optax.chain(optax.zero_nans(), make_tx("soap")), 2)
    params, gradients = normal(4, 4), gradients_of(normal(4, 4), 6)
    gradients[-1] = gradients[-1].at[0, 1].set(jnp.nan)
    trained, state = run(tx, params, gradients)
    assert types(state) == types(tx.init(params))
    means = [jnp.nan_to_num((a + b) / 2) for a, b in pairs_of(gradients)]
    assert_close(trained, run(make_tx("soap"), params, means)[0], atol=1e-6)


@of("marin-community/levanter/pull/973")
@soap
def test_skipped_steps_leave_the_state_alone(make):
    """The accumulation skips gradients that are not finite, also where one is due."""
    skip = optax.skip_not_finite
    tx = optax.MultiSteps(make(), 1, should_skip_update_fn=skip)
    params, gradients = normal(4, 4), gradients_of(normal(4, 4), 6)
    bad = {2, 4}
    seen = [g * jnp.nan if i in bad else g for i, g in enumerate(gradients)]
    kept = [g for i, g in enumerate(gradients) if i not in bad]
    trained, state = run(tx, params, seen)
    expected = run(make(), params, kept)
    assert_close((trained, state.inner_opt_state), expected)


@of("pyro-ppl/numpyro/issues/1955")
def test_reduce_on_plateau():
    """The value of the loss passes by and scales what comes out."""
    plateau = optax.contrib.reduce_on_plateau(factor=0.5, patience=2)
    plain = make_tx("soap")
    tx = optax.chain(plain, plateau)
    params, gradients = normal(4, 4), gradients_of(normal(4, 4), 6)
    state, scales = tx.init(params), []
    other = plain.init(params)
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params, value=1.0)
        expected, other = jax.jit(plain.update)(gradient, other, params)
        scales.append(float(optax.tree.get(state, "scale")))
        assert_close(updates, expected * scales[-1])
    assert scales[0] == 1 and scales[-1] < 0.5


@of("google-deepmind/optax/issues/271")
@both
def test_nested_masks(make):
    params = {"a": normal(4, 4), "b": {"c": normal(4, 4), "d": normal(3)}}
    inner = optax.masked(make(), {"a": False, "b": {"c": True, "d": True}})
    tx = optax.masked(inner, {"a": True, "b": {"c": True, "d": False}})
    gradients = gradients_of(params, 4)
    trained, _ = run(tx, params, gradients)
    assert_close(trained["b"]["c"], alone(make(), params, gradients)["b"]["c"])
    total = functools.reduce(jnp.add, [g["a"] for g in gradients])
    assert_close(trained["a"], params["a"] + total)


@of("google-deepmind/optax/issues/160")
@soap
def test_frozen_dicts(make):
    """A mask that is a function makes a frozen dict of one; the rest is as in dicts."""
    params = {"dense": {"kernel": normal(4, 4), "bias": normal(3)}, "bias": normal(3)}
    params = flax.core.freeze(params)
    mask = lambda tree: jax.tree.map(lambda x: jnp.ndim(x) == 2, tree)  # noqa: E731
    gradients = gradients_of(params, 3)
    trained, _ = run(optax.masked(make(), mask), params, gradients)
    assert isinstance(trained, flax.core.FrozenDict)
    kernels = [tree["dense"]["kernel"] for tree in (params, *gradients)]
    expected = alone(make(), kernels[0], kernels[1:])
    assert_close(trained["dense"]["kernel"], expected)


@of("google-deepmind/optax/issues/477")
@soap
def test_frozen_groups_have_no_factors(make):
    params = {"encoder": normal(4, 3), "head": normal(4, 4)}
    labels = {"encoder": "freeze", "head": "train"}
    tx = optax.partition({"train": make(), "freeze": optax.set_to_zero()}, labels)
    gradients = gradients_of(params, 4)
    trained, state = run(tx, params, gradients)
    np.testing.assert_array_equal(trained["encoder"], params["encoder"])
    expected, other = run(make(), params["head"], [g["head"] for g in gradients])
    assert_close(trained["head"], expected)
    sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, other)]
    assert sizes[0] == sizes[1]


@flax.struct.dataclass
class Networks:
    """The parameters of an actor and a critic."""

    policy: Any
    value: Any


@of("google/brax/issues/480")
def test_one_optimizer_for_each_network():
    """Labels for whole networks in a dataclass, with an optimizer for each label."""
    params = Networks({"w": normal(4, 4), "b": normal(3)}, {"w": normal(4, 1)})
    soap, adam = make_tx("soap"), optax.adam(0.01)
    tx = optax.partition({"soap": soap, "adam": adam}, Networks("soap", "adam"))
    gradients = gradients_of(params, 4)
    trained, _ = run(tx, params, gradients)
    policy = alone(soap, params.policy, [g.policy for g in gradients])
    value = alone(adam, params.value, [g.value for g in gradients])
    assert_close(trained, Networks(policy, value))


class TwoLayers(nnx.Module):
    """A model for the tests with NNX."""

    def __init__(self):
        self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(4, 2, rngs=nnx.Rngs(1))

    def __call__(self, x):
        return self.second(nnx.tanh(self.first(x)))


def train_nnx(optimizer, model, steps):
    inputs, targets = normal(16, 4, dtype="f4"), normal(16, 2, seed=1, dtype="f4")

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: jnp.mean((model(inputs) - targets) ** 2)  # noqa: E731
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(steps):
        step(model, optimizer)
    return jax.tree.map(jnp.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Param)))


@of("google/flax/issues/5372")
def test_partition_in_nnx():
    """Layers of an NNX model may have optimizers of their own."""

    def labels(params):
        return jax.tree.map_with_path(
            lambda path, _: "soap" if "first" in str(path[0]) else "sgd", params
        )

    def train(first, second):
        model = TwoLayers()
        tx = optax.partition({"soap": first, "sgd": second}, labels)
        return train_nnx(nnx.Optimizer(model, tx, wrt=nnx.Param), model, 3)

    start = nnx.to_pure_dict(nnx.state(TwoLayers(), nnx.Param))
    trained = train(soap_optax.soap(0.1), optax.set_to_zero())
    assert_equal(trained["second"], start["second"])
    assert np.abs(trained["first"]["kernel"] - start["first"]["kernel"]).min() > 1e-3


@of("google/flax/issues/4901")
def test_masks_inside_an_optimizer_in_nnx():
    """Shampoo masks parameters inside, and trains an NNX model as it does a dict."""
    model, tx = TwoLayers(), soap_optax.shampoo(0.1)
    start = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    trained = train_nnx(nnx.Optimizer(model, tx, wrt=nnx.Param), model, 3)
    inputs, targets = normal(16, 4, dtype="f4"), normal(16, 2, seed=1, dtype="f4")

    def loss(p):
        hidden = jnp.tanh(inputs @ p["first"]["kernel"] + p["first"]["bias"][None])
        outputs = hidden @ p["second"]["kernel"] + p["second"]["bias"][None]
        return jnp.mean((outputs - targets) ** 2)

    params, state = start, tx.init(start)
    for _ in range(3):
        params, state = step_of(tx)(params, state, jax.grad(loss)(params))
    assert_close(trained, params, rtol=1e-3, atol=1e-4)


@of("google-deepmind/optax/pull/165")
def test_lookahead_with_weight_decay():
    """The fast optimizer gets the fast parameters, with which it computes decay."""
    soap = soap_optax.soap(0.1, weight_decay=0.5)
    tx = optax.lookahead(soap, sync_period=3, slow_step_size=0.5)
    start, gradients = normal(4, 4), gradients_of(normal(4, 4), 3)
    params = optax.LookaheadParams.init_synced(start)
    state = tx.init(params)
    for gradient in gradients:
        updates, state = jax.jit(tx.update)(gradient, state, params)
        params = optax.apply_updates(params, updates)
    fast, _ = run(soap, start, gradients)
    assert_close(params.slow, (start + fast) / 2)
    assert_close(params.fast, params.slow)


@of("google-deepmind/optax/pull/1059")
@soap
def test_a_fresh_train_state_can_be_donated(make):
    """No buffer of a fresh state is one of the parameters, or stands there twice."""
    tx = optax.contrib.schedule_free(make(b1=0.0), 0.1)
    params = normal(4, 4)
    gradients = gradients_of(params, 2)
    expected = run(tx, params, gradients)
    donating = jax.jit(functools.partial(plain_step, tx), donate_argnums=(0, 1))
    carry = (params, tx.init(params))
    for gradient in gradients:
        carry = donating(*carry, gradient)
    assert params.is_deleted()
    assert_close(carry, expected)


@of("google-deepmind/optax/pull/1743")
def test_normalized_updates():
    """With the current basis no update is zero, and each can be normalized."""
    tx = optax.chain(
        soap_optax.scale_by_soap(basis="current"), optax.contrib.normalize()
    )
    params = {"w": normal(4, 4), "v": normal(3)}
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients_of(params, 3):
        updates, state = update(gradient, state, params)
        np.testing.assert_allclose(optax.tree.norm(updates), 1, rtol=1e-12)


@of("Drenderer/klax/issues/39")
def test_parameters_that_stay_nonnegative():
    """An entry that is held at zero leaves it again when its target rises."""
    tx = optax.chain(soap_optax.soap(0.05), optax.keep_params_nonnegative())
    params, lowest = jnp.abs(normal(4, 4)), []
    state = tx.init(params)
    for i in range(160):
        params, state = step_of(tx)(params, state, params + (1 if i < 60 else -1))
        lowest.append(params.min())
    assert min(lowest) == 0 and lowest[59] < 0.05
    np.testing.assert_allclose(params, 1, atol=0.2)


# -------------------------------------------------------------------------- trees


@of("patrick-kidger/equinox/issues/607")
def test_updates_without_parameters():
    """Only weight decay needs the parameters, and says so."""
    params, gradients = normal(4, 4), gradients_of(normal(4, 4), 3)
    tx, trained = make_tx("soap"), params
    state, update = tx.init(params), jax.jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state)
        trained = optax.apply_updates(trained, updates)
    assert_close(trained, run(tx, params, gradients)[0])
    decaying = soap_optax.soap(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="not passing `params`"):
        decaying.update(gradients[0], decaying.init(params))


@of("google-deepmind/optax/issues/366")
@both
def test_gradients_of_the_wrong_argument(make):
    """The error says what is expected, and for which parameter."""
    params = {"dense": {"kernel": normal(4, 3), "bias": normal(3)}}
    state = make().init(params)
    with pytest.raises(ValueError, match=r"params must have the structure of the upd"):
        make().update(normal(16, 4), state, params)
    with pytest.raises(ValueError, match=r"the parameter must have the shape"):
        make().update(normal(16, 4), state)
    with pytest.raises(ValueError, match=r"\['dense'\]\['kernel'\]"):
        make().update({"dense": {"bias": normal(3)}}, state)


@of("google-deepmind/optax/issues/333")
def test_parameters_that_are_python_numbers():
    """A float trains as with Adam, and an integer is refused, not truncated."""
    tx, adam = make_tx("soap"), optax.adam(0.1, 0.95, 0.95)
    x, state, y, other = 100.0, tx.init(100.0), 100.0, adam.init(100.0)
    updates, state = tx.update(2 * x, state, x)
    assert updates == 0  # The first step only builds eigenbases.
    for _ in range(4):
        updates, state = tx.update(2 * x, state, x)
        x = optax.apply_updates(x, updates)
        updates, other = adam.update(2 * y, other, y)
        y = optax.apply_updates(y, updates)
    np.testing.assert_allclose(x, y, rtol=1e-6)
    with pytest.raises(ValueError, match="the parameter must be real floating point"):
        tx.init(100)


@of("google-deepmind/optax/pull/1736")
def test_scalars_among_matrices():
    """A temperature beside a matrix gets Adam's updates; SOAP begins a step later."""
    params = {"w": normal(4, 4), "temperature": jnp.asarray(2.0)}
    gradients = gradients_of(params, 5)
    adam = optax.adam(0.1, 0.95, 0.95)
    scalars = [g["temperature"] for g in gradients]
    for name, seen in (("soap", scalars[1:]), ("shampoo", scalars)):
        trained, _ = run(make_tx(name), params, gradients)
        expected, _ = run(adam, params["temperature"], seen)
        assert_close(trained["temperature"], expected)


@of("google-deepmind/optax/issues/196")
@soap
def test_complex_parameters(make):
    """They are refused by an error that says what works, and that works."""
    params = normal(4, 4) + 1j * normal(4, 4, seed=1)
    with pytest.raises(ValueError, match="split_real_and_imaginary"):
        make().init(params)
    tx = optax.contrib.split_real_and_imaginary(make())
    parts = gradients_of((params.real, params.imag), 4)
    trained, _ = run(tx, params, [a + 1j * b for a, b in parts])
    real, imag = alone(make(), (params.real, params.imag), parts)
    assert_close(trained, real + 1j * imag)


@jax.tree_util.register_pytree_node_class
class FlatMapping:
    """A mapping as Haiku had it, whose children have no keys on their paths."""

    def __init__(self, mapping):
        self.mapping = dict(sorted(mapping.items()))

    def tree_flatten(self):
        return tuple(self.mapping.values()), tuple(self.mapping)

    @classmethod
    def tree_unflatten(cls, names, children):
        return cls(dict(zip(names, children, strict=True)))


@of("google-deepmind/dm-haiku/issues/191")
@soap
def test_mappings_of_other_libraries(make):
    layer = FlatMapping({"w": normal(4, 4), "b": normal(3)})
    params = FlatMapping({"mlp/~/linear_0": layer, "mlp/~/linear_1": layer})
    gradients = gradients_of(params, 3)
    trained, _ = run(make(), params, gradients)
    assert_close(trained, alone(make(), params, gradients))


class Dense(NamedTuple):
    """Parameters in a named tuple, with a field that a tuple has as a method."""

    weight: Any
    count: Any = None


@of("jax-ml/jax/issues/3759")
@soap
def test_named_tuples_and_names_with_slashes(make):
    """A state of nested dicts keeps the names, whatever they are."""
    params = {"mlp/linear": Dense(normal(4, 4), normal(3)), "mlp": {"linear": [None]}}
    gradients = gradients_of(params, 3)
    trained, state = run(make(), params, gradients)
    factors = optax.tree.get(state, "factors")
    assert [f.shape for f in factors["mlp/linear"]["weight"]] == [(4, 4), (4, 4)]
    assert_close(trained, alone(make(), params, gradients))


@of("google/flax/issues/1263")
@soap
def test_weights_that_start_as_one_array(make):
    """An array that stands twice in a tree is two parameters, with two states."""
    shared = normal(4, 4)
    params = {"embedding": shared, "head": shared}
    gradients = gradients_of(params, 4)
    gradients[0]["head"] = gradients[0]["embedding"]
    donating = jax.jit(functools.partial(plain_step, make()), donate_argnums=1)
    trained, state = params, make().init(params)
    for gradient in gradients:
        trained, state = donating(trained, state, gradient)
    assert_close(trained, alone(make(), params, gradients))


# ----------------------------------------------------- states: saved, moved, resumed


@of("jax-ml/jax/issues/1078")
@soap
def test_a_pickled_state_resumes(make):
    """NumPy arrays in place of JAX's, also in counts, continue bit for bit."""
    params, tx = normal(4, 4), make()
    gradients = gradients_of(params, 6)
    middle = run(tx, params, gradients[:3])
    restored = pickle.loads(pickle.dumps(jax.device_get(middle)))
    assert isinstance(optax.tree.get(restored[1], "factors")[0], np.ndarray)
    expected = run(tx, middle[0], gradients[3:], middle[1])
    assert_equal(run(tx, restored[0], gradients[3:], restored[1]), expected)


@of("google-deepmind/ferminet/pull/105")
def test_a_state_whose_tuples_became_lists():
    """A checkpoint without types gives lists for the tuples of a chain."""
    params, tx = normal(4, 4), make_tx("soap")
    gradients = gradients_of(params, 6)
    middle, state = run(tx, params, gradients[:3])
    soap = state[0]._replace(
        factors=list(state[0].factors), eigenbases=list(state[0].eigenbases)
    )
    expected = run(tx, middle, gradients[3:], state)
    assert_close(run(tx, middle, gradients[3:], [soap, *state[1:]]), expected)


@of("google/flax/issues/4423")
def test_the_state_of_an_nnx_optimizer_through_orbax(tmp_path):
    def fresh():
        model = TwoLayers()
        tx = soap_optax.soap(0.1, precondition_frequency=2)
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = fresh()
    train_nnx(optimizer, model, 3)
    saved = nnx.to_pure_dict(nnx.state((model, optimizer)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved)
        checkpointer.wait_until_finished()
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
        restored = checkpointer.restore(tmp_path / "state", target)
    resumed = fresh()
    state = nnx.state(resumed)
    nnx.replace_by_pure_dict(state, restored)
    nnx.update(resumed, state)
    expected = train_nnx(optimizer, model, 3)
    assert_equal(train_nnx(resumed[1], resumed[0], 3), expected)


@of("FhG-IISB/jNO/pull/115")
@soap
def test_a_training_in_chunks(make):
    """Counts and schedules are in the state, so that chunks are one training."""
    decay = optax.scale_by_schedule(optax.linear_schedule(1.0, 0.0, 6))
    tx, params = optax.chain(make(), decay), normal(4, 4)
    gradients = gradients_of(params, 6)
    chunked, state = params, tx.init(params)
    for chunk in (slice(1), slice(1, 4), slice(4, 6)):
        chunked, state = run(tx, chunked, gradients[chunk], state)
    assert_equal((chunked, state), run(tx, params, gradients))
    stopped, _ = run(tx, chunked, gradients, state)
    assert_close(stopped, chunked, atol=1e-7)  # The schedule has come to its end.


@of("google-deepmind/optax/issues/1036")
def test_a_restart_with_other_hyperparameters():
    """The state fits another frequency and rate, and its count goes on."""
    old, new = (
        soap_optax.soap(0.1, precondition_frequency=2),
        soap_optax.soap(0.01, precondition_frequency=5),
    )
    params = normal(4, 4)
    middle, state = run(old, params, gradients_of(params, 4))
    refreshes = []
    for gradient in gradients_of(params, 8):
        before = state[0].eigenbases
        middle, state = run(new, middle, [gradient], state)
        refreshes.append(bool(np.any(before[0] != state[0].eigenbases[0])))
    assert [4 + i for i, refreshed in enumerate(refreshes) if refreshed] == [5, 10]
    assert state[0].count == 12


@of("google-deepmind/optax/pull/1714")
@both
def test_a_state_from_shapes(make):
    """The state of shapes alone is that of arrays of zeros, with its types."""
    params = {"w": normal(4, 4), "v": normal(3)}
    shapes = jax.eval_shape(lambda: params)
    state = make().init(params)
    assert types(make().init(shapes)) == types(state)
    assert types(jax.jit(make().init)(params)) == types(state)
    abstract = jax.eval_shape(make().init, shapes)
    filled = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract)
    assert types(filled) == types(state)


@of("google/flax/issues/2120")
@soap
def test_data_parallel_training_with_pmap(make):
    """Replicas that share the mean gradient stay equal, and are as one device."""
    tx, start = make(), normal(4, 4)
    halves = [jnp.stack(gradients_of(start, 2 * i)[-2:]) for i in range(1, 5)]
    devices = jax.devices()[:2]

    @functools.partial(jax.pmap, axis_name="batch", devices=devices)
    def step(params, state, gradient):
        return plain_step(tx, params, state, jax.lax.pmean(gradient, "batch"))

    replicate = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jnp.stack([x, x]), tree
    )
    carry = replicate((start, tx.init(start)))
    for half in halves:
        carry = step(*carry, half)
    carry = jax.device_get(carry)
    assert_equal(at(carry, 0), at(carry, 1))
    expected = run(tx, start, [half.mean(0) for half in halves])
    assert_close(at(carry, 0), jax.device_get(expected))


@of("jax-ml/jax/issues/23693")
def test_accumulation_inside_shard_map():
    """The conditionals of accumulation and of refreshes agree on what is replicated."""
    tx, automatic = optax.MultiSteps(make_tx("soap"), 2), jax.sharding.AxisType.Auto
    mesh = jax.make_mesh((2,), ("data",), (automatic,), devices=jax.devices()[:2])
    start = normal(4, 4)
    batches = [jnp.stack(gradients_of(start, 2 * i)[-2:]) for i in range(1, 7)]

    def step(params, state, gradients):
        return plain_step(tx, params, state, jax.lax.pmean(gradients[0], "data"))

    sharded = jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(jax.P(), jax.P(), jax.P("data")),
            out_specs=(jax.P(), jax.P()),
        )
    )
    carry = start, tx.init(start)
    for batch in batches:
        carry = sharded(*carry, batch)
    expected, _ = run(tx, start, [batch.mean(0) for batch in batches])
    assert_close(jax.device_get(carry[0]), jax.device_get(expected))


@of("SlopDotCash/asi/issues/334")
@pytest.mark.parametrize("basis", ["previous", "current"])
def test_counts_at_the_end_of_int32(basis):
    """They saturate, and training goes on."""
    tx = soap_optax.soap(0.1, basis=basis)
    params, end = normal(4, 4), np.iinfo(np.int32).max
    middle, state = run(tx, params, gradients_of(params, 3))
    state = optax.tree.set(state, count=jnp.asarray(end, jnp.int32))
    trained, new = run(tx, middle, gradients_of(params, 2), state)
    assert new[0].count == end
    assert np.abs(trained - middle).max() < 1 and np.all(trained != middle)
    assert np.any(new[0].factors[0] != state[0].factors[0])


@of("HomebrewML/HeavyBall/issues/40")
def test_a_convolution_is_as_the_paper_says():
    """A kernel with four axes gets the updates of the paper's algorithm."""
    gradients = np.random.default_rng(0).normal(size=(12, 4, 3, 3, 3))
    tx = soap_optax.scale_by_soap(precondition_frequency=4)
    state, found = tx.init(jnp.asarray(gradients[0])), []
    for gradient in gradients:
        update, state = jax.jit(tx.update)(jnp.asarray(gradient), state)
        found.append(update)
    expected = reference.run(gradients, frequency=4)
    np.testing.assert_allclose(found, expected, atol=1e-8)


def test_the_page_lists_each_report():
    """The page on reliability names the reports of this file, and no others."""
    tests = {name: t for name, t in globals().items() if name.startswith("test_")}
    del tests["test_the_page_lists_each_report"]
    text = PAGE.read_text(encoding="utf-8").split("## Uses by other programs")[1]
    listed = re.findall(r"\((https://github\.com/[^)]+)\)", text.split("\n## ")[0])
    assert sorted(listed) == sorted(test.report for test in tests.values())
