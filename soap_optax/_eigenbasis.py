"""Runs any optax transformation in the eigenbasis of Shampoo's Kronecker factors.

This module holds the step, and nothing else: project, run the inner transformation,
project back; accumulate the factors, and refresh the eigenbases when they are due. The
step works on lists in the order of the parameters (see `_state`). `_kronecker` knows
how a single parameter is multiplied.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import optax

from soap_optax import _arguments, _kronecker, _moments, _state
from soap_optax._dtypes import coarsest_eps
from soap_optax._kronecker import BasisChange, Moments, RoundOff
from soap_optax._moments import Words
from soap_optax._options import EigenbasisOptions, takes
from soap_optax._state import EigenbasisState
from soap_optax.mesh import _mesh, _placement, _spread
from soap_optax.parameters import _tree
from soap_optax.parameters._tree import Leaf, Plan
from soap_optax.refresh import _stacks
from soap_optax.refresh._clock import Clock, Due
from soap_optax.refresh._methods import RefreshRequest, method_of
from soap_optax.refresh._stacks import Bases

# Refreshes before this step leave second moments as they are, as published. All of them
# come from three gradients or fewer there, so none is young among old ones, and
# `clip_update_rms` bounds what they do.
_FIRST_RAISE = 4

_PerLeaf = list[list[Any]]  # For each parameter it has an array or None per axis.


@takes(EigenbasisOptions)
def in_eigenbasis(
    inner: optax.GradientTransformation,
    *,
    first_moments: Sequence[str] = (),
    coordinatewise: Sequence[str] = (),
    second_moments: Sequence[str] = (),
    **options: Unpack[EigenbasisOptions],
) -> optax.GradientTransformationExtraArgs:
    """Runs `inner` in the eigenbasis of Shampoo's factors.

    Updates and parameters are projected before `inner` sees them, and the updates that
    it makes are projected back. With Adam inside, this is SOAP; with Adafactor inside,
    it is Shampoo of power 1/2. The eigenbasis of an axis without a factor is the
    identity, so a parameter without factors gets the updates of `inner` itself (after a
    first step without an update; see `basis`). Inner updates in directions without
    gradients are taken out (see `rcond`), so weight decay belongs outside.

    A refresh carries arrays of the inner state that are linear in the gradient (first
    moments) over to the new eigenbasis. All other arrays, like second moments, belong
    to coordinates and stay. The library knows which arrays of optax's states are which.
    For any other array of the shape of a parameter with factors, `first_moments` or
    `coordinatewise` has to say it.

    Args:
      inner: any optax transformation; it sees arrays of the parameters' shapes, in at
        least float32.
      first_moments: names of the fields of the inner state that are linear in the
        gradient. They come before what the library knows of optax's states.
      coordinatewise: names of the fields of the inner state that belong to
        coordinates. They come before what the library knows of optax's states.
      second_moments: names of the fields of the inner state that belong to coordinates,
        and are means of the squares of what the first moments in the same state are
        means of. A refresh raises such an entry where a first moment comes into a
        coordinate that has as good as no second moment, because its row rarely has a
        gradient; otherwise an update like Adam's would have no bound there. SOAP itself
        says `("nu",)`.
      **options: see `soap_optax.soap`. Here `shampoo_beta=None` means 0.95. The default
        of `clip_update_rms` is None, because the scale of the inner updates is not
        known.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `EigenbasisState`.

    Raises:
      TypeError: for an unknown option; it names the function and the option.
      ValueError: for an argument that breaks its rule, naming the argument, the rule
        and the value; in `init` for an array of the inner state about which nothing is
        known, naming its field, for a name that is no field, and for an inner state
        that cannot work on projected parameters; in `init` and `update` for parameters
        that are not real floating point, for dimension numbers that do not fit, and for
        updates that differ from the parameters of `init`, naming the parameter.

    Examples:
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
    _arguments.check(
        first_moments=(first_moments, _arguments.strings),
        coordinatewise=(coordinatewise, _arguments.strings),
        second_moments=(second_moments, _arguments.strings),
    )
    if options["shampoo_beta"] is None:
        options["shampoo_beta"] = 0.95
    extended = optax.with_extra_args_support(inner)
    return make_transformation(
        Inner(
            lambda leaves, eigenvalues: extended,
            Words(tuple(first_moments), tuple(coordinatewise), tuple(second_moments)),
        ),
        options,
    )


