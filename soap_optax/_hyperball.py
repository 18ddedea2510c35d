"""Matrices that keep the norms that they start with: the last part of a chain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments
from soap_optax._chain import decay_and_rate
from soap_optax._options import complete
from soap_optax.parameters import _tree
from soap_optax.parameters._tree import Leaf


class HyperballState(NamedTuple):
    """State of `hyperball`.

    Attributes:
      count: number of updates, int32 scalar.
      radii: for each parameter, in nested dicts by the names on its path, a tuple with
        the norms of its matrices, float32 or float64, `[…]` with an axis of size 1 for
        each axis of a matrix. The tuple is empty for a parameter that is no matrix.
      of_others: state of weight decay and learning rate of the other parameters.
    """

    count: jax.Array  # type: ignore[assignment]
    radii: Any
    of_others: optax.OptState


def hyperball(
    learning_rate: optax.ScalarOrSchedule,
    *,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
    adam_weight_decay: optax.ScalarOrSchedule = 0.0,
    dimension_numbers: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Moves each matrix on the sphere of its initial norm.

    It comes last in a chain, in the place of `optax.scale_by_learning_rate`. A matrix W
    of initial norm R that gets the update U becomes

      R n(W - learning_rate R n(U)),

    where n divides by the Frobenius norm. So the learning rate is the size of a step
    over the size of the matrix, about the angle of a step in radians, whatever the size
    of U, and the rate that is best for one width is near to the best of others.
    Matrices have no weight decay, which would only change their norms.

    Other parameters get weight decay and a learning rate as usual. So does a matrix
    that starts at zero, because it has no sphere. A matrix whose update is zero stays
    as it is, and one whose update is not finite is not finite afterwards. A mesh of
    devices sums three numbers for each matrix, in one all-reduce along each of its axes
    that shard the matrix.

    Args:
      learning_rate: of matrices, a number or a function of the number of updates. 0.018
        is that of the paper.
      adam_learning_rate: of all other parameters, likewise. None means that of
        matrices.
      adam_weight_decay: weight decay of all other parameters, likewise, which their
        learning rate multiplies, as in `optax.adamw`.
      dimension_numbers: what `soap_optax.soap` has under this name, and the same value
        as there. The axes of all factors of a parameter together are a matrix, and each
        index along its other axes has a matrix of its own. With None every parameter
        with two axes or more is one matrix. A parameter without factors is no matrix.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `HyperballState`. Its
      updates have the dtype of those that it gets, and need `params`.

    Raises:
      ValueError: for an argument that breaks its rule, naming argument, rule and value;
        in `update`, if `params` is missing or differs from the updates in structure.

    Examples:
      >>> import jax.numpy as jnp, optax, soap_optax
      >>> tx = optax.chain(soap_optax.scale_by_soap(), soap_optax.hyperball(0.018))
      >>> params = jnp.diag(jnp.arange(1.0, 4.0))
      >>> updates, state = tx.update(jnp.ones((3, 3)), tx.init(params), params)
      >>> moved = optax.apply_updates(params, updates)
      >>> bool(jnp.allclose(jnp.linalg.norm(moved), jnp.linalg.norm(params)))
      True

    References:
      Hyperball optimization, [arXiv 2606.16899](https://arxiv.org/abs/2606.16899), 2026
    """
    rule = _arguments.learning_rate
    _arguments.check(
        learning_rate=(learning_rate, rule),
        adam_learning_rate=(adam_learning_rate, _arguments.optional(rule)),
        adam_weight_decay=(adam_weight_decay, _arguments.weight_decay),
    )
    options = complete(dimension_numbers=dimension_numbers)
    rate_of_others = learning_rate if adam_learning_rate is None else adam_learning_rate
    of_others = optax.chain(*decay_and_rate(rate_of_others, adam_weight_decay, None))

    def init_fn(params: optax.Params) -> HyperballState:
        plan = _tree.make_plan(params, options)
        radii = [
            (_root(_inner_products(leaf, array, array), of_zero=0),)
            if leaf.layout.has_factors
            else ()
            for leaf, array in zip(plan.leaves, plan.arrays, strict=True)
        ]
        return HyperballState(
            count=jnp.zeros([], jnp.int32),
            radii=_tree.nest(plan.leaves, radii),
            of_others=of_others.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: HyperballState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HyperballState]:
        del extra_args
        if params is None:
            raise ValueError("params must be given to the update of hyperball")
        _arguments.check(state=(state, _arguments.made_by_init(HyperballState)))
        plan = _tree.make_plan(updates, options)
        radii = _tree.find(plan.leaves, state.radii)
        _check_radii(plan.leaves, radii)
        _tree.check_no_others(plan.leaves, state.radii)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        usual, state_of_others = of_others.update(updates, state.of_others, params)
        moved = [
            _move(leaf, jnp.asarray(rate), update, param, radius, other)
            for leaf, update, param, radius, other in zip(
                plan.leaves,
                plan.arrays,
                _tree.flatten_params(plan, params),
                radii,
                plan.treedef.flatten_up_to(usual),
                strict=True,
            )
        ]
        return plan.treedef.unflatten(moved), HyperballState(
            optax.safe_increment(state.count), state.radii, state_of_others
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_radii(leaves: Sequence[Leaf], radii: Sequence[list[jax.Array]]) -> None:
    """Raises a `ValueError` naming a parameter for which init made other radii."""
    for leaf, of_leaf in zip(leaves, radii, strict=True):
        shapes = [radius.shape for radius in of_leaf]
        wanted = [_shape_of_radii(leaf)] if leaf.layout.has_factors else []
        if shapes != wanted:
            raise ValueError(
                f"{leaf.name} must have the shape and the dimension numbers for which "
                f"init made the state: an update of shape {leaf.layout.shape} needs "
                f"radii of shapes {wanted}, got {shapes}"
            )


def _move(
    leaf: Leaf,
    rate: jax.Array,
    update: jax.Array,
    param: jax.Array,
    radii: list[jax.Array],
    other: jax.Array,
) -> jax.Array:
    """The update of one parameter: a step on its spheres, or `other` without any.

    With r = rate R / ||U|| the step ends at s (W - r U). The norm of W - r U follows
    from three inner products, so that a mesh has to sum only once.
    """
    if not leaf.layout.has_factors:
        return other
    (radius,) = radii
    u, w, rate = leaf.cast(update), leaf.cast(param), leaf.cast(rate)
    uu, uw, ww = (_inner_products(leaf, *of) for of in ((u, u), (u, w), (w, w)))
    r = rate * radius / _root(uu, of_zero=1)
    s = radius / _root(ww - 2 * r * uw + r * r * uu, of_zero=1)
    step = jnp.where(uu == 0, 0, (s - 1) * w - s * r * u)
    return jnp.where(radius > 0, step, leaf.cast(other)).astype(update.dtype)


def _root(squares: jax.Array, of_zero: float) -> jax.Array:
    """Square roots, and a constant in the place of that of 0, which has no slope."""
    is_zero = squares == 0
    return jnp.where(is_zero, of_zero, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def _inner_products(leaf: Leaf, left: jax.Array, right: jax.Array) -> jax.Array:
    """The inner products of matrices, with an axis of size 1 for each of their axes."""
    product = leaf.cast(left) * leaf.cast(right)
    return jnp.sum(product, axis=_axes(leaf), keepdims=True)


def _shape_of_radii(leaf: Leaf) -> tuple[int, ...]:
    axes = _axes(leaf)
    return tuple(1 if a in axes else size for a, size in enumerate(leaf.layout.shape))


def _axes(leaf: Leaf) -> list[int]:
    """The axes of a parameter that form its matrices; the others are batch axes."""
    layout = leaf.layout
    batch = {layout.sources[axis] for axis in layout.grid}
    return [axis for axis in range(len(layout.shape)) if axis not in batch]
