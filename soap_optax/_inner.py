"""Inner transformations that know the blocks of parameters, and their eigenvalues.

The step makes them anew each time, from the plans of the parameters and the eigenvalues
of the factors; see `soap_optax._eigenbasis.Inner`.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments, _kronecker
from soap_optax.mesh import _mesh, _placement
from soap_optax.parameters import _tree
from soap_optax.parameters._tree import Leaf

# The least epsilon. Programs may take smaller numbers near the end of float32 for 0.
_LEAST_EPS = 1e-30


class FactorizedAdamState(NamedTuple):
    """State of `scale_by_factorized_adam`.

    Attributes:
      count: steps taken, int32 scalar.
      mu: first moments, like the parameters.
      nu: nested dicts with a tuple of second moments in the place of each parameter.
        For a parameter with factors, the tuple has an array `[grid…, b]` per axis, the
        mean of the second moments at each index of the axis. For a parameter without
        factors, it has one array of the parameter's shape.
    """

    count: Any
    mu: optax.Updates
    nu: Any


class AdamSettings(NamedTuple):
    """The settings of Adam for one kind of parameter; see `optax.scale_by_adam`."""

    b1: jax.typing.ArrayLike
    b2: jax.typing.ArrayLike
    eps: jax.typing.ArrayLike

    def differing(self, b1: Any, b2: Any, eps: Any) -> "AdamSettings | None":
        """These settings, but for those that are not None; None if all are None."""
        given = {"b1": b1, "b2": b2, "eps": eps}
        given = {name: value for name, value in given.items() if value is not None}
        return self._replace(**given) if given else None


def check_adam(
    b1: Any, b2: Any, eps: Any, eps_root: Any, mu_dtype: Any, nesterov: Any
) -> None:
    """Checks the arguments of `optax.scale_by_adam`."""
    _arguments.check(
        b1=(b1, _arguments.number(0, 1)),
        b2=(b2, _arguments.number(0, 1)),
        eps=(eps, _arguments.number(0)),
        eps_root=(eps_root, _arguments.number(0)),
        mu_dtype=(mu_dtype, _arguments.optional(_arguments.floating_dtype)),
        nesterov=(nesterov, _arguments.flag),
    )
    _arguments.slowest_mean("b1", b1, mu_dtype, "mu_dtype")


def settings_of_adam(
    of_factored: AdamSettings, b1: Any, b2: Any, eps: Any, mu_dtype: Any
) -> tuple[AdamSettings, AdamSettings | None]:
    """The settings of parameters with factors, and those of the others if they differ.

    Args:
      of_factored: settings of the parameters with factors.
      b1: what differs for the others, or None.
      b2: the same.
      eps: the same.
      mu_dtype: dtype of the stored first moments.
    """
    if b1 is not None:
        _arguments.slowest_mean("adam_b1", b1, mu_dtype, "mu_dtype")
    eps = None if eps is None else nonzero(eps)
    return of_factored, of_factored.differing(b1, b2, eps)


def nonzero(eps: Any) -> Any:
    """Raises an epsilon of 0 to `_LEAST_EPS`.

    Adam then divides no 0 by 0 where gradients are 0. `optax.inject_hyperparams` gives
    hyperparameters the dtype of the parameters, and float16 rounds the default to 0.
    """
    if isinstance(eps, jax.Array):
        wide = eps.astype(jnp.promote_types(eps.dtype, jnp.float32))
        return jnp.maximum(wide, _LEAST_EPS)
    return max(float(eps), _LEAST_EPS)


def scale_by_adam(
    leaves: Sequence[Leaf],
    eigenvalues: Any,
    *,
    settings: tuple[AdamSettings, AdamSettings | None],
    eps_root: jax.typing.ArrayLike,
    mu_dtype: jax.typing.DTypeLike | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """Makes `optax.scale_by_adam`, with settings for parameters without factors.

    The first of `settings` is for parameters with factors, and the second one for the
    others; None means the same. The state is that of `optax.scale_by_adam`, whatever
    they are.
    """
    del eigenvalues

    def adam(own: AdamSettings) -> optax.GradientTransformation:
        return optax.scale_by_adam(
            *own, eps_root=eps_root, mu_dtype=mu_dtype, nesterov=nesterov
        )

    if settings[1] is None:
        return optax.with_extra_args_support(adam(settings[0]))

    def update_fn(
        updates: optax.Updates,
        state: optax.ScaleByAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.ScaleByAdamState]:
        del params, extra_args

        def one(
            gradient: jax.Array, mu: jax.Array, nu: jax.Array, leaf: Leaf
        ) -> tuple[Any, Any, Any]:
            old = optax.ScaleByAdamState(state.count, mu, nu)
            step, new = adam(_own(settings, leaf)).update(gradient, old)
            return step, new.mu, new.nu

        treedef: Any
        arrays, treedef = jax.tree.flatten(updates)
        old = map(treedef.flatten_up_to, (state.mu, state.nu))
        steps, mu, nu = (
            treedef.unflatten(entries)
            for entries in _transposed(map(one, arrays, *old, leaves))
        )
        count = optax.safe_increment(state.count)
        return steps, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(adam(settings[0]).init, update_fn)


def _own(
    settings: tuple[AdamSettings, AdamSettings | None], leaf: Leaf
) -> AdamSettings:
    """The settings of one parameter, of those that `settings_of_adam` gives."""
    of_factored, of_others = settings
    if of_others is None or leaf.layout.has_factors:
        return of_factored
    return of_others


def _transposed(results: Iterable[tuple[Any, Any, Any]]) -> list[list[Any]]:
    """Three lists of results in place of a list of triples, which may be empty."""
    triples = list(results)
    return [[triple[i] for triple in triples] for i in range(3)]


def scale_by_factorized_adam(
    leaves: Sequence[Leaf],
    eigenvalues: Any,
    *,
    settings: tuple[AdamSettings, AdamSettings | None],
    eps_root: jax.typing.ArrayLike,
    mu_dtype: jax.typing.DTypeLike | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """Makes `scale_by_adam` with second moments of rank one in each block.

    The second moment at (i, j) of a block is estimated by r_i c_j / mean(r) from the
    means r and c of its rows and columns. Parameters without factors keep the second
    moments of Adam. See Shazeer & Stern, "Adafactor: Adaptive Learning Rates with
    Sublinear Memory Cost", https://arxiv.org/abs/1804.04235.
    """
    del eigenvalues

    def scale(moment: jax.Array, means: Any, leaf: Leaf, eps: Any) -> jax.Array:
        if leaf.layout.has_factors:
            root = _kronecker.rank_one(means, moment, leaf.layout)
        else:
            root = _kronecker.safe_root(means[0])
        if not (isinstance(eps_root, (int, float)) and eps_root == 0):
            root = _kronecker.safe_root(jnp.square(root) + eps_root)
        return moment / (root + eps)

    def one(
        gradient: jax.Array, mu: jax.Array, nu: Any, leaf: Leaf, count: jax.Array
    ) -> tuple[jax.Array, jax.Array, list[jax.Array]]:
        b1, b2, eps = _own(settings, leaf)
        mu = optax.tree.update_moment(gradient, mu, b1, 1)
        mean = _corrected_mean(mu, gradient, b1, count, nesterov)
        nu = _updated_squares(gradient, leaf, nu, b2)
        corrected = optax.tree.bias_correction(nu, b2, count)
        step = scale(mean, corrected, leaf, eps)
        return step, optax.tree.cast(mu, mu_dtype), nu

    def init_fn(params: optax.Params) -> FactorizedAdamState:
        mu = optax.tree.zeros_like(params, dtype=mu_dtype)
        zeros = jax.tree.leaves(optax.tree.zeros_like(params))
        nu = [_squares(*pair) for pair in zip(zeros, leaves, strict=True)]
        return FactorizedAdamState(jnp.zeros([], jnp.int32), mu, _tree.nest(leaves, nu))

    def update_fn(
        updates: optax.Updates,
        state: FactorizedAdamState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, FactorizedAdamState]:
        del params, extra_args
        count = optax.safe_increment(state.count)
        treedef: Any
        arrays, treedef = jax.tree.flatten(updates)
        old = treedef.flatten_up_to(state.mu), _tree.find(leaves, state.nu)
        of_leaf = zip(arrays, *old, leaves, strict=True)
        steps, mu, nu = _transposed(one(*entry, count) for entry in of_leaf)
        nested = _tree.nest(leaves, nu)
        state = FactorizedAdamState(count, treedef.unflatten(mu), nested)
        return treedef.unflatten(steps), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _squares(array: jax.Array, leaf: Leaf) -> list[jax.Array]:
    """The mean squares at each index of each axis or, without factors, all squares."""
    if leaf.layout.has_factors:
        array = _placement.for_blocks(array, leaf)
        return _kronecker.mean_squares(array, leaf.layout)
    return [jnp.square(array)]


def _updated_squares(
    array: jax.Array, leaf: Leaf, old: list[jax.Array], decay: jax.typing.ArrayLike
) -> list[jax.Array]:
    """Moves second moments towards a gradient's squares; their sharding stays."""
    new = optax.tree.update_moment(_squares(array, leaf), old, decay, 1)
    if not leaf.layout.has_factors:
        return new
    return [_mesh.placed(mean, _placement.of_vector(leaf)) for mean in new]


