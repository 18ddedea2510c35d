"""Rules for public arguments, and one style of error.

A *rule* is a function of an argument's name and value. If the value breaks the rule, it
raises a `ValueError` that names the argument, the rule and the value.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Rule = Callable[[str, Any], None]


def require(name: str, value: Any, rule: str, holds: bool) -> None:
    """Raises a `ValueError` with argument, rule and value unless the rule holds."""
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def check(**arguments: tuple[Any, Rule]) -> None:
    """Checks each named argument, given as a pair of its value and its rule."""
    for name, (value, rule) in arguments.items():
        rule(name, value)


def optional(rule: Rule) -> Rule:
    """A rule that None fulfils, and every value that fulfils `rule`."""

    def check_unless_none(name: str, value: Any) -> None:
        if value is not None:
            rule(name, value)

    return check_unless_none


def or_schedule(rule: Rule) -> Rule:
    """A rule that every callable fulfils, and every value that fulfils `rule`."""

    def check_unless_callable(name: str, value: Any) -> None:
        if not callable(value):
            rule(name, value)

    return check_unless_callable


def _is_number(value: Any) -> bool:
    kinds = (int, float, np.generic, np.ndarray, jax.Array)
    is_number = isinstance(value, kinds) and not isinstance(value, bool)
    return is_number and np.ndim(value) == 0


def number(low: float, below: float = np.inf) -> Rule:
    """A rule for finite numbers in [low, below). Traced values pass."""

    def check_number(name: str, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            return
        least = "" if low == -np.inf else f", at least {low:g}"
        most = "" if below == np.inf else f" and below {below:g}"
        holds = _is_number(value) and -np.inf < value < np.inf and low <= value < below
        require(name, value, f"a finite number{least}{most}", bool(holds))

    return check_number


def positive(name: str, value: Any) -> None:
    """A rule for finite numbers above 0. Traced values pass."""
    if isinstance(value, jax.core.Tracer):
        return
    holds = _is_number(value) and 0 < value < np.inf
    require(name, value, "a finite number above 0", bool(holds))


learning_rate = or_schedule(number(-np.inf))
weight_decay = or_schedule(number(0))


def static(name: str, value: Any) -> None:
    """A rule against arrays, which `optax.inject_hyperparams` makes of numbers."""
    if isinstance(value, jax.Array):
        raise ValueError(
            f"{name} must be static, because it fixes shapes or dtypes, got an array; "
            "optax.inject_hyperparams leaves it alone when it is named in "
            f"static_args=({name!r},)"
        )


def integer(low: int) -> Rule:
    """A rule for static integers of at least `low`."""

    def check_integer(name: str, value: Any) -> None:
        static(name, value)
        traceable_integer(low)(name, value)

    return check_integer


def traceable_integer(low: int) -> Rule:
    """A rule for integers of at least `low`. Traced values pass."""

    def check_integer(name: str, value: Any) -> None:
        if isinstance(value, jax.core.Tracer):
            return
        if isinstance(value, jax.Array) and jnp.issubdtype(value.dtype, jnp.integer):
            value = int(value)
        is_integer = isinstance(value, (int, np.integer))
        holds = is_integer and not isinstance(value, bool) and value >= low
        require(name, value, f"an integer of at least {low}", holds)

    return check_integer


def choice(*choices: Any) -> Rule:
    """A rule for values that are one of `choices`."""

    def check_choice(name: str, value: Any) -> None:
        listed = " or ".join(repr(choice) for choice in choices)
        is_array = isinstance(value, (np.ndarray, jax.Array))
        holds = not is_array and any(value is c or value == c for c in choices)
        require(name, value, listed, holds)

    return check_choice


def made_by_init(kind: type) -> Rule:
    """A rule for states: they are of the class of those that `init` makes."""

    def check_state(name: str, value: Any) -> None:
        rule = f"of type {kind.__name__}, as init makes it"
        require(name, type(value).__name__, rule, isinstance(value, kind))

    return check_state


flag = choice(True, False)


def precision(name: str, value: Any) -> None:
    """A rule for what JAX takes as the precision of a matrix product."""
    matrix = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda x: jnp.matmul(x, x, precision=value), matrix)
    except (TypeError, ValueError):
        require(name, value, "a precision of jax.numpy.matmul", False)


def floating_dtype(name: str, value: Any) -> None:
    """A rule for real floating-point dtypes of at least 16 bits. Arrays break it."""
    rule = "None or a floating-point dtype of at least 16 bits"
    require(name, value, rule, _bits(name, value) >= 16)


def _bits(name: str, value: Any) -> int:
    """The bits of a real floating-point dtype, or 0 for anything else."""
    static(name, value)
    try:
        return jnp.finfo(value).bits if jnp.issubdtype(value, jnp.floating) else 0
    except TypeError:
        return 0


def slowest_mean(name: str, value: Any, dtype: Any, of: str) -> None:
    """A rule for the decay of a mean that is stored in a dtype, the argument `of`.

    A mean that moves by less than the rounding of its dtype stays where it is. Traced
    values and a dtype of None pass.
    """
    if dtype is None or isinstance(value, jax.core.Tracer):
        return
    most = 1 - float(jnp.finfo(dtype).eps)
    rule = (
        f"at most {most:.9g} with {of}={jnp.dtype(dtype).name}, because a slower mean "
        "would not move in this dtype"
    )
    require(name, value, rule, bool(value <= most))


def strings(name: str, value: Any) -> None:
    """A rule for a sequence of names, as of fields or of mesh axes."""
    is_sequence = isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    holds = is_sequence and all(isinstance(entry, str) for entry in value)
    require(name, value, "a sequence of names", holds)


def tree_or_function(kind: str) -> Rule:
    """A rule for a tree of something, or a function that makes it from parameters."""

    def check_tree(name: str, value: Any) -> None:
        static(name, value)
        is_tree = not isinstance(value, (str, int, float))
        rule = f"{kind}, a tree of them, a callable or None"
        require(name, value, rule, is_tree)

    return check_tree
