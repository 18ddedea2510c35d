"""Shampoo, Adafactor in the eigenbasis, factorized, one-sided and KL-SOAP."""

import functools
import math

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import training
from test_reference import EPS, assert_same, gradients, run

import soap_optax
from soap_optax import _kronecker
from soap_optax.refresh import _stacks
from soap_optax.refresh._methods import RefreshRequest

HIGHEST = jax.lax.Precision.HIGHEST


# --- Shampoo, with explicit Kronecker products ---------------------------------------


def explicit_shampoo(grads, *, power, eps, frequency, b1=0.9, b2=0.95):
    """kron(L + eps I, R + eps I, …)^-power applied to the mean gradient as a vector.

    Between refreshes the eigenvectors stay, and the off-diagonal part that the factors
    then have in them is left out.
    """
    shape = grads.shape[1:]
    mean = np.zeros(shape)
    factors = [np.zeros((n, n)) for n in shape]
    steps = []
    for t, grad in enumerate(grads):
        mean = b1 * mean + (1 - b1) * grad
        for i, factor in enumerate(factors):
            rows = np.moveaxis(grad, i, 0).reshape(shape[i], -1)
            factors[i] = b2 * factor + (1 - b2) * rows @ rows.T
        corrected = [f / (1 - b2 ** (t + 1)) + eps * np.eye(len(f)) for f in factors]
        if t % frequency == 0:
            bases = [np.linalg.eigh(f)[1] for f in corrected]
        pairs = zip(corrected, bases, strict=True)
        values = functools.reduce(np.kron, [np.diag(q.T @ f @ q) for f, q in pairs])
        vectors = functools.reduce(np.kron, bases)
        root = (vectors * values**-power) @ vectors.T
        corrected_mean = mean / (1 - b1 ** (t + 1))
        steps.append((root @ corrected_mean.ravel()).reshape(shape))
    return np.stack(steps)


@pytest.mark.parametrize("power", [0.25, *cases.slow(0.4), 0.5])
@pytest.mark.parametrize(
    ("shape", "frequency"), [((5, 5), 1), *cases.slow(((5, 5), 4)), ((3, 4, 3), 3)]
)
def test_shampoo_is_a_power_of_the_kronecker_product(power, shape, frequency):
    grads = gradients(*shape)
    # Large enough that the product of all eigenvalues is well conditioned.
    options = {"power": power, "eps": 0.1, "b1": 0.9}
    tx = soap_optax.scale_by_shampoo(
        grafting=None, precondition_frequency=frequency, rcond=0, **options
    )
    expected = explicit_shampoo(grads, frequency=frequency, **options)
    np.testing.assert_allclose(run(tx, grads), expected, rtol=0, atol=1e-8)
    assert np.abs(expected).max() > 0.01


def run_in_float32(tx, grads):
    state, update = tx.init(jnp.zeros(grads.shape[1:], jnp.float32)), jax.jit(tx.update)
    steps = []
    for grad in grads:
        step, state = update(jnp.asarray(grad), state)
        assert step.dtype == jnp.float32
        steps.append(step)
    return np.stack(steps)


def test_grafting_takes_the_norm_of_each_block_from_adam():
    grads = gradients(6, 4)
    adam = run(optax.scale_by_adam(0.95, 0.95), grads)
    options = {"block_size": 2, "precondition_frequency": 3}
    bare = run(soap_optax.scale_by_shampoo(grafting=None, **options), grads)
    grafted = run(soap_optax.scale_by_shampoo(**options), grads)

    def blocks(steps):
        return steps.reshape(-1, 3, 2, 2, 2).swapaxes(2, 3).reshape(-1, 3, 2, 4)

    norms = [np.linalg.norm(blocks(x), axis=-1, keepdims=True) for x in (adam, bare)]
    expected = blocks(bare) * norms[0] / norms[1]
    np.testing.assert_allclose(blocks(grafted), expected, rtol=1e-10)


# Sizes of gradients share one compiled step.
grafted = functools.cache(soap_optax.scale_by_shampoo)


