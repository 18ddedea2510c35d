"""Where the parameters and the arrays that belong to them lie on a mesh of devices.

A parameter is *aligned* if each device has whole blocks of it: every mesh axis that
shards the parameter splits it between blocks. Blocks are *cut* if one lies on several
devices. Where the sharding of a parameter is not known, nothing is placed.
"""

import dataclasses
import math
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import optax

from soap_optax import _arguments
from soap_optax.mesh import _mesh
from soap_optax.mesh._mesh import NamedSharding, placed
from soap_optax.parameters import _tree
from soap_optax.parameters._layout import Layout
from soap_optax.parameters._tree import Leaf


def state_sharding(
    tx: optax.GradientTransformation, params: optax.Params, params_sharding: Any
) -> Any:
    """The sharding of each array in the state of a transformation.

    Moments and all else that `tx.init` makes like a parameter are sharded like it.
    Factors and eigenbases of `soap_optax` are sharded like the blocks of the parameter,
    over whole blocks; where mesh axes are left over, by rows, as far as those divide
    them. All other arrays are replicated. No array is made.

    Args:
      tx: any optax transformation, with or without SOAP in it.
      params: the parameters or their `jax.ShapeDtypeStruct`s.
      params_sharding: a tree of `jax.sharding.NamedSharding` or, for the mesh of
        `jax.set_mesh`, `jax.P` (`PartitionSpec`), like the parameters or a prefix of
        them, or a callable making it from them.

    Returns:
      A tree like `tx.init(params)` of `NamedSharding`, to be given to
      `jax.jit(tx.init, out_shardings=…)`.

    Raises:
      ValueError: naming the parameter, if its sharding is none, names axes that its
        mesh does not have, does not fit its shape, or is on another mesh than the
        others.

    Warns:
      UserWarning: naming the parameter, if its blocks are cut across shards.

    Example:
      >>> import jax, jax.numpy as jnp, soap_optax
      >>> mesh = jax.make_mesh((1, 1), ("fsdp", "tensor"))
      >>> shardings = {"w": jax.NamedSharding(mesh, jax.P("fsdp", "tensor"))}
      >>> params = {"w": jax.ShapeDtypeStruct((64, 32), jnp.float32)}
      >>> tx = soap_optax.soap(3e-3, block_size=16, params_sharding=shardings)
      >>> state = soap_optax.state_sharding(tx, params, shardings)
      >>> state[0].eigenbases["w"][0].spec == jax.P("fsdp", "tensor", None, None)
      True
      >>> state[0].inner_state.mu["w"].spec == jax.P("fsdp", "tensor")
      True
    """
    shardings = _tree.resolve_shardings(params, params_sharding)
    _arguments.require("params", params, "at least one parameter", bool(shardings))
    return _mesh.result_shardings(tx.init, params, shardings)


def spec_and_sizes(leaf: Leaf) -> tuple[jax.P, Any]:
    """The spec of a parameter whose sharding is known, and the sizes of its mesh."""
    assert leaf.sharding is not None
    return leaf.sharding.spec, leaf.sharding.mesh.shape


