"""Where the parameters and the arrays that belong to them lie on a mesh of devices.

A parameter is *aligned* if it is sharded and each device has whole blocks of it: every
mesh axis that shards the parameter splits it between blocks. On a single device every
parameter is aligned. A block is *cut* if parts of it lie on several devices. Where the
sharding of a parameter is not known, XLA decides where arrays lie.
"""

import contextvars
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

# While `state_sharding` runs an `init`, this holds a list. `init` enters the names of
# the parameters whose sharding no update on automatic axes will know.
_unknown: contextvars.ContextVar[list[str] | None] = contextvars.ContextVar(
    "_unknown", default=None
)


def state_sharding(
    tx: optax.GradientTransformation, params: optax.Params, params_sharding: Any
) -> Any:
    """The sharding of each array in the state of a transformation.

    Moments, and whatever else `tx.init` makes from a parameter in its shape, are
    sharded like the parameter. Factors and eigenbases of `soap_optax` are sharded
    between blocks as the parameter is. Their rows are sharded over the mesh axes that
    shard the parameter along axes without blocks, as far as the shards divide the rows.
    All other arrays are replicated. No array is made.

    Args:
      tx: any optax transformation, with or without SOAP in it.
      params: the parameters or their `jax.ShapeDtypeStruct`s.
      params_sharding: a tree of `jax.sharding.NamedSharding` or, for the mesh of
        `jax.set_mesh`, `jax.P` (`PartitionSpec`), like the parameters or a prefix of
        them, or a callable that makes such a tree from the parameters.

    Returns:
      A tree of `NamedSharding` like `tx.init(params)`, which can be given to
      `jax.jit(tx.init, out_shardings=…)`.

    Raises:
      ValueError: if there is no parameter; if what is given for a parameter is no
        sharding, names axes that its mesh does not have, does not fit the parameter's
        shape, or is on another mesh than the others, naming the parameter.

    Warns:
      UserWarning: if blocks of a parameter are cut across shards; it names the
        parameter. Also if `tx` was made without its argument `params_sharding` and the
        mesh has automatic axes, where updates then communicate; it names the parameters
        that have factors and are sharded.

    Examples:
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
    unknown: list[str] = []
    token = _unknown.set(unknown)
    try:
        # The function is a new one each time, so that no cached trace answers for it.
        state = _mesh.result_shardings(lambda p: tx.init(p), params, shardings)
    finally:
        _unknown.reset(token)
    if unknown and not _mesh.is_explicit(shardings[0].mesh):
        listed = ", ".join(unknown[:3]) + (", …" if len(unknown) > 3 else "")
        warnings.warn(
            "params_sharding must be given where tx is made, too, on a mesh with "
            "automatic axes: without it updates do not know how parameters are "
            f"sharded, and communicate; it is missing for {listed}",
            stacklevel=2,
        )
    return state


def note_unknown_shardings(leaves: Sequence[Leaf], params_sharding: Any) -> None:
    """Tells `state_sharding` which parameters an `init` has no `params_sharding` for.

    These are the parameters with factors that are sharded over several devices.
    """
    unknown = _unknown.get()
    if unknown is None or params_sharding is not None:
        return
    for leaf in leaves:
        if leaf.sharding is not None and leaf.layout.has_factors:
            spec, sizes = spec_and_sizes(leaf)
            if any(_mesh.shards(entry, sizes) > 1 for entry in spec):
                unknown.append(leaf.name)


def spec_and_sizes(leaf: Leaf) -> tuple[jax.P, Any]:
    """The spec of a parameter whose sharding is known, and the sizes of its mesh.

    The module `_mesh` says what a spec and sizes are.
    """
    assert leaf.sharding is not None
    return leaf.sharding.spec, leaf.sharding.mesh.shape


def like_parameter(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Shards an array of the parameter's shape like the parameter."""
    return placed(array, leaf.sharding)


