"""The search for the settings of a training."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

Settings, Result = TypeVar("Settings", bound=Any), TypeVar("Result")


def climb(
    starts: Mapping[Any, Settings],
    neighbours: Callable[[Settings], Sequence[Settings]],
    train: Callable[[Sequence[Settings]], Sequence[Result]],
    loss: Callable[[Result], float],
) -> tuple[dict[Any, Settings], dict[tuple[Any, Settings], Result]]:
    """Moves each of some settings to a better neighbour, until none is better.

    Args:
      starts: settings by label; they are hashable.
      neighbours: gives the settings one step away.
      train: gives the result of a training with each of the settings. It is asked again
        for results that it has given before.
      loss: what is to be small about a result; NaN is worse than any number.

    Returns:
      The best settings by label, and the results by label and settings.
    """
    best, found = dict(starts), {}

    def of_pair(label: Any, one: Settings) -> float:
        return float(np.nan_to_num(loss(found[label, one]), nan=np.inf))

    while True:
        wanted = {label: [one, *neighbours(one)] for label, one in best.items()}
        pairs = [(label, one) for label, some in wanted.items() for one in some]
        results = train([one for _, one in pairs])
        found |= dict(zip(pairs, results, strict=True))
        before, best = best, {}
        for label, some in wanted.items():
            best[label] = min(some, key=functools.partial(of_pair, label))
        if best == before:
            return best, found


def at_next_rates(job: Settings, rates: Sequence[float]) -> list[Settings]:
    """The dataclass `job` with its field `rate` one step down and one step up."""
    at = rates.index(job.rate)
    near = [*rates[max(at - 1, 0) : at], *rates[at + 1 : at + 2]]
    return [dataclasses.replace(job, rate=rate) for rate in near]
