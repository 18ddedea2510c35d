"""When eigenbases are refreshed: all at once every few steps, or some at each step."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Clock:
    """Says which refreshes are due in a step.

    The parameters are divided into slots (see `_stacks`). All slots are refreshed in
    one step or, if they are staggered, at most one slot in each step.

    Attributes:
      frequency: number of steps from one refresh of a parameter to the next, or a
        schedule of it.
      stagger: whether the slots are staggered.
    """

    frequency: int | Callable[[jax.Array], Any]
    stagger: bool

    def due(self, count: jax.Array, slots: int) -> tuple[Any, Any]:
        """The first of the slots that are due in the step `count`, and the last plus 1.

        All slots are due when the frequency divides the count. If they are staggered,
        all are due in the first step, and later at most one in each step.
        """
        if not self.stagger:
            return 0, jnp.where(self.begins(count, slots), slots, 0)
        slot = count % self._frequency_at(count)
        is_first = count == 0
        return (
            jnp.where(is_first, 0, slot),
            jnp.where(is_first, slots, jnp.minimum(slot + 1, slots)),
        )

    def begins(self, count: jax.Array, slots: int) -> jax.Array:
        """Says whether a refresh of all eigenbases begins in the step `count`."""
        frequency = self._frequency_at(count)
        # The step of count 0 refreshes all slots, and that of count 1 the second slot.
        is_second = self.stagger and slots > 1
        begin = 1 % frequency if is_second else 0
        return (count % frequency == begin) | (count == 0)

    def _frequency_at(self, count: jax.Array) -> jax.Array:
        """The frequency in the step `count`, at least 1, in the dtype of the count."""
        frequency: Any = self.frequency
        if callable(frequency):
            frequency = frequency(count)
        if isinstance(frequency, int):  # No count reaches a larger one.
            frequency = min(frequency, int(jnp.iinfo(count.dtype).max))
        return jnp.maximum(1, jnp.asarray(frequency).astype(count.dtype))
