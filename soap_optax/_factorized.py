"""Adam with a second moment of rank one, as Adafactor's: for factorized SOAP."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax import _kronecker, _sharding, _tree


class FactorizedAdamState(NamedTuple):
    """State of `scale_by_factorized_adam`.

    Attributes:
      count: steps taken, int32 scalar.
      mu: first moments, like the parameters.
      nu: nested dicts with a tuple in the place of each parameter: the mean squares at
        each index of each axis, `[grid…, b]`; or, without factors, those of all
        entries, in its shape.
    """

    count: Any
    mu: optax.Updates
    nu: Any


def scale_by_factorized_adam(
    leaves: Sequence[_tree.Leaf],
    b1: jax.typing.ArrayLike,
    b2: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with second moments of rank one in each block.

    Of the parameters, planned in `leaves`, that have a factor. Their entry at (i, j) of
    a block is estimated by r_i c_j / mean(r) from the means r and c of its rows and
    columns. See Shazeer & Stern, "Adafactor: Adaptive Learning Rates with Sublinear
    Memory Cost", https://arxiv.org/abs/1804.04235.
    """

    def squares(array: jax.Array, leaf: _tree.Leaf) -> list[jax.Array]:
        if leaf.layout.has_factors:
            array = _sharding.for_blocks(array, leaf)
            return _kronecker.mean_squares(array, leaf.layout)
        return [jnp.square(array)]

    def init_fn(params: optax.Params) -> FactorizedAdamState:
        zero = jnp.zeros([], jnp.int32)
        zeros = optax.tree.zeros_like(params)
        arrays = jax.tree.leaves(zeros)
        nu = [squares(*pair) for pair in zip(arrays, leaves, strict=True)]
        # Without leaves it is `optax.tree.map_params` that asks: one stands for all.
        return FactorizedAdamState(zero, zeros, _tree.nest(leaves, nu) if leaves else 0)

    def update_fn(
        updates: optax.Updates,
        state: FactorizedAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FactorizedAdamState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        treedef: Any
        arrays, treedef = jax.tree.flatten(updates)
        old = _tree.find(leaves, state.nu)

        def second_moments(array: Any, leaf: _tree.Leaf, old: Any) -> list[jax.Array]:
            new = optax.tree.update_moment(squares(array, leaf), old, b2, 1)
            if not leaf.layout.has_factors:
                return new
            return [_sharding.placed(mean, _sharding.of_vector(leaf)) for mean in new]

        nu = [second_moments(*of) for of in zip(arrays, leaves, old, strict=True)]

        def scale(moment: jax.Array, means: Any, leaf: _tree.Leaf) -> jax.Array:
            if leaf.layout.has_factors:
                root = _kronecker.rank_one(means, moment, leaf.layout)
            else:
                root = jnp.sqrt(means[0])
            return moment / (root + eps)

        moments = jax.tree.leaves(optax.tree.bias_correction(mu, b1, count))
        corrected = optax.tree.bias_correction(nu, b2, count)
        steps = [scale(*of) for of in zip(moments, corrected, leaves, strict=True)]
        nested = _tree.nest(leaves, nu)
        return treedef.unflatten(steps), FactorizedAdamState(count, mu, nested)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
