"""Shampoo, SOAP's ancestor: powers of the eigenvalues in place of Adam."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Unpack

import jax
import optax

from soap_optax import _arguments, _kronecker
from soap_optax._chain import optimizer, split_rates
from soap_optax._eigenbasis import Inner, kept, make_transformation
from soap_optax._inner import (
    AdamSettings,
    check_adam,
    nonzero,
    scale_by_adam,
    scale_by_shampoo_roots,
    settings_of_adam,
)
from soap_optax._options import (
    FamilyOptions,
    ScaleByShampooOptions,
    ShampooOptions,
    complete,
    takes,
)
from soap_optax._state import EigenbasisState
from soap_optax.mesh import _placement
from soap_optax.parameters import _tree
from soap_optax.parameters._tree import Leaf, Plan


class ShampooState(NamedTuple):
    """State of `scale_by_shampoo`.

    Attributes:
      preconditioner: the factors, eigenbases and eigenvalues and, for parameters with
        factors, the mean gradient in the coordinates of the eigenbases.
      adam: Adam's state, for the parameters without factors or, with grafting, for all.
    """

    preconditioner: EigenbasisState
    adam: optax.OptState


_EIGH = {"refresh": "eigh"}  # It is the default of both functions.


@takes(ShampooOptions, **_EIGH)
def shampoo(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-12,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    mask: Any | Callable[[optax.Params], Any] | None = None,
    *,
    nesterov: bool = False,
    power: jax.typing.ArrayLike = 0.4,
    grafting: Literal["adam"] | None = "adam",
    **options: Unpack[ShampooOptions],
) -> optax.GradientTransformationExtraArgs:
    r"""Shampoo, with the layouts, blocks and refreshes of `soap`.

    For a matrix $W$ of shape `[m, n]` with gradient $G$, at each step:

    $$
    \begin{aligned}
      M &\leftarrow \beta_1 M + (1 - \beta_1) G \\
      L &\leftarrow \beta_s L + (1 - \beta_s) G G^\top, \qquad
      R \leftarrow \beta_s R + (1 - \beta_s) G^\top G \\
      W &\leftarrow W - \eta \left(\gamma (\hat L + \epsilon I)^{-p} \hat M
        (\hat R + \epsilon I)^{-p} + \lambda W \right)
    \end{aligned}
    $$

    where hats are bias corrections, $p$ is `power`, $\epsilon$ is `eps`, and the other
    symbols are those of `soap`. Between refreshes the eigenvectors stay and the
    eigenvalues follow the gradients, so that the roots are those of
    $Q \operatorname{diag}(Q^\top L Q) Q^\top$, and likewise for $R$. With grafting,
    $\gamma$ gives each block the norm that Adam's update would have. Without grafting
    it is 1, and with power 1/2 updates grow like the inverse of a shrinking gradient.
    Adam updates the parameters without factors.

    Args:
      learning_rate: see `soap`, which also describes all arguments not listed here.
      b1: decay of the mean gradient and, in Adam, of the first moment, in [0, 1).
      b2: decay of Adam's second moment, in [0, 1).
      eps: added to the eigenvalues of the factors, at least 0.
      eps_root: added to Adam's second moment under the root, at least 0.
      mu_dtype: dtype of the stored mean gradient and first moment; see `soap`.
      weight_decay: see `soap`.
      mask: see `soap`.
      power: power p of the inverse of each factor, at least 0. It was 1/4 as first
        published for matrices, it is 1/2 for Adafactor in the eigenbasis, and it was
        1/2.5 in the experiments of the SOAP paper.
      grafting: `"adam"` for blocks with the norms of Adam's updates, or None.
        `update_rms` comes in its place.
      adam_learning_rate: see `soap`.
      adam_b1: decay of Adam's first moment for parameters without factors; see `soap`.
      adam_b2: the same of its second moment.
      adam_eps: added to the root of Adam's second moment, at least 0. None means 1e-8.
      adam_weight_decay: see `soap`.
      nesterov: whether the mean gradient and Adam's first moment look one step ahead.
      refresh: `"eigh"`, a full decomposition at every refresh, or any other method that
        `soap` takes.
      factors: `"shampoo"` or `"kl"`; see `soap`. With `"kl"` and `power` 1/2 this is
        KL-Shampoo.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Updates have the dtype
      that those of `optax.adamw` have: the gradients', unless weight decay widens it.

    Raises:
      TypeError: for an unknown argument; it names the function and the argument.
      ValueError: for an argument that breaks its rule; it names the argument, the rule
        and the value. `in_eigenbasis` lists further reasons.

    Examples:
      >>> import jax.numpy as jnp, optax, soap_optax
      >>> tx = soap_optax.shampoo(learning_rate=0.01, power=0.5)
      >>> w = jnp.zeros((4, 3))
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jnp.arange(12.0).reshape(4, 3), state, w)
      >>> updates.shape
      (4, 3)

    References:
      Gupta et al., [Shampoo: Preconditioned Stochastic Tensor
      Optimization](https://arxiv.org/abs/1802.09568), 2018; Anil et al., [Scalable
      Second Order Optimization for Deep Learning](https://arxiv.org/abs/2002.09018),
      2020, for grafting; Shi et al., [A Distributed Data-Parallel PyTorch
      Implementation of the Distributed Shampoo
      Optimizer](https://arxiv.org/abs/2309.06497), 2023, for epsilon.
    """
    of_others, rest = split_rates(options)
    transformation = scale_by_shampoo(
        b1,
        b2,
        eps,
        eps_root,
        mu_dtype,
        nesterov=nesterov,
        power=power,
        grafting=grafting,
        **rest,
    )
    rate_and_decay = learning_rate, weight_decay
    return optimizer(transformation, rate_and_decay, of_others, mask, rest)


@takes(ScaleByShampooOptions, **_EIGH)
def scale_by_shampoo(
    b1: jax.typing.ArrayLike = 0.95,
    b2: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-12,
    eps_root: jax.typing.ArrayLike = 0.0,
    mu_dtype: jax.typing.DTypeLike | None = None,
    *,
    nesterov: bool = False,
    power: jax.typing.ArrayLike = 0.4,
    grafting: Literal["adam"] | None = "adam",
    **options: Unpack[ScaleByShampooOptions],
) -> optax.GradientTransformationExtraArgs:
    """Rescales updates by Shampoo: a mean of gradients, scaled in the eigenbasis.

    `soap_optax.shampoo` describes the algorithm, all arguments and the errors. This
    function is its first part, without weight decay and learning rate.

    Returns:
      An `optax.GradientTransformationExtraArgs` with state `ShampooState`.

    Examples:
      >>> import optax, soap_optax
      >>> tx = optax.chain(
      ...     soap_optax.scale_by_shampoo(power=0.25, grafting=None),
      ...     optax.scale_by_learning_rate(3e-3),
      ... )
    """
    check_adam(b1, b2, eps, eps_root, mu_dtype, nesterov)
    _arguments.check(
        power=(power, _arguments.number(0)),
        grafting=(grafting, _arguments.choice("adam", None)),
    )
    if options["shampoo_beta"] is None:
        options["shampoo_beta"] = b2
    inner = functools.partial(
        scale_by_shampoo_roots,
        b1=b1,
        power=power,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    adam_eps = 1e-8 if options["adam_eps"] is None else options["adam_eps"]
    of_grafts = AdamSettings(b1, b2, nonzero(adam_eps))
    differing = options["adam_b1"], options["adam_b2"], None
    adam = functools.partial(
        scale_by_adam,
        settings=settings_of_adam(of_grafts, *differing, mu_dtype),
        eps_root=eps_root,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
    )
    of_shampoo = Inner(inner, rounds=False, reads_params=False)
    return _grafted(of_shampoo, adam, grafting, options)


def _grafted(
    inner: Inner,
    adam: Callable[[Sequence[Leaf], Any], optax.GradientTransformation],
    grafting: str | None,
    given: ScaleByShampooOptions,
) -> optax.GradientTransformationExtraArgs:
    """Runs Adam for parameters without factors, and `inner` for the others.

    With grafting, each block of an update of `inner` gets the norm of Adam's. The root
    mean square `update_rms` comes in its place.
    """
    grafting = grafting if given["update_rms"] is None else None
    names = FamilyOptions.__annotations__
    family = {name: value for name, value in given.items() if name in names}
    options = complete(**family, basis="current", clip_update_rms=None)
    preconditioner = make_transformation(inner, options)

    def adam_for(plan: Plan) -> optax.GradientTransformation:
        """Adam for the parameters that it updates or grafts; the others are masked.

        The mask is made here and not in `masked`, because Optimistix makes trees of
        closures, and `masked` would take the tree of a function for a mask.
        """
        is_adam = [
            grafting == "adam" or not leaf.layout.has_factors for leaf in plan.leaves
        ]
        has_adam = plan.treedef.unflatten(is_adam)
        leaves = list(itertools.compress(plan.leaves, is_adam))
        return optax.masked(adam(leaves, None), lambda _: has_adam)

    def combine(step: Any, adam_step: Any, leaf: Leaf) -> jax.Array:
        if not leaf.layout.has_factors:
            return adam_step
        if grafting is None:
            return step
        step, adam_step = (_placement.for_blocks(s, leaf) for s in (step, adam_step))
        grafted = _kronecker.graft(step, adam_step, leaf.layout)
        return _placement.like_parameter(grafted, leaf)

    def init_fn(params: optax.Params) -> ShampooState:
        plan = _tree.make_plan(params, options)
        adam_state = adam_for(plan).init(plan.widened())
        return ShampooState(preconditioner.init(params), adam_state)

    def update_fn(
        updates: optax.Updates,
        state: ShampooState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ShampooState]:
        _arguments.check(state=(state, _arguments.made_by_init(ShampooState)))
        plan = _tree.make_plan(updates, options)
        steps, of_shampoo = preconditioner.update(
            updates, state.preconditioner, params, **extra_args
        )
        of_adam, adam_state = adam_for(plan).update(plan.widened(), state.adam)
        adam_state = kept(adam_state, state.adam)
        of_leaf = zip(
            plan.treedef.flatten_up_to(steps),
            plan.treedef.flatten_up_to(of_adam),
            plan.leaves,
            strict=True,
        )
        combined = [combine(*entry) for entry in of_leaf]
        pairs = zip(combined, plan.arrays, strict=True)
        new_updates = [step.astype(gradient.dtype) for step, gradient in pairs]
        return plan.treedef.unflatten(new_updates), ShampooState(of_shampoo, adam_state)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
