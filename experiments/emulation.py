"""Products of TF32 and bfloat16 on a CPU, which has none of its own.

Within `on_cpu()` these precisions can be used on a CPU, where JAX would refuse them:
operands are rounded to the nearest number of so many digits, ties to even, and
multiplied in float32. An operand may be a sum of terms, each of which continues the
digits of those before it; products of terms that are below round-off are left out. So
accelerators multiply, too, and sum in float32, in another order.
"""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

# JAX lets one replace how a primitive is lowered, but has no name for what was there.
from jax._src.lax.lax import _dot_general_lower
from jax.interpreters import mlir


class Operands(NamedTuple):
    """The digits of a term after the first, in bits, and how many terms there are."""

    bits: int
    terms: int = 1


EMULATED = {
    "TF32_TF32_F32": Operands(10),
    "TF32_TF32_F32_X3": Operands(10, 2),
    "BF16_BF16_F32": Operands(7),
    "BF16_BF16_F32_X3": Operands(7, 2),
    "BF16_BF16_F32_X6": Operands(7, 3),
}
"""By the names of `jax.lax.DotAlgorithmPreset`, which count the products of terms."""


def split(array: jax.Array, operands: Operands) -> list[jax.Array]:
    """Terms that sum up to the array, the largest first."""
    terms = []
    for _ in range(operands.terms):
        terms.append(lax.reduce_precision(array, 8, operands.bits))
        array = array - terms[-1]
    return terms


def rounded_product(
    left: jax.Array, right: jax.Array, operands: Operands, **params: Any
) -> jax.Array:
    """The products of all terms that matter, summed from the smallest on."""
    multiply = functools.partial(
        lax.dot_general_p.bind, precision=(lax.Precision.HIGHEST,) * 2, **params
    )
    of_left, of_right = split(left, operands), split(right, operands)
    total = jnp.zeros([], left.dtype)
    for order in reversed(range(operands.terms)):
        for i in range(order + 1):
            total = total + multiply(of_left[i], of_right[order - i])
    return total


def lower(context: Any, left: Any, right: Any, *, precision: Any, **params: Any) -> Any:
    operands = EMULATED.get(getattr(precision, "name", ""))
    if operands is None:
        return lower_as_jax(context, left, right, precision=precision, **params)
    product = functools.partial(rounded_product, operands=operands, **params)
    return mlir.lower_fun(product, multiple_results=False)(context, left, right)


lower_as_jax = functools.partial(_dot_general_lower, platform="cpu")


@contextlib.contextmanager
def on_cpu() -> Iterator[None]:
    """Lets programs that are compiled meanwhile have the precisions in `EMULATED`."""
    mlir.register_lowering(lax.dot_general_p, lower, platform="cpu")
    try:
        yield
    finally:
        mlir.register_lowering(lax.dot_general_p, lower_as_jax, platform="cpu")
