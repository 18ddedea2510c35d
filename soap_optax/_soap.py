"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner: chains, documentation."""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import optax

from soap_optax import _arguments
from soap_optax._eigenbasis import (
    DEFAULT_MAX_PRECOND_DIM,
    Options,
    make_transformation,
)
from soap_optax._factorized import scale_by_factorized_adam


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    precondition_frequency: int | Callable[[jax.Array], Any] = 10,
    max_precond_dim: int = DEFAULT_MAX_PRECOND_DIM,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    factorized: bool = False,
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
    clip_update_rms: jax.typing.ArrayLike | None = 10.0,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

    For a matrix :math:`W` of shape `[m, n]` with gradient :math:`G`, at each step:

    .. math::

      \begin{align*}
        G' &= Q_L^\top G Q_R \\
        M &\leftarrow \beta_1 M + (1 - \beta_1) G', \qquad
        V \leftarrow \beta_2 V + (1 - \beta_2) G' \odot G' \\
        W &\leftarrow W - \eta \left(Q_L \frac{\hat M}{\sqrt{\hat V} + \epsilon}
          Q_R^\top + \lambda W \right) \\
        L &\leftarrow \beta_s L + (1 - \beta_s) G G^\top, \qquad
        R \leftarrow \beta_s R + (1 - \beta_s) G^\top G
      \end{align*}

    and every :math:`f` steps the eigenbases :math:`Q_L, Q_R` are refreshed by one power
    step and a QR decomposition, of :math:`L Q_L` and :math:`R Q_R`, and :math:`M`
    changes to the new basis. :math:`\eta` is `learning_rate`, :math:`\beta_1, \beta_2`
    are `b1`, `b2`, :math:`\epsilon` is `eps`, :math:`\lambda` is `weight_decay`,
    :math:`\beta_s` is `shampoo_beta`, :math:`f` is `precondition_frequency`; hats are
    bias corrections. A k-dimensional parameter has a factor and an eigenbasis per axis.

    Like `optax.adamw`, and with its arguments; start with the learning rate 3e-3.

    Args:
      learning_rate: step size, at least 0, or a schedule of the step count.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0. (The authors add it
        before bias correction, optax and this library after.)
      weight_decay: strength of decoupled weight decay, at least 0, or a schedule.
      mask: tree of bools like the parameters, or a callable making it from them: which
        parameters decay.
      shampoo_beta: decay of the factors, in [0, 1); None means `b2`.
      precondition_frequency: steps from one refresh to the next, a positive integer, or
        a schedule `count -> int`; a refresh is due when it divides the count.
      max_precond_dim: an axis (of a block) longer than this keeps the identity.
      merge_dims: merge adjacent axes while their product is at most `max_precond_dim`,
        as for convolution kernels.
      precondition_1d: whether vectors have a factor, too.
      one_sided: rotate only the smallest axis (of a block), the first of equals.
      factorized: whether the second moment of each block has rank one, as Adafactor's,
        kept as the means of its rows and columns: saves the memory of a parameter.
      block_size: upper bound of a block's sides, at least 2: an axis is cut into equal
        blocks of its largest divisor up to this, and each block of the parameter is
        preconditioned as a parameter of its own. An axis with no such divisor of at
        least an eighth of `block_size` stays whole. None: no blocks.
      dimension_numbers: `soap_optax.DimensionNumbers` or
        `optax.contrib.MuonDimensionNumbers`, or a tree of them like the parameters, or
        a callable making it from them: the axes that form each factor. Axes not named
        are batch axes. A parameter with None has no factor. If not given, the shape
        decides. `optax.inject_hyperparams` takes a callable for a schedule: name it in
        `static_args`.
      factors: `"shampoo"`, as published, or `"kl"`: each factor is weighted by the
        inverse of the other, :math:`L \leftarrow \beta_s L + (1 - \beta_s) G R^{-1}
        G^\top / n` and likewise R, as in KL-SOAP, arXiv 2509.03378.
      basis: `"previous"`, as published: a gradient is rotated by the basis of the
        gradients before it, and the first step only builds the basis (its update is
        zero but for weight decay). `"current"`: factors, bias-corrected, and basis take
        in each gradient before it is rotated, and the first step is a real one.
      refresh: `"qr"`, as published, one power step and a QR decomposition;
        `"cholesky_qr"`, the same up to round-off from products of matrices, for GPU and
        TPU (where it fails, the QR decomposition follows); or `"eigh"`, a decomposition
        at every refresh.
      refresh_tolerance: in [0, 1), skip the refresh of an eigenbasis Q of a factor M
        while the norm of the off-diagonal part of Q^T M Q is at most this share of the
        norm of M, as in arXiv 2506.03595. None: skip none.
      stagger: whether to refresh about 1/f of the parameters at each step, balanced by
        cost, each at every f-th step, instead of all at once. All are refreshed at the
        first step. `precondition_frequency` must be an integer then, and static.
      initial_basis: `"eigh"`, as published, or `"identity"`: the first step refreshes
        the identity by `refresh`, so that with `"qr"` no `eigh` is in the program.
      mu_dtype: dtype of the stored first moment; None: that of the computation, float32
        (float64 for float64 parameters).
      precond_dtype: dtype of the stored factors and eigenbases; None: as above.
      precision: of the matrix products. Less than the default can make Rayleigh
        quotients useless.
      rcond: share of a factor's largest eigenvalue under which a direction counts as
        round-off: its update is scaled by r^2 / (r^2 + rcond^2), r = e / e_max. None:
        0.01 of the unit round-off, which leaves all but null directions as they are;
        0: off, as published.
      clip_update_rms: bound of the root mean square of a block's update before the
        learning rate, above 0, for parameters with factors; None: no bound, as
        published. In a basis that stays, one is Adam's own bound (if b1 = b2). The
        default only stops a moment that turns, after a spike, to where the second
        moment has not seen it.
      params_sharding: how the parameters are sharded over a mesh of devices with
        automatic axes: a tree of `jax.sharding.NamedSharding` like the parameters, or a
        callable making it from them. Refreshes are then local where blocks lie within
        shards, and spread over all devices where not; without it each factor is
        refreshed alone, as XLA sees fit. Not needed on meshes with explicit axes, whose
        arrays say it, and not looked at inside `jax.shard_map`. See `state_sharding`.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the gradients' dtype.

    Raises:
      ValueError: for an argument out of its range, naming argument, rule and value; see
        also `in_eigenbasis`.

    Example:
      >>> import jax, jax.numpy as jnp, optax, soap_optax
      >>> tx = soap_optax.soap(learning_rate=0.01, precondition_frequency=5)
      >>> target = jnp.arange(12.0).reshape(4, 3)
      >>> loss = lambda w: jnp.mean((w - target) ** 2)
      >>> w = jnp.zeros((4, 3))
      >>> state = tx.init(w)
      >>> for _ in range(3):
      ...     updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...     w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < loss(jnp.zeros((4, 3))))
      True

    References:
      Vyas et al., `SOAP: Improving and Stabilizing Shampoo using Adam
      <https://arxiv.org/abs/2409.11321>`_, 2024
    """
    return optimizer(
        scale_by_soap(
            b1=b1,
            b2=b2,
            eps=eps,
            shampoo_beta=shampoo_beta,
            precondition_frequency=precondition_frequency,
            max_precond_dim=max_precond_dim,
            merge_dims=merge_dims,
            precondition_1d=precondition_1d,
            one_sided=one_sided,
            factorized=factorized,
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
        ),
        *(learning_rate, weight_decay, mask),
    )


def optimizer(
    transformation: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, then weight decay and learning rate, as in `optax.adamw`."""
    infinity = float("inf")
    _arguments.require_number_or_schedule("learning_rate", learning_rate, 0, infinity)
    _arguments.require_number_or_schedule("weight_decay", weight_decay, 0, infinity)
    return optax.chain(
        transformation,
        # No decay leaves out a pass over the parameters; a traced 0 may change.
        optax.identity()
        if isinstance(weight_decay, (int, float)) and weight_decay == 0
        else optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_by_soap(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    shampoo_beta: jax.typing.ArrayLike | None = None,
    precondition_frequency: int | Callable[[jax.Array], Any] = 10,
    max_precond_dim: int = DEFAULT_MAX_PRECOND_DIM,
    merge_dims: bool = False,
    precondition_1d: bool = False,
    one_sided: bool = False,
    factorized: bool = False,
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
    clip_update_rms: jax.typing.ArrayLike | None = 10.0,
    params_sharding: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by SOAP: `in_eigenbasis` of `optax.scale_by_adam`.

    See `soap_optax.soap` for the algorithm, all arguments and the errors; this is its
    first part, without weight decay and learning rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `EigenbasisState`.

    Example:
      >>> import optax, soap_optax
      >>> tx = optax.chain(
      ...     optax.clip_by_global_norm(1.0),
      ...     soap_optax.scale_by_soap(b1=0.9),
      ...     optax.scale_by_learning_rate(optax.cosine_decay_schedule(3e-3, 1000)),
      ... )
    """
    _arguments.require_number("b1", b1, 0, 1)
    _arguments.require_number("b2", b2, 0, 1)
    _arguments.require_number("eps", eps, 0, float("inf"))
    _arguments.require_choice("factorized", factorized, (True, False))
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
    )
    if factorized:
        inner_of = functools.partial(scale_by_factorized_adam, b1=b1, b2=b2, eps=eps)
        return make_transformation(inner_of, options)
    adam = optax.with_extra_args_support(optax.scale_by_adam(b1, b2, eps))
    return make_transformation(lambda _: adam, options)
