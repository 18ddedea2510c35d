"""What comes after the preconditioner: weight decay and learning rates.

Parameters without factors, which Adam updates, may have their own.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import optax

from soap_optax import _arguments
from soap_optax._options import FamilyOptions, RateOptions
from soap_optax.parameters import _tree

Rates = tuple[optax.ScalarOrSchedule | None, optax.ScalarOrSchedule | None]


def split_rates(options: Any) -> tuple[Rates, Any]:
    """Takes the options of `RateOptions` out of options that have them.

    Returns:
      Learning rate and weight decay of parameters without factors, and a dict of the
      options that are left.
    """
    names = RateOptions.__annotations__
    rest = {name: value for name, value in options.items() if name not in names}
    return (options["adam_learning_rate"], options["adam_weight_decay"]), rest


def optimizer(
    transformation: optax.GradientTransformation,
    of_matrices: tuple[optax.ScalarOrSchedule, optax.ScalarOrSchedule],
    of_others: Rates,
    mask: Any | Callable[[optax.Params], Any] | None,
    options: FamilyOptions,
) -> optax.GradientTransformationExtraArgs:
    """Chains a transformation with weight decay and learning rate, as `optax.adamw`.

    Args:
      transformation: makes the updates.
      of_matrices: learning rate and weight decay of the parameters with factors.
      of_others: those of the parameters without, if they differ.
      mask: says which parameters decay.
      options: a value for every option, which decide what has factors.
    """
    _arguments.check(
        learning_rate=(of_matrices[0], _arguments.learning_rate),
        weight_decay=(of_matrices[1], _arguments.weight_decay),
    )
    last = decay_and_rate(*of_matrices, mask)
    if of_others != (None, None):
        rate, decay = (
            of_matrix if of_other is None else of_other
            for of_other, of_matrix in zip(of_others, of_matrices, strict=True)
        )
        last = _apart(last, decay_and_rate(rate, decay, mask), options)
    return optax.chain(transformation, *last)


def decay_and_rate(
    learning_rate: optax.ScalarOrSchedule,
    weight_decay: optax.ScalarOrSchedule,
    mask: Any,
) -> tuple[optax.GradientTransformation, ...]:
    """What follows the preconditioner in `optax.adamw`, for a chain."""
    # Without decay no pass over the parameters is needed. A 0 in an array of JAX may
    # change, and with a mask the state keeps the structure that it has with decay.
    is_number = isinstance(weight_decay, (int, float, np.generic, np.ndarray))
    if is_number and weight_decay == 0 and mask is None:
        decay: optax.GradientTransformation = optax.identity()
    else:
        decay = optax.add_decayed_weights(weight_decay, mask)
    return decay, optax.scale_by_learning_rate(learning_rate)


class ApartState(NamedTuple):
    """State of what differs between parameters with factors and the others.

    Attributes:
      of_matrices: state of the transformation of parameters with factors.
      of_others: state of the transformation of all others.
    """

    of_matrices: optax.OptState
    of_others: optax.OptState


def _apart(
    of_matrices: Sequence[optax.GradientTransformation],
    of_others: Sequence[optax.GradientTransformation],
    options: FamilyOptions,
) -> tuple[optax.GradientTransformation]:
    """Takes updates of parameters without factors from another transformation.

    Both transformations see all parameters, because decay and learning rates have no
    state for a parameter. A compiled step computes only what is taken.
    """
    both = optax.chain(*of_matrices), optax.chain(*of_others)

    def init_fn(params: optax.Params) -> ApartState:
        return ApartState(*(tx.init(params) for tx in both))

    def update_fn(
        updates: optax.Updates, state: ApartState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, ApartState]:
        plan = _tree.make_plan(updates, options)
        results = [
            tx.update(updates, s, params) for tx, s in zip(both, state, strict=True)
        ]
        steps = (plan.treedef.flatten_up_to(step) for step, _ in results)
        taken = [
            of_matrix if leaf.layout.has_factors else of_other
            for of_matrix, of_other, leaf in zip(*steps, plan.leaves, strict=True)
        ]
        return plan.treedef.unflatten(taken), ApartState(*(s for _, s in results))

    return (optax.GradientTransformation(init_fn, update_fn),)