@pytest.mark.parametrize("power", [0.25, *cases.slow(0.4), 1.0])
@pytest.mark.parametrize("size", [1e-15, *cases.slow(1e-8, 1.0), 1e8])
def test_grafted_updates_have_the_norm_of_adam(power, size):
    """Whatever the norms of what is grafted are, here in float32."""
    grads = (size * gradients(6, 6)[:3]).astype(np.float32)
    adam = run_in_float32(optax.scale_by_adam(0.95, 0.95), grads)
    steps = run_in_float32(grafted(power=power), grads)
    norms = [np.linalg.norm(np.float64(x), axis=(1, 2)) for x in (steps, adam)]
    np.testing.assert_allclose(*norms, rtol=1e-4)
    assert norms[1].min() > 0


@pytest.mark.parametrize("grafting", ["adam", None])
def test_shampoo_without_factors_is_adam(grafting):
    grads = gradients(6)
    adam = run(optax.scale_by_adam(0.9, 0.99), grads)
    tx = soap_optax.scale_by_shampoo(0.9, 0.99, grafting=grafting)
    np.testing.assert_allclose(run(tx, grads), adam, 1e-6)


@pytest.mark.parametrize("grafting", ["adam", None])
def test_shampoo_keeps_no_mean_without_factors(grafting):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    tx = soap_optax.scale_by_shampoo(grafting=grafting)
    state = tx.init(params)
    mu = state.preconditioner.inner_state.mu
    assert mu["w"].shape == (4, 3) and mu["b"] == optax.MaskedNode()
    _, after = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


def test_shampoo_with_nesterov_is_that_of_the_mean():
    """Without decay of the mean it is the newest gradient, with Nesterov or not."""
    grads = gradients(5, 5)
    options = {"grafting": None, "precondition_frequency": 3}
    for b1, is_same in ((0.0, True), (0.9, False)):
        plain, ahead = (
            run(soap_optax.scale_by_shampoo(b1, nesterov=nesterov, **options), grads)
            for nesterov in (False, True)
        )
        assert np.allclose(plain, ahead, rtol=1e-9) == is_same


@pytest.mark.parametrize("frequency", [1, 3])
def test_shampoo_with_a_tolerance_that_skips_nothing(frequency):
    grads = gradients(6, 5)
    options = {"grafting": None, "precondition_frequency": frequency}
    plain, never = (
        run(soap_optax.scale_by_shampoo(refresh_tolerance=tolerance, **options), grads)
        for tolerance in (None, 0.0)
    )
    np.testing.assert_allclose(never, plain, rtol=1e-9)


def test_shampoo_where_a_tolerance_keeps_the_eigenbasis():
    """Where the identity is one, refreshes give new eigenvalues for it."""
    gradient = jnp.diag(jnp.array([1.0, 2.0]))
    tx = soap_optax.scale_by_shampoo(
        power=0.25, grafting=None, refresh_tolerance=0.1, precondition_frequency=1
    )
    state = tx.init(gradient)
    for scale in (1.0, 1.0, 1e-3, 1e-3):
        update, state = jax.jit(tx.update)(scale * gradient, state)
        assert 0.1 < np.linalg.norm(update) < 10
    assert state.preconditioner.skipped[0] == 4


@pytest.mark.parametrize("power", [0.25, 0.4, 0.5])
@pytest.mark.parametrize("factors", ["shampoo", "kl"])
def test_shampoo_after_gradients_of_zero(power, factors):
    """Its roots follow the first gradient that is not zero (LoRA, unused experts)."""
    grads = gradients(5, 5)
    options = {"power": power, "factors": factors, "grafting": None}
    tx = soap_optax.scale_by_shampoo(**options)
    usual = run(tx, grads)
    for zeros in (1, 3):
        late = np.concatenate([np.zeros((zeros, 5, 5)), grads])
        steps = run(tx, late)
        np.testing.assert_array_equal(steps[:zeros], 0)
        assert np.linalg.norm(steps[zeros]) > 0.1
        # The eigenvectors wait for the next refresh.
        assert np.abs(steps).max() < 3 * np.abs(usual).max()


