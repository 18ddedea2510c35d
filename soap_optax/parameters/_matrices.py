"""Dimension numbers by the names of parameters."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments
from soap_optax.parameters import _tree
from soap_optax.parameters._layout import DimensionNumbers

_LAST_TWO = DimensionNumbers((-2, -1))


def matrices(
    exclude: str | Sequence[str] = (), include: str | Sequence[str] | None = None
) -> Callable[[Any], Any]:
    r"""Makes `dimension_numbers` that take the last two axes as matrices, by names.

    The axes before the last two are batch axes, as for stacked layers, experts or
    heads: each index along them has factors of its own. Parameters of fewer than two
    axes and excluded parameters have no factors, so that SOAP is Adam for them. Leave
    the embedding and the head of a language model to Adam, as it is usual with Muon.

    Patterns are regular expressions that are searched for in the path of a parameter,
    whose names are joined by `/`, as in `params/layers_0/attention/query/kernel`.

    Args:
      exclude: a pattern, or a sequence of patterns, for parameters without factors.
      include: the same for parameters with factors. None means all parameters.

    Returns:
      A function from the parameters to a tree like them, with `DimensionNumbers` for
      matrices and None for all others, for the option `dimension_numbers` of every
      function of this library. It raises a `ValueError` for a pattern that matches no
      parameter, naming the pattern and listing the paths. In an `optax.partition` and
      under `optax.masked` there is no such error, because they hide parameters, which a
      pattern may be for.

    Raises:
      ValueError: for a pattern that is no regular expression. The function also raises
        it where `optax.inject_hyperparams` takes it for a schedule; name the option in
        `static_args` there.

    Examples:
      >>> import jax.numpy as jnp, soap_optax
      >>> numbers = soap_optax.matrices(exclude=("embed", r"^head$"))
      >>> params = {"embed": jnp.ones((8, 4)), "layers": {"w": jnp.ones((3, 4, 4))}}
      >>> params["head"] = jnp.ones((4, 8))
      >>> numbers(params)["layers"]
      {'w': DimensionNumbers(factor_axes=(-2, -1))}
      >>> tx = soap_optax.soap(3e-3, dimension_numbers=numbers)
    """
    excluded = _compiled("exclude", exclude)
    included = None if include is None else _compiled("include", include)

    def numbers(params: Any) -> Any:
        if _is_count(params):
            _arguments.static("dimension_numbers", params)
        treedef: Any
        nodes, treedef = jax.tree.flatten(params, is_leaf=_is_hidden)
        paths = list(map("/".join, _tree.names(params, _is_hidden)))
        if not any(isinstance(node, optax.MaskedNode) for node in nodes):
            _check_found("exclude", excluded, paths)
            _check_found("include", included or [], paths)
        is_out = [_is_found(path, excluded) for path in paths]
        is_in = [included is None or _is_found(path, included) for path in paths]

        def one(node: Any, with_factors: bool, without: bool) -> Any:
            if _is_hidden(node):
                return node
            is_matrix = jnp.ndim(node) >= 2 and with_factors and not without
            return _LAST_TWO if is_matrix else None

        return treedef.unflatten(map(one, nodes, is_in, is_out))

    return numbers


def _is_count(params: Any) -> bool:
    """Says whether `optax.inject_hyperparams` has called a function as a schedule."""
    is_scalar = isinstance(params, jax.Array) and params.ndim == 0
    return is_scalar and jnp.issubdtype(params.dtype, jnp.integer)


def _is_hidden(node: Any) -> bool:
    """Says whether a node is in the place of a parameter that is not to be updated."""
    return node is None or isinstance(node, optax.MaskedNode)


def _compiled(name: str, patterns: Any) -> list[re.Pattern[str]]:
    given = [patterns] if isinstance(patterns, str) else patterns
    rule = "a regular expression, or a sequence of them"
    are_texts = isinstance(given, Iterable) and all(isinstance(p, str) for p in given)
    _arguments.require(name, patterns, rule, are_texts)
    try:
        return [re.compile(pattern) for pattern in given]
    except re.error as error:
        raise ValueError(f"{name} must be {rule}, got {patterns!r}: {error}") from error


def _check_found(
    name: str, patterns: Sequence[re.Pattern[str]], paths: Sequence[str]
) -> None:
    """Raises a `ValueError` for a pattern that matches no path, if there are paths."""
    for pattern in patterns:
        rule = f"patterns that match one of {', '.join(paths)}"
        fits = not paths or any(map(pattern.search, paths))
        _arguments.require(name, pattern.pattern, rule, fits)


def _is_found(path: str, patterns: Sequence[re.Pattern[str]]) -> bool:
    return any(pattern.search(path) for pattern in patterns)
