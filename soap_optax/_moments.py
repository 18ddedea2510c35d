"""Which arrays of an inner state change basis at a refresh, and which stay.

An array is *linear* if it turns with the gradient, as a first moment, a sum of
gradients or a copy of the parameters does. A refresh has to change its basis. An array
is *coordinatewise* if its entries belong to coordinates, as in second moments and step
sizes. A refresh leaves it as it is. The user says by `Words` which arrays are which.
Where the user says nothing, the table `_KNOWN` decides, by the innermost state of optax
that holds the array. If neither says anything about an array that is like a parameter,
the array is refused. A linear array is also refused if it has no owner, or if it is
like a parameter and does not have the shape of its owner, because its basis cannot be
changed.

The *owner* of an array is the parameter whose path ends the path of the array. The
*name* of an array is the last attribute or dict key before the path of the owner. An
array without an owner can be named by each attribute and dict key on its path. An array
is *like* a parameter if its owner has factors. If it has no owner or not the shape of
its owner, it is also like a parameter if it has as many entries as a parameter with
factors or as all parameters together.

The states of optax are identified by the names of their classes and of the package,
because some of these classes are not public, and some are missing in some versions.
"""

import collections
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax._kronecker import Moments
from soap_optax.parameters._tree import Leaf


class Words(NamedTuple):
    """Says what the arrays in some fields of a state are, by the names of the fields.

    Attributes:
      first_moments: names of the fields whose arrays are linear.
      coordinatewise: names of the fields whose arrays are coordinatewise.
      second_moments: names of the fields whose arrays are coordinatewise, and are means
        of the squares of what the first moments in the same state are means of.
    """

    first_moments: tuple[str, ...] = ()
    coordinatewise: tuple[str, ...] = ()
    second_moments: tuple[str, ...] = ()


_KNOWN = {
    "ApplyEvery": Words(("grad_acc",)),
    "COCOBState": Words(
        ("init_particles", "cumulative_gradients"),
        ("scale", "subgradients", "reward"),
    ),
    "DAdaptAdamWState": Words(("exp_avg", "grad_sum"), ("exp_avg_sq",)),
    "DoGState": Words(("init_params",)),
    "DoWGState": Words(("init_params",)),
    "EmaState": Words(("ema",)),
    "FactoredState": Words((), ("v_row", "v_col", "v")),
    "FactorizedAdamState": Words(("mu",), ("nu",)),
    "InjectHyperparamsState": Words((), ("hyperparams",)),
    "InjectStatefulHyperparamsState": Words((), ("hyperparams", "hyperparams_states")),
    "MadgradState": Words(("s", "x0"), ("grad_sum_sq",)),
    "MechanicState": Words(("x0",), ("r", "m", "v", "s")),
    "MomoAdamState": Words(("exp_avg",), ("exp_avg_sq",)),
    "MomoState": Words(("exp_avg",)),
    "MultiStepsState": Words(("acc_grads",)),
    "MuonState": Words(("mu",), ("ns_coeffs",)),
    "ProdigyState": Words(("exp_avg", "grad_sum", "params0"), ("exp_avg_sq",)),
    "SAMState": Words(("cache",)),
    "ScaleByAdaDeltaState": Words((), ("e_g", "e_x")),
    "ScaleByAdamState": Words(("mu",), ("nu",)),
    "ScaleByAdanState": Words(("m", "v", "g"), ("n",)),
    "ScaleByAdemamixState": Words(("m1", "m2"), ("nu",)),
    "ScaleByAmsgradState": Words(("mu",), ("nu", "nu_max")),
    "ScaleByBeliefState": Words(("mu",), ("nu",)),
    "ScaleByDistanceOverGradientsState": Words(
        ("init_params",), ("max_dist", "grad_sum_of_squares")
    ),
    "ScaleByLBFGSState": Words(
        ("params", "updates", "diff_params_memory", "diff_updates_memory"),
        ("weights_memory",),
    ),
    "ScaleByLionState": Words(("mu",)),
    "ScaleByNovogradState": Words(("mu",), ("nu",)),
    "ScaleByOptimisticGradientState": Words(("previous_gradient",)),
    "ScaleByRmsState": Words((), ("nu",)),
    "ScaleByRmsWithCountState": Words((), ("nu",)),
    "ScaleByRpropState": Words(("prev_updates",), ("step_sizes",)),
    "ScaleByRssState": Words((), ("sum_of_squares",)),
    "ScaleBySM3State": Words(("nu",), ("mu",)),  # Here nu is the mean of updates.
    "ScaleBySimplifiedAdEMAMixState": Words(("m",), ("n",)),
    "ScheduleFreeState": Words(("z",)),
    "ShampooRootsState": Words(("mu",)),
    "SophiaState": Words(("mu",), ("nu",)),
    "TraceState": Words(("trace",)),
}