@dataclasses.dataclass(frozen=True)
class Inner:
    """How to make an inner transformation, which may know plans and eigenvalues.

    Attributes:
      make: makes the transformation from the plans of the parameters and, in a list per
        parameter, the eigenvalues of each axis. It is called anew in each step.
      words: what the user says about the arrays in the transformation's state.
      rounds: whether updates have the dtype of the gradients. If not, they have that of
        the computation.
      reads_params: whether the transformation reads the parameters, which then have to
        be projected.
    """

    make: Callable[[Sequence[Leaf], _PerLeaf], optax.GradientTransformationExtraArgs]
    words: Words = Words()  # noqa: RUF009, because a tuple does not change
    rounds: bool = True
    reads_params: bool = True


def make_transformation(
    inner: Inner, options: EigenbasisOptions
) -> optax.GradientTransformationExtraArgs:
    """Makes what `in_eigenbasis` returns, from an `Inner` instead of a transformation.

    Args:
      inner: how the inner transformation is made.
      options: a value for every option; `shampoo_beta` must not be None here.
    """

    def init_fn(params: optax.Params) -> EigenbasisState:
        plan = _tree.make_plan(params, options)
        for leaf in plan.leaves:
            _placement.warn_of_cut_blocks(leaf)
            _placement.check_refresh_axes(leaf, options["refresh_axes"])
            _placement.check_packing(leaf, options["pack_factors"])
        _placement.note_unknown_shardings(plan.leaves, options["params_sharding"])
        state = _state.start(plan, options)
        transformation = inner.make(plan.leaves, state.eigenvalues)
        inner_state = transformation.init(plan.widened())
        _moments.check_inner_state(inner_state, plan.leaves, inner.words)
        inner_state = _settled(transformation, plan.widened(), inner_state)
        return _state.nested(plan, state._replace(inner_state=inner_state))

    def update_fn(
        updates: optax.Updates,
        state: EigenbasisState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, EigenbasisState]:
        plan = _tree.make_plan(updates, options)
        if params is not None:
            params = _tree.flatten_params(plan, params)
        run = _Update(plan, options, inner, params, extra_args)
        old = _state.listed(plan, options, state)
        run.check(old)
        if options["basis"] == "current":
            new = run.accumulate(old)
            _, new = run.refresh([], new)
            steps, new = run.step(new, run.weights(old, new))
        else:
            steps, new = run.step_unless_first(old, run.weights(old, old))
            new = run.accumulate(new)
            steps, new = run.refresh(steps, new)
        new = new._replace(count=optax.safe_increment(state.count))
        if inner.rounds:
            pairs = zip(steps, plan.arrays, strict=True)
            steps = [step.astype(gradient.dtype) for step, gradient in pairs]
        return plan.treedef.unflatten(steps), _state.nested(plan, new)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _settled(
    inner: optax.GradientTransformationExtraArgs, params: Any, state: Any
) -> Any:
    """The first inner state, in the dtypes that it has after an update.

    Some transformations start with Python numbers, or widen arrays in their first
    update. Where `inner` cannot be tried, because it needs further arguments, the
    arrays have the dtypes that they have.
    """
    treedef: Any
    values, treedef = jax.tree.flatten(state)
    try:
        _, after = jax.eval_shape(inner.update, params, state, params)
        wanted, treedef_after = jax.tree.flatten(after)
    except Exception:
        wanted, treedef_after = values, treedef
    if treedef_after != treedef:
        wanted = values  # The first step says what is wrong.
    pairs = zip(values, wanted, strict=True)
    return treedef.unflatten(jnp.asarray(x, jnp.result_type(y)) for x, y in pairs)