# --- eigenvalues between refreshes ---------------------------------------------------


class FirstOnly(soap_optax.RefreshMethod):
    """Decomposes at the first step, and fails later, so that eigenbases stay."""

    def refresh(self, factors, eigenbases, wanted, request):
        new = soap_optax.Eigh().refresh(factors, eigenbases, wanted, request)
        return new._replace(is_new=new.is_new & request.decompose)


def make_with(inner, **options):
    if inner == "adam":
        return soap_optax.scale_by_soap(**options)
    return soap_optax.scale_by_shampoo(grafting=None, **options)


@pytest.mark.parametrize("refresh", ["eigh", FirstOnly()])
@pytest.mark.parametrize(
    ("inner", "options"),
    [
        ("adam", {"basis": "previous"}),
        ("adam", {"basis": "current"}),
        ("shampoo", {}),
    ],
)
def test_eigenvalues_are_those_of_the_factors_at_every_step(inner, options, refresh):
    """In the eigenbases of the last refresh, of which there is one every three steps.

    Each gradient counts once, and one that is not finite does not count.
    """
    grads = gradients(5, 4)[:10]
    grads[7, 0, 0] = np.nan
    tx = make_with(inner, refresh=refresh, precondition_frequency=3, **options)
    state, update = tx.init(jnp.zeros((5, 4))), jax.jit(tx.update)
    for grad in grads:
        _, state = update(jnp.asarray(grad), state)
        own = getattr(state, "preconditioner", state)
        for factor, q, values in zip(
            own.factors, own.eigenbases, own.eigenvalues, strict=True
        ):
            quotients = np.einsum("ij,ik,kj->j", q, factor, q)
            np.testing.assert_allclose(values, quotients, rtol=1e-10, atol=1e-13)
            assert np.abs(quotients).max() > 0.1


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("frequency", [1, 4])
def test_eigenvalues_of_kl_are_those_of_the_reference(basis, frequency):
    """With the previous basis, factors are weighted by what has followed already."""
    options = {"factors": "kl", "basis": basis, "refresh": "eigh"}
    soap = reference.Soap((5, 4), frequency=frequency, **options)
    tx = soap_optax.scale_by_soap(precondition_frequency=frequency, **options)
    state, update = tx.init(jnp.zeros((5, 4))), jax.jit(tx.update)
    for grad in gradients(5, 4)[:10]:
        soap.step(grad)
        _, state = update(jnp.asarray(grad), state)
        for values, expected in zip(state.eigenvalues, soap.eigenvalues, strict=True):
            pair = np.sort(values), np.sort(expected)
            np.testing.assert_allclose(*pair, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"power": -1}, "power must be .*, got -1"),
        ({"grafting": "sgd"}, "grafting must be .*, got 'sgd'"),
        ({"eps": -1.0}, "eps must be .*, got -1"),
        ({"adam_eps": -1.0}, "adam_eps must be .*, got -1"),
        ({"block_size": 1}, "block_size must be .*, got 1"),
    ],
)
def test_bad_arguments_of_shampoo(options, message):
    with pytest.raises(ValueError, match=message):
        soap_optax.shampoo(1e-3, **options)


# --- the paper's Claim 1 -------------------------------------------------------------


