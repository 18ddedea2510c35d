"""When eigenbases are refreshed: all at once every few steps, or some at each step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Clock:
    """Says which refreshes are due in a step.

    The parameters are divided into *slots* (see `_stacks`), which are refreshed one
    after the other: all in one step or, staggered, one in each step.

    Attributes:
      frequency: steps from one refresh of a parameter to the next, or a schedule.
      stagger: whether the slots are refreshed in steps of their own.
    """

    frequency: int | Callable[[jax.Array], Any]
    stagger: bool

    def due(self, count: jax.Array, slots: int) -> tuple[Any, Any]:
        """The first of the slots that are due in the step `count`, and the last plus 1.

        All are when the frequency divides the count, and so at the first step. If they
        are staggered, one is in each step after the first.
        """
        if not self.stagger:
            return 0, jnp.where(self.begins(count, slots), slots, 0)
        frequency: Any = self.frequency  # no schedule, by the rules of the options
        slot = count % frequency
        is_first = count == 0
        return (
            jnp.where(is_first, 0, slot),
            jnp.where(is_first, slots, jnp.minimum(slot + 1, slots)),
        )

    def begins(self, count: jax.Array, slots: int) -> jax.Array:
        """Says whether a refresh of all eigenbases begins in the step `count`."""
        frequency: Any = self.frequency
        if callable(frequency):
            frequency = frequency(count)
        frequency = jnp.maximum(1, jnp.asarray(frequency).astype(count.dtype))
        # The first step refreshes all, so that the first to follow is the second slot.
        is_second = self.stagger and slots > 1
        begin = 1 % frequency if is_second else 0
        return (count % frequency == begin) | (count == 0)