def kept(new: Any, old: Any) -> Any:
    """The new inner state, in the structure and the dtypes of the old one.

    Raises:
      ValueError: if the structure differs, or if a dtype does that is not only wider.
    """
    rule = "a transformation that keeps the structure and the dtypes of its state"
    treedef: Any = jax.tree.structure(new)
    _arguments.require("inner", treedef, rule, treedef == jax.tree.structure(old))

    def one(path: Any, new: Any, old: Any) -> jax.Array:
        name = f"inner state {jax.tree_util.keystr(path)}"
        kinds = [jnp.issubdtype(jnp.result_type(x), jnp.inexact) for x in (new, old)]
        fits = kinds[0] == kinds[1] or not kinds[0]
        _arguments.require(name, jnp.result_type(new), f"{old.dtype}, as before", fits)
        return jnp.asarray(new, old.dtype)

    return jax.tree_util.tree_map_with_path(one, new, old)


@dataclasses.dataclass(frozen=True)
class _Update:
    """What the parts of one update share; each part makes a new state from an old one.

    Attributes:
      plan: the plan of the updates.
      options: a value for every option.
      inner: how the inner transformation is made.
      params: the list of the parameters, or None.
      extra_args: further arguments of the inner transformation.
    """

    plan: Plan
    options: EigenbasisOptions
    inner: Inner
    params: list[jax.Array] | None
    extra_args: dict[str, Any]

    def check(self, state: EigenbasisState) -> None:
        """Raises a `ValueError` if the state does not fit the updates."""
        for leaf in self.plan.leaves:
            _placement.check_packing(leaf, self.options["pack_factors"])
        transformation = self.inner.make(self.plan.leaves, state.eigenvalues)
        _moments.check_shapes(
            state.inner_state,
            self.plan.leaves,
            self.inner.words,
            init=lambda: transformation.init(self.plan.widened()),
        )

    def step(
        self, state: EigenbasisState, weights: _PerLeaf
    ) -> tuple[list[jax.Array], EigenbasisState]:
        """Projects, runs the inner transformation and projects its updates back.

        Args:
          state: the state before the step.
          weights: the weight of the gradient in the eigenvalues, which follow it, for
            each axis of each parameter.
        """
        plan = self.plan
        of_leaf = zip(
            plan.arrays,
            plan.leaves,
            state.eigenbases,
            state.eigenvalues,
            weights,
            strict=True,
        )
        first = 1 if self.options["basis"] == "previous" else 0
        is_early = state.count <= first + 1
        measured = [self._project_and_follow(*entry, is_early) for entry in of_leaf]
        eigenvalues = [values for _, values, _ in measured]
        inner_updates, inner_state = self._inner_update(
            self.inner.make(plan.leaves, eigenvalues),
            plan.treedef.unflatten(projected for projected, *_ in measured),
            state,
        )
        seen = [
            _without_hidden(update, is_hidden)
            for update, (_, _, is_hidden) in zip(
                plan.treedef.flatten_up_to(inner_updates), measured, strict=True
            )
        ]
        moved = zip(
            seen,
            plan.arrays,
            plan.leaves,
            state.eigenbases,
            eigenvalues,
            strict=True,
        )
        steps = [self._project_back(*entry) for entry in moved]
        inner_state = kept(inner_state, state.inner_state)
        return steps, state._replace(eigenvalues=eigenvalues, inner_state=inner_state)

    def _inner_update(
        self,
        transformation: optax.GradientTransformationExtraArgs,
        projected: optax.Updates,
        state: EigenbasisState,
    ) -> tuple[optax.Updates, optax.OptState]:
        """Runs the inner transformation, which may not know what to do with a state."""
        params = self._projected_params(state)
        try:
            return transformation.update(
                projected, state.inner_state, params, **self.extra_args
            )
        except Exception:
            init = functools.partial(transformation.init, self.plan.widened())
            _moments.check_made_by(state.inner_state, init)
            raise

    def step_unless_first(
        self, state: EigenbasisState, weights: _PerLeaf
    ) -> tuple[list[jax.Array], EigenbasisState]:
        """Takes a step unless it is the first, which only builds the eigenbases.

        The update of the first step is zero, and the inner transformation does not run.

        The two cases are branches of a conditional, because XLA can overwrite the inner
        state in a branch. It could not if both results were computed and one chosen.
        """

        def skip(eigenvalues: Any, inner_state: Any) -> tuple[Any, Any, Any]:
            zeros = [jnp.zeros_like(x, leaf.dtype) for leaf, x in self._of_arrays()]
            return zeros, eigenvalues, inner_state

        def run(eigenvalues: Any, inner_state: Any) -> tuple[Any, Any, Any]:
            before = state._replace(eigenvalues=eigenvalues, inner_state=inner_state)
            steps, after = self.step(before, weights)
            return steps, after.eigenvalues, after.inner_state

        operands = (state.eigenvalues, state.inner_state)
        if isinstance(state.count, jax.core.Tracer):
            is_later = (state.count != 0).astype(jnp.int32)
            steps, *kept = jax.lax.switch(is_later, [skip, run], *operands)
        else:
            steps, *kept = run(*operands) if state.count else skip(*operands)
        eigenvalues, inner_state = kept
        return steps, state._replace(eigenvalues=eigenvalues, inner_state=inner_state)

    def accumulate(self, state: EigenbasisState) -> EigenbasisState:
        """Moves the factors towards the gradients."""
        weight = self._weight(state)
        precision = self.options["precision"]
        factors = []
        for i, (leaf, array) in enumerate(self._of_arrays()):
            if not leaf.layout.has_factors:
                factors.append(state.factors[i])
                continue
            gradient = _placement.for_blocks(array, leaf)
            gradients = [gradient] * len(leaf.layout.axes)
            if self.options["factors"] == "kl":
                gradients = _kronecker.whiten(
                    gradient.astype(leaf.dtype),
                    state.eigenbases[i],
                    state.eigenvalues[i],
                    leaf.layout,
                    self._round_off(leaf, array, state.eigenbases[i]),
                    precision,
                )
            new = _kronecker.accumulate(
                state.factors[i],
                gradients,
                leaf.layout,
                weight,
                precision,
            )
            factors.append(list(map(_mesh.placed, new, _placement.of_factors(leaf))))
        return state._replace(factors=factors)

    def refresh(
        self, steps: list[jax.Array], state: EigenbasisState
    ) -> tuple[list[jax.Array], EigenbasisState]:
        """Refreshes the eigenbases that are due; first moments change basis with them.

        The arrays `steps` are handed through; see `_in_place_if`.
        """
        options = self.options
        moments, with_moments = _moments.split_moments(
            state.inner_state, self.plan.leaves, self.inner.words
        )
        bases = Bases(state.eigenbases, state.eigenvalues, state.skipped, moments)
        refresh = self._planned_refresh(state)
        leaves = tuple(self.plan.leaves)
        clock = Clock(options["precondition_frequency"], options["stagger"])
        slots = len(refresh.slots)
        due = clock.due(state.count, slots)
        is_due = due.is_any()
        if isinstance(is_due, jax.core.Tracer):
            bases, steps = _in_place_if(
                is_due,
                lambda bases: _refreshed(leaves, refresh, bases, due),
                bases,
                steps,
            )
        elif is_due:
            bases = _compiled_refresh(leaves, refresh, bases, due)
        refreshes = jnp.where(
            clock.begins(state.count, slots),
            optax.safe_increment(state.refreshes),
            state.refreshes,
        )
        return steps, state._replace(
            refreshes=refreshes,
            eigenbases=bases.eigenbases,
            eigenvalues=bases.eigenvalues,
            skipped=bases.skipped,
            inner_state=with_moments(bases.moments),
        )

    def _planned_refresh(
        self, state: EigenbasisState
    ) -> _stacks.Refresh | _spread.SpreadRefresh:
        """Plans the refresh of all parameters, as options and step ask for it."""
        options: Any = self.options
        request = RefreshRequest(
            decompose=state.count == 0 if options["initial_basis"] == "eigh" else None,
            tolerance=options["refresh_tolerance"],
            precision=options["refresh_precision"],
        )
        count = options["precondition_frequency"] if options["stagger"] else None
        method = method_of(options["refresh"])
        change = BasisChange(state.count >= _FIRST_RAISE, options["precision"])
        return _spread.make_refresh(
            self.plan.leaves,
            state.factors,
            method,
            request,
            change,
            count,
            options["refresh_axes"],
        )

    def _of_arrays(self) -> list[tuple[Leaf, jax.Array]]:
        return list(zip(self.plan.leaves, self.plan.arrays, strict=True))

    def _weight(self, state: EigenbasisState) -> jax.typing.ArrayLike:
        """The weight of the newest gradient in the factors and eigenvalues.

        With `basis="current"` it makes them bias-corrected means, and is 1 at the first
        step. With `factors="kl"` it does so too, because each factor is weighted by the
        inverses of the others.
        """
        beta: Any = self.options["shampoo_beta"]
        weight = 1 - beta
        if self.options["basis"] == "previous" and self.options["factors"] == "shampoo":
            return weight
        return weight / (1 - _power(beta, optax.safe_increment(state.count)))

    def weights(self, old: EigenbasisState, new: EigenbasisState) -> _PerLeaf:
        """The weight that the newest gradient has to get in each eigenvalue.

        A refresh takes eigenvalues from factors that have this gradient in them. There
        the weight is 0, so that no gradient counts twice. Eigenvalues of a block that
        no refresh has changed follow the gradient, also where a refresh failed.

        KL-SOAP is the exception: its eigenvalues follow every gradient, also those that
        a refresh has counted. They weight the other factors, which a gradient of a new
        size or direction would otherwise let grow too far (see docs/family.md).

        Args:
          old: the state before this update.
          new: the state before the step, in which eigenvalues may be refreshed.
        """
        weight = self._weight(old)
        always = self.options["factors"] == "kl"

        def one(old: Any, new: Any) -> Any:
            if always or old is new:  # There was no refresh, or there is no factor.
                return weight
            is_refreshed = jnp.any(old != new, axis=-1, keepdims=True)
            return jnp.where(is_refreshed, 0, weight)

        is_array_or_none = lambda node: not isinstance(node, list)  # noqa: E731
        return jax.tree.map(
            one, old.eigenvalues, new.eigenvalues, is_leaf=is_array_or_none
        )

    def _project_and_follow(
        self,
        array: jax.Array,
        leaf: Leaf,
        eigenbases: Any,
        eigenvalues: Any,
        weights: Sequence[Any],
        is_early: jax.typing.ArrayLike,
    ) -> tuple[jax.Array, list[Any], jax.Array | None]:
        """The coordinates of a gradient, and the eigenvalues, which follow it.

        In the first step of the inner transformation, the eigenbases come from a single
        gradient, which may be this one, or one like it. So they may in the second step,
        where a learning rate that starts at 0 has left the parameters as they were. The
        last result says which coordinates are hidden by round-off in these two steps;
        it is None without factors.
        """
        if not leaf.layout.has_factors:
            gradient = array.astype(leaf.dtype)
            return _placement.like_parameter(gradient, leaf), eigenvalues, None
        coordinates, energies = _kronecker.project_and_measure(
            _placement.for_blocks(array.astype(leaf.dtype), leaf),
            eigenbases,
            leaf.layout,
            self.options["precision"],
        )
        eps = self._eps(leaf, *eigenbases)
        is_hidden = _kronecker.hidden(coordinates, energies, leaf.layout, eps)
        is_hidden = jnp.logical_and(is_early, is_hidden)
        if self.options["factors"] == "kl":
            round_off = self._round_off(leaf, array, eigenbases)
            energies = _kronecker.whitened_energies(
                coordinates, eigenvalues, leaf.layout, round_off
            )
        followed = _kronecker.follow(eigenvalues, energies, weights)
        eigenvalues = list(map(_mesh.placed, followed, _placement.of_vectors(leaf)))
        coordinates = _kronecker.bounded(coordinates)
        coordinates = _placement.like_parameter(coordinates, leaf)
        is_hidden = _placement.like_parameter(is_hidden, leaf)
        return _apart_from_blocks(coordinates, leaf), eigenvalues, is_hidden

    def _eps(self, leaf: Leaf, *arrays: jax.Array | None) -> Any:
        """The machine epsilon of the coarsest rounding of arrays and their products."""
        dtypes = [leaf.dtype, *(array.dtype for array in arrays if array is not None)]
        return coarsest_eps(
            *dtypes,
            precisions=[self.options["precision"], self.options["refresh_precision"]],
        )

    def _round_off(self, leaf: Leaf, gradient: jax.Array, eigenbases: Any) -> RoundOff:
        """Which eigenvalues count as round-off."""
        given: Any = self.options["rcond"]
        if given is not None:
            return RoundOff(given)
        return RoundOff.of(leaf.dtype, self._eps(leaf, gradient, *eigenbases))

    def _projected_params(self, state: EigenbasisState) -> Any:
        """The tree of the coordinates of the parameters, or None if nobody reads it."""
        if self.params is None or not self.inner.reads_params:
            return None
        projected = [
            _kronecker.project(
                _placement.for_blocks(param.astype(leaf.dtype), leaf),
                eigenbases,
                leaf.layout,
                self.options["precision"],
            )
            for param, leaf, eigenbases in zip(
                self.params, self.plan.leaves, state.eigenbases, strict=True
            )
        ]
        placed = map(_placement.like_parameter, projected, self.plan.leaves)
        return self.plan.treedef.unflatten(placed)

    def _project_back(
        self,
        update: jax.Array,
        gradient: jax.Array,
        leaf: Leaf,
        eigenbases: Any,
        eigenvalues: Any,
    ) -> jax.Array:
        """Damps an inner update, projects it back and bounds or sets its size."""
        options, layout = self.options, leaf.layout
        if not layout.has_factors:
            return _placement.like_parameter(update.astype(leaf.dtype), leaf)
        round_off = self._round_off(leaf, gradient, eigenbases)
        wanted, limit = options["update_rms"], options["clip_update_rms"]
        update = _placement.for_blocks(_apart_from_blocks(update, leaf), leaf)
        update = _kronecker.damp(update, eigenvalues, layout, round_off)
        step = _kronecker.project_back(update, eigenbases, layout, options["precision"])
        if wanted is not None:
            step = _kronecker.set_rms(step, layout, wanted)
        elif limit is not None:
            step = _kronecker.clip_rms(step, layout, limit)
        return _placement.like_parameter(step.astype(leaf.dtype), leaf)