def test_shampoo_of_power_one_half_is_adafactor_in_its_eigenbasis():
    """Idealized, i.e. of means over a data set of gradients: Claim 1 of the paper."""
    m, n = 6, 4
    rng = np.random.default_rng(0)
    left, right = (np.eye(k) + 0.3 * rng.normal(size=(k, k)) for k in (m, n))
    grads = jnp.asarray(left @ rng.normal(size=(50, m, n)) @ right)
    layout = training.layout((m, n))
    factors = [jnp.zeros((m, m)), jnp.zeros((n, n))]
    for t, grad in enumerate(grads):
        factors = _kronecker.accumulate(
            factors, [grad] * 2, layout, 1 / (t + 1), HIGHEST
        )
    eigh, request = soap_optax.Eigh(), RefreshRequest()
    new = [_stacks.refresh_one(f, jnp.eye(len(f)), eigh, request) for f in factors]
    bases = [x.eigenbases for x in new]
    trace = jnp.trace(factors[0])

    def project(grad):
        return _kronecker.project(grad, bases, layout, HIGHEST)

    squares = [_kronecker.mean_squares(project(grad), layout) for grad in grads]
    rows, columns = (sum(axis) / len(grads) for axis in zip(*squares, strict=True))
    values, vectors = np.linalg.eigh(np.kron(*factors) / trace)
    power_half = (vectors * values**-0.5) @ vectors.T
    for grad in grads[:3]:
        shampoo = (power_half @ np.ravel(grad)).reshape(m, n)
        root = _kronecker.rank_one([rows, columns], grad, layout)
        adafactor = _kronecker.project_back(
            project(grad) / root, bases, layout, HIGHEST
        )
        np.testing.assert_allclose(adafactor, shampoo, rtol=0, atol=1e-10)
        eigenvalues = [x.eigenvalues for x in new]
        scaled = _kronecker.root(project(grad), eigenvalues, layout, 0.5, 0.0)
        library = _kronecker.project_back(scaled, bases, layout, HIGHEST)
        np.testing.assert_allclose(library * trace**0.5, shampoo, rtol=0, atol=1e-10)
        assert np.abs(shampoo).max() > 0.1


# --- factorized and one-sided SOAP ---------------------------------------------------


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("one_sided", [False, True])
@pytest.mark.parametrize("shape", [(5, 5), (5, 3, 4)])
def test_factorized(basis, one_sided, shape):
    options = {"basis": basis, "one_sided": one_sided, "factorized": True}
    options |= {"initial_basis": "identity"}  # some first factors are singular
    grads = gradients(*shape)
    tx = soap_optax.scale_by_soap(
        eps=EPS, precondition_frequency=3, clip_update_rms=None, **options
    )
    assert_same(run(tx, grads), reference.run(grads, eps=EPS, frequency=3, **options))


def test_factorized_blocks_and_batches_are_parameters_of_their_own():
    grads = gradients(2, 4, 6)
    whole = soap_optax.scale_by_soap(
        factorized=True,
        block_size=2,
        dimension_numbers=soap_optax.DimensionNumbers((1, 2)),
        precondition_frequency=3,
    )
    one = soap_optax.scale_by_soap(factorized=True, precondition_frequency=3)
    steps = run(whole, grads)
    for layer, row, column in [(0, 0, 0), (1, 1, 2), (0, 1, 1)]:
        block = (
            slice(None),
            layer,
            slice(2 * row, 2 * row + 2),
            slice(2 * column, 2 * column + 2),
        )
        np.testing.assert_allclose(steps[block], run(one, grads[block]), atol=1e-9)


def test_factorized_without_factors_is_adam():
    grads = gradients(6)
    adam = run(optax.scale_by_adam(0.9, 0.99), grads)
    tx = soap_optax.scale_by_soap(0.9, 0.99, factorized=True, basis="current")
    np.testing.assert_allclose(run(tx, grads), adam, rtol=1e-14)


