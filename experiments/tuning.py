"""Trainings of the small language model, kept on disk, and the search for settings.

A training is a `Config` of `examples/train_lm.py`, and its table has the validation
loss at some thirty steps. Trainings of one length differ from `base` of that length,
and a table is named by the differences.
"""

import dataclasses
import platform
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import emulation
import jax
import members
import numpy as np
import recipes  # noqa: F401  This adds optimizers and models to the trainer.
from results import Row, run_all
from search import climb
from train_lm import UNTUNED, Config, train

HALF_DECADES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
LADDERS: dict[str, Sequence[float]] = {
    "learning_rate": HALF_DECADES,
    "adam_learning_rate": HALF_DECADES,
    "b2": (0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999),
}
"""The values of each setting."""


def base(steps: int) -> Config:
    """What trainings of a length have in common, unless they differ in it."""
    return Config(
        steps=steps,
        warmup=steps // 10,
        eval_every=max(1, steps // 30),
        eval_batches=4,
        learning_rate=3e-2,
        b1=0.95,
        b2=0.95,
        weight_decay=1e-4,
        clip=1.0,
        nesterov=True,
        adam=("embed",),
        diagnose=False,
        precision="highest",
        **UNTUNED,
    )


@dataclasses.dataclass(frozen=True)
class Curve:
    """The steps and the validation losses of a training."""

    config: Config
    steps: np.ndarray
    losses: np.ndarray

    @property
    def final(self) -> float:
        """The last loss, infinite if the training did not stay finite."""
        return float(self.losses[-1]) if np.isfinite(self.losses[-1]) else np.inf

    def reached(self, loss: float) -> float:
        """The steps to a loss, infinite if the training stays above it.

        Between two evaluations the loss is taken to fall on a line.
        """
        below = np.flatnonzero(self.losses <= loss)
        if not len(below):
            return np.inf
        i = below[0]
        if i == 0:
            return float(self.steps[0])
        share = (self.losses[i - 1] - loss) / (self.losses[i - 1] - self.losses[i])
        return float(self.steps[i - 1] + share * (self.steps[i] - self.steps[i - 1]))


def run(config: Config) -> list[Row]:
    with emulation.on_cpu():
        return [
            {"step": row.step, "validation_loss": row.validation_loss}
            for row in train(config)
        ]


def name_of(config: Config) -> str:
    """A name made of the length, and of all fields that are not as in its base."""
    common = base(config.steps)
    names = [field.name for field in dataclasses.fields(config)]
    changes = [n for n in names if getattr(config, n) != getattr(common, n)]
    return ",".join(f"{n}={getattr(config, n)}" for n in ("steps", *changes))


def of_this_machine(folder: Path) -> Path:
    """The folder within for this Python, whose source files are the data, and JAX."""
    versions = f"python_{platform.python_version()}_jax_{jax.__version__}"
    on_cpu = jax.default_backend() == "cpu"
    return folder / (versions if on_cpu else f"{versions}_{jax.default_backend()}")


def curves(folder: Path, configs: Iterable[Config]) -> list[Curve]:
    """Trains whatever is not in the folder yet, see `of_this_machine`."""
    configs = list(configs)
    folder = of_this_machine(folder)
    jobs = {name_of(config): config for config in configs}
    if jax.default_backend() != "cpu":
        members.run_together(jobs, folder)
    tables = run_all(run, jobs, folder)

    def column(config, field):
        return np.array([float(row[field]) for row in tables[name_of(config)]])

    fields = ("step", "validation_loss")
    return [Curve(c, *(column(c, field) for field in fields)) for c in configs]


Seeds = list[Curve]
"""The curves of one configuration for all seeds, beginning with seed 0."""


def mean(of_seeds: Seeds) -> float:
    """The mean of the final losses."""
    return float(np.mean([curve.final for curve in of_seeds]))


def best_settings(
    folder: Path, starts: Mapping[Any, Config], fields: Sequence[str], seeds: int
) -> tuple[dict[Any, Config], list[tuple[Any, Seeds]]]:
    """Moves settings of each configuration to where no step to either side is better.

    A configuration is better than another if the mean of its final losses is lower.

    Args:
      folder: of the tables.
      starts: configurations by label.
      fields: the settings that move together, named as in `LADDERS`.
      seeds: how many seeds the mean is over.

    Returns:
      The best configurations by label, and all that were tried with their labels.
    """
    best, found = climb(
        starts,
        lambda config: neighbours(config, fields),
        lambda configs: with_seeds(folder, configs, seeds),
        mean,
    )
    return best, [(label, of_seeds) for (label, _), of_seeds in found.items()]


def with_seeds(folder: Path, configs: Sequence[Config], seeds: int) -> list[Seeds]:
    """The curves of each configuration, all trained at once."""
    every = [
        dataclasses.replace(c, seed=seed) for c in configs for seed in range(seeds)
    ]
    found = curves(folder, every)
    return [found[i : i + seeds] for i in range(0, len(found), seeds)]


def neighbours(config: Config, fields: Sequence[str]) -> list[Config]:
    """The configurations one rung down and one rung up the ladders of the settings."""
    both = [shifted(config, fields, by) for by in (-1, 1)]
    return [config for config in both if config is not None]


def shifted(config: Config, fields: Sequence[str], by: int) -> Config | None:
    """A configuration some rungs away, or None beyond the end of a ladder.

    Adam's rate is None in the result if it is that of all, so that no configuration has
    two names.
    """
    values = dataclasses.asdict(config) | {"adam_learning_rate": config.adam_peak}
    for field in fields:
        rung = LADDERS[field].index(values[field]) + by
        if not 0 <= rung < len(LADDERS[field]):
            return None
        values[field] = LADDERS[field][rung]
    if values["adam_learning_rate"] == values["learning_rate"]:
        values["adam_learning_rate"] = None
    return Config(**values)


def saved(found: Sequence[Curve], others: Sequence[Curve]) -> np.ndarray:
    """The share of steps, seed by seed, that are saved until others' final losses.

    It is -infinity for a training that stays above the loss, and NaN where the other
    training did not stay finite.
    """
    pairs = zip(found, others, strict=True)
    return np.array(
        [
            1 - one.reached(other.final) / other.steps[-1]
            if np.isfinite(other.final)
            else np.nan
            for one, other in pairs
        ]
    )
