"""Plans the parameters of a tree, and nests values like the parameters.

A *leaf* is the plan of one parameter, which has all that is static about it: its path,
layout, dtype and sharding. The *plan* of a tree has the leaves, the structure and the
arrays of the tree. The transformation works on lists in the order of the leaves. This
module also puts such lists into nested dicts and finds them there again. Its errors
name the parameter.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from soap_optax import _arguments
from soap_optax._dtypes import widest
from soap_optax._options import FamilyOptions
from soap_optax.mesh import _mesh
from soap_optax.parameters._layout import (
    DimensionNumbers,
    Layout,
    is_dimension_numbers,
    make_layout,
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What is static about one parameter.

    Attributes:
      path: keys of the parameter in its tree.
      keys: names on the path, by which values for the parameter are kept in nested
        dicts.
      layout: layout of its factors and blocks.
      dtype: dtype in which its update is computed, at least float32.
      sharding: its sharding on a mesh, with a `jax.P` of its rank; None if not known.
    """

    path: tuple[Any, ...]
    keys: tuple[str, ...]
    layout: Layout
    dtype: Any
    sharding: _mesh.NamedSharding | None

    @property
    def name(self) -> str:
        """The text by which errors name the parameter."""
        return _name(self.path)

    def cast(self, array: Any) -> Any:
        """Converts an array or a `jax.ShapeDtypeStruct` to the dtype of the leaf."""
        if isinstance(array, jax.ShapeDtypeStruct):
            return array.update(dtype=self.dtype)
        return array.astype(self.dtype)


class Plan(NamedTuple):
    """A tree of arrays: its structure and, in the same order, leaves and arrays."""

    treedef: Any
    leaves: list[Leaf]
    arrays: list[Any]

    def widened(self) -> Any:
        """The tree, with each array in the dtype of its leaf."""
        return self.treedef.unflatten(
            leaf.cast(array)
            for leaf, array in zip(self.leaves, self.arrays, strict=True)
        )