def entries(tree):
    return sum(x.size for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(
    ("make", "options", "formula"),
    [
        ("soap", {}, lambda m, n: 2 * m**2 + 2 * n**2 + 2 * m * n),
        ("soap", {"factorized": True}, lambda m, n: 2 * m**2 + 2 * n**2 + m * n),
        ("soap", {"one_sided": True}, lambda m, n: 2 * min(m, n) ** 2 + 2 * m * n),
        (
            "soap",
            {"one_sided": True, "factorized": True},
            lambda m, n: 2 * min(m, n) ** 2 + m * n,
        ),
        ("soap", {"block_size": 20}, lambda m, n: 2 * 2 * 20 * m * n // 20 + 2 * m * n),
        ("shampoo", {"grafting": None}, lambda m, n: 2 * m**2 + 2 * n**2 + m * n),
        ("shampoo", {}, lambda m, n: 2 * m**2 + 2 * n**2 + 3 * m * n),
    ],
)
def test_space(make, options, formula):
    """The paper's formulas (section 7.2), but for vectors and counts."""
    m, n = 60, 40
    tx = getattr(soap_optax, f"scale_by_{make}")(**options)
    state = jax.eval_shape(tx.init, jnp.zeros((m, n)))
    vectors = 4 * (m + n)
    assert 0 <= entries(state) - formula(m, n) <= vectors


# --- KL-SOAP -------------------------------------------------------------------------


@pytest.mark.parametrize("basis", ["previous", "current"])
@pytest.mark.parametrize("frequency", [*cases.slow(1), 4])
@pytest.mark.parametrize("shape", [(5, 5), (4, 5, 4)])
def test_kl(basis, frequency, shape):
    options = {"factors": "kl", "basis": basis, "refresh": "eigh"}
    grads = gradients(*shape)
    tx = soap_optax.scale_by_soap(
        eps=EPS, precondition_frequency=frequency, clip_update_rms=None, **options
    )
    expected = reference.run(grads, eps=EPS, frequency=frequency, **options)
    assert_same(run(tx, grads), expected)


def test_whitened_gram_matrices_are_weighted_by_the_inverse_of_the_other_factor():
    m, n = 6, 4
    rng = np.random.default_rng(0)
    grad = jnp.asarray(rng.normal(size=(m, n)))
    left, right = (np.cov(rng.normal(size=(k, 5 * k))) for k in (m, n))
    (e_left, q_left), (e_right, q_right) = map(np.linalg.eigh, (left, right))
    of_left, of_right = _kronecker.whiten(
        grad,
        [q_left, q_right],
        [jnp.asarray(e_left), jnp.asarray(e_right)],
        training.layout((m, n)),
        _kronecker.RoundOff(0.0),
        HIGHEST,
    )
    np.testing.assert_allclose(
        of_left @ of_left.T, grad @ np.linalg.inv(right) @ grad.T / n, rtol=1e-10
    )
    np.testing.assert_allclose(
        of_right.T @ of_right, grad.T @ np.linalg.inv(left) @ grad / m, rtol=1e-10
    )


@pytest.mark.parametrize("frequency", [1, *cases.slow(10), 100])
@pytest.mark.parametrize("scale", [1e-6, *cases.slow(1.0), 1e6])
def test_kl_factors_find_the_covariance(frequency, scale):
    """From the first step on, for gradients of any size and at any frequency.

    kron(L, R) tends to the covariance of the gradients, if that is such a product.
    """
    m, n = 8, 6
    rng = np.random.default_rng(0)
    left, right = (np.cov(rng.normal(size=(k, 3 * k))) for k in (m, n))
    roots = [np.linalg.cholesky(x) for x in (left, right)]
    tx = soap_optax.scale_by_soap(
        factors="kl", shampoo_beta=0.99, precondition_frequency=frequency
    )
    state, update = tx.init(jnp.zeros((m, n))), jax.jit(tx.update)
    expected = scale**2 * np.kron(left, right)
    for step in range(600):
        grad = scale * roots[0] @ rng.normal(size=(m, n)) @ roots[1].T
        _, state = update(jnp.asarray(grad), state)
        if step in (0, 5, 50, 599):
            ratio = np.trace(np.kron(*state.factors)) / np.trace(expected)
            assert 1 / 30 < ratio < 30, (step, ratio)
    found = np.kron(*state.factors)
    assert np.linalg.norm(found - expected) < 0.35 * np.linalg.norm(expected)


def test_kl_with_gradients_of_zero_or_new_directions_stays_finite():
    tx = soap_optax.scale_by_soap(factors="kl", precondition_frequency=3)
    rng = np.random.default_rng(0)
    state = tx.init(jnp.zeros((6, 4), jnp.float32))
    update = jax.jit(tx.update)
    for step in range(40):
        grad = rng.normal(size=(6, 4)) * (step > 3)
        grad[3:] *= step > 20  # rows that had no gradient
        updates, state = update(jnp.asarray(grad, jnp.float32), state)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((updates, state)))
        assert np.sqrt(np.mean(np.square(updates))) < 5
    assert math.prod(f.shape[0] for f in state.factors) == 24
