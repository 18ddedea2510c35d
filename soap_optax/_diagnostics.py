"""Figures about the factors and eigenbases of a state."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_optax import _arguments, _triangles
from soap_optax._state import EigenbasisState
from soap_optax.mesh import _mesh
from soap_optax.refresh import _methods, _stacks


class Diagnostics(NamedTuple):
    """Figures of one factor M and its eigenbasis Q, each an array `[grid…]`, float32.

    Attributes:
      condition: largest Rayleigh quotient q^T M q of the columns q of Q over the
        smallest. It is the condition number of M or, where Q is old, less. It is
        infinite where M is singular up to round-off.
      off_diagonal: norm of the off-diagonal part of Q^T M Q over the norm of M. It is 0
        if Q diagonalizes M.
      rotation: how far the eigenvectors have turned since the last refresh: the root
        mean square of the angles, in radians, by which a refresh by `soap_optax.QR`
        would now turn the columns of Q.
      skipped: share of the refreshes that left Q as it was, of those that were due.
    """

    condition: jax.Array
    off_diagonal: jax.Array
    rotation: jax.Array
    skipped: jax.Array


def diagnostics(
    state: Any, *, precision: Any = jax.lax.Precision.HIGHEST
) -> dict[str, Any]:
    """Says how well conditioned factors are, and how well eigenbases diagonalize them.

    It can run inside and outside `jax.jit`. Call it now and then only, because it costs
    about as much as a refresh.

    Args:
      state: an `EigenbasisState`, or any optax state that holds one, or several of
        different parameters.
      precision: precision of the matrix products.

    Returns:
      Nested dicts like `EigenbasisState.factors`. In the place of a parameter stands a
      tuple with `Diagnostics` per axis, or None where an axis has no factor.

    Raises:
      ValueError: if the state holds no `EigenbasisState`, or two of one parameter.

    Examples:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> tx = soap_optax.soap(3e-3)
      >>> params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> rows, columns = jax.jit(soap_optax.diagnostics)(state)["w"]
      >>> columns.off_diagonal.shape, bool(columns.off_diagonal < 1e-5)
      ((), True)
    """
    _arguments.check(precision=(precision, _arguments.precision))
    merged: dict[str, Any] = {}
    for one in _eigenbasis_states(state):
        diagnose = functools.partial(
            _diagnose, refreshes=_array(one.refreshes), precision=precision
        )
        if not isinstance(one.factors, (dict, tuple, list)):
            continue  # The state for no parameters has a scalar there.
        figures = jax.tree.map(
            diagnose,
            one.factors,
            one.eigenbases,
            one.skipped,
            is_leaf=lambda node: not isinstance(node, (dict, tuple, list, type(None))),
        )
        merged = _merge(merged, figures)
    return merged


def _array(node: Any) -> Any:
    """Takes an array out of the variable in which NNX keeps it, if there is one."""
    return jax.tree.leaves(node)[0]


def _eigenbasis_states(state: Any) -> list[EigenbasisState]:
    is_one = lambda node: isinstance(node, EigenbasisState)  # noqa: E731
    found = [n for n in jax.tree.leaves(state, is_leaf=is_one) if is_one(n)]
    rule = "an optax state that holds an EigenbasisState"
    _arguments.require("state", type(state).__name__, rule, bool(found))
    return found


def _diagnose(*of_factor: Any, refreshes: jax.Array, precision: Any) -> Diagnostics:
    """The figures of one factor, from the factor, its eigenbasis and its `skipped`."""
    factor, eigenbasis, skipped = (_array(x) for x in of_factor)
    factor, eigenbasis = map(_mesh.with_whole_rows, (factor, eigenbasis))
    factor = _triangles.whole(factor, eigenbasis.shape[-1])
    condition, off_diagonal = _methods.quality(factor, eigenbasis, precision)
    method, request = _methods.QR(), _methods.RefreshRequest(precision=precision)
    refreshed = _stacks.refresh_one(factor, eigenbasis, method, request)
    angles = _methods.angles(eigenbasis, refreshed.eigenbases)
    figures = Diagnostics(
        condition=condition,
        off_diagonal=off_diagonal,
        rotation=jnp.sqrt(jnp.mean(jnp.square(angles), axis=-1)),
        skipped=skipped[..., 0] / jnp.maximum(refreshes, 1),
    )
    return Diagnostics(*(figure.astype(jnp.float32) for figure in figures))


def _merge(some: Any, others: Any, path: str = "") -> Any:
    """Merges nested dicts, and raises a `ValueError` for a parameter in both."""
    if not some:
        return others
    if not (isinstance(some, dict) and isinstance(others, dict)):
        name = path or "the parameter"
        raise ValueError(f"state must hold one EigenbasisState of {name}, got two")
    merged = dict(some)
    for key, value in others.items():
        merged[key] = _merge(some.get(key), value, f"{path}[{key!r}]")
    return merged