def for_blocks(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Shards an array of the parameter's shape like the parameter, but cuts no block.

    An axis that is not divided into blocks stays as it is sharded. The array is
    gathered along the mesh axes that would cut its blocks, so that a step gathers it
    once. XLA has also been seen to compute wrong products of blocks that are cut (JAX
    0.10.2). No program is known that shows this now, and no public issue.
    """
    if leaf.sharding is None:
        return array
    view = _spec_of_view(leaf)
    whole = [entry if entry in tuple(view) else None for entry in leaf.sharding.spec]
    return placed(array, NamedSharding(leaf.sharding.mesh, jax.P(*whole)))


def of_factors(leaf: Leaf) -> Sequence[NamedSharding | None]:
    """The sharding of the factor of each axis, or None if not known or without factor.

    The grid of `[grid…, b, b]` is sharded like the grid of the view (see `Layout`). The
    rows are sharded over the mesh axes that shard the parameter along axes without
    blocks, as far as the shards divide the rows.
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
    """For each axis the sharding of `[grid…, b]`, or None if not known or no factor."""
    return [sharding and of_vector(leaf) for sharding in of_factors(leaf)]


def of_vector(leaf: Leaf) -> NamedSharding | None:
    """The sharding of an array `[grid…, b]` of any axis, or None if not known."""
    if leaf.sharding is None:
        return None
    return NamedSharding(leaf.sharding.mesh, jax.P(*_spec_of_grid(leaf), None))


def is_aligned(leaf: Leaf) -> bool:
    """Says whether a parameter is aligned; its sharding has to be known.

    Along mesh axes that do not shard an aligned parameter, devices have copies of its
    blocks. A parameter that is not sharded at all is aligned only on a single device.
    """
    spec, sizes = spec_and_sizes(leaf)
    grid = {name for entry in _spec_of_grid(leaf) for name in _mesh.names(entry)}
    named = {n for entry in spec for n in _mesh.names(entry) if sizes[n] > 1}
    return named <= grid and bool(named or math.prod(sizes.values()) == 1)


def local_layout(leaf: Leaf) -> Layout:
    """The layout of the shard that one device has of an aligned parameter."""
    spec, sizes = spec_and_sizes(leaf)
    layout = leaf.layout
    return dataclasses.replace(
        layout,
        shape=_mesh.shard_shape(layout.shape, spec, sizes),
        view=_mesh.shard_shape(layout.view, _spec_of_view(leaf), sizes),
    )


def _spec_of_view(leaf: Leaf) -> jax.P:
    """The spec of the view, which is the array of blocks."""
    spec, sizes = spec_and_sizes(leaf)
    return _mesh.inherited(spec, leaf.layout.sources, leaf.layout.view, sizes)


def _spec_of_grid(leaf: Leaf) -> jax.P:
    """The spec of the view, with the entries of the grid only."""
    view = _spec_of_view(leaf)
    return jax.P(*(view[axis] for axis in leaf.layout.grid))


class _CutBlocks(NamedTuple):
    """The blocks of one axis, if they are cut. The axis may be merged from several.

    Attributes:
      axes: axes of the parameter that are merged.
      size: size of the merged axis.
      block: side of its blocks.
      shard: size of the part that one device has.
      inner: number of shards into which the merged axes but the first are cut.
      fitting: largest smaller side of blocks that would not be cut, or 0 for none.
    """

    axes: tuple[int, ...]
    size: int
    block: int
    shard: int
    inner: int
    fitting: int


def _cut_blocks(leaf: Leaf) -> list[_CutBlocks]:
    """The axes, which may be merged, whose blocks are cut."""
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


def check_refresh_axes(leaf: Leaf, refresh_axes: Sequence[str] | None) -> None:
    """Raises a `ValueError` if an axis is not one of the parameter's mesh."""
    if leaf.sharding is None:
        return
    _, known = spec_and_sizes(leaf)
    rule = f"different axes of the mesh, which are {', '.join(known)}"
    axes = [*(refresh_axes or ())]
    holds = set(axes) <= set(known) and len(set(axes)) == len(axes)
    _arguments.require("refresh_axes", refresh_axes, rule, holds)


def check_packing(leaf: Leaf, pack_factors: bool) -> None:
    """Raises a `ValueError` if factors are to be packed that are cut across devices."""
    is_cut = any(s is not None and s.spec[-2] is not None for s in of_factors(leaf))
    rule = (
        f"False where factors are cut across devices, as those of {leaf.name}; a "
        "block_size whose blocks fit the shards cuts none"
    )
    _arguments.require(
        "pack_factors", pack_factors, rule, not (pack_factors and is_cut)
    )


def warn_of_cut_blocks(leaf: Leaf) -> None:
    """Warns if blocks of a parameter are cut."""
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