_CALLS = "it calls a function of the parameters, which would get projected ones"

# The states that cannot run in an eigenbasis, whatever the user says, and the reasons.
_REFUSED = {
    "DifferentiallyPrivateAggregateState": "it needs the gradients of single examples",
    "EigenbasisState": "it projects gradients itself",
    "GaLoreState": "it projects gradients itself",
    "HutchinsonState": _CALLS,
    "LookaheadState": "it needs optax.LookaheadParams, so it belongs outside",
    "MonitorState": "the first step changes its structure, so it belongs outside",
    "ScaleByBacktrackingLinesearchState": _CALLS,
    "ScaleByZoomLinesearchState": _CALLS,
}


class _Entry(NamedTuple):
    """One array of an inner state.

    Attributes:
      path: the keys on the way to the array in the state.
      array: the array, or anything with a shape and a dtype.
      names: names by which the array can be named, the last one on its path first; at
        most one, its name, if it has an owner.
      owner: the index of the owner, or None.
      linear: whether the array is linear; None if neither the words nor the table say.
      is_square: whether the words call the array a second moment.
      state: the keys on the way to the state in whose field the array is.
    """

    path: tuple[Any, ...]
    array: Any
    names: list[str]
    owner: int | None
    linear: bool | None
    is_square: bool
    state: tuple[Any, ...]


def check_inner_state(
    inner_state: optax.OptState, leaves: Sequence[Leaf], words: Words
) -> None:
    """Checks that it is known of each array whether a refresh changes its basis.

    Args:
      inner_state: the state that the inner transformation makes of the parameters.
      leaves: the plans of the parameters.
      words: what the user says about arrays.

    Raises:
      ValueError: for an array that is refused; for a word that names no field, or that
        stands in two tuples of `words`; for a state that cannot run in an eigenbasis.
    """
    shapes = [leaf.layout.shape for leaf in leaves]
    sizes = {math.prod(leaf.layout.shape) for leaf in leaves if leaf.layout.has_factors}
    if not sizes:
        return
    # An array can hold all parameters together, as in optax.flatten.
    sizes.add(sum(map(math.prod, shapes)))
    _check_states(inner_state)
    entries = [e for e in _entries(inner_state, leaves, words) if _is_inexact(e.array)]
    _check_words(words, entries)
    for entry in entries:
        leaf = None if entry.owner is None else leaves[entry.owner]
        shape, size = entry.array.shape, math.prod(entry.array.shape)
        fits = leaf is not None and shape == leaf.layout.shape
        # The path of a bare parameter is empty, and every path ends in it. Only the
        # shape can then tell whether the parameter owns the array.
        if leaf is not None and (fits or leaf.path):
            is_like = leaf.layout.has_factors or (size in sizes and not fits)
        else:
            is_like = size in sizes or bool(entry.linear)
        if is_like and (entry.linear is None or (entry.linear and not fits)):
            raise ValueError(_complaint(inner_state, entry, leaf, fits))


def check_shapes(
    inner_state: optax.OptState,
    leaves: Sequence[Leaf],
    words: Words,
    init: Callable[[], optax.OptState],
) -> None:
    """Raises a `ValueError` naming a parameter whose first moment does not fit it.

    A first moment must have the shape of its parameter or, because a parameter without
    factors may have first moments of another shape, the shape that `init` would make.
    """
    others = [
        (position, leaves[entry.owner], jnp.shape(entry.array))
        for position, entry in enumerate(_entries(inner_state, leaves, words))
        if entry.owner is not None
        and entry.linear
        and jnp.shape(entry.array) != leaves[entry.owner].layout.shape
    ]
    expected = jax.tree.leaves(jax.eval_shape(init)) if others else []
    for position, leaf, shape in others:
        if expected[position].shape != shape:
            raise ValueError(
                f"{leaf.name} must have the shape for which init made the state: an "
                f"update of shape {leaf.layout.shape} needs a first moment of shape "
                f"{expected[position].shape}, got {shape}"
            )