def make_plan(tree: Any, options: FamilyOptions) -> Plan:
    """Plans each parameter of a tree.

    Args:
      tree: parameters, or anything with their structure and shapes.
      options: a value for every option. Shardings in the types of arrays come before
        the option `params_sharding`.

    Returns:
      The `Plan`.

    Raises:
      ValueError: if a parameter is not real floating point, or if its dimension numbers
        or its sharding do not fit; it names the parameter.
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree)
    paths = [path for path, _ in entries]
    arrays = [_canonical(array) for _, array in entries]
    numbers = _resolve_dimension_numbers(
        options["dimension_numbers"], tree, len(entries)
    )
    shardings = _known_shardings(arrays, tree, options["params_sharding"])

    def plan(path: Any, keys: Any, array: Any, numbers: Any, sharding: Any) -> Leaf:
        name = _name(path)
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(
                f"{name} must be real floating point, got {array.dtype} (for complex "
                "parameters see optax.contrib.split_real_and_imaginary)"
            )
        try:
            layout = make_layout(array.shape, options, numbers)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        dtype = widest(array.dtype, jnp.float32)
        return Leaf(path, keys, layout, dtype, sharding)

    planned = zip(
        paths, _dict_keys(paths, treedef), arrays, numbers, shardings, strict=True
    )
    return Plan(treedef, [plan(*of_leaf) for of_leaf in planned], arrays)


def _canonical(array: Any) -> Any:
    """An array or a shape in a dtype that JAX has.

    Without `jax_enable_x64`, JAX takes NumPy's float64 for float32, as `jnp.asarray`
    does, and warns wherever this dtype is asked for.
    """
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=jax.dtypes.canonicalize_dtype(array.dtype))
    return array if isinstance(array, jax.Array) else jnp.asarray(array)


def _name(path: tuple[Any, ...]) -> str:
    """The text by which errors name the parameter with this path."""
    return jax.tree_util.keystr(path) or "the parameter"


def flatten_params(plan: Plan, params: Any) -> list[jax.Array]:
    """The arrays of `params`, checked against the plan, which updates have made.

    Where the updates have None, `params` may have anything, because Equinox hands over
    a whole model, with the functions and the frozen arrays in it.
    """
    is_none = lambda node: node is None  # noqa: E731
    numbers = plan.treedef.unflatten(range(len(plan.leaves)))
    try:
        entries = jax.tree.leaves(numbers, is_leaf=is_none)
        treedef: Any = jax.tree.structure(numbers, is_leaf=is_none)
        pairs = zip(entries, treedef.flatten_up_to(params), strict=True)
    except ValueError as error:
        raise ValueError(
            f"params must have the structure of the updates; {error}"
        ) from error
    given = [param for number, param in pairs if number is not None]
    flat = list(map(_as_array, given, plan.leaves))
    for leaf, param in zip(plan.leaves, flat, strict=True):
        if param.shape != leaf.layout.shape:
            raise ValueError(
                f"{leaf.name} must have the shape of its parameter, {param.shape}, in "
                f"the updates, got {leaf.layout.shape}"
            )
    return flat


def _as_array(param: Any, leaf: Leaf) -> jax.Array:
    """Converts what `params` has in the place of an update to an array."""
    try:
        return jnp.asarray(param)
    except (TypeError, ValueError) as error:
        raise ValueError(
            "params must have the structure of the updates, which have an array for "
            f"{leaf.name}, got {jax.tree.structure(param)}"
        ) from error


def names(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> list[tuple[str, ...]]:
    """The names on the path of each parameter of a tree, as in `Leaf.keys`."""
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf)
    return _dict_keys([path for path, _ in entries], treedef)


def _dict_keys(paths: Sequence[tuple[Any, ...]], treedef: Any) -> list[tuple[str, ...]]:
    """The names on each path, without the `value` of a box around a parameter.

    Flax puts parameters into boxes that hold metadata. NNX passes boxes to `init` and
    bare arrays to `update`, and both have to give the same names. The `value` of a box
    is an attribute, which tells it from a key of a dict, and the only child of the box.

    Raises:
      ValueError: naming two parameters whose names are the same.
    """
    box = jax.tree_util.GetAttrKey("value")
    found: dict[tuple[str, ...], Any] = {}
    for path, is_alone in zip(paths, _only_children(treedef), strict=True):
        keys = path[:-1] if is_alone and path[-1] == box else path
        names = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if names in found:
            raise ValueError(
                "parameters must differ in the names on their paths, got "
                f"{_name(found[names])} and {_name(path)}"
            )
        found[names] = path
    return list(found)


def _only_children(treedef: Any) -> list[bool]:
    """Says of each leaf whether its node has no other child, not even an empty one.

    An empty child is None, or a parameter that another optimizer of a partition has.
    """
    leaf: Any = jax.tree.structure(0)
    children = treedef.children()
    if treedef == leaf or children == [leaf]:
        return [treedef != leaf]
    return [is_alone for child in children for is_alone in _only_children(child)]


def nest(leaves: Sequence[Leaf], values: Sequence[Sequence[Any]]) -> Any:
    """Puts the values of each leaf, as a tuple, into nested dicts by the leaf's keys.

    Without leaves the result is a scalar 0 and not an empty dict. To find the parts of
    a state that are shaped like parameters, `optax.tree.map_params` calls `init` with a
    tree that has no leaves. There one leaf has to stand for the nested dicts, because
    they are no such part.
    """
    if not leaves:
        return jnp.zeros([], jnp.int32)
    root: dict[str, Any] = {}
    for leaf, value in zip(leaves, values, strict=True):
        *parents, last = "", *leaf.keys
        node = root
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = tuple(value)
    return root.get("", {})


def find(leaves: Sequence[Leaf], nested: Any) -> list[list[Any]]:
    """Inverts `nest`, with an empty list for a leaf that `nested` does not have."""

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
    for path, value in entries:
        is_of_parameter = isinstance(value, (tuple, list))
        if (
            is_of_parameter
            and tuple(jax.tree_util.keystr((k,), simple=True) for k in path)
            not in known
        ):
            raise ValueError(
                "updates must have every parameter for which init made the state, got "
                f"none for {jax.tree_util.keystr(path) or 'the parameter'}"
            )


def _resolve_dimension_numbers(numbers: Any, tree: Any, count: int) -> list[Any]:
    """The dimension numbers of each parameter, None where the shape decides."""
    if _is_function(numbers, is_dimension_numbers):
        numbers = numbers(tree)
    if numbers is None or is_dimension_numbers(numbers):
        return [numbers] * count
    rule = "DimensionNumbers, MuonDimensionNumbers or None for each parameter"
    entries = _per_parameter(
        "dimension_numbers", numbers, tree, is_dimension_numbers, rule
    )
    return [DimensionNumbers(()) if entry is None else entry for entry in entries]


def resolve_shardings(tree: Any, params_sharding: Any) -> list[_mesh.NamedSharding]:
    """The sharding of each parameter, as a `NamedSharding` with a `jax.P` of its rank.

    Args:
      tree: the parameters, or their shapes.
      params_sharding: a tree of `NamedSharding` or, for the mesh of `jax.set_mesh`,
        `jax.P`, like the parameters or a prefix of them, or a callable that makes such
        a tree from the parameters.

    Raises:
      ValueError: if what is given for a parameter is no sharding, names axes that its
        mesh does not have, does not fit the parameter's shape, or is on another mesh
        than the others; it names the parameter.
    """
    if _is_function(params_sharding, _is_sharding):
        params_sharding = params_sharding(tree)
    given = _per_parameter(
        "params_sharding", params_sharding, tree, _is_sharding, _mesh.SHARDING_RULE
    )
    shardings: list[_mesh.NamedSharding] = []
    entries = jax.tree_util.tree_flatten_with_path(tree)[0]
    for (path, array), sharding in zip(entries, given, strict=True):
        name = f"params_sharding of {_name(path)}"
        shardings.append(_mesh.checked(name, sharding, jnp.shape(array)))
        mesh, first = shardings[-1].mesh, shardings[0].mesh
        rule = f"on the same mesh as the others, {first}"
        same = _mesh.is_same_mesh(mesh, first)
        _arguments.require(name, shardings[-1].spec, rule, same)
    return shardings


def _is_sharding(node: Any) -> bool:
    return isinstance(node, (jax.sharding.Sharding, jax.P))


def _is_function(given: Any, is_entry: Callable[[Any], bool]) -> bool:
    """Says whether an option is a function, and not a tree of entries.

    A tree may be callable, like an Equinox module. A function may be a tree, because
    Optimistix makes trees of closures. A tree of entries has nothing else in it.
    """
    is_leaf = lambda node: node is None or is_entry(node)  # noqa: E731
    is_tree = all(map(is_leaf, jax.tree.leaves(given, is_leaf=is_leaf)))
    return callable(given) and not is_tree


def _known_shardings(
    arrays: Sequence[Any], tree: Any, params_sharding: Any
) -> Sequence[_mesh.NamedSharding | None]:
    """The shardings in the types of the arrays, or else those of `params_sharding`.

    All are None if one of them is not known, if all arrays are only shapes, or if each
    device sees arrays of its own, as in `jax.shard_map`.
    """
    unknown = [None] * len(arrays)
    if not arrays:
        return unknown
    if all(isinstance(array, jax.ShapeDtypeStruct) for array in arrays):
        return unknown
    if any(map(_mesh.is_manual, arrays)):
        return unknown
    shardings = [_mesh.explicit_sharding(a, range(a.ndim)) for a in arrays]
    if all(sharding is None for sharding in shardings) and params_sharding is not None:
        if _is_function(params_sharding, _is_sharding):
            params_sharding = _made_from_shapes(params_sharding, tree)
        shardings = list(resolve_shardings(tree, params_sharding))
    return unknown if None in shardings else shardings


def _made_from_shapes(params_sharding: Callable[[Any], Any], tree: Any) -> Any:
    """What a function makes of the shapes of the parameters.

    An update that is traced on automatic axes knows nothing else of its arrays. With
    shapes everywhere, a function that works in `init` works in every update, too.
    """
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(jnp.shape(x), jnp.result_type(x)), tree
    )
    made = params_sharding(shapes)
    entries = jax.tree.leaves(made, is_leaf=lambda node: node is None)
    rule = (
        "a function of the shapes of the parameters, which have no shardings (in place "
        "of a function that reads them, give the tree of the shardings)"
    )
    _arguments.require("params_sharding", params_sharding, rule, None not in entries)
    return made


def _per_parameter(
    name: str, given: Any, tree: Any, is_entry: Callable[[Any], bool], rule: str
) -> list[Any]:
    """For each parameter, its entry in a tree like the parameters or a prefix of it."""
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
    # An entry applies to every parameter in its subtree, which is one parameter, boxed
    # or not, a whole layer, or nothing where the parameter is masked.
    return [
        entry
        for entry, subtree in zip(entries, subtrees, strict=True)
        for _ in jax.tree.leaves(subtree)
    ]
