"""Refreshes under `jax.vmap`: the members of an ensemble share them.

Under `jax.vmap` each *member* of an ensemble has a state of its own. If left alone, JAX
turns a conditional whose predicate differs between members into a selection, which
computes all branches in each step, and it makes batches of the decompositions. The
functions here tell JAX what to do in its place. Without `jax.vmap` they do nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@jax.custom_batching.custom_vmap
def bounds(begin: jax.Array, end: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The least `begin` and the largest `end` of all members, as scalars.

    Members for which `begin` is not less than `end` do not count.
    """
    return begin, end


@bounds.def_vmap
def _bounds_of_members(
    size: int, _: Any, begin: jax.Array, end: jax.Array
) -> tuple[Any, Any]:
    begin, end = (jnp.broadcast_to(x, size) for x in (begin, end))
    counts = begin < end
    least = jnp.min(jnp.where(counts, begin, jnp.iinfo(begin.dtype).max))
    # For members of members this function is called by another `jax.vmap`.
    return bounds(least, jnp.max(jnp.where(counts, end, 0))), (False, False)


def as_one_stack(function: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Makes a function of stacks that is called once for the stacks of all members.

    The stacks of all members are then one stack. So a program has one decomposition for
    each size, conditionals in the function have scalar predicates, and chunks of the
    stack bound the memory as ever.

    Args:
      function: a function of two trees that returns a tree. The first tree has scalars
        or, where they differ between the members, an entry `[n]` for each matrix. The
        others have stacks `[n, …]`.
    """
    merged = jax.custom_batching.custom_vmap(function)

    @merged.def_vmap
    def _(size: int, is_batched: Any, scalars: Any, stacks: Any) -> tuple[Any, Any]:
        of_scalars, of_stacks = is_batched
        batched = zip(jax.tree.leaves(stacks), jax.tree.leaves(of_stacks), strict=True)
        count = next(x.shape[1] if b else x.shape[0] for x, b in batched)

        def of_matrices(scalar: Any, is_batched: bool) -> Any:
            if not is_batched:
                return scalar if jnp.ndim(scalar) == 0 else jnp.tile(scalar, size)
            column = scalar[:, None] if scalar.ndim == 1 else scalar
            return jnp.broadcast_to(column, (size, count)).reshape(-1)

        def of_members(stack: Any, is_batched: bool) -> Any:
            every = (
                stack if is_batched else jnp.broadcast_to(stack, (size, *stack.shape))
            )
            return every.reshape(-1, *every.shape[2:])

        scalars = jax.tree.map(of_matrices, scalars, of_scalars)
        stacks = jax.tree.map(of_members, stacks, of_stacks)
        found = merged(scalars, stacks)
        by_member = lambda x: x.reshape(size, count, *x.shape[1:])  # noqa: E731
        return jax.tree.map(by_member, found), jax.tree.map(lambda _: True, found)

    return merged