def check_made_by(
    inner_state: optax.OptState, init: Callable[[], optax.OptState]
) -> None:
    """Raises a `ValueError` if a state has not the arrays that `init` would make."""

    def arrays(state: optax.OptState) -> dict[str, tuple[int, ...]]:
        entries = jax.tree_util.tree_leaves_with_path(state)
        return {jax.tree_util.keystr(path): jnp.shape(x) for path, x in entries}

    wanted, given = arrays(jax.eval_shape(init)), arrays(inner_state)
    if wanted == given:
        return
    names = [*wanted, *given]
    path = next(name for name in names if wanted.get(name) != given.get(name))
    raise ValueError(
        "the inner state must have the arrays that init makes with these options: "
        f"{path} must be of shape {wanted.get(path)}, got {given.get(path)}"
    )


def split_moments(
    inner_state: optax.OptState, leaves: Sequence[Leaf], words: Words
) -> tuple[
    list[list[Moments]], Callable[[Sequence[Sequence[Moments]]], optax.OptState]
]:
    """Takes what a refresh changes out of a state.

    This is linear arrays that have the shape of their owner, and the second moments in
    the same state.

    Returns:
      For each parameter a list with `Moments` for each state that has first moments of
      it, and a function that makes the state again, with the arrays in other such lists
      in their place.
    """
    treedef: Any
    values, treedef = jax.tree.flatten(inner_state)
    states: list[dict[Any, Moments]] = [{} for _ in leaves]
    for position, entry in enumerate(_entries(inner_state, leaves, words)):
        owner, shape = entry.owner, jnp.shape(entry.array)
        if owner is not None and shape == leaves[owner].layout.shape:
            of_state = states[owner].setdefault(entry.state, Moments([], []))
            if entry.linear:
                of_state.first.append(position)
            elif entry.is_square:
                of_state.second.append(position)
    positions = [[m for m in of_leaf.values() if m.first] for of_leaf in states]

    def merge(moments: Sequence[Sequence[Moments]]) -> optax.OptState:
        changed = list(values)
        pairs = zip(jax.tree.leaves(positions), jax.tree.leaves(moments), strict=True)
        for position, array in pairs:
            changed[position] = array
        return treedef.unflatten(changed)

    return jax.tree.map(lambda position: values[position], positions), merge


def _entries(
    inner_state: optax.OptState, leaves: Sequence[Leaf], words: Words
) -> Iterator[_Entry]:
    """Yields an `_Entry` for each array, in the order of `jax.tree.leaves`."""
    index = {leaf.path: i for i, leaf in enumerate(leaves)}
    for path, array, known, field in _arrays(inner_state):
        # The longest end is tried first: a parameter's path may end in another's.
        start = next((k for k in range(len(path) + 1) if path[k:] in index), None)
        names = [name for key in path[:start][::-1] if (name := _name(key)) is not None]
        if start is not None:
            names = names[:1]
        linear = _says(words, names)
        if linear is None:
            linear = _says(known, [field])
        owner = None if start is None else index[path[start:]]
        is_square = any(name in words.second_moments for name in names)
        yield _Entry(path, array, names, owner, linear, is_square, path[:start][:-1])


def _arrays(
    node: Any, path: tuple[Any, ...] = ()
) -> Iterator[tuple[tuple[Any, ...], Any, Words, str]]:
    """Yields each array: its path, itself, what `_KNOWN` says of its state, its field.

    The state is the innermost one that `_KNOWN` lists, and the field is a name in it.
    """
    is_other = lambda other: other is not node and _is_known(other)  # noqa: E731
    known = _KNOWN[type(node).__name__] if _is_known(node) else Words()
    for end, child in jax.tree_util.tree_flatten_with_path(node, is_leaf=is_other)[0]:
        if _is_known(child):
            yield from _arrays(child, (*path, *end))
        else:
            field = _name(end[0]) if end else None
            yield (*path, *end), child, known, field or ""


