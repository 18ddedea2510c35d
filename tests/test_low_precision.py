"""Gradients, factors and products with few digits: round-off, and means that move."""

import re

import cases
import emulation
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reliability
import training

import soap_optax
from soap_optax import _kronecker
from soap_optax._dtypes import coarsest_eps
from soap_optax._kronecker import RoundOff
from soap_optax.refresh import METHODS

HIGHEST = jax.lax.Precision.HIGHEST
EPS = {"float32": 2.0**-23, "bfloat16": 2.0**-7, "tensorfloat32": 2.0**-10}


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# --- which rounding is in play -------------------------------------------------------


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], EPS["float32"]),
        (["float32", "bfloat16"], EPS["bfloat16"]),
        (["float64", "float32"], EPS["float32"]),
        (["float32", "float16"], EPS["bfloat16"]),
    ],
)
def test_the_coarsest_dtype_counts(dtypes, expected):
    assert coarsest_eps(*map(jnp.dtype, dtypes), precisions=[HIGHEST]) == expected


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("highest", EPS["float32"]),
        ("F32_F32_F32", EPS["float32"]),
        ("BF16_BF16_F32", EPS["bfloat16"]),
        ("BF16_BF16_F32_X3", 2.0**-15),
        ("BF16_BF16_F32_X6", EPS["float32"]),
        ("TF32_TF32_F32", EPS["tensorfloat32"]),
        ("TF32_TF32_F32_X3", 2.0**-21),
        (
            jax.lax.DotAlgorithm(jnp.bfloat16, jnp.bfloat16, jnp.float32),
            EPS["bfloat16"],
        ),
    ],
    ids=str,
)
def test_the_algorithm_of_products_counts(precision, expected):
    assert coarsest_eps(jnp.float32, precisions=[precision]) == expected


@pytest.mark.parametrize("precision", [None, "default", ("highest", "high")])
def test_a_platform_that_does_not_round(precision):
    """On CPU no precision of a product rounds float32 or float64."""
    found = coarsest_eps(jnp.float32, precisions=[precision])
    assert found == EPS["float32"]
    assert coarsest_eps(jnp.float64, precisions=[precision]) == 2.0**-52


@pytest.mark.parametrize(
    ("platform", "precision", "expected"),
    [
        ("tpu", "default", EPS["bfloat16"]),
        ("tpu", "high", 2.0**-15),
        ("cuda", "default", EPS["tensorfloat32"]),
        ("cuda", "high", EPS["tensorfloat32"]),
        ("cpu", "default", EPS["float32"]),
    ],
)
def test_the_platform_that_computes_counts(platform, precision, expected):
    """It is that of the compiled program, which need not be that of the process."""
    program = jax.jit(lambda: coarsest_eps(jnp.float32, precisions=[precision]))
    text = program.trace().lower(lowering_platforms=(platform,)).as_text()
    [number] = re.findall(r"dense<(\S*)> : tensor<f32>", text)
    assert np.float32(number) == np.float32(expected)


# --- directions without gradient -----------------------------------------------------

LOW = {
    "bfloat16 gradients": ("bfloat16", None),
    "float16 gradients": ("float16", None),
    "bfloat16 eigenbases": ("float32", jnp.bfloat16),
    "float16 eigenbases": ("float32", jnp.float16),
    "all in bfloat16": ("bfloat16", jnp.bfloat16),
}


def precisions(**options):
    """Those of all products in the program of an update."""
    tx, params = soap_optax.soap(1e-2, **options), jnp.ones((4, 3))
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return set(re.findall(r"Precision\.(\w+)", str(jaxpr)))


def test_products_of_refreshes_alone_are_the_most_precise_there_are():
    assert precisions(precision="highest") == {"HIGHEST"}
    assert precisions() == {"HIGH", "HIGHEST"}
    assert precisions(refresh_precision="default") == {"DEFAULT", "HIGH", "HIGHEST"}


@pytest.mark.parametrize("scale", [1, *cases.slow(1e-5)])
@pytest.mark.parametrize(("gradients", "precond_dtype"), LOW.values(), ids=LOW)
def test_no_steps_into_the_null_space(gradients, precond_dtype, scale):
    """Most of the published algorithm's update is there."""
    low = {"dtype": gradients, "precond_dtype": precond_dtype}
    shares = reliability.null_shares(64, 4, scale, None, **low)
    assert np.median(shares) <= 0.005
    if scale == 1:
        assert np.median(reliability.null_shares(64, 4, scale, 0, **low)) > 0.7


