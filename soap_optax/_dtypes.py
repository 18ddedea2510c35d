"""The floating-point dtypes in which the library computes, and their round-off."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

# The machine epsilon of what each platform makes of float32 operands of a product, as
# the documentation of `jax.lax.Precision` says. With `HIGH` a TPU takes two terms of
# bfloat16 for each operand.
_BFLOAT16, _TENSORFLOAT32 = 2.0**-7, 2.0**-10
_EPS_OF_PRECISION = {
    jax.lax.Precision.DEFAULT: {"tpu": _BFLOAT16, "default": _TENSORFLOAT32},
    jax.lax.Precision.HIGH: {"tpu": 2.0**-15, "default": _TENSORFLOAT32},
}
# The same of the algorithms of `jax.lax.DotAlgorithmPreset`, by how their names begin,
# and the number of terms that stand for each operand, by how their names end.
_EPS_OF_ALGORITHM = {
    "BF16": _BFLOAT16,
    "F16": 2.0**-10,
    "TF32": _TENSORFLOAT32,
    "ANY_F8": 0.25,
}
_TERMS = {"X3": 2, "X6": 3, "X9": 3}


def widest(*dtypes: Any) -> Any:
    """The floating-point dtype with the most bits, found without dtype promotion."""
    return max((jnp.dtype(d) for d in dtypes), key=lambda d: jnp.finfo(d).bits)


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widens an array to float32 unless its dtype has 32 bits or more."""
    return array.astype(widest(jnp.float32, array.dtype))


def coarsest_eps(*dtypes: Any, precisions: Sequence[Any]) -> Any:
    """The machine epsilon of the coarsest rounding in play.

    Args:
      *dtypes: dtypes to which arrays are rounded. Float16 counts as bfloat16, because
        numbers below 6e-5 have as few digits there.
      precisions: precisions of the products of these arrays, as in `jax.numpy.matmul`.

    Returns:
      A number, or a scalar array where it depends on the platform that computes.
    """
    has_float16 = any(dtype == jnp.float16 for dtype in dtypes)
    least = _BFLOAT16 if has_float16 else 0.0
    eps = max(least, *(float(jnp.finfo(dtype).eps) for dtype in dtypes))
    dtype = widest(jnp.float32, *dtypes)
    of_products = [_eps_of_operands(dtype, precision) for precision in precisions]
    names = dict.fromkeys(name for of_one in of_products for name in of_one)
    of_platform = {
        name: max(eps, *(of_one.get(name, of_one["default"]) for of_one in of_products))
        for name in names
    }
    if len({*of_platform.values()}) == 1:
        return of_platform["default"]
    return _of_platform(tuple(of_platform.items()))


@functools.partial(jax.jit, static_argnums=0, inline=True)
def _of_platform(numbers: tuple[tuple[str, float], ...]) -> jax.Array:
    """The number of the platform that computes, in one program for all eager steps."""
    branches: dict[str, Any] = {
        name: functools.partial(jnp.asarray, number, jnp.float32)
        for name, number in numbers
    }
    return jax.lax.platform_dependent(**branches)


def _eps_of_operands(dtype: Any, precision: Any) -> dict[str, float]:
    """The machine epsilon of the operands of a product in a dtype, by platform.

    It is 0 where operands are taken as they are.
    """
    if precision is jax.lax.Precision.HIGHEST:
        return {"default": 0.0}
    found = precision
    if not isinstance(precision, jax.lax.Precision):  # JAX knows what it stands for.
        matrix = jax.ShapeDtypeStruct((1, 1), dtype)
        product = jax.make_jaxpr(lambda x: jax.lax.dot(x, x, precision=precision))
        found = product(matrix).eqns[0].params["precision"]
    if isinstance(found, jax.lax.DotAlgorithm):
        eps = float(jnp.finfo(found.lhs_precision_type).eps)
        return {"default": _eps_of_terms(eps, found.lhs_component_count)}
    if isinstance(found, tuple):  # There is one for each operand.
        found = min(found, key=lambda precision: precision.value)
    name = "DEFAULT" if found is None else found.name
    if isinstance(found, jax.lax.DotAlgorithmPreset) and name != "DEFAULT":
        begins = (e for kind, e in _EPS_OF_ALGORITHM.items() if name.startswith(kind))
        eps = next(begins, 0.0)
        return {"default": _eps_of_terms(eps, _TERMS.get(name[-2:], 1))}
    # Other precisions concern float32 only, and a CPU computes as with `HIGHEST`.
    if name == "HIGHEST" or dtype != jnp.float32:
        return {"default": 0.0}
    return {"cpu": 0.0, **_EPS_OF_PRECISION[jax.lax.Precision[name]]}


def _eps_of_terms(eps: float, terms: int) -> float:
    """The machine epsilon of a sum of terms, each of which continues the digits."""
    return 2 * (eps / 2) ** terms
