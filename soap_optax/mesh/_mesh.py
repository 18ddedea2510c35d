"""JAX's interface for meshes of devices, and the arithmetic of shards.

This is the only module that asks JAX how an array is sharded, or tells it. It knows
arrays, shapes and shardings, and nothing of parameters or factors.

A *spec* is a `jax.P`. Its *entry* for an axis of an array names the mesh axes that
shard it, and is None, a name, or a sequence of names. The *sizes* of a mesh are a
mapping from the names of its axes to their sizes. The axes of a mesh are *explicit* if
shardings are part of the types of arrays, *automatic* if XLA chooses the shardings, and
*manual* within `jax.shard_map`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from soap_optax import _arguments

NamedSharding = jax.sharding.NamedSharding
_AxisType = jax.sharding.AxisType

SHARDING_RULE = (
    "a NamedSharding or, under jax.set_mesh, a PartitionSpec for each parameter"
)


def names(entry: Any) -> tuple[str, ...]:
    """The names of the mesh axes in an entry of a spec."""
    if entry is None:
        return ()
    return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)


def shards(entry: Any, sizes: Mapping[str, int]) -> int:
    """The number of shards into which an axis with this entry is cut."""
    return math.prod(sizes[name] for name in names(entry))


def shard_shape(
    shape: Sequence[int], spec: jax.P, sizes: Mapping[str, int]
) -> tuple[int, ...]:
    """The shape of the shard that one device has of an array sharded by `spec`."""
    entries = zip(shape, spec, strict=True)
    return tuple(size // shards(entry, sizes) for size, entry in entries)


def inherited(
    spec: jax.P,
    parents: Sequence[int | None],
    shape: Sequence[int],
    sizes: Mapping[str, int],
) -> jax.P:
    """The spec of an array whose axes take their entries from those of another array.

    Args:
      spec: spec of the other array.
      parents: for each axis, the axis of the other array whose entry it takes, or None
        if it is not sharded. It takes an entry only if the shards divide its size.
      shape: shape of the array.
      sizes: sizes of the mesh.
    """
    entries: list[Any] = []
    for size, parent in zip(shape, parents, strict=True):
        entry = None if parent is None else spec[parent]
        entries.append(None if size % shards(entry, sizes) else entry)
    return jax.P(*entries)


def explicit_sharding(
    array: jax.Array, dims: Sequence[int | None]
) -> NamedSharding | None:
    """The sharding of a result whose axes are the axes `dims` of an explicit array.

    On a mesh with explicit axes, reshapes and products have to say how their results
    are sharded. On other meshes there is nothing to say, and this returns None.

    Args:
      array: array from which the axes of the result take their sharding.
      dims: for each axis of the result, an axis of `array`, or None for an axis that is
        not sharded.
    """
    sharding = jax.typeof(array).sharding
    if not is_explicit(sharding.mesh):
        return None
    spec = jax.P(*(None if d is None else sharding.spec[d] for d in dims))
    return NamedSharding(sharding.mesh, spec)


def is_explicit(mesh: Any) -> bool:
    """Says whether some axes of a mesh are explicit."""
    return _AxisType.Explicit in mesh.axis_types


def placed(array: Any, sharding: NamedSharding | None) -> Any:
    """Shards an array as `sharding` says, or returns it as it is if that is None."""
    if sharding is None:
        return array
    if is_explicit(sharding.mesh):
        return jax.sharding.reshard(array, sharding)
    return jax.lax.with_sharding_constraint(array, sharding)


def with_whole_rows(matrix: jax.Array) -> jax.Array:
    """Gathers the rows of matrices `[grid…, b, b]` on a mesh with explicit axes."""
    grid = range(matrix.ndim - 2)
    return placed(matrix, explicit_sharding(matrix, [*grid, None, None]))


def may_be_spread(array: jax.Array) -> bool:
    """Says whether an array may be on several devices, outside `jax.shard_map`."""
    mesh = jax.typeof(array).sharding.mesh
    axes = zip(mesh.axis_types, mesh.axis_sizes, strict=True)
    return any(kind != _AxisType.Manual and size > 1 for kind, size in axes)


def is_manual(array: jax.Array) -> bool:
    """Says whether each device sees an array of its own, as in `jax.shard_map`."""
    return _AxisType.Manual in jax.typeof(array).sharding.mesh.axis_types


def in_automatic_mode(
    function: Callable[..., Any], out_shardings: Any
) -> Callable[..., Any]:
    """Makes a function within which XLA chooses the shardings on an explicit mesh."""
    return jax.sharding.auto_axes(function, out_sharding=out_shardings)


def on_each_device(
    function: Callable[..., Any], mesh: Any, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """Makes a function that each device of the mesh runs on its own shards.

    The check by JAX of which results are equal on all devices (`check_vma`) is off.
    What one device hands back to all is equal on all by construction, but JAX cannot
    see that.
    """
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )


def checked(name: str, sharding: Any, shape: Sequence[int]) -> NamedSharding:
    """Checks the sharding of an array, and gives its spec an entry for each axis.

    Args:
      name: name of the sharding in errors.
      sharding: a `NamedSharding` or, for the mesh of `jax.set_mesh`, a `jax.P`.
      shape: shape of the array.

    Raises:
      ValueError: if `sharding` is neither, names axes that its mesh does not have, or
        does not fit the shape.
    """
    mesh: Any
    if isinstance(sharding, jax.P):
        mesh, spec = jax.sharding.get_abstract_mesh(), sharding
        no_mesh = f"{SHARDING_RULE} (no mesh is set)"
        _arguments.require(name, sharding, no_mesh, not mesh.empty)
    else:
        is_named = isinstance(sharding, NamedSharding)
        _arguments.require(name, sharding, SHARDING_RULE, is_named)
        mesh, spec = sharding.mesh, sharding.spec
    axes = {axis for entry in spec for axis in names(entry)}
    known = f"of mesh axes {tuple(mesh.axis_names)}"
    _arguments.require(name, spec, known, axes <= set(mesh.axis_names))
    rank = len(shape)
    _arguments.require(name, spec, f"of at most {rank} axes", len(spec) <= rank)
    spec = jax.P(*spec, *[None] * (rank - len(spec)))
    for size, entry in zip(shape, spec, strict=True):
        count = shards(entry, mesh.shape)
        rule = f"such that {count} shards divide an axis of {size}"
        _arguments.require(name, spec, rule, size % count == 0)
    return NamedSharding(mesh, spec)


def is_same_mesh(mesh: Any, other: Any) -> bool:
    """Says whether two meshes are equal. One or both of them may be abstract."""
    is_abstract = jax.sharding.AbstractMesh in (type(mesh), type(other))
    return mesh.shape == other.shape and (is_abstract or mesh == other)


def result_shardings(
    function: Callable[[Any], Any], tree: Any, shardings: Sequence[NamedSharding]
) -> Any:
    """The shardings of the arrays that a function makes of a tree with `shardings`.

    No array is made. The function is traced on a mesh with explicit axes, where each
    result has a sharding in its type. Results without one are replicated.
    """
    mesh = shardings[0].mesh
    explicit = jax.sharding.AbstractMesh(
        mesh.axis_sizes,
        mesh.axis_names,
        axis_types=(_AxisType.Explicit,) * len(mesh.axis_names),
    )
    treedef: Any
    leaves, treedef = jax.tree.flatten(tree)
    typed = [
        jax.ShapeDtypeStruct(
            jnp.shape(leaf),
            jnp.result_type(leaf),
            sharding=NamedSharding(explicit, sharding.spec),
        )
        for leaf, sharding in zip(leaves, shardings, strict=True)
    ]
    with jax.sharding.use_abstract_mesh(explicit):
        result = jax.eval_shape(function, treedef.unflatten(typed))

    def one(array: jax.ShapeDtypeStruct) -> NamedSharding:
        is_typed = isinstance(array.sharding, NamedSharding)
        return NamedSharding(mesh, array.sharding.spec if is_typed else jax.P())

    return jax.tree.map(one, result)