@pytest.mark.parametrize(
    "options",
    [
        {"precondition_frequency": 1},
        {"factors": "kl"},
        *cases.slow(
            {"refresh": "eigh"}, {"refresh": "cholesky_qr"}, {"basis": "current"}
        ),
    ],
    ids=str,
)
def test_no_steps_into_the_null_space_with_options(options):
    low = {"dtype": "bfloat16", "precond_dtype": jnp.bfloat16, **options}
    assert np.median(reliability.null_shares(64, 4, 1e-3, None, **low)) <= 0.005


@pytest.mark.parametrize(("dtype", "first"), [(None, 10), (jnp.bfloat16, 0)])
def test_a_basis_that_has_to_be_found_first(dtype, first):
    """A badly conditioned first gradient; in float32 the second refresh finds it."""
    shares = reliability.null_shares(256, 16, 1, None, precond_dtype=dtype)
    assert np.max(shares[first:]) <= 0.003


@pytest.mark.parametrize("products", ["all", *cases.slow("of steps", "of refreshes")])
@pytest.mark.parametrize("precision", ["TF32_TF32_F32", "BF16_BF16_F32"])
def test_no_steps_into_the_null_space_with_rounded_products(precision, products):
    low = {"dtype": "float32"}
    if products != "of refreshes":
        low["precision"] = precision
    if products != "of steps":
        low["refresh_precision"] = precision
    with emulation.on_cpu():
        shares, undamped = (
            reliability.null_shares(64, 4, 1, rcond, **low) for rcond in (None, 0)
        )
    assert np.median(shares) <= 0.005
    assert np.median(undamped) > 0.5


def test_damping_of_coarse_round_off():
    """It begins where rounding would put the energy of an even spread."""
    plan = training.layout((3, 2))
    round_off = RoundOff.of(jnp.float32, EPS["bfloat16"])
    share = 5 * EPS["bfloat16"] ** 2 / 2
    eigenvalues = [
        jnp.array([1.0, 0.5 - share, share], jnp.float32),
        jnp.ones(2, jnp.float32),
    ]
    damped = _kronecker.damp(
        jnp.ones((3, 2), jnp.float32), eigenvalues, plan, round_off
    )
    np.testing.assert_allclose(damped[:2], 1, rtol=1e-6)
    np.testing.assert_allclose(damped[2], 0.5, rtol=1e-3)


def test_float32_is_as_before():
    round_off = RoundOff.of(jnp.float32, EPS["float32"])
    assert round_off == RoundOff(0.01 * EPS["float32"], 0.0)
    ratios = jnp.ones(3, jnp.float32)
    assert round_off.share(ratios) == np.float32(0.01 * EPS["float32"])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_null_directions_of_stored_eigenbases(method, dtype):
    """They stay null, although a coarsely rounded column has a part of all others."""
    basis = np.linalg.qr(normal(0, 32, 32))[0]
    factor = jnp.asarray((basis[:, :3] * [4, 2, 1]) @ basis[:, :3].T)[None]
    start = jnp.asarray(basis + 0.02 * normal(1, 32, 32))[None]
    eigenbases = jnp.linalg.qr(start).Q.astype(dtype)
    new = METHODS[method].refresh(
        factor, eigenbases, jnp.ones(1, bool), soap_optax.RefreshRequest()
    )
    assert new.is_new.all()
    assert np.sort(new.eigenvalues[0])[-3:] == pytest.approx([1, 2, 4], rel=0.1)
    assert np.sort(new.eigenvalues[0])[:-3].max() <= 1e-4


# --- the first update ----------------------------------------------------------------