def _without_hidden(update: jax.Array, is_hidden: jax.Array | None) -> jax.Array:
    """Leaves out hidden coordinates. Derivatives are those with all coordinates."""
    if is_hidden is None:
        return update
    return update - jax.lax.stop_gradient(jnp.where(is_hidden, update, 0))


def _apart_from_blocks(array: jax.Array, leaf: Leaf) -> jax.Array:
    """Keeps XLA from fusing blocks with the inner transformation.

    The array is what the inner transformation takes or makes. If the parameter has
    blocks, the array is permuted to or from them. On GPU a pass over memory that does
    this and updates moments in bfloat16 cannot overwrite them, and XLA copies them. The
    column `copied_mb` of `make gpu-check` shows it. No public issue is known.
    """
    return jax.lax.optimization_barrier(array) if leaf.layout.blocked() else array


@functools.partial(jax.jit, inline=True)
def _power(base: jax.typing.ArrayLike, exponent: jax.Array) -> jax.Array:
    """Computes a power in a program that serves all exponents, not one for each."""
    return jax.lax.pow(jnp.asarray(base), exponent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _refreshed(
    leaves: tuple[Leaf, ...],
    refresh: _stacks.Refresh | _spread.SpreadRefresh,
    bases: Bases,
    due: Due,
) -> Bases:
    """Refreshes the bases. Derivatives are those of a refresh whose results are fixed.

    The derivatives of decompositions do not exist where eigenvalues are equal, and only
    the first moments that turn with the eigenbases matter for what a step does.
    """
    return refresh.run(bases, due)


@_refreshed.defjvp
def _derivative(
    leaves: tuple[Leaf, ...], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Bases, Bases]:
    refresh, old, due = primals
    new, tangent = _refreshed(leaves, refresh, old, due), tangents[1]

    def turned(i: int) -> list[Moments]:
        """The derivatives of moments are those of their change of basis."""
        leaf, bases = leaves[i], (old.eigenbases[i], new.eigenbases[i])
        is_new = jax.tree.map(lambda a, b: jnp.any(a != b, (-2, -1)), *bases)

        def change(moments: list[Moments]) -> list[Moments]:
            placed = jax.tree.map(lambda m: _placement.for_blocks(m, leaf), moments)
            changed, _ = _kronecker.change_basis(
                placed,
                *bases,
                is_new,
                leaf.layout,
                refresh.change,
            )
            return jax.tree.map(lambda m: _placement.like_parameter(m, leaf), changed)

        return jax.jvp(change, (old.moments[i],), (tangent.moments[i],))[1]

    def fixed(new: jax.Array, old: jax.Array, tangent: jax.Array) -> jax.Array:
        """What the refresh did not change keeps its derivative."""
        return jnp.where(new == old, tangent, 0)

    return new, Bases(
        jax.tree.map(fixed, new.eigenbases, old.eigenbases, tangent.eigenbases),
        jax.tree.map(fixed, new.eigenvalues, old.eigenvalues, tangent.eigenvalues),
        tangent.skipped,
        [turned(i) for i in range(len(leaves))],
    )


# A step that is not traced refreshes by this function, which is compiled once for all
# such steps. Without it, JAX would compile the branches of conditionals in each step.
_compiled_refresh = jax.jit(_refreshed, static_argnums=0)


def _in_place_if(
    is_due: jax.Array,
    refresh: Callable[[Bases], Bases],
    bases: Bases,
    steps: list[jax.Array],
) -> tuple[Bases, list[jax.Array]]:
    """Refreshes the bases if a refresh is due, and copies nothing if none is.

    XLA lets the branches of a conditional overwrite their operands, so that the branch
    that keeps them costs nothing. This has three conditions. The branch that keeps is
    the first, which has index 0 in `jax.lax.switch`. Everything that reads the old
    eigenbases comes before the conditional. Everything that the other branch writes is
    written after all reads of the old eigenbases. The steps were computed from the old
    eigenbases. They are therefore operands and results of both branches, and go through
    a barrier in the second one, so that XLA does not see that they are unused there.

    The order of branches is reported in jax-ml/jax#16661 and jax-ml/jax#39449. For the
    reads no public issue is known, and jax-ml/jax#16663 is near. The file
    `tests/test_workarounds.py` tells when each may go.

    Args:
      is_due: whether to refresh.
      refresh: makes the new bases.
      bases: the old bases.
      steps: arrays that were computed from the old bases and are handed through.

    Returns:
      The bases and the steps.
    """

    def keep(bases: Bases, steps: Any) -> tuple[Bases, Any]:
        return bases, steps

    def renew(bases: Bases, steps: Any) -> tuple[Bases, Any]:
        return refresh(bases), [jax.lax.optimization_barrier(step) for step in steps]

    return jax.lax.switch(is_due.astype(jnp.int32), [keep, renew], bases, steps)
