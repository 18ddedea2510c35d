"""The floating-point dtypes in which the library computes."""

from typing import Any

import jax
import jax.numpy as jnp


def widest(*dtypes: Any) -> Any:
    """The floating-point dtype with the most bits, found without dtype promotion."""
    return max((jnp.dtype(d) for d in dtypes), key=lambda d: jnp.finfo(d).bits)


def at_least_float32(array: jax.Array) -> jax.Array:
    """Widens an array to float32 unless its dtype has 32 bits or more."""
    return array.astype(widest(jnp.float32, array.dtype))