def like_parameter(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Shards an array of the parameter's shape like the parameter."""
    return placed(array, leaf.sharding)


def for_blocks(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Shards an array of the parameter's shape like it, but so that no block is cut.

    The array is gathered along the mesh axes that would cut its blocks, because XLA can
    be wrong about products of blocks that are cut (seen with JAX 0.10.2 and 0.12.0; no
    public issue is known).
    """
    if leaf.sharding is None:
        return array
    view = _spec_of_view(leaf)
    whole = [entry if entry in tuple(view) else None for entry in leaf.sharding.spec]
    return placed(array, NamedSharding(leaf.sharding.mesh, jax.P(*whole)))


def of_factors(leaf: Leaf) -> Sequence[NamedSharding | None]:
    """The sharding of the factor of each axis; None: not known, or no factor.

    The grid of `[grid…, b, b]` is sharded as in the array of blocks; the rows are, by
    the mesh axes of those axes that are not cut into blocks, as far as these divide
    them.
    """
    if leaf.sharding is None:
        return [None] * len(leaf.layout.axes)
    mesh, layout = leaf.sharding.mesh, leaf.layout
    grid = _spec_of_grid(leaf)
    used = {name for entry in grid for name in _mesh.names(entry)}
    blocked = {axis for axes, _ in layout.blocked() for axis in axes}
    others = [
        name
        for axis, entry in enumerate(leaf.sharding.spec)
        if axis not in blocked
        for name in _mesh.names(entry)
        if name not in used
    ]

    def one(shape: tuple[int, ...]) -> NamedSharding:
        rows: tuple[str, ...] = ()
        for name in others:
            if shape[-2] % _mesh.shards((*rows, name), mesh.shape) == 0:
                rows = (*rows, name)
        return NamedSharding(mesh, jax.P(*grid, rows or None, None))

    return [None if shape is None else one(shape) for shape in layout.factor_shapes()]


def of_vectors(leaf: Leaf) -> Sequence[NamedSharding | None]:
    """The sharding of `[grid…, b]` for each axis; None: not known, or no factor."""
    return [sharding and of_vector(leaf) for sharding in of_factors(leaf)]


def of_vector(leaf: Leaf) -> NamedSharding | None:
    """The sharding of an axis' array `[grid…, b]`; None: not known."""
    if leaf.sharding is None:
        return None
    return NamedSharding(leaf.sharding.mesh, jax.P(*_spec_of_grid(leaf), None))


def is_aligned(leaf: Leaf) -> bool:
    """Says whether each device has whole blocks, of which no other device has one.

    Each mesh axis that shards the parameter then splits it between blocks. A parameter
    that is on several devices and not sharded is not aligned.
    """
    spec, sizes = spec_and_sizes(leaf)
    grid = {name for entry in _spec_of_grid(leaf) for name in _mesh.names(entry)}
    named = {n for entry in spec for n in _mesh.names(entry) if sizes[n] > 1}
    return named <= grid and bool(named or math.prod(sizes.values()) == 1)


def local_layout(leaf: Leaf) -> Layout:
    """The layout of what one device has of an aligned parameter."""
    spec, sizes = spec_and_sizes(leaf)
    layout = leaf.layout
    return dataclasses.replace(
        layout,
        shape=_mesh.shard_shape(layout.shape, spec, sizes),
        view=_mesh.shard_shape(layout.view, _spec_of_view(leaf), sizes),
    )


def _spec_of_view(leaf: Leaf) -> jax.P:
    """How the array of blocks is sharded."""
    spec, sizes = spec_and_sizes(leaf)
    return _mesh.inherited(spec, leaf.layout.sources, leaf.layout.view, sizes)


def _spec_of_grid(leaf: Leaf) -> jax.P:
    """How the grid of blocks is sharded."""
    view = _spec_of_view(leaf)
    return jax.P(*(view[axis] for axis in leaf.layout.grid))


class _CutBlocks(NamedTuple):
    """The blocks of a (merged) axis that lie on several devices each.

    Attributes:
      axes: of the parameter.
      size: of all of the axis.
      block: the side of its blocks.
      shard: how much of it a device has.
      inner: how many devices share each index of the first of merged axes.
      fitting: the largest side of blocks that would lie on one device each, or 0.
    """

    axes: tuple[int, ...]
    size: int
    block: int
    shard: int
    inner: int
    fitting: int


def _cut_blocks(leaf: Leaf) -> list[_CutBlocks]:
    """The (merged) axes whose blocks are cut."""
    spec, sizes = spec_and_sizes(leaf)
    found = []
    for axes, block in leaf.layout.blocked():
        first, *others = (_mesh.shards(spec[axis], sizes) for axis in axes)
        inner = math.prod(others)
        size = math.prod(leaf.layout.shape[axis] for axis in axes)
        shard = size // first
        if inner > 1 or shard % block:
            fits = [b for b in range(2, block) if inner == 1 and shard % b == 0]
            fitting = max(fits, default=0)
            found.append(_CutBlocks(axes, size, block, shard // inner, inner, fitting))
    return found


def warn_of_cut_blocks(leaf: Leaf) -> None:
    """Warns if blocks of a parameter lie on several devices each."""
    if leaf.sharding is None:
        return
    for cut in _cut_blocks(leaf):
        if cut.inner > 1:
            advice = "only the first of merged axes can be sharded along its blocks"
        elif cut.fitting:
            advice = f"block_size={cut.fitting} would fit"
        else:
            advice = "no block_size fits"
        axes = cut.axes[0] if len(cut.axes) == 1 else cut.axes
        warnings.warn(
            f"{leaf.name}: blocks cut across shards, so that each step gathers the "
            f"gradient and each refresh communicates: axis {axes} of size {cut.size} "
            f"has blocks of {cut.block} and shards of {cut.shard}; {advice}",
            stacklevel=2,
        )
