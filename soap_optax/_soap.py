"""SOAP, Adam in the eigenbasis of Shampoo's preconditioner: chains, documentation."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from soap_optax import _arguments
from soap_optax._eigenbasis import Inner, make_transformation
from soap_optax._factorized import scale_by_factorized_adam
from soap_optax._options import EigenbasisOptions, takes


@takes(EigenbasisOptions, clip_update_rms=10.0)
def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    factorized: bool = False,
    **options: Unpack[EigenbasisOptions],
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

    It takes the arguments of `optax.adamw` in their order, and options by name. A good
    learning rate to start with is 3e-3.

    Args:
      learning_rate: step size, or a schedule of the step count. With a negative one
        the loss is ascended, as in optax.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0. (The authors add it
        before bias correction, optax and this library after.)
      eps_root: added to the second moment under the root, at least 0.
      mu_dtype: dtype of the stored first moment; None: that of the computation, float32
        (float64 for float64 parameters).
      weight_decay: strength of decoupled weight decay, at least 0, or a schedule.
      mask: tree of bools like the parameters, or a callable making it from them: which
        parameters decay.
      nesterov: whether the first moment looks one step ahead, as in `optax.adamw`.
      factorized: whether the second moment of each block has rank one, as Adafactor's,
        kept as the means of its rows and columns: saves the memory of a parameter.
      shampoo_beta: decay of the factors, in [0, 1); None means `b2`.
      precondition_frequency: steps from one refresh to the next, a positive integer, or
        a schedule `count -> int`; a refresh is due when it divides the count.
      max_precond_dim: an axis (of a block) longer than this keeps the identity. None
        means 10 000, as published.
      merge_dims: merge adjacent axes while their product is at most `max_precond_dim`,
        as for convolution kernels.
      precondition_1d: whether vectors have a factor, too.
      one_sided: rotate only the smallest axis (of a block), the first of equals.
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
      refresh: a `soap_optax.RefreshMethod`, or a name: `"qr"` for `soap_optax.QR()`, as
        published, one power step and a QR decomposition; `"cholesky_qr"` for
        `soap_optax.CholeskyQR()`, which gives equal results, up to round-off, from
        products of matrices, for GPU and TPU (where it fails, the QR decomposition
        follows); or `"eigh"` for `soap_optax.Eigh()`, a decomposition at every refresh.
      refresh_tolerance: in [0, 1), skip the refresh of an eigenbasis Q of a factor M
        while the norm of the off-diagonal part of Q^T M Q is at most this share of the
        norm of M, as in arXiv 2506.03595. None: skip none.
      stagger: whether to refresh about 1/f of the parameters at each step, balanced by
        cost, each at every f-th step, instead of all at once. All are refreshed at the
        first step. `precondition_frequency` must be an integer then, and static.
      initial_basis: `"eigh"`, as published, or `"identity"`: the first step refreshes
        the identity by `refresh`, so that with `"qr"` no `eigh` is in the program.
      precond_dtype: dtype of the stored factors and eigenbases; None: that of the
        computation.
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
      TypeError: for an unknown argument, naming function and argument.
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
    transformation = scale_by_soap(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=nesterov,
        factorized=factorized,
        **options,
    )
    return optimizer(transformation, learning_rate, weight_decay, mask)


def optimizer(
    transformation: optax.GradientTransformation,
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any | Callable[[optax.Params], Any] | None,
) -> optax.GradientTransformationExtraArgs:
    """The transformation, then weight decay and learning rate, as in `optax.adamw`."""
    _arguments.check(
        learning_rate=(learning_rate, _RATE), weight_decay=(weight_decay, _DECAY)
    )
    # Without decay a pass over the parameters is left out. A traced 0 may change, and
    # with a mask the state has the structure that it has with decay.
    is_number = isinstance(weight_decay, (int, float))
    if is_number and weight_decay == 0 and mask is None:
        decay: optax.GradientTransformation = optax.identity()
    else:
        decay = optax.add_decayed_weights(weight_decay, mask)
    return optax.chain(
        transformation, decay, optax.scale_by_learning_rate(learning_rate)
    )


_RATE = _arguments.or_schedule(_arguments.number(-float("inf")))
_DECAY = _arguments.or_schedule(_arguments.number(0))


@takes(EigenbasisOptions, clip_update_rms=10.0)
def scale_by_soap(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    factorized: bool = False,
    **options: Unpack[EigenbasisOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by SOAP: `in_eigenbasis` of `optax.scale_by_adam`.

    See `soap_optax.soap` for the algorithm, all arguments and the errors. This is its
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
    check_adam(b1, b2, eps, eps_root, mu_dtype, nesterov)
    _arguments.check(factorized=(factorized, _arguments.flag))
    if options["shampoo_beta"] is None:
        options["shampoo_beta"] = b2
    adam = scale_by_factorized_adam if factorized else _scale_by_adam
    make = functools.partial(
        adam,
        b1=b1,
        b2=b2,
        eps=eps,
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    return make_transformation(Inner(make), options)


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


def _scale_by_adam(
    leaves: Any, eigenvalues: Any, **arguments: Any
) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, which need not know where it runs."""
    del leaves, eigenvalues
    return optax.with_extra_args_support(optax.scale_by_adam(**arguments))
