"""Runs any optax transformation in the eigenbasis of Shampoo's Kronecker factors.

The only home of the step count and `lax.cond`: `_layout` knows one shape, `_kronecker`
one parameter, `_tree` where things stand in a tree. Two functions of the state make a
step, `_step` (project, run the inner transformation, project back) and
`_accumulate_and_refresh`; `basis` says which comes first.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from soap_optax import _arguments, _kronecker, _tree
from soap_optax._layout import Layout, make_layout

# Fields of optax states that hold a mean of gradients.
FIRST_MOMENTS = ("mu", "trace", "ema", "m1", "m2", "grad_acc", "acc_grads")

# A NumPy integer, because optax.inject_hyperparams traces every default that is a
# Python number, and a traced number cannot decide which factors exist.
DEFAULT_MAX_PRECOND_DIM: int = np.int64(10_000)  # type: ignore[assignment]


_PerLeaf = list[list[Any]]  # for each parameter, an array or None per axis

# The fields of the state that are so, and their shape from that of the factor.
_PER_FACTOR: dict[str, Callable[[tuple[int, ...]], tuple[int, ...]]] = {
    "factors": lambda shape: shape,
    "eigenbases": lambda shape: shape,
    "eigenvalues": lambda shape: shape[:-1],
    "skipped": lambda shape: (*shape[:-2], 1),
}


class EigenbasisState(NamedTuple):
    """State of `in_eigenbasis`.

    `factors` and `eigenbases` are nested dicts, keyed by the names on the path to each
    parameter (for parameters in nested dicts: the same structure). In the place of a
    parameter stands a tuple with one array `[grid…, b, b]` per axis, or None where an
    axis has no factor and its eigenbasis is the identity.

    Attributes:
      count: steps taken, int32 scalar; the clock of refreshes.
      refreshes: refreshes that were due, int32 scalar.
      factors: Shampoo's factors.
      eigenbases: orthonormal matrices, one eigenvector a column.
      eigenvalues: estimates of the factors' eigenvalues, `[grid…, b]`, in the order of
        the columns: exact or nearly so at a refresh, followed since.
      skipped: how many of `refreshes` failed and left an eigenbasis as it was, int32
        `[grid…, 1]`.
      inner_state: the inner transformation's. Its moments hold projected coordinates
        in the parameters' shapes.
    """

    count: Any  # not jax.Array, because tuple has a method of this name
    refreshes: Any
    factors: Any
    eigenbases: Any
    eigenvalues: Any
    skipped: Any
    inner_state: optax.OptState


@dataclasses.dataclass(frozen=True)
class _Options:
    """Options of `in_eigenbasis` that act at every step, checked."""

    shampoo_beta: Any
    precondition_frequency: Any
    basis: str
    refresh: Any
    initial_basis: str
    mu_dtype: Any
    precond_dtype: Any
    precision: Any
    rcond: Any
    clip_update_rms: Any
    first_moments: tuple[str, ...]


def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    precondition_frequency: int | Callable[[jax.Array], Any] = 10,
    max_precond_dim: int = DEFAULT_MAX_PRECOND_DIM,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    block_size: int | None = None,
    dimension_numbers: Any = None,
    basis: Literal["previous", "current"] = "previous",
    refresh: Literal["qr", "eigh"] = "qr",
    initial_basis: Literal["eigh", "identity"] = "eigh",
    mu_dtype: jax.typing.DTypeLike | None = None,
    precond_dtype: jax.typing.DTypeLike | None = None,
    precision: Any = jax.lax.Precision.HIGHEST,
    rcond: float | None = None,
    clip_update_rms: jax.typing.ArrayLike | None = None,
    first_moments: Sequence[str] = FIRST_MOMENTS,
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in the eigenbasis of Shampoo's factors.

    Updates and parameters reach `inner` projected, and its updates are projected back,
    so that with Adam inside this is SOAP, and with Adafactor Shampoo of power 1/2. An
    axis without a factor has the identity: where no axis has one, this *is* `inner`.
    Inner updates in directions without gradients are taken out (see `rcond`), so weight
    decay belongs outside.

    Args:
      inner: any optax transformation; it sees arrays of the parameters' shapes, in at
        least float32.
      shampoo_beta: decay of the factors, in [0, 1); None means 0.95.
      precondition_frequency: see `soap_optax.soap`, as for all options not listed here.
      clip_update_rms: see `soap_optax.soap`; None, as here: no clipping, because the
        scale of the inner updates is not known.
      first_moments: names of the fields of the inner state that are linear in the
        gradient (momentum). A refresh carries them over to the new eigenbasis; all
        other state, like second moments, belongs to coordinates and stays.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `EigenbasisState`.

    Raises:
      ValueError: for an argument out of its range, naming argument, rule and value; in
        `init` and `update` for parameters that are not real floating point, dimension
        numbers that do not fit, and updates that differ from the parameters of `init`,
        naming the parameter.

    Example:
      >>> import jax.numpy as jnp, optax, soap_optax
      >>> lion = soap_optax.in_eigenbasis(optax.scale_by_lion())
      >>> tx = optax.chain(lion, optax.scale_by_learning_rate(1e-3))
      >>> params = {"w": jnp.ones((4, 3))}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.ones((4, 3))}, state, params)
      >>> updates["w"].shape
      (4, 3)
    """
    is_transformation = hasattr(inner, "init") and hasattr(inner, "update")
    _arguments.require(
        "inner", inner, "an optax.GradientTransformation", is_transformation
    )
    names = not isinstance(first_moments, str)
    _arguments.require("first_moments", first_moments, "a sequence of names", names)
    inner = optax.with_extra_args_support(inner)
    options = _Options(
        shampoo_beta=0.95 if shampoo_beta is None else shampoo_beta,
        precondition_frequency=precondition_frequency,
        basis=basis,
        refresh=refresh,
        initial_basis=initial_basis,
        mu_dtype=mu_dtype,
        precond_dtype=precond_dtype,
        precision=precision,
        rcond=rcond,
        clip_update_rms=clip_update_rms,
        first_moments=tuple(first_moments),
    )
    _check_options(options)
    layout_of = _checked_layout(
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        one_sided=one_sided,
        block_size=block_size,
    )
    _check_dimension_numbers(dimension_numbers)

    def plan_of(tree: Any) -> _tree.Plan:
        return _tree.make_plan(tree, layout_of, dimension_numbers)

    def init_fn(params: optax.Params) -> EigenbasisState:
        if isinstance(params, _PARAMS_PLACEHOLDER):
            # optax.tree.map_params asks which parts of the state are shaped like the
            # parameters. Factors are not: one leaf stands for all of them.
            zero = _zero_count()
            return EigenbasisState(zero, zero, 0, 0, 0, 0, inner.init(params))
        return _nested(plan := plan_of(params), _init(plan, options, inner))

    def update_fn(
        updates: optax.Updates,
        state: EigenbasisState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EigenbasisState]:
        plan = plan_of(updates)
        flat = _flat(plan, state)
        _tree.check_first_moments(
            *(state.inner_state, plan.leaves, options.first_moments),
            init=lambda: inner.init(updates),
        )
        if params is not None:
            params = _tree.flatten_params(plan, params)
        step = functools.partial(_step, plan, options, inner, params, extra_args)
        if basis == "current":
            steps, flat = step(_accumulate_and_refresh(plan, options, flat))
        else:
            # The first step only builds the eigenbases: no update, inner not run.
            stepped, flat = step(flat)
            steps, inner_state = optax.tree.where(
                state.count == 0,
                (jax.tree.map(jnp.zeros_like, stepped), state.inner_state),
                (stepped, flat.inner_state),
            )
            flat = _accumulate_and_refresh(
                plan, options, flat._replace(inner_state=inner_state)
            )
        new_updates = [
            step.astype(gradient.dtype)
            for step, gradient in zip(steps, plan.arrays, strict=True)
        ]
        flat = flat._replace(count=optax.safe_increment(state.count))
        return plan.treedef.unflatten(new_updates), _nested(plan, flat)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _init(
    plan: _tree.Plan,
    options: _Options,
    inner: optax.GradientTransformationExtraArgs,
) -> EigenbasisState:
    """Zero factors and identity eigenbases, as lists that follow the plan."""

    def per_factor(make: Callable[[tuple[int, ...], Any], jax.Array]) -> _PerLeaf:
        def one(array: Any, leaf: _tree.Leaf, shape: tuple[int, ...] | None) -> Any:
            if shape is None:
                return None
            stored = make(shape, _stored_dtype(leaf, options))
            if isinstance(array, jax.ShapeDtypeStruct):
                return stored
            return _kronecker.sharded_like(stored, array, leaf.layout)

        return [
            [one(array, leaf, shape) for shape in leaf.layout.factor_shapes()]
            for array, leaf in zip(plan.arrays, plan.leaves, strict=True)
        ]

    def identity(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

    def zero_eigenvalues(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        stored = jnp.promote_types(dtype, jnp.float32)
        return jnp.zeros(_PER_FACTOR["eigenvalues"](shape), stored)

    def zero_counts(shape: tuple[int, ...], _: Any) -> jax.Array:
        return jnp.zeros(_PER_FACTOR["skipped"](shape), jnp.int32)

    inner_params = [
        _cast(array, leaf.dtype)
        for leaf, array in zip(plan.leaves, plan.arrays, strict=True)
    ]
    return EigenbasisState(
        count=_zero_count(),
        refreshes=_zero_count(),
        factors=per_factor(jnp.zeros),
        eigenbases=per_factor(identity),
        eigenvalues=per_factor(zero_eigenvalues),
        skipped=per_factor(zero_counts),
        inner_state=_cast_first_moments(
            plan, options, inner.init(plan.treedef.unflatten(inner_params))
        ),
    )


def _step(
    plan: _tree.Plan,
    options: _Options,
    inner: optax.GradientTransformationExtraArgs,
    params: list[jax.Array] | None,
    extra_args: dict[str, Any],
    state: EigenbasisState,
) -> tuple[list[jax.Array], EigenbasisState]:
    """Projects, runs the inner transformation and projects its updates back."""
    layouts = [leaf.layout for leaf in plan.leaves]

    def project(arrays: Sequence[jax.Array]) -> list[jax.Array]:
        entries = zip(arrays, plan.leaves, state.eigenbases, strict=True)
        return [
            _kronecker.project(
                array.astype(leaf.dtype), q, leaf.layout, options.precision
            )
            for array, leaf, q in entries
        ]

    projected = [
        _kronecker.bounded(array) if any(layout.factored) else array
        for array, layout in zip(project(plan.arrays), layouts, strict=True)
    ]
    weight = _weight(options, state.count)
    eigenvalues = [
        _kronecker.follow(e, array, layout, weight)
        for e, array, layout in zip(state.eigenvalues, projected, layouts, strict=True)
    ]
    inner_updates, inner_state = inner.update(
        plan.treedef.unflatten(projected),
        state.inner_state,
        None if params is None else plan.treedef.unflatten(project(params)),
        **extra_args,
    )
    inner_updates = plan.treedef.flatten_up_to(inner_updates)
    steps = [
        _bound_and_project_back(options, layout, *of_leaf)
        for layout, *of_leaf in zip(
            layouts, inner_updates, eigenvalues, state.eigenbases, strict=True
        )
    ]
    inner_state = _cast_first_moments(plan, options, inner_state)
    return steps, state._replace(eigenvalues=eigenvalues, inner_state=inner_state)


def _bound_and_project_back(
    options: _Options, layout: Layout, update: jax.Array, eigenvalues: Any, bases: Any
) -> jax.Array:
    """The step of a parameter, from an inner update."""
    update = _kronecker.damp(update, eigenvalues, layout, options.rcond)
    if any(layout.factored) and options.clip_update_rms is not None:
        update = _kronecker.clip_rms(update, layout, options.clip_update_rms)
    return _kronecker.project_back(update, bases, layout, options.precision)


def _accumulate_and_refresh(
    plan: _tree.Plan, options: _Options, state: EigenbasisState
) -> EigenbasisState:
    """Accumulates the factors and, when due, refreshes the eigenbases."""
    weight = _weight(options, state.count)
    factors = [
        _kronecker.accumulate(f, gradient, leaf.layout, weight, options.precision)
        for f, gradient, leaf in zip(
            state.factors, plan.arrays, plan.leaves, strict=True
        )
    ]
    return _refresh_if_due(plan, options, state._replace(factors=factors))


def _refresh_if_due(
    plan: _tree.Plan, options: _Options, state: EigenbasisState
) -> EigenbasisState:
    """Refreshes the eigenbases and changes the first moments to them.

    It is due when the frequency divides the count, so always at the first step.
    """
    owners, moments, with_moments = _tree.split_first_moments(
        state.inner_state, plan.leaves, options.first_moments
    )

    def keep(*operands: Any) -> tuple[Any, ...]:
        return operands

    def refresh(
        method: Any, eigenbases: Any, eigenvalues: Any, skipped: Any, moments: Any
    ) -> tuple[Any, ...]:
        new, eigenvalues, failed = _refresh(
            state.factors, eigenbases, eigenvalues, method, options
        )
        skipped = jax.tree.map(jnp.add, skipped, failed)
        moments = [
            _kronecker.change_basis(
                moment, eigenbases[i], new[i], plan.leaves[i].layout, options.precision
            )
            for i, moment in zip(owners, moments, strict=True)
        ]
        return new, eigenvalues, skipped, moments

    branches: list[Any] = [keep, functools.partial(refresh, options.refresh)]
    is_due = _is_due(options, state.count)
    branch = is_due.astype(jnp.int32)
    if options.initial_basis == "eigh" and options.refresh != "eigh":
        branches.append(functools.partial(refresh, "eigh"))
        branch = jnp.where(state.count == 0, 2, branch)
    eigenbases, eigenvalues, skipped, moments = jax.lax.switch(
        *(branch, branches),
        *(state.eigenbases, state.eigenvalues, state.skipped, moments),
    )
    return state._replace(
        refreshes=jnp.where(
            is_due, optax.safe_increment(state.refreshes), state.refreshes
        ),
        eigenbases=eigenbases,
        eigenvalues=eigenvalues,
        skipped=skipped,
        inner_state=with_moments(moments),
    )


def _refresh(
    factors: _PerLeaf,
    eigenbases: _PerLeaf,
    eigenvalues: _PerLeaf,
    method: Any,
    options: _Options,
) -> tuple[_PerLeaf, _PerLeaf, _PerLeaf]:
    """Refreshes all eigenbases and eigenvalues, and says which failed."""

    def one(factor: Any, eigenbasis: Any, values: Any) -> tuple[Any, Any, Any]:
        if factor is None:
            return None, None, None
        return _kronecker.refresh(factor, eigenbasis, values, method, options.precision)

    refreshed = [
        [one(*of_axis) for of_axis in zip(*of_leaf, strict=True)]
        for of_leaf in zip(factors, eigenbases, eigenvalues, strict=True)
    ]
    new, values, failed = (
        [[of_axis[i] for of_axis in of_leaf] for of_leaf in refreshed] for i in range(3)
    )
    return new, values, failed


def _is_due(options: _Options, count: jax.Array) -> jax.Array:
    """Whether the eigenbases are refreshed in the step with this count."""
    frequency = options.precondition_frequency
    if callable(frequency):
        frequency = frequency(count)
    frequency = jnp.maximum(1, jnp.asarray(frequency).astype(count.dtype))
    return count % frequency == 0


def _weight(options: _Options, count: jax.Array) -> jax.typing.ArrayLike:
    """The weight of the newest gradient in the factors and eigenvalues.

    With the current basis it is that of a bias-corrected mean, 1 at the first step.
    """
    weight = 1 - options.shampoo_beta
    if options.basis == "previous":
        return weight
    return weight / (1 - options.shampoo_beta ** (count + 1))


def _cast_first_moments(
    plan: _tree.Plan, options: _Options, inner_state: optax.OptState
) -> optax.OptState:
    """The inner state with its first moments in `mu_dtype`."""
    if options.mu_dtype is None:
        return inner_state
    _, moments, with_moments = _tree.split_first_moments(
        inner_state, plan.leaves, options.first_moments
    )
    return with_moments([moment.astype(options.mu_dtype) for moment in moments])


def _stored_dtype(leaf: _tree.Leaf, options: _Options) -> Any:
    """The dtype of stored factors and eigenbases."""
    return leaf.dtype if options.precond_dtype is None else options.precond_dtype


def _cast(array: Any, dtype: Any) -> Any:
    """`array.astype(dtype)`, also for a `jax.ShapeDtypeStruct`."""
    if isinstance(array, jax.ShapeDtypeStruct):
        return array.update(dtype=dtype)
    return array.astype(dtype)


def _zero_count() -> jax.Array:
    return jnp.zeros([], jnp.int32)


def _nested(plan: _tree.Plan, flat: EigenbasisState) -> EigenbasisState:
    """The state as users see it, from one with lists that follow the plan."""
    nested = {
        name: _tree.nest(plan.leaves, getattr(flat, name)) for name in _PER_FACTOR
    }
    return flat._replace(**nested)


def _flat(plan: _tree.Plan, state: EigenbasisState) -> EigenbasisState:
    """Inverse of `_nested`, checked against the updates."""
    flat = {name: _tree.find(plan.leaves, getattr(state, name)) for name in _PER_FACTOR}
    for i, leaf in enumerate(plan.leaves):
        factors = leaf.layout.factor_shapes()
        for name, shape_of in _PER_FACTOR.items():
            wanted = tuple(None if s is None else shape_of(s) for s in factors)
            shapes = tuple(None if x is None else x.shape for x in flat[name][i])
            if shapes != wanted:
                raise ValueError(
                    f"{leaf.name} must have the shape and the options for which init "
                    f"made the state: an update of shape {leaf.layout.shape} needs "
                    f"{name} of shapes {wanted}, got {shapes}"
                )
    _tree.check_no_others(plan.leaves, state.factors)
    return state._replace(**flat)


def _check_options(options: _Options) -> None:
    frequency = options.precondition_frequency
    _arguments.require_number("shampoo_beta", options.shampoo_beta, 0, 1)
    if options.rcond is not None:
        _arguments.require_number("rcond", options.rcond, 0, 1)
    if options.clip_update_rms is not None:
        _arguments.require_positive("clip_update_rms", options.clip_update_rms)
    if not callable(frequency):
        _arguments.require_traceable_int("precondition_frequency", frequency, 1)
    _arguments.require_choice("basis", options.basis, ("previous", "current"))
    _arguments.require_choice("refresh", options.refresh, ("qr", "eigh"))
    initial = ("eigh", "identity")
    _arguments.require_choice("initial_basis", options.initial_basis, initial)
    _arguments.require_precision("precision", options.precision)
    _arguments.require_dtype("mu_dtype", options.mu_dtype)
    _arguments.require_dtype("precond_dtype", options.precond_dtype)


def _checked_layout(
    max_precond_dim: Any, block_size: Any, **flags: Any
) -> Callable[..., Layout]:
    """`make_layout` with its options, checked."""
    _arguments.require_int("max_precond_dim", max_precond_dim, 0)
    if block_size is not None:
        _arguments.require_int("block_size", block_size, 2)
    for name, value in flags.items():
        _arguments.require_choice(name, value, (True, False))
    return functools.partial(
        make_layout, max_precond_dim=max_precond_dim, block_size=block_size, **flags
    )


def _check_dimension_numbers(dimension_numbers: Any) -> None:
    _arguments.require_static("dimension_numbers", dimension_numbers)
    is_tree = not isinstance(dimension_numbers, (str, int, float))
    rule = "dimension numbers, a tree of them, a callable or None"
    _arguments.require("dimension_numbers", dimension_numbers, rule, is_tree)


def _params_placeholder() -> type:
    """The type with which `optax.tree.map_params` calls `init`."""
    seen: list[type] = []
    optax.tree.map_params(lambda params: seen.append(type(params)), lambda x: x, None)
    return seen[0]


_PARAMS_PLACEHOLDER = _params_placeholder()
