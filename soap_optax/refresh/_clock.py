"""When eigenbases are refreshed: all at once every few steps, or some at each step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax.refresh import _members


class Due(NamedTuple):
    """The slots that are due in a step.

    Attributes:
      begin: the first of the slots that are due.
      end: the last of them plus 1; it is not above `begin` if none is due.
      least: the least `begin` of all members under `jax.vmap`; see `_members`.
      most: the largest `end` of all members.
    """

    begin: Any
    end: Any
    least: Any
    most: Any

    @classmethod
    def between(cls, begin: Any, end: Any) -> "Due":
        """The slots from `begin` to `end`, and what is due to any member."""
        begin, end = jnp.asarray(begin, jnp.int32), jnp.asarray(end, jnp.int32)
        least, most = _members.bounds(begin, end)
        return cls(begin, end, least, most)

    def is_any(self) -> jax.Array:
        """Says whether anything is due to any member."""
        return jnp.less(self.least, self.most)

    def has(self, slot: Any) -> jax.Array:
        """Says whether a slot is due to this member."""
        return jnp.logical_and(self.begin <= slot, slot < self.end)

    def has_for_any(self, slot: Any) -> jax.Array:
        """Says whether a slot lies between those that are due to all members."""
        return jnp.logical_and(self.least <= slot, slot < self.most)


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

    def due(self, count: jax.Array, slots: int) -> Due:
        """The slots that are due in the step `count`.

        All slots are due when the frequency divides the count. If they are staggered,
        all are due in the first step, and later at most one in each step.
        """
        if not self.stagger:
            return Due.between(0, jnp.where(self.begins(count, slots), slots, 0))
        slot = count % self._frequency_at(count)
        is_first = count == 0
        return Due.between(
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
        if isinstance(frequency, (int, np.integer)):  # No count reaches a larger one.
            frequency = min(int(frequency), int(jnp.iinfo(count.dtype).max))
        return jnp.maximum(1, jnp.asarray(frequency).astype(count.dtype))