def test_the_first_update_with_stored_bfloat16():
    """Another rounding of a repeated gradient gives the same update, up to a little."""
    gradient = jnp.asarray(normal(0, 64, 64)).astype(jnp.bfloat16)
    bits = jax.lax.bitcast_convert_type(gradient, jnp.uint16)
    other = jax.lax.bitcast_convert_type(bits + jnp.uint16(1), jnp.bfloat16)
    tx = soap_optax.scale_by_soap(precond_dtype=jnp.bfloat16)
    updates = []
    for one in (gradient, other):
        state, update = tx.init(one.astype(jnp.float32)), jax.jit(tx.update)
        for _ in range(2):
            step, state = update(one.astype(jnp.float32), state)
        updates.append(np.asarray(step) / np.linalg.norm(step))
    assert np.sum(updates[0] * updates[1]) > 0.95


# --- factors keep their digits --------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_factors_follow_slow_means(dtype):
    """Eigenbases with few digits take none from factors, which a step hardly moves."""
    gradients = [normal(t, 12, 16) for t in range(200)]
    factors = []
    for precond_dtype in (dtype, None):
        tx = soap_optax.scale_by_soap(b2=0.999, precond_dtype=precond_dtype)
        state = tx.init(jnp.zeros((12, 16), jnp.float32))
        for gradient in gradients:
            state = jax.jit(tx.update)(jnp.asarray(gradient, jnp.float32), state)[1]
        factors.append(state.factors[0])
    assert state.eigenbases[0].dtype == jnp.float32
    np.testing.assert_array_equal(*factors)


# --- what is refused -----------------------------------------------------------------

MAKE = [soap_optax.soap, soap_optax.shampoo]


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("name", ["mu_dtype", "precond_dtype"])
def test_moments_and_eigenbases_need_16_bits(make, name):
    message = f"^{name} must be None or a floating-point dtype of at least 16 bits"
    with pytest.raises(ValueError, match=message):
        make(1e-3, **{name: jnp.float8_e4m3fn})
    make(1e-3, **{name: jnp.float16})


@pytest.mark.parametrize("make", MAKE)
def test_first_moments_that_could_not_move(make):
    message = "^b1 must be at most 0.9921875 with mu_dtype=bfloat16, .* got 0.995"
    with pytest.raises(ValueError, match=message):
        make(1e-3, b1=0.995, mu_dtype=jnp.bfloat16)
    make(1e-3, b1=0.99, mu_dtype=jnp.bfloat16)
    make(1e-3, b1=0.9999)


# --- in chains -----------------------------------------------------------------------


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_injected_hyperparameters_of_low_precision_parameters(make, dtype):
    """An epsilon that the dtype rounds to 0 divides no 0 by 0."""
    params = {"w": jnp.ones((4, 3), dtype), "v": jnp.zeros(3, dtype)}
    gradients = jax.tree.map(jnp.zeros_like, params)
    gradients["w"] = gradients["w"].at[0].set(1)
    tx = optax.inject_hyperparams(make)(0.1)
    state, update = tx.init(params), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(gradients, state, params)
    assert all(np.isfinite(x.astype(jnp.float32)).all() for x in updates.values())
    assert np.any(updates["w"][0]) and not np.any(updates["v"])


def test_mixed_dtypes_of_gradients():
    """Each parameter has the thresholds of its own gradient."""
    left, right = normal(0, 16, 2), normal(1, 2, 16)
    gradients = [left @ normal(i, 2, 2) @ right for i in range(2, 8)]
    tx = soap_optax.scale_by_soap(precondition_frequency=2)

    def last(cast):
        trees = [{"a": jnp.asarray(g), "b": cast(jnp.asarray(g))} for g in gradients]
        state, update = tx.init(trees[0]), jax.jit(tx.update)
        for tree in trees:
            updates, state = update(tree, state)
        return updates

    mixed = last(lambda g: g.astype(jnp.bfloat16))
    np.testing.assert_allclose(mixed["a"], last(lambda g: g)["a"], rtol=1e-6, atol=1e-7)
    span = np.linalg.qr(left)[0]
    step = np.asarray(mixed["b"], np.float64)
    outside = np.linalg.norm(step - span @ (span.T @ step)) / np.linalg.norm(step)
    assert outside < 0.01


def test_shampoo_sees_the_dtype_of_gradients():
    """It widens them itself, and damps their round-off all the same."""
    options = {"make": soap_optax.scale_by_shampoo, "dtype": "bfloat16"}
    assert np.median(reliability.null_shares(64, 4, 1, None, **options)) <= 0.005
