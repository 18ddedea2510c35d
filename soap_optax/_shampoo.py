"""Shampoo, SOAP's ancestor: powers of the eigenvalues in place of Adam."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import optax

from soap_optax import _arguments, _kronecker, _sharding, _tree
from soap_optax._eigenbasis import (
    DEFAULT_MAX_PRECOND_DIM,
    EigenbasisState,
    Options,
    make_transformation,
)
from soap_optax._soap import optimizer


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      preconditioner: factors, eigenbases, eigenvalues and the mean gradient, in the
        coordinates of the eigenbases.
      adam: of the parameters without factors; with grafting, of all.
    """

    preconditioner: EigenbasisState
    adam: optax.OptState


def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-12,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    power: jax.typing.ArrayLike = 0.4,
    grafting: Literal["adam"] | None = "adam",
    adam_eps: jax.typing.ArrayLike = 1e-8,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    precondition_frequency: int | Callable[[jax.Array], Any] = 10,
    max_precond_dim: int = DEFAULT_MAX_PRECOND_DIM,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    block_size: int | None = None,
    dimension_numbers: Any = None,
    factors: Literal["shampoo", "kl"] = "shampoo",
    refresh: Literal["qr", "cholesky_qr", "eigh"] = "eigh",
    refresh_tolerance: jax.typing.ArrayLike | None = None,
    stagger: bool = False,
    initial_basis: Literal["eigh", "identity"] = "eigh",
    mu_dtype: jax.typing.DTypeLike | None = None,
    precond_dtype: jax.typing.DTypeLike | None = None,
    precision: Any = jax.lax.Precision.HIGHEST,
    rcond: float | None = None,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo, with the layouts, blocks and refreshes of `soap`.

    For a matrix :math:`W` of shape `[m, n]` with gradient :math:`G`, at each step:

    .. math::

      \begin{align*}
        M &\leftarrow \beta_1 M + (1 - \beta_1) G \\
        L &\leftarrow \beta_s L + (1 - \beta_s) G G^\top, \qquad
        R \leftarrow \beta_s R + (1 - \beta_s) G^\top G \\
        W &\leftarrow W - \eta \left(\gamma (\hat L + \epsilon I)^{-p} \hat M
          (\hat R + \epsilon I)^{-p} + \lambda W \right)
      \end{align*}

    where hats are bias corrections, and the inverse roots are those of the last of
    every :math:`f` steps. With grafting, :math:`\gamma` gives each block the norm that
    Adam's update would have; else it is 1, and updates of power 1/2 grow like the
    inverse of a shrinking gradient. Parameters without factors have Adam's. :math:`p`
    is `power`, :math:`\epsilon` is `eps`, all else as in `soap`.

    Args:
      learning_rate: see `soap`, as for all arguments not listed here.
      b1: decay of the mean gradient and, in Adam, of the first moment, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1).
      eps: added to the eigenvalues of the factors, at least 0.
      weight_decay: see `soap`.
      mask: see `soap`.
      power: of the inverse of each factor, at least 0: 1/4 as first published for
        matrices, 1/2 as with Adafactor in the eigenbasis, 1/2.5 in the experiments of
        the SOAP paper.
      grafting: `"adam"`, or None.
      adam_eps: added to the root of Adam's second moment, at least 0.
      refresh: `"eigh"`, a decomposition at every refresh, or, as in `soap`, `"qr"` or
        `"cholesky_qr"`.
      factors: `"shampoo"` or, with `power` 1/2 KL-Shampoo, `"kl"`; see `soap`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the gradients' dtype.

    Raises:
      ValueError: for an argument out of its range, naming argument, rule and value; see
        also `in_eigenbasis`.

    Example:
      >>> import jax.numpy as jnp, optax, soap_optax
      >>> tx = soap_optax.shampoo(learning_rate=0.01, power=0.5)
      >>> w = jnp.zeros((4, 3))
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jnp.arange(12.0).reshape(4, 3), state, w)
      >>> updates.shape
      (4, 3)

    References:
      Gupta et al., `Shampoo: Preconditioned Stochastic Tensor Optimization
      <https://arxiv.org/abs/1802.09568>`_, 2018; Anil et al., `Scalable Second Order
      Optimization for Deep Learning <https://arxiv.org/abs/2002.09018>`_, 2020, for
      grafting; Shi et al., `A Distributed Data-Parallel PyTorch Implementation of the
      Distributed Shampoo Optimizer <https://arxiv.org/abs/2309.06497>`_, 2023, for
      epsilon.
    """
    return optimizer(
        scale_by_shampoo(
            b1=b1,
            b2=b2,
            eps=eps,
            power=power,
            grafting=grafting,
            adam_eps=adam_eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            one_sided=one_sided,
            block_size=block_size,
            dimension_numbers=dimension_numbers,
            factors=factors,
            refresh=refresh,
            refresh_tolerance=refresh_tolerance,
            stagger=stagger,
            initial_basis=initial_basis,
            mu_dtype=mu_dtype,
            precond_dtype=precond_dtype,
            precision=precision,
            rcond=rcond,
            params_sharding=params_sharding,
        ),
        *(learning_rate, weight_decay, mask),
    )


def scale_by_shampoo(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-12,
    *,
    power: jax.typing.ArrayLike = 0.4,
    grafting: Literal["adam"] | None = "adam",
    adam_eps: jax.typing.ArrayLike = 1e-8,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    precondition_frequency: int | Callable[[jax.Array], Any] = 10,
    max_precond_dim: int = DEFAULT_MAX_PRECOND_DIM,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    block_size: int | None = None,
    dimension_numbers: Any = None,
    factors: Literal["shampoo", "kl"] = "shampoo",
    refresh: Literal["qr", "cholesky_qr", "eigh"] = "eigh",
    refresh_tolerance: jax.typing.ArrayLike | None = None,
    stagger: bool = False,
    initial_basis: Literal["eigh", "identity"] = "eigh",
    mu_dtype: jax.typing.DTypeLike | None = None,
    precond_dtype: jax.typing.DTypeLike | None = None,
    precision: Any = jax.lax.Precision.HIGHEST,
    rcond: float | None = None,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Shampoo: a mean of gradients, scaled in the eigenbasis.

    See `soap_optax.shampoo` for the algorithm, all arguments and the errors; this is
    its first part, without weight decay and learning rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ShampooState`.

    Example:
      >>> import optax, soap_optax
      >>> tx = optax.chain(
      ...     soap_optax.scale_by_shampoo(power=0.25, grafting=None),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
    """
    infinity = float("inf")
    _arguments.require_number("b1", b1, 0, 1)
    _arguments.require_number("b2", b2, 0, 1)
    _arguments.require_number("eps", eps, 0, infinity)
    _arguments.require_number("power", power, 0, infinity)
    _arguments.require_number("adam_eps", adam_eps, 0, infinity)
    _arguments.require_choice("grafting", grafting, ("adam", None))
    options = Options(
        shampoo_beta=b2 if shampoo_beta is None else shampoo_beta,
        precondition_frequency=precondition_frequency,
        max_precond_dim=max_precond_dim,
        merge_dims=merge_dims,
        precondition_1d=precondition_1d,
        one_sided=one_sided,
        block_size=block_size,
        dimension_numbers=dimension_numbers,
        factors=factors,
        basis="current",
        refresh=refresh,
        refresh_tolerance=refresh_tolerance,
        stagger=stagger,
        initial_basis=initial_basis,
        mu_dtype=mu_dtype,
        precond_dtype=precond_dtype,
        precision=precision,
        rcond=rcond,
        clip_update_rms=None,
        params_sharding=params_sharding,
        root=(power, eps),
    )
    mean = optax.with_extra_args_support(optax.ema(b1))
    adam = optax.scale_by_adam(b1, b2, adam_eps, mu_dtype=mu_dtype)
    return _grafted(
        make_transformation(lambda _: mean, options), adam, grafting, options
    )