def _corrected_mean(
    mean: Any,
    updates: Any,
    decay: jax.typing.ArrayLike,
    count: jax.Array,
    nesterov: bool,
) -> Any:
    """Corrects the bias of a first moment as optax does, with or without `nesterov`."""
    if not nesterov:
        return optax.tree.bias_correction(mean, decay, count)
    ahead = optax.tree.bias_correction(mean, decay, optax.safe_increment(count))
    newest = optax.tree.bias_correction(updates, decay, count)
    return jax.tree.map(lambda m, g: decay * m + (1 - decay) * g, ahead, newest)


class ShampooRootsState(NamedTuple):
    """State of `scale_by_shampoo_roots`.

    Attributes:
      count: steps taken, int32 scalar.
      mu: the mean gradients in a tree like the parameters, with `optax.MaskedNode` in
        the place of a parameter without factors.
    """

    count: Any
    mu: optax.Updates


def scale_by_shampoo_roots(
    leaves: Sequence[Leaf],
    eigenvalues: Sequence[Any],
    *,
    b1: jax.typing.ArrayLike,
    power: jax.typing.ArrayLike,
    eps: jax.typing.ArrayLike,
    mu_dtype: jax.typing.DTypeLike | None,
    nesterov: bool,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation that scales mean gradients by powers of the eigenvalues.

    The mean gradient is multiplied by (e_i + eps)^-power at each index i of each axis
    that has a factor. Updates of parameters without factors pass as they are.
    """

    def of_factored(tree: Any) -> list[Any]:
        """The leaves of a tree, with `optax.MaskedNode` where there is no factor."""
        pairs = zip(jax.tree.leaves(tree), leaves, strict=True)
        masked = optax.MaskedNode()
        return [x if leaf.layout.has_factors else masked for x, leaf in pairs]

    def init_fn(params: optax.Params) -> ShampooRootsState:
        zeros = of_factored(optax.tree.zeros_like(params, dtype=mu_dtype))
        treedef: Any = jax.tree.structure(params)
        return ShampooRootsState(jnp.zeros([], jnp.int32), treedef.unflatten(zeros))

    def update_fn(
        updates: optax.Updates,
        state: ShampooRootsState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ShampooRootsState]:
        del params, extra_args
        treedef: Any = jax.tree.structure(updates)
        count = optax.safe_increment(state.count)
        gradients = of_factored(updates)
        old = treedef.flatten_up_to(state.mu)
        mu = optax.tree.update_moment(gradients, old, b1, 1)
        means = _corrected_mean(mu, gradients, b1, count, nesterov)
        scaled = [
            _kronecker.root(mean, values, leaf.layout, power, eps)
            if leaf.layout.has_factors
            else gradient
            for mean, gradient, values, leaf in zip(
                means, treedef.flatten_up_to(updates), eigenvalues, leaves, strict=True
            )
        ]
        mu = treedef.unflatten(optax.tree.cast(mu, mu_dtype))
        return treedef.unflatten(scaled), ShampooRootsState(count, mu)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
