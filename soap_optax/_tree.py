"""From a tree of parameters to a list of plans, and from lists back to trees.

The transformation works on lists that follow the parameters. Here they get their paths,
layouts and dtypes, with errors that name the parameter, and what belongs to them is
found in, or put into, the state.
"""

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments
from soap_optax._layout import (
    DimensionNumbers,
    Layout,
    explicit_sharding,
    is_dimension_numbers,
    mesh_axes,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is static about one parameter.

    Attributes:
      path: its keys in the tree.
      keys: its keys in nested dicts.
      layout: its factors and blocks.
      dtype: that of its moments, at least float32.
      sharding: on a mesh, with a `jax.P` of its rank; None: not known.
    """

    path: tuple[Any, ...]
    keys: tuple[str, ...]
    layout: Layout
    dtype: Any
    sharding: jax.sharding.NamedSharding | None

    @property
    def name(self) -> str:
        """The path as errors name it."""
        return jax.tree_util.keystr(self.path) or "the parameter"

    def cast(self, array: Any) -> Any:
        """The array, or a `jax.ShapeDtypeStruct`, in this dtype."""
        if isinstance(array, jax.ShapeDtypeStruct):
            return array.update(dtype=self.dtype)
        return array.astype(self.dtype)


class Plan(NamedTuple):
    """A tree of arrays: its structure and, in the same order, leaves and arrays."""

    treedef: Any
    leaves: list[Leaf]
    arrays: list[Any]

    def widened(self) -> Any:
        """The tree, each array in the dtype of its moments."""
        return self.treedef.unflatten(
            leaf.cast(array)
            for leaf, array in zip(self.leaves, self.arrays, strict=True)
        )


def make_plan(
    tree: Any,
    layout_of: Callable[..., Layout],
    dimension_numbers: Any,
    params_sharding: Any = None,
) -> Plan:
    """Plans each parameter of a tree.

    Args:
      tree: parameters, or anything with their structure and shapes.
      layout_of: `make_layout` with all options but `dimension_numbers`.
      dimension_numbers: as given to `in_eigenbasis`.
      params_sharding: as given to `in_eigenbasis`; the types of arrays come before it.

    Returns:
      The `Plan`.

    Raises:
      ValueError: naming the parameter, if it is not real floating point or its
        dimension numbers or its sharding do not fit.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    keys = _dict_keys([path for path, _ in entries])
    numbers = _resolve_dimension_numbers(dimension_numbers, tree, len(entries))
    arrays = [a if hasattr(a, "dtype") else jnp.asarray(a) for _, a in entries]
    shardings = _known_shardings(arrays, tree, params_sharding)
    leaves = []
    for i, ((path, _), array) in enumerate(zip(entries, arrays, strict=True)):
        name = jax.tree_util.keystr(path) or "the parameter"
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be real floating point, got {array.dtype} (for complex "
                "parameters see optax.contrib.split_real_and_imaginary)"
            )
        try:
            layout = layout_of(array.shape, dimension_numbers=numbers[i])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        dtype = jnp.promote_types(array.dtype, jnp.float32)
        leaves.append(Leaf(path, keys[i], layout, dtype, shardings[i]))
    return Plan(treedef, leaves, arrays)


def flatten_params(plan: Plan, params: Any) -> list[jax.Array]:
    """The leaves of `params`, checked against the updates that made the plan."""
    try:
        flat = [jnp.asarray(p) for p in plan.treedef.flatten_up_to(params)]
    except ValueError as error:
        raise ValueError(
            f"params must have the structure of the updates; {error}"
        ) from error
    for leaf, param in zip(plan.leaves, flat, strict=True):
        if param.shape != leaf.layout.shape:
            raise ValueError(
                f"{leaf.name} must have the shape of its parameter, {param.shape}, in "
                f"the updates, got {leaf.layout.shape}"
            )
    return flat


def _dict_keys(paths: Sequence[tuple[Any, ...]]) -> list[tuple[str, ...]]:
    """The names on each path, without the `value` of a box around a parameter.

    Flax boxes parameters to hold metadata, and NNX gives init boxes, update arrays.
    """
    names = [tuple(jax.tree_util.keystr((k,), simple=True) for k in p) for p in paths]
    siblings = collections.Counter(path[:i] for path in names for i in range(len(path)))
    return [
        path[:-1] if path[-1:] == ("value",) and siblings[path[:-1]] == 1 else path
        for path in names
    ]


def nest(leaves: Sequence[Leaf], values: Sequence[Sequence[Any]]) -> Any:
    """Nested dicts by the keys of each leaf's path, with its values as a tuple."""
    root: dict[str, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        *parents, last = "", *leaf.keys
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = tuple(value)
    return root.get("", {})


def find(leaves: Sequence[Leaf], nested: Any) -> list[list[Any]]:
    """Inverse of `nest`, with an empty list for a leaf that is not there."""

    def one(leaf: Leaf) -> list[Any]:
        node = nested
        for key in leaf.keys:
            node = node.get(key, {}) if isinstance(node, dict) else {}
        return list(node) if isinstance(node, (tuple, list)) else []

    return [one(leaf) for leaf in leaves]


def check_no_others(leaves: Sequence[Leaf], nested: Any) -> None:
    """Raises a `ValueError` naming an entry of `nested` that belongs to no leaf."""
    entries = jax.tree_util.tree_flatten_with_path(
        nested, is_leaf=lambda node: isinstance(node, (tuple, list))
    )[0]
    known = {leaf.keys for leaf in leaves}
    for path, _ in entries:
        if tuple(jax.tree_util.keystr((k,), simple=True) for k in path) not in known:
            raise ValueError(
                "updates must have every parameter for which init made the state, got "
                f"none for {jax.tree_util.keystr(path) or 'the parameter'}"
            )


def split_first_moments(
    inner_state: optax.OptState, leaves: Sequence[Leaf], names: Sequence[str]
) -> tuple[list[int], list[Any], Callable[[Sequence[Any]], optax.OptState]]:
    """Takes the first moments out of a state.

    An array of the state belongs to a parameter if its path ends in the parameter's
    and it has its shape; it is a first moment if the field before is in `names`.

    Returns:
      For each first moment the index of its leaf, the moments, and a function that
      makes the state with other moments.
    """
    treedef: Any
    values, treedef = jax.tree.flatten(inner_state)
    found = {
        position: i
        for position, i in _named_like_parameters(inner_state, leaves, names).items()
        if values[position].shape == leaves[i].layout.shape
    }

    def merge(moments: Sequence[Any]) -> optax.OptState:
        changed = dict(zip(found, moments, strict=True))
        return treedef.unflatten(changed.get(i, v) for i, v in enumerate(values))

    return list(found.values()), [values[position] for position in found], merge


def check_first_moments(
    inner_state: optax.OptState,
    leaves: Sequence[Leaf],
    names: Sequence[str],
    init: Callable[[], optax.OptState],
) -> None:
    """Raises a `ValueError` naming a parameter whose first moment has another shape.

    Another than its own, and than `init` would make it: some transformations have
    first moments of another shape.
    """
    values = jax.tree.leaves(inner_state)
    others = {
        position: leaves[i]
        for position, i in _named_like_parameters(inner_state, leaves, names).items()
        if values[position].shape != leaves[i].layout.shape
    }
    expected = jax.tree.leaves(jax.eval_shape(init)) if others else []
    for position, leaf in others.items():
        if expected[position].shape != values[position].shape:
            raise ValueError(
                f"{leaf.name} must have the shape for which init made the state: an "
                f"update of shape {leaf.layout.shape} needs a first moment of shape "
                f"{expected[position].shape}, got {values[position].shape}"
            )


def _named_like_parameters(
    inner_state: optax.OptState, leaves: Sequence[Leaf], names: Sequence[str]
) -> dict[int, int]:
    """From positions in such fields to the leaf at the end of each path."""
    index = {leaf.path: i for i, leaf in enumerate(leaves)}
    found: dict[int, int] = {}
    for position, (path, _) in enumerate(
        jax.tree_util.tree_flatten_with_path(inner_state)[0]
    ):
        ends = (k for k in range(1, len(path) + 1) if path[k:] in index)
        start = next(ends, None)
        if start is not None and getattr(path[start - 1], "name", None) in names:
            found[position] = index[path[start:]]
    return found


def _resolve_dimension_numbers(numbers: Any, tree: Any, count: int) -> list[Any]:
    """The dimension numbers of each parameter, None where the shape decides."""
    if callable(numbers):
        numbers = numbers(tree)
    if numbers is None or is_dimension_numbers(numbers):
        return [numbers] * count
    rule = "DimensionNumbers, MuonDimensionNumbers or None for each parameter"
    entries = _per_parameter(
        *("dimension_numbers", numbers, tree, is_dimension_numbers, rule)
    )
    return [DimensionNumbers(()) if entry is None else entry for entry in entries]


def resolve_shardings(
    tree: Any, params_sharding: Any
) -> list[jax.sharding.NamedSharding]:
    """The sharding of each parameter, as a `NamedSharding` with a `jax.P` of its rank.

    Args:
      tree: the parameters, or their shapes.
      params_sharding: a tree of `NamedSharding` or, for the mesh of `jax.set_mesh`,
        `jax.P`, like the parameters or a prefix of them, or a callable making it.

    Raises:
      ValueError: naming the parameter, if its sharding is none, names axes that its
        mesh has not, does not fit its shape, or is on another mesh than the others.
    """
    rule = "a NamedSharding or, under jax.set_mesh, a PartitionSpec for each parameter"
    is_sharding = lambda x: isinstance(x, (jax.sharding.Sharding, jax.P))  # noqa: E731
    if callable(params_sharding):
        params_sharding = params_sharding(tree)
    given = _per_parameter("params_sharding", params_sharding, tree, is_sharding, rule)
    shardings: list[jax.sharding.NamedSharding] = []
    for (path, array), sharding in zip(
        jax.tree_util.tree_flatten_with_path(tree)[0], given, strict=True
    ):
        name = f"params_sharding of {jax.tree_util.keystr(path) or 'the parameter'}"
        mesh: Any
        if isinstance(sharding, jax.P):
            mesh, spec = jax.sharding.get_abstract_mesh(), sharding
            no_mesh = f"{rule} (no mesh is set)"
            _arguments.require(name, sharding, no_mesh, not mesh.empty)
        else:
            is_named = isinstance(sharding, jax.sharding.NamedSharding)
            _arguments.require(name, sharding, rule, is_named)
            mesh, spec = sharding.mesh, sharding.spec
        axes = {axis for entry in spec for axis in mesh_axes(entry)}
        known = f"of mesh axes {tuple(mesh.axis_names)}"
        _arguments.require(name, spec, known, axes <= set(mesh.axis_names))
        first = shardings[0].mesh if shardings else mesh
        is_abstract = jax.sharding.AbstractMesh in (type(mesh), type(first))
        same = mesh.shape == first.shape and (is_abstract or mesh == first)
        rule_of_mesh = f"on the same mesh as the others, {first}"
        _arguments.require(name, sharding, rule_of_mesh, same)
        rank = jnp.ndim(array)
        fits = len(spec) <= rank
        _arguments.require(name, spec, f"of at most {rank} axes", fits)
        spec = jax.P(*spec, *[None] * (rank - len(spec)))
        for size, entry in zip(jnp.shape(array), spec, strict=True):
            shards = math.prod(mesh.shape[n] for n in mesh_axes(entry))
            rule_of_size = f"such that {shards} shards divide an axis of {size}"
            _arguments.require(name, spec, rule_of_size, size % shards == 0)
        shardings.append(jax.sharding.NamedSharding(mesh, spec))
    return shardings


def _known_shardings(
    arrays: Sequence[Any], tree: Any, params_sharding: Any
) -> Sequence[jax.sharding.NamedSharding | None]:
    """From the types of the arrays on explicit meshes, else from `params_sharding`.

    None where each device sees arrays of its own (`jax.shard_map`).
    """
    unknown = [None] * len(arrays)
    if not arrays:
        return unknown
    if all(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return unknown
    shardings = [explicit_sharding(array, range(array.ndim)) for array in arrays]
    types = {kind for a in arrays for kind in jax.typeof(a).sharding.mesh.axis_types}
    if jax.sharding.AxisType.Manual in types:
        return unknown
    if all(sharding is None for sharding in shardings) and params_sharding is not None:
        shardings = list(resolve_shardings(tree, params_sharding))
    return unknown if None in shardings else shardings


def _per_parameter(
    name: str, given: Any, tree: Any, is_entry: Callable[[Any], bool], rule: str
) -> list[Any]:
    """The entries of a tree like the parameters, or of a prefix, for each of them."""
    treedef: Any
    entries, treedef = jax.tree.flatten(
        given, is_leaf=lambda node: node is None or is_entry(node)
    )
    for entry in entries:
        _arguments.require(name, entry, rule, entry is None or is_entry(entry))
    try:
        subtrees = treedef.flatten_up_to(tree)
    except ValueError as error:
        raise ValueError(
            f"{name} must be a tree with the structure of the parameters, or a prefix "
            f"of it; {error}"
        ) from error
    # An entry holds for all of its subtree: one parameter, boxed or not, a whole layer,
    # or nothing where the parameter is masked.
    return [
        entry
        for entry, subtree in zip(entries, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]
