"""The state of `in_eigenbasis`: what it keeps for each factor, and how it is nested.

Between steps the state holds nested dicts, keyed like the parameters. Within a step it
holds lists in the order of the parameters in their `Plan`. Such a list has one list per
parameter, with an array or None per axis. `nested` and `listed` convert between the two
forms.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments, _triangles
from soap_optax._dtypes import widest
from soap_optax._options import EigenbasisOptions
from soap_optax.mesh import _mesh, _placement
from soap_optax.parameters import _tree
from soap_optax.parameters._tree import Leaf, Plan


class EigenbasisState(NamedTuple):
    """State of `in_eigenbasis`.

    `factors`, `eigenbases`, `eigenvalues` and `skipped` are nested dicts, keyed by the
    names on the path to each parameter. For parameters in nested dicts, they have the
    structure of the parameters. In the place of a parameter stands a tuple with one
    array per axis, or None where an axis has no factor and its eigenbasis is the
    identity. If there is no parameter at all, each of the four is a scalar 0.

    In the shapes below, `grid` stands for the axes that number the blocks of the
    parameter and its batches, and b for the side of a block.

    Attributes:
      count: number of steps taken, int32 scalar. It decides when refreshes are due.
      refreshes: number of refreshes that were due, int32 scalar. With `stagger`, one
        round over all parameters counts once.
      factors: Shampoo's factors, `[grid…, b, b]`, in at least float32. With
        `pack_factors` they are `[grid…, 2h + 1, h]`, where h is half of b, rounded up.
      eigenbases: orthonormal matrices whose columns are eigenvectors, `[grid…, b, b]`.
      eigenvalues: estimates of the factors' eigenvalues, `[grid…, b]`, in the order of
        the columns. A refresh sets them, and between refreshes they follow the
        gradients.
      skipped: how many of `refreshes` left an eigenbasis as it was, because they failed
        or because `refresh_tolerance` made them needless, int32 `[grid…, 1]`.
      inner_state: state of the inner transformation. Its moments hold projected
        coordinates in the parameters' shapes.
    """

    count: Any  # The type is not jax.Array, because tuple has a method `count`.
    refreshes: Any
    factors: Any
    eigenbases: Any
    eigenvalues: Any
    skipped: Any
    inner_state: optax.OptState


class _PerFactor(NamedTuple):
    """Describes the array that a field of the state holds for each factor.

    Attributes:
      shape: gives the array's shape from that of the factor, `[grid…, b, b]`.
      shardings: gives the array's sharding for each axis of a parameter.
      start: makes the array of the first state from its shape and the dtype in which
        eigenbases are stored.
    """

    shape: Callable[[tuple[int, ...]], tuple[int, ...]]
    shardings: Callable[[Leaf], Any]
    start: Callable[[tuple[int, ...], Any], jax.Array]


def _identity(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


def _wide_zeros(shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jnp.zeros(shape, widest(dtype, jnp.float32))


def _zero_counts(shape: tuple[int, ...], _: Any) -> jax.Array:
    return jnp.zeros(shape, jnp.int32)


_FIELDS = {
    "factors": _PerFactor(lambda shape: shape, _placement.of_factors, _wide_zeros),
    "eigenbases": _PerFactor(lambda shape: shape, _placement.of_factors, _identity),
    "eigenvalues": _PerFactor(
        lambda shape: shape[:-1], _placement.of_vectors, _wide_zeros
    ),
    "skipped": _PerFactor(
        lambda shape: (*shape[:-2], 1), _placement.of_vectors, _zero_counts
    ),
}


def _fields(options: EigenbasisOptions) -> dict[str, _PerFactor]:
    """What the state holds for each factor."""
    if not options["pack_factors"]:
        return _FIELDS
    packed = _FIELDS["factors"]._replace(shape=_triangles.packed_shape)
    return _FIELDS | {"factors": packed}


def start(plan: Plan, options: EigenbasisOptions) -> EigenbasisState:
    """The first state, in lists: zero factors and identity eigenbases.

    It has no inner state yet.
    """

    def one(leaf: Leaf, shape: Any, sharding: Any, field: _PerFactor) -> Any:
        if shape is None:
            return None
        given = options["precond_dtype"]
        dtype = leaf.dtype if given is None else given
        return _mesh.placed(field.start(field.shape(shape), dtype), sharding)

    def of_leaf(leaf: Leaf, field: _PerFactor) -> list[Any]:
        axes = zip(leaf.layout.factor_shapes(), field.shardings(leaf), strict=True)
        return [one(leaf, shape, sharding, field) for shape, sharding in axes]

    lists = {
        name: [of_leaf(leaf, field) for leaf in plan.leaves]
        for name, field in _fields(options).items()
    }
    return EigenbasisState(
        count=jnp.zeros([], jnp.int32),
        refreshes=jnp.zeros([], jnp.int32),  # One array cannot be donated twice.
        inner_state=None,
        **lists,
    )


def nested(plan: Plan, state: EigenbasisState) -> EigenbasisState:
    """Converts a state in lists into one in nested dicts, as users see it."""
    fields = {name: _tree.nest(plan.leaves, getattr(state, name)) for name in _FIELDS}
    return state._replace(**fields)


def listed(
    plan: Plan, options: EigenbasisOptions, state: EigenbasisState
) -> EigenbasisState:
    """Inverts `nested`.

    Raises:
      ValueError: if the state was made for other parameters or options; it names a
        parameter.
    """
    _arguments.check(state=(state, _arguments.made_by_init(EigenbasisState)))
    fields = {name: _tree.find(plan.leaves, getattr(state, name)) for name in _FIELDS}
    for i, leaf in enumerate(plan.leaves):
        factors = leaf.layout.factor_shapes()
        for name, field in _fields(options).items():
            wanted = tuple(None if s is None else field.shape(s) for s in factors)
            shapes = tuple(None if x is None else x.shape for x in fields[name][i])
            if shapes != wanted:
                raise ValueError(
                    f"{leaf.name} must have the shape and the options for which init "
                    f"made the state: an update of shape {leaf.layout.shape} needs "
                    f"{name} of shapes {wanted}, got {shapes}"
                )
    _tree.check_no_others(plan.leaves, state.factors)
    return state._replace(**fields)