def _is_known(node: Any, table: Any = _KNOWN) -> bool:
    """Says whether a node is a state of optax or this library that the table lists."""
    package = type(node).__module__.partition(".")[0]
    return package in ("optax", "soap_optax") and type(node).__name__ in table


def _name(key: Any) -> str | None:
    """Gives the name of an attribute or of a key in a dict, and None for an index."""
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    return str(key.key) if isinstance(key, jax.tree_util.DictKey) else None


def _says(words: Words, names: Sequence[str]) -> bool | None:
    """Says whether words call an array linear; None if they have none of its names."""
    for name in names:
        if any(name in field for field in words):
            return name in words.first_moments
    return None


def _is_inexact(array: Any) -> bool:
    """Says whether an array is floating point or complex and has axes and entries."""
    dtype, shape = getattr(array, "dtype", None), getattr(array, "shape", ())
    has_entries = len(shape) > 0 and 0 not in shape
    return dtype is not None and jnp.issubdtype(dtype, jnp.inexact) and has_entries


def _refusal(node: Any) -> str | None:
    """Says why a node of the state cannot run in an eigenbasis; None if it can."""
    if _is_known(node, ("SAMState",)) and node.cache is None:  # SAM's opaque mode
        return _CALLS
    return _REFUSED[type(node).__name__] if _is_known(node, _REFUSED) else None


def _check_states(inner_state: optax.OptState) -> None:
    """Raises a `ValueError` naming a state that cannot run in an eigenbasis."""
    is_refused = lambda node: _refusal(node) is not None  # noqa: E731
    for node in jax.tree.leaves(inner_state, is_leaf=is_refused):
        if is_refused(node):
            raise ValueError(
                f"inner must not have a {type(node).__name__} where a parameter has "
                f"factors: {_refusal(node)}"
            )


def _check_words(words: Words, entries: Sequence[_Entry]) -> None:
    """Raises a `ValueError` for a word that names no field or is said twice."""
    fields = sorted({name for entry in entries for name in entry.names})
    said = collections.Counter(name for names in words for name in {*names})
    for argument, names in words._asdict().items():
        for name in names:
            if name not in fields:
                raise ValueError(
                    f"{argument} must name fields of the inner state with arrays, "
                    f"which are {', '.join(map(repr, fields)) or 'none'}, got {name!r}"
                )
            if said[name] > 1:
                raise ValueError(
                    f"{name!r} must stand in only one of {', '.join(words._fields)}"
                )


def _complaint(
    inner_state: optax.OptState, entry: _Entry, leaf: Leaf | None, fits: bool
) -> str:
    """The message of the error about an array that is refused."""
    holder = _holder(inner_state, entry.path)
    belongs = "that belongs to no parameter by its path"
    if leaf is not None:
        belongs = f"of parameter {leaf.name}, of shape {leaf.layout.shape}"
    where = f"the array {jax.tree_util.keystr(entry.path)} of shape {entry.array.shape}"
    what = f"{where} in {holder}, {belongs},"
    if not entry.names:
        return (
            f"in_eigenbasis does not know whether {what} changes basis with the "
            "gradient, and it is in no field that could be named: make the state a "
            "NamedTuple or a dict"
        )
    stays = f"coordinatewise=({entry.names[0]!r},)"
    if entry.linear:
        return (
            f"in_eigenbasis cannot change the basis of {what} which is linear in the "
            "gradient, because it does not have the path and the shape of a parameter; "
            "run this transformation outside of in_eigenbasis"
        )
    changes = (
        f"say first_moments=({entry.names[0]!r},) if it is linear in the gradient, or "
    )
    return (
        f"in_eigenbasis does not know whether {what} changes basis with the gradient; "
        f"{changes if fits else 'say '}{stays} if its entries belong to coordinates"
    )


def _holder(inner_state: optax.OptState, path: Sequence[Any]) -> str:
    """The name of the class whose attribute is the last one on the path."""
    node, name = inner_state, type(inner_state).__name__
    for key in path:
        if isinstance(key, jax.tree_util.GetAttrKey):
            name = type(node).__name__
        is_child = lambda child, node=node: child is not node  # noqa: E731
        children = jax.tree_util.tree_flatten_with_path(node, is_leaf=is_child)[0]
        node = dict(children)[(key,)]
    return name