def _grafted(
    preconditioner: optax.GradientTransformationExtraArgs,
    adam: optax.GradientTransformation,
    grafting: str | None,
    options: Options,
) -> optax.GradientTransformationExtraArgs:
    """The preconditioner, with Adam where there are no factors, and its norms."""

    def has_adam(params: optax.Params) -> Any:
        plan = options.plan(params)
        return plan.treedef.unflatten(
            grafting == "adam" or not leaf.layout.has_factors for leaf in plan.leaves
        )

    def combine(step: Any, adam_step: Any, leaf: _tree.Leaf) -> jax.Array:
        if not leaf.layout.has_factors:
            return adam_step
        if grafting is None:
            return step
        step, adam_step = (_sharding.for_blocks(s, leaf) for s in (step, adam_step))
        grafted = _kronecker.graft(step, adam_step, leaf.layout)
        return _sharding.like_parameter(grafted, leaf)

    adam = optax.masked(adam, has_adam)

    def init_fn(params: optax.Params) -> ShampooState:
        wide = options.plan(params).widened()
        return ShampooState(preconditioner.init(params), adam.init(wide))

    def update_fn(
        updates: optax.Updates,
        state: ShampooState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ShampooState]:
        plan = options.plan(updates)
        wide = plan.widened()
        steps, of_shampoo = preconditioner.update(
            *(wide, state.preconditioner, params), **extra_args
        )
        of_adam, adam_state = adam.update(wide, state.adam)
        new_updates = [
            combine(step, adam_step, leaf).astype(gradient.dtype)
            for step, adam_step, leaf, gradient in zip(
                plan.treedef.flatten_up_to(steps),
                plan.treedef.flatten_up_to(of_adam),
                *(plan.leaves, plan.arrays),
                strict=True,
            )
        ]
        return plan.treedef.unflatten(new_updates), ShampooState(of_shampoo, adam_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
