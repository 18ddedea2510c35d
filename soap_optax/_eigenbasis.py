"""Runs any optax transformation in the eigenbasis of Shampoo's Kronecker factors.

The only home of the step count: `_layout` knows one shape, `_kronecker` one parameter,
`_refresh` the eigenbases that are due, `_tree` where things stand in a tree. Two
functions of the state make a step, `_step` (project, run the inner transformation,
project back) and `_accumulate_and_refresh`; `basis` says which comes first.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from soap_optax import _arguments, _kronecker, _refresh, _sharding, _tree
from soap_optax._layout import make_layout

# Fields of optax states that hold a mean of gradients.
FIRST_MOMENTS = ("mu", "trace", "ema", "m1", "m2", "grad_acc", "acc_grads")

# A NumPy integer, because optax.inject_hyperparams traces every default that is a
# Python number, and a traced number cannot decide which factors exist.
DEFAULT_MAX_PRECOND_DIM: int = np.int64(10_000)  # type: ignore[assignment]


_PerLeaf = list[list[Any]]  # for each parameter, an array or None per axis

# The fields of the state that are so: their shape from that of the factor, and their
# shardings from the parameter.
_PER_FACTOR: dict[str, tuple[Callable[[tuple[int, ...]], tuple[int, ...]], Any]] = {
    "factors": (lambda shape: shape, _sharding.of_factors),
    "eigenbases": (lambda shape: shape, _sharding.of_factors),
    "eigenvalues": (lambda shape: shape[:-1], _sharding.of_vectors),
    "skipped": (lambda shape: (*shape[:-2], 1), _sharding.of_vectors),
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
        the columns: exact or nearly so at a refresh, followed since (but by Shampoo).
      skipped: how many of `refreshes` left an eigenbasis as it was, because they failed
        or `refresh_tolerance` made them needless, int32 `[grid…, 1]`.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """All options of `in_eigenbasis`, and what only other members of the family need.

    Attributes:
      root: Shampoo's exponent and epsilon: updates are scaled by powers of the
        eigenvalues at the last refresh. None: they are not.
    """

    shampoo_beta: Any
    precondition_frequency: Any
    max_precond_dim: Any
    merge_dims: Any
    precondition_1d: Any
    one_sided: Any
    block_size: Any
    dimension_numbers: Any
    factors: Any
    basis: Any
    refresh: Any
    refresh_tolerance: Any
    stagger: Any
    initial_basis: Any
    mu_dtype: Any
    precond_dtype: Any
    precision: Any
    rcond: Any
    clip_update_rms: Any
    params_sharding: Any
    first_moments: Any = FIRST_MOMENTS
    root: tuple[Any, Any] | None = None

    def __post_init__(self) -> None:
        _check_options(self)

    def plan(self, tree: Any) -> _tree.Plan:
        """The plan of a tree of parameters, or of updates."""
        layout_of = functools.partial(
            make_layout,
            max_precond_dim=self.max_precond_dim,
            merge_dims=self.merge_dims,
            precondition_1d=self.precondition_1d,
            one_sided=self.one_sided,
            block_size=self.block_size,
        )
        return _tree.make_plan(
            tree, layout_of, self.dimension_numbers, self.params_sharding
        )


_StepFn = Callable[[EigenbasisState], tuple[list[jax.Array], EigenbasisState]]


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
    factors: Literal["shampoo", "kl"] = "shampoo",
    basis: Literal["previous", "current"] = "previous",
    refresh: Literal["qr", "cholesky_qr", "eigh"] = "qr",
    refresh_tolerance: jax.typing.ArrayLike | None = None,
    stagger: bool = False,
    initial_basis: Literal["eigh", "identity"] = "eigh",
    mu_dtype: jax.typing.DTypeLike | None = None,
    precond_dtype: jax.typing.DTypeLike | None = None,
    precision: Any = jax.lax.Precision.HIGHEST,
    rcond: float | None = None,
    clip_update_rms: jax.typing.ArrayLike | None = None,
    params_sharding: Any = None,
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
    options = Options(
        shampoo_beta=0.95 if shampoo_beta is None else shampoo_beta,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        one_sided=one_sided,
        block_size=block_size,
        dimension_numbers=dimension_numbers,
        factors=factors,
        basis=basis,
        refresh=refresh,
        refresh_tolerance=refresh_tolerance,
        stagger=stagger,
        initial_basis=initial_basis,
        mu_dtype=mu_dtype,
        precond_dtype=precond_dtype,
        precision=precision,
        rcond=rcond,
        clip_update_rms=clip_update_rms,
        params_sharding=params_sharding,
        first_moments=tuple(first_moments),
    )
    inner = optax.with_extra_args_support(inner)
    return make_transformation(lambda _: inner, options)


def make_transformation(
    inner_of: Callable[[Sequence[_tree.Leaf]], optax.GradientTransformationExtraArgs],
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """`in_eigenbasis` of an inner transformation that may depend on the layouts."""

    def init_fn(params: optax.Params) -> EigenbasisState:
        if isinstance(params, _PARAMS_PLACEHOLDER):
            # optax.tree.map_params asks which parts of the state are shaped like the
            # parameters. Factors are not: one leaf stands for all of them.
            zero = _zero_count()
            return EigenbasisState(zero, zero, 0, 0, 0, 0, inner_of([]).init(params))
        plan = options.plan(params)
        for leaf in plan.leaves:
            _sharding.warn_of_cut_blocks(leaf)
        return _nested(plan, _init(plan, options, inner_of(plan.leaves)))

    def update_fn(
        updates: optax.Updates,
        state: EigenbasisState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EigenbasisState]:
        plan = options.plan(updates)
        flat = _flat(plan, state)
        inner = inner_of(plan.leaves)
        _tree.check_first_moments(
            *(state.inner_state, plan.leaves, options.first_moments),
            init=lambda: inner.init(updates),
        )
        if params is not None:
            params = _tree.flatten_params(plan, params)
        step = functools.partial(_step, plan, options, inner, params, extra_args)
        if options.basis == "current":
            steps, flat = step(_accumulate_and_refresh(plan, options, [], flat)[1])
        else:
            steps, flat = _accumulate_and_refresh(
                plan, options, *_unless_first(step, plan, flat)
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
    options: Options,
    inner: optax.GradientTransformationExtraArgs,
) -> EigenbasisState:
    """Zero factors and identity eigenbases, as lists that follow the plan."""

    def per_factor(name: str, make: Callable[[tuple[int, ...], Any], Any]) -> _PerLeaf:
        shape_of, sharding_of = _PER_FACTOR[name]

        def one(leaf: _tree.Leaf, shape: Any, sharding: Any) -> Any:
            if shape is None:
                return None
            stored = make(shape_of(shape), _stored_dtype(leaf, options))
            return _sharding.placed(stored, sharding)

        return [
            [
                one(leaf, *of_axis)
                for of_axis in zip(
                    leaf.layout.factor_shapes(), sharding_of(leaf), strict=True
                )
            ]
            for leaf in plan.leaves
        ]

    def identity(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)

    def zero_eigenvalues(shape: tuple[int, ...], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, jnp.promote_types(dtype, jnp.float32))

    def zero_counts(shape: tuple[int, ...], _: Any) -> jax.Array:
        return jnp.zeros(shape, jnp.int32)

    return EigenbasisState(
        count=_zero_count(),
        refreshes=_zero_count(),
        factors=per_factor("factors", jnp.zeros),
        eigenbases=per_factor("eigenbases", identity),
        eigenvalues=per_factor("eigenvalues", zero_eigenvalues),
        skipped=per_factor("skipped", zero_counts),
        inner_state=_cast_first_moments(plan, options, inner.init(plan.widened())),
    )


def _step(
    plan: _tree.Plan,
    options: Options,
    inner: optax.GradientTransformationExtraArgs,
    params: list[jax.Array] | None,
    extra_args: dict[str, Any],
    state: EigenbasisState,
) -> tuple[list[jax.Array], EigenbasisState]:
    """Projects, runs the inner transformation and projects its updates back."""

    def project_params() -> Any:
        entries = zip(params or (), plan.leaves, state.eigenbases, strict=True)
        return plan.treedef.unflatten(
            _sharding.like_parameter(
                _kronecker.project(
                    _sharding.for_blocks(param.astype(leaf.dtype), leaf),
                    *(q, leaf.layout, options.precision),
                ),
                leaf,
            )
            for param, leaf, q in entries
        )

    projected, eigenvalues = [], []
    weight = _weight(options, state.count)
    for array, leaf, q, values in zip(
        plan.arrays, plan.leaves, state.eigenbases, state.eigenvalues, strict=True
    ):
        coordinates, energies = _kronecker.project_and_measure(
            _sharding.for_blocks(array.astype(leaf.dtype), leaf),
            *(q, leaf.layout, options.precision),
        )
        if options.factors == "kl":
            energies = _kronecker.whitened_energies(coordinates, values, leaf.layout)
        if options.root is None:
            values = _kronecker.follow(values, energies, weight)
        eigenvalues.append(values)
        if leaf.layout.has_factors:
            coordinates = _kronecker.bounded(coordinates)
        coordinates = _sharding.like_parameter(coordinates, leaf)
        projected.append(_apart_from_blocks(coordinates, leaf))
    inner_updates, inner_state = inner.update(
        plan.treedef.unflatten(projected),
        state.inner_state,
        None if params is None else project_params(),
        **extra_args,
    )
    inner_updates = plan.treedef.flatten_up_to(inner_updates)
    steps = [
        _bound_and_project_back(options, leaf, *of_leaf)
        for leaf, *of_leaf in zip(
            plan.leaves, inner_updates, eigenvalues, state.eigenbases, strict=True
        )
    ]
    inner_state = _cast_first_moments(plan, options, inner_state)
    return steps, state._replace(eigenvalues=eigenvalues, inner_state=inner_state)


def _apart_from_blocks(array: jax.Array, leaf: _tree.Leaf) -> jax.Array:
    """What the inner transformation takes or gives, kept out of XLA's passes with it.

    Where the array is permuted to or from blocks: on GPU such a pass cannot overwrite
    moments in bfloat16, and XLA copied them (`copied_mb` of `make gpu-check`).
    """
    return jax.lax.optimization_barrier(array) if leaf.layout.blocked() else array


def _bound_and_project_back(
    options: Options, leaf: _tree.Leaf, update: jax.Array, eigenvalues: Any, bases: Any
) -> jax.Array:
    """The step of a parameter, from an inner update."""
    layout = leaf.layout
    update = _sharding.for_blocks(_apart_from_blocks(update, leaf), leaf)
    update = _kronecker.damp(update, eigenvalues, layout, options.rcond)
    if options.root is not None:
        update = _kronecker.root(update, eigenvalues, layout, *options.root)
    step = _kronecker.project_back(update, bases, layout, options.precision)
    if layout.has_factors and options.clip_update_rms is not None:
        step = _kronecker.clip_rms(step, layout, options.clip_update_rms)
    return _sharding.like_parameter(step, leaf)


def _unless_first(
    step: _StepFn, plan: _tree.Plan, state: EigenbasisState
) -> tuple[list[jax.Array], EigenbasisState]:
    """The step, but the first, which builds the eigenbases: no update, inner not run.

    Not by choosing between two results: what is chosen from cannot be overwritten.
    """

    def run(eigenvalues: Any, inner_state: Any) -> tuple[Any, ...]:
        steps, new = step(
            state._replace(eigenvalues=eigenvalues, inner_state=inner_state)
        )
        return steps, new.eigenvalues, new.inner_state

    # For its cache of traces: `skip` asks for the shapes of what `switch` traces again.
    traced_once = jax.jit(run, inline=True)

    def skip(eigenvalues: Any, inner_state: Any) -> tuple[Any, ...]:
        # In the dtypes of a step: those of an inner state may change in its first one.
        steps, *kept = jax.eval_shape(traced_once, eigenvalues, inner_state)
        zeros = [
            jnp.zeros_like(gradient, step.dtype)
            for gradient, step in zip(plan.arrays, steps, strict=True)
        ]
        same = jax.tree.map(
            lambda old, new: jnp.asarray(old, new.dtype),
            *([eigenvalues, inner_state], kept),
        )
        return zeros, *same

    operands = (state.eigenvalues, state.inner_state)
    if isinstance(state.count, jax.core.Tracer):
        is_later = (state.count != 0).astype(jnp.int32)
        results = jax.lax.switch(is_later, [skip, traced_once], *operands)
    else:
        results = run(*operands) if state.count else skip(*operands)
    steps, eigenvalues, inner_state = results
    return steps, state._replace(eigenvalues=eigenvalues, inner_state=inner_state)


def _accumulate_and_refresh(
    plan: _tree.Plan,
    options: Options,
    steps: list[jax.Array],
    state: EigenbasisState,
) -> tuple[list[jax.Array], EigenbasisState]:
    """Accumulates the factors and, when due, refreshes the eigenbases."""
    weight = _weight(options, state.count)
    factors = []
    for old, gradient, leaf, bases, values in zip(
        *(state.factors, plan.arrays, plan.leaves),
        *(state.eigenbases, state.eigenvalues),
        strict=True,
    ):
        gradient = _sharding.for_blocks(gradient, leaf)
        gradients = [gradient] * len(old)
        if options.factors == "kl":
            gradients = _kronecker.whiten(
                gradient.astype(leaf.dtype),
                *(bases, values, leaf.layout, options.precision),
            )
        new = _kronecker.accumulate(
            *(old, gradients, leaf.layout, weight, options.precision)
        )
        factors.append(list(map(_sharding.placed, new, _sharding.of_factors(leaf))))
    return _refresh_if_due(plan, options, steps, state._replace(factors=factors))


def _refresh_if_due(
    plan: _tree.Plan,
    options: Options,
    steps: list[jax.Array],
    state: EigenbasisState,
) -> tuple[list[jax.Array], EigenbasisState]:
    """Refreshes the eigenbases that are due and changes the first moments to them."""
    owners, moments, with_moments = _tree.split_first_moments(
        state.inner_state, plan.leaves, options.first_moments
    )
    of_leaf = [
        [k for k, owner in enumerate(owners) if owner == i]
        for i in range(len(plan.leaves))
    ]
    method = _refresh.Method(
        options.refresh,
        initial=options.initial_basis == "eigh" and state.count == 0,
        tolerance=options.refresh_tolerance,
        precision=options.precision,
    )
    all_bases = _sharding.make_refresh(
        *(plan.leaves, state.factors, method),
        count=options.precondition_frequency if options.stagger else None,
    )
    slots = len(all_bases.slots)
    begin, end = _due_slots(options, state.count, slots)

    # XLA lets the branches overwrite their operands, copying nothing where nothing is
    # due, if the one that keeps them is the first, if all that reads the eigenbases
    # comes before, and if the new ones are written after all that reads the old ones.
    # Hence the steps as operands, behind a barrier, lest they be seen to be unused.

    def keep(bases: _refresh.Bases, steps: Any) -> tuple[_refresh.Bases, Any]:
        return bases, steps

    def refresh(bases: _refresh.Bases, steps: Any) -> tuple[_refresh.Bases, Any]:
        bases = all_bases.run(bases, begin, end)
        return bases, [jax.lax.optimization_barrier(step) for step in steps]

    bases = _refresh.Bases(
        *(state.eigenbases, state.eigenvalues, state.skipped),
        [[moments[k] for k in mine] for mine in of_leaf],
    )
    bases, steps = jax.lax.switch(
        jnp.less(begin, end).astype(jnp.int32), [keep, refresh], bases, steps
    )
    for mine, changed in zip(of_leaf, bases.moments, strict=True):
        for k, moment in zip(mine, changed, strict=True):
            moments[k] = moment
    return steps, state._replace(
        refreshes=jnp.where(
            _is_due(options, state.count, slots),
            optax.safe_increment(state.refreshes),
            state.refreshes,
        ),
        eigenbases=bases.eigenbases,
        eigenvalues=bases.eigenvalues,
        skipped=bases.skipped,
        inner_state=with_moments(moments),
    )


def _due_slots(options: Options, count: jax.Array, slots: int) -> tuple[Any, Any]:
    """The slots that are refreshed in the step with this count, from one to another.

    All when the frequency divides the count, so always at the first step; staggered,
    one a step after that.
    """
    if not options.stagger:
        return 0, jnp.where(_is_due(options, count, slots), slots, 0)
    slot = count % options.precondition_frequency
    is_first = count == 0
    return (
        jnp.where(is_first, 0, slot),
        jnp.where(is_first, slots, jnp.minimum(slot + 1, slots)),
    )


def _is_due(options: Options, count: jax.Array, slots: int) -> jax.Array:
    """Whether a refresh of all eigenbases begins in the step with this count."""
    frequency = options.precondition_frequency
    if callable(frequency):
        frequency = frequency(count)
    frequency = jnp.maximum(1, jnp.asarray(frequency).astype(count.dtype))
    # Staggered, the first is followed by that of the second slot.
    is_second = options.stagger and slots > 1
    return (count % frequency == (1 % frequency if is_second else 0)) | (count == 0)


def _weight(options: Options, count: jax.Array) -> jax.typing.ArrayLike:
    """The weight of the newest gradient in the factors and eigenvalues.

    With the current basis it is that of a bias-corrected mean, 1 at the first step;
    also with KL-SOAP's factors, for each is weighted by the inverses of the others.
    """
    weight = 1 - options.shampoo_beta
    if options.basis == "previous" and options.factors == "shampoo":
        return weight
    return weight / (1 - options.shampoo_beta ** (count + 1))


def _cast_first_moments(
    plan: _tree.Plan, options: Options, inner_state: optax.OptState
) -> optax.OptState:
    """The inner state with its first moments in `mu_dtype`."""
    if options.mu_dtype is None:
        return inner_state
    _, moments, with_moments = _tree.split_first_moments(
        inner_state, plan.leaves, options.first_moments
    )
    return with_moments([moment.astype(options.mu_dtype) for moment in moments])


def _stored_dtype(leaf: _tree.Leaf, options: Options) -> Any:
    """The dtype of stored factors and eigenbases."""
    return leaf.dtype if options.precond_dtype is None else options.precond_dtype


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
        for name, (shape_of, _) in _PER_FACTOR.items():
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


def _check_options(options: Options) -> None:
    frequency = options.precondition_frequency
    _arguments.require_number("shampoo_beta", options.shampoo_beta, 0, 1)
    if options.rcond is not None:
        _arguments.require_number("rcond", options.rcond, 0, 1)
    if options.clip_update_rms is not None:
        _arguments.require_positive("clip_update_rms", options.clip_update_rms)
    for name in ("merge_dims", "precondition_1d", "one_sided", "stagger"):
        _arguments.require_choice(name, getattr(options, name), (True, False))
    if options.stagger:  # it fixes which factors share a step
        _arguments.require_int("precondition_frequency", frequency, 1)
    elif not callable(frequency):
        _arguments.require_traceable_int("precondition_frequency", frequency, 1)
    _arguments.require_choice("factors", options.factors, ("shampoo", "kl"))
    _arguments.require_choice("basis", options.basis, ("previous", "current"))
    methods = ("qr", "cholesky_qr", "eigh")
    _arguments.require_choice("refresh", options.refresh, methods)
    if options.refresh_tolerance is not None:
        _arguments.require_number("refresh_tolerance", options.refresh_tolerance, 0, 1)
    initial = ("eigh", "identity")
    _arguments.require_choice("initial_basis", options.initial_basis, initial)
    _arguments.require_precision("precision", options.precision)
    _arguments.require_dtype("mu_dtype", options.mu_dtype)
    _arguments.require_dtype("precond_dtype", options.precond_dtype)
    _arguments.require_int("max_precond_dim", options.max_precond_dim, 0)
    if options.block_size is not None:
        _arguments.require_int("block_size", options.block_size, 2)
    numbers = options.dimension_numbers
    _arguments.require_static("dimension_numbers", numbers)
    is_tree = not isinstance(numbers, (str, int, float))
    rule = "dimension numbers, a tree of them, a callable or None"
    _arguments.require("dimension_numbers", numbers, rule, is_tree)


def _params_placeholder() -> type:
    """The type with which `optax.tree.map_params` calls `init`."""
    seen: list[type] = []
    optax.tree.map_params(lambda params: seen.append(type(params)), lambda x: x, None)
    return seen[0]


_PARAMS_PLACEHOLDER = _params_placeholder()
