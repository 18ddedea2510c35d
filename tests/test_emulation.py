"""Products of TF32 and bfloat16 on a CPU."""

import emulation
import jax
import jax.numpy as jnp
import numpy as np
import precisions
import pytest

RNG = np.random.default_rng(0)
LEFT = RNG.normal(size=(5, 40)).astype(np.float32)
RIGHT = RNG.normal(size=(40, 3)).astype(np.float32)
EXACT = LEFT.astype(np.float64) @ RIGHT.astype(np.float64)


def product(precision):
    def multiply(left, right):  # A new function is not compiled yet.
        return jnp.matmul(left, right, precision=precision)

    return np.asarray(jax.jit(multiply)(LEFT, RIGHT))


def error(precision):
    with emulation.on_cpu():
        found = product(precision)
    assert found.dtype == np.float32
    return np.abs(found - EXACT).max() / np.abs(EXACT).max()


def test_bfloat16_products_have_bfloat16_operands():
    with emulation.on_cpu():
        found = product("BF16_BF16_F32")
    left, right = (x.astype(jnp.bfloat16).astype(np.float64) for x in (LEFT, RIGHT))
    np.testing.assert_allclose(found, left @ right, rtol=1e-5, atol=1e-6)


def test_tf32_operands_have_ten_bits_after_the_first():
    x = np.float32(1 + np.array([2.0**-10, 2.0**-11, 3 * 2.0**-11, 2.0**-12]))
    (rounded,) = emulation.split(x, emulation.EMULATED["TF32_TF32_F32"])
    even = 1 + np.array([2.0**-10, 0, 2.0**-9, 0])  # Ties go to even numbers.
    np.testing.assert_array_equal(rounded, even.astype(np.float32))


@pytest.mark.parametrize("name", emulation.EMULATED)
def test_each_term_continues_the_digits(name):
    operands = emulation.EMULATED[name]
    rest = np.abs(LEFT - sum(emulation.split(LEFT, operands)))
    digits = operands.terms * (operands.bits + 1)
    assert (rest <= np.abs(LEFT) * 2.0**-digits).all()


@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("BF16_BF16_F32", 1e-2),
        ("TF32_TF32_F32", 1e-3),
        ("BF16_BF16_F32_X3", 3e-5),
        ("TF32_TF32_F32_X3", 1e-6),
        ("BF16_BF16_F32_X6", 1e-6),
    ],
)
def test_more_digits_are_nearer_to_the_product(name, bound):
    assert error(name) < bound


def test_other_products_and_programs_are_as_they_were():
    before = product("highest")
    with emulation.on_cpu():
        np.testing.assert_array_equal(product("highest"), before)
    np.testing.assert_array_equal(product("highest"), before)
    with pytest.raises(Exception, match="TF32_TF32_F32' is not supported"):
        product("TF32_TF32_F32")


def test_it_works_under_vmap_and_grad():
    def sum_of_product(left):
        return jnp.sum(jnp.matmul(left, RIGHT, precision="BF16_BF16_F32"))

    with emulation.on_cpu():
        gradient = jax.jit(jax.vmap(jax.grad(sum_of_product)))(LEFT[None])[0]
    rounded = RIGHT.astype(jnp.bfloat16).astype(np.float64)
    expected = np.broadcast_to(rounded.sum(1), LEFT.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_errors_of_updates():
    experiment = precisions.Experiment(
        steps=40, optimizers=("SOAP, f=10",), precisions=("BF16_BF16_F32",)
    )
    with jax.enable_x64(False), emulation.on_cpu():
        rows = list(precisions.rows(experiment))
    errors = {
        (row["precision"], row["refresh_precision"]): row["error of an update"]
        for row in rows
    }
    assert errors["float64", "float64"] == 0
    assert 0 < errors["highest", "highest"] < 0.01
    # With the basis of the step before, the refresh comes after the update.
    of_refresh = errors["BF16_BF16_F32", "BF16_BF16_F32"]
    assert 0.01 < errors["BF16_BF16_F32", "highest"] == of_refresh < 0.2
