"""SOAP, which is Adam in an eigenbasis, and the documentation of all options."""

import functools
from collections.abc import Callable
from typing import Any, Unpack

import jax
import optax

from soap_optax import _arguments
from soap_optax._chain import optimizer, split_rates
from soap_optax._eigenbasis import Inner, make_transformation
from soap_optax._inner import (
    AdamSettings,
    check_adam,
    nonzero,
    scale_by_adam,
    scale_by_factorized_adam,
    settings_of_adam,
)
from soap_optax._moments import Words
from soap_optax._options import ScaleBySoapOptions, SoapOptions, takes

_CLIP = {"clip_update_rms": 10.0}  # It is a default of both functions.


@takes(SoapOptions, **_CLIP)
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
    **options: Unpack[SoapOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioner.

    For a matrix $W$ of shape `[m, n]` with gradient $G$, at each step:

    $$
    \begin{aligned}
      G' &= Q_L^\top G Q_R \\
      M &\leftarrow \beta_1 M + (1 - \beta_1) G', \qquad
      V \leftarrow \beta_2 V + (1 - \beta_2) G' \odot G' \\
      W &\leftarrow W - \eta \left(Q_L \frac{\hat M}{\sqrt{\hat V} + \epsilon}
        Q_R^\top + \lambda W \right) \\
      L &\leftarrow \beta_s L + (1 - \beta_s) G G^\top, \qquad
      R \leftarrow \beta_s R + (1 - \beta_s) G^\top G
    \end{aligned}
    $$

    Every $f$ steps the eigenbases $Q_L, Q_R$ are refreshed: QR decompositions of
    $L Q_L$ and $R Q_R$ give the new ones, and $M$ changes to the new basis. $\eta$ is
    `learning_rate`, $\beta_1$ and $\beta_2$ are `b1` and `b2`, $\epsilon$ is `eps`,
    $\lambda$ is `weight_decay`, $\beta_s$ is `shampoo_beta`, and $f$ is
    `precondition_frequency`. Hats are bias corrections. A k-dimensional parameter has a
    factor and an eigenbasis per axis.

    The function takes the arguments of `optax.adamw` in their order, and the options by
    name. A good learning rate to start with is 3e-3.

    Args:
      learning_rate: step size, or a schedule of the step count. A negative step size
        ascends the loss, as in optax.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the root of the second moment, at least 0. (The authors add it
        before bias correction; optax and this library add it after.)
      eps_root: added to the second moment under the root, at least 0.
      mu_dtype: dtype of the stored first moment, of at least 16 bits. None means the
        dtype of the computation, which is float32 (float64 for float64 parameters).
        `b1` may be at most 1 minus the machine epsilon of the dtype (0.992 in
        bfloat16), because a slower mean would not move.
      weight_decay: strength of decoupled weight decay, at least 0, or a schedule.
      mask: tree of bools like the parameters, or a callable making it from them, that
        says which parameters decay.
      nesterov: whether the first moment looks one step ahead, as in `optax.adamw`.
      factorized: whether the second moment of each block has rank one, as in Adafactor.
        Only the means of its rows and columns are kept, which saves as much memory as
        the parameters take.
      adam_learning_rate: step size, or a schedule, of parameters without factors, which
        Adam updates. This and the next four arguments have the names that
        `optax.contrib.muon` gives them; None means what parameters with factors have.
      adam_b1: decay of the first moment of parameters without factors, in [0, 1).
      adam_b2: decay of the second moment of parameters without factors, in [0, 1).
      adam_eps: `eps` of parameters without factors, at least 0.
      adam_weight_decay: weight decay of parameters without factors, or a schedule.
      shampoo_beta: decay of the factors, in [0, 1); None means `b2`.
      precondition_frequency: steps from one refresh to the next: a positive integer, or
        a schedule `count -> int`. A refresh is due at each step whose count it divides.
      max_precond_dim: longest axis (of a block) that has a factor. A longer axis keeps
        the identity. None means 10,000, as published.
      merge_dims: whether to merge adjacent axes while their product is at most
        `max_precond_dim`, as for convolution kernels.
      precondition_1d: whether vectors have a factor, too.
      one_sided: whether to rotate only the shortest axis (of a block) that can have a
        factor, the first one of equals.
      block_size: upper bound of a block's sides, at least 2, or None for no blocks. An
        axis is cut into equal blocks of its largest divisor up to this bound, and each
        block of the parameter is preconditioned as a parameter of its own. An axis
        stays whole if that divisor is 1 or less than an eighth of `block_size`.
      dimension_numbers: the axes that form each factor, as a
        `soap_optax.DimensionNumbers` or `optax.contrib.MuonDimensionNumbers`, a tree of
        them like the parameters, or a callable making one from the parameters. Axes
        that are not named are batch axes. A parameter with None in the tree has no
        factor. If the option is None, the shape of each parameter decides.
        `optax.inject_hyperparams` takes a callable for a schedule, unless
        `static_args` names this option.
      factors: `"shampoo"`, as published, or `"kl"`, as in KL-SOAP, arXiv 2509.03378,
        where each factor is weighted by the inverse of the other:
        $L \leftarrow \beta_s L + (1 - \beta_s) G R^{-1} G^\top / n$ and
        $R \leftarrow \beta_s R + (1 - \beta_s) G^\top L^{-1} G / m$.
      basis: `"previous"`, as published, rotates a gradient by the basis of the
        gradients before it. The first step only builds the basis, and its update is
        zero but for weight decay. With `"current"`, the factors, which are then
        bias-corrected, and the basis take in each gradient before it is rotated, and
        the first step is a real one.
      refresh: a `soap_optax.RefreshMethod`, or the name of one. `"qr"`, as published,
        stands for `soap_optax.QR()`, one power step and a QR decomposition: on CPU by
        Householder's method, and on other platforms by products of matrices, with equal
        results up to round-off. `"cholesky_qr"` stands for `soap_optax.CholeskyQR()`,
        which takes these products on CPU, too. `"eigh"` stands for `soap_optax.Eigh()`,
        a full decomposition at every refresh.
      refresh_tolerance: share in [0, 1), or None. The refresh of an eigenbasis Q of a
        factor M is skipped while the norm of the off-diagonal part of Q^T M Q is at
        most this share of the norm of M, as in arXiv 2506.03595. None skips nothing.
      stagger: whether to refresh about 1/f of the parameters at each step, balanced by
        cost, each at every f-th step, instead of all at once. All are refreshed at the
        first step. `precondition_frequency` must then be a static integer.
      initial_basis: `"eigh"`, as published, or `"identity"`, with which the first step
        refreshes the identity by `refresh`, so that with `"qr"` or `"cholesky_qr"` the
        program contains no `eigh`.
      precond_dtype: dtype in which eigenbases are stored, of at least 16 bits. Factors
        are stored in it, too, if it has at least 32 bits, and in float32 if not, as
        squares of gradients need the digits. None means the dtype of the computation.
      pack_factors: whether to store one triangle of each factor, in half of the memory
        and with all digits. No block may be cut across devices then.
      precision: precision of the matrix products of a step, as in `jax.numpy.matmul`:
        those that project gradients and updates, accumulate factors and change bases.
        The default is float32 on CPU, TensorFloat-32 on GPU and three products of
        bfloat16 on TPU. `"highest"` is float32 on all of them.
      refresh_precision: precision of the products of factors and eigenbases in a
        refresh. Less than the default can make Rayleigh quotients useless.
      rcond: share of a factor's largest eigenvalue e_max under which a direction counts
        as round-off. The update in a direction of eigenvalue e is multiplied by
        r^2 / (r^2 + rcond^2), where r = e / e_max. None follows the rounding in play:
        it means 0.01 of the machine epsilon of the computation. If gradients, stored
        eigenbases or products are rounded more coarsely, to a machine epsilon `eps`, it
        means 5 eps^2 of the mean eigenvalue where this is more. That leaves all but
        null directions as they are. 0, as published, multiplies by 1. A model that
        computes in bfloat16 and hands over float32 gradients hides its rounding:
        give 1e-4, or cast the gradients to bfloat16 before.
      update_rms: root mean square, above 0, to which the update of each block of a
        parameter with factors is scaled before weight decay and learning rate. None, as
        published, leaves updates as they are. With 0.2 the learning rates of AdamW
        carry over, as with `consistent_rms` of `optax.contrib.muon`. It comes in the
        place of `clip_update_rms`. An update is scaled up however small it is, so a
        block without gradients moves on until its first moment is exactly 0.
      clip_update_rms: bound, above 0, of the root mean square of the update of a block
        of a parameter with factors, before the learning rate. None, as published, means
        no bound. While the basis stays, Adam itself keeps to a bound of 1 (if b1 = b2).
        A refresh can turn the first moment after a spike into directions in which the
        second moment has not seen the spike. From the fifth step on SOAP raises the
        second moment there, so that the default hardly ever acts.
      params_sharding: how the parameters are sharded over a mesh of devices with
        automatic axes: a tree of `jax.sharding.NamedSharding` like the parameters, or a
        callable making it from their shapes. Refreshes are then local where blocks lie
        within shards, and spread over all devices elsewhere. Without it each factor is
        refreshed alone, as XLA sees fit. It is not needed on meshes with explicit axes,
        where the types of arrays contain it, and ignored inside `jax.shard_map`. See
        `state_sharding`. `optax.inject_hyperparams` takes a callable for a schedule,
        unless `static_args` names this option.
      refresh_axes: names of mesh axes along which devices that have copies of a factor
        share its refreshes and then gather the new eigenbases. None means no axis where
        blocks lie within shards, and all axes elsewhere. It has no effect where
        shardings are not known.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the dtype
      that those of `optax.adamw` have: the gradients', unless weight decay widens it.

    Raises:
      TypeError: for an unknown argument; it names the function and the argument.
      ValueError: for an argument that breaks its rule; it names the argument, the rule
        and the value. `in_eigenbasis` lists further reasons.

    Examples:
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
      Vyas et al., [SOAP: Improving and Stabilizing Shampoo using
      Adam](https://arxiv.org/abs/2409.11321), 2024
    """
    of_others, rest = split_rates(options)
    transformation = scale_by_soap(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=nesterov,
        factorized=factorized,
        **rest,
    )
    rate_and_decay = learning_rate, weight_decay
    return optimizer(transformation, rate_and_decay, of_others, mask, rest)


@takes(ScaleBySoapOptions, **_CLIP)
def scale_by_soap(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    factorized: bool = False,
    **options: Unpack[ScaleBySoapOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by SOAP: `in_eigenbasis` of `optax.scale_by_adam`.

    `soap_optax.soap` describes the algorithm, all arguments and the errors. This
    function is its first part, without weight decay and learning rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `EigenbasisState`.

    Examples:
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
    differing = options["adam_b1"], options["adam_b2"], options["adam_eps"]
    settings = AdamSettings(b1, b2, nonzero(eps))
    make = functools.partial(
        scale_by_factorized_adam if factorized else scale_by_adam,
        settings=settings_of_adam(settings, *differing, mu_dtype),
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    # Second moments of rank one bound each row by themselves.
    words = Words() if factorized else Words(second_moments=("nu",))
    return make_transformation(Inner(make, words, reads_params=False), options)
