"""Checks of public arguments: one rule, one style of error."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def require(name: str, value: Any, rule: str, holds: bool) -> None:
    """Raises a `ValueError` naming argument, rule and value unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def require_number(name: str, value: Any, low: float, below: float) -> None:
    """Requires a number in [low, below). Traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    is_number = isinstance(value, (int, float, np.generic, np.ndarray, jax.Array))
    number = is_number and not isinstance(value, bool) and np.ndim(value) == 0
    top = "" if below == np.inf else f" and below {below:g}"
    rule = f"a finite number, at least {low:g}{top}"
    require(name, value, rule, bool(number and low <= value < below))


def require_positive(name: str, value: Any) -> None:
    """Requires a finite number above 0. Traced values pass."""
    try:
        require_number(name, value, 0, np.inf)
        holds = isinstance(value, jax.core.Tracer) or value > 0
    except ValueError:
        holds = False
    require(name, value, "a finite number above 0", bool(holds))


def require_number_or_schedule(name: str, value: Any, low: float, below: float) -> None:
    """Requires a number in [low, below) or a callable."""
    if not callable(value):
        require_number(name, value, low, below)


def require_static(name: str, value: Any) -> None:
    """Requires that `value` is not an array, as `optax.inject_hyperparams` makes it."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be static, because it fixes shapes or dtypes, got an array; "
            "optax.inject_hyperparams leaves it alone when it is named in "
            f"static_args=({name!r},)"
        )


def require_int(name: str, value: Any, low: int) -> None:
    """Requires a static integer of at least `low`."""
    require_static(name, value)
    require_traceable_int(name, value, low)


def require_traceable_int(name: str, value: Any, low: int) -> None:
    """Requires an integer of at least `low`. Traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
        value = int(value)
    integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    require(name, value, f"an integer of at least {low}", integer and value >= low)


def require_precision(name: str, value: Any) -> None:
    """Requires what JAX takes for the precision of a matrix product."""
    matrix = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=value), matrix)
    except (TypeError, ValueError):
        require(name, value, "a precision of jax.numpy.matmul", False)


def require_choice(name: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Requires one of `choices`."""
    listed = " or ".join(repr(choice) for choice in choices)
    require(name, value, listed, any(value is c or value == c for c in choices))


def require_dtype(name: str, value: Any) -> None:
    """Requires None or a real floating-point dtype."""
    require_static(name, value)
    if value is None:
        return
    try:
        floating = jnp.issubdtype(value, jnp.floating)
    except TypeError:
        floating = False
    require(name, value, "None or a floating-point dtype", floating)
