"""The paper's comparison of optimizers on a small language model.

    python experiments/language_model.py          # All but the last part take an hour.
    python experiments/language_model.py --parts efficiency

The model is the tiny preset of `examples/train_lm.py`, and it is trained on the source
files of Python's standard library. Runs are kept in `--runs` and not repeated, so that
a command that was stopped goes on where it was. Each part prints a table and writes it,
with a plot, to `--out`:

    efficiency  counts the steps and seconds of each optimizer to AdamW's final loss
    frequency   shows the final loss against the steps between refreshes
    batch_size  shows the steps to a fixed loss against the batch size
    ablations   shows what the options of SOAP cost and bring
    recipes     compares optimizers with Nesterov, embedding and head left to Adam
"""

import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import tyro
from results import Row, report, require_known, run_all

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from train_lm import Config, make_model, make_state, train

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE = Config(
    steps=300,
    warmup=30,
    eval_every=10,
    eval_batches=4,
    learning_rate=1e-2,
    b2=0.95,
    diagnose=False,
)
RATES = {
    "adamw": (3e-3, 1e-2, 3e-2),
    "soap": (1e-2, 3e-2, 1e-1),
    "shampoo": (3e-3, 1e-2, 3e-2, 1e-1),
    "muon": (3e-3, 1e-2, 3e-2, 1e-1),
}
LABELS = {"adamw": "AdamW", "soap": "SOAP", "shampoo": "Shampoo", "muon": "Muon"}
COLORS = {"adamw": "C7", "soap": "C3", "shampoo": "C0", "muon": "C2"}
FREQUENCIES = (1, 5, 10, 25, 50, 100)
BATCHES = (8, 16, 32, 64)
VARIANTS: dict[str, dict[str, Any]] = {
    "SOAP, as published": {},
    "eigh at every refresh": {"refresh": "eigh"},
    "Cholesky-QR": {"refresh": "cholesky_qr"},
    "current basis": {"basis": "current"},
    "blocks of 64": {"block_size": 64},
    "staggered": {"stagger": True},
    "one-sided": {"one_sided": True},
    "factorized": {"factorized": True},
    "one-sided and factorized": {"one_sided": True, "factorized": True},
    "KL": {"factors": "kl"},
    "KL, current basis": {"factors": "kl", "basis": "current"},
}


# As in Muon, the embedding and the head are left to Adam.
_ADAM: dict[str, Any] = {"adam": ("embed",)}
_KL: dict[str, Any] = {"basis": "current", "factors": "kl"}
RECIPES: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw"},
    "NAdamW": {"optimizer": "adamw", "nesterov": True},
    "Muon": {"optimizer": "muon", "nesterov": True},
    "Shampoo": {"optimizer": "shampoo", "nesterov": True, **_ADAM},
    "SOAP, as published": {},
    "SOAP": {"nesterov": True, **_ADAM},
    "SOAP, current, KL, f=1": {
        "nesterov": True,
        "precondition_frequency": 1,
        **_ADAM,
        **_KL,
    },
}
RECIPE_RATES = (3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The paper's comparison of optimizers on a small language model."""

    parts: tuple[str, ...] = ("efficiency", "frequency", "batch_size", "ablations")
    seeds: int = 3
    """How many seeds the comparison of optimizers has; the other parts have one."""
    runs: Path = Path("runs/language_model")
    out: Path = Path("runs/language_model")


@dataclasses.dataclass(frozen=True)
class Curve:
    """The steps, the seconds of one core and the validation losses of a run."""

    config: Config
    steps: np.ndarray
    seconds: np.ndarray
    losses: np.ndarray

    def reached(self, loss: float) -> tuple[float, float]:
        """The steps and the seconds to a loss, infinite if the run does not reach it.

        Between two evaluations the loss is taken to fall on a line.
        """
        below = np.flatnonzero(self.losses <= loss)
        if not len(below):
            return np.inf, np.inf
        i = below[0]
        if i == 0:
            return self.steps[0], self.seconds[0]
        share = (self.losses[i - 1] - loss) / (self.losses[i - 1] - self.losses[i])
        return tuple(
            float(x[i - 1] + share * (x[i] - x[i - 1]))
            for x in (self.steps, self.seconds)
        )


def run(config: Config) -> list[Row]:
    rows = train(config, clock=time.process_time)
    return [dataclasses.asdict(row) for row in rows]


def name_of(config: Config) -> str:
    """A name made of all fields that are not as in `BASE`."""
    fields = [field.name for field in dataclasses.fields(config)]
    changes = [n for n in fields if getattr(config, n) != getattr(BASE, n)]
    return ",".join(f"{n}={getattr(config, n)}" for n in changes) or "base"


def curves(experiment: Experiment, configs: Iterable[Config]) -> list[Curve]:
    jobs = {name_of(config): config for config in configs}
    tables = run_all(run, jobs, experiment.runs)

    def column(rows, field):
        return np.array([float(row[field]) for row in rows])

    fields = ("step", "seconds", "validation_loss")
    return [
        Curve(config, *(column(tables[name], field) for field in fields))
        for name, config in jobs.items()
    ]


# --- efficiency ----------------------------------------------------------------------


@functools.cache
def tuned(experiment: Experiment) -> tuple[dict[str, Config], list[Row]]:
    """The best configuration of each optimizer, and the sweep that says so.

    Learning rates are swept at b2 = 0.95. AdamW, whose b2 matters, also runs with 0.99
    at its best learning rate.
    """
    sweep = curves(
        experiment,
        [
            dataclasses.replace(BASE, optimizer=optimizer, learning_rate=rate)
            for optimizer, rates in RATES.items()
            for rate in rates
        ],
    )
    best = best_of(sweep)
    other = dataclasses.replace(best["adamw"], b2=0.99)
    sweep += curves(experiment, [other])
    rows = [
        {
            "optimizer": LABELS[curve.config.optimizer],
            "learning rate": curve.config.learning_rate,
            "b2": curve.config.b2,
            "final loss": curve.losses[-1],
        }
        for curve in sweep
    ]
    return best_of(sweep), rows


def best_of(sweep: list[Curve]) -> dict[str, Config]:
    best: dict[str, Curve] = {}
    for curve in sweep:
        so_far = best.setdefault(curve.config.optimizer, curve)
        if curve.losses[-1] < so_far.losses[-1]:
            best[curve.config.optimizer] = curve
    return {optimizer: curve.config for optimizer, curve in best.items()}


def efficiency(experiment: Experiment) -> None:
    configs, sweep = tuned(experiment)
    report(sweep, experiment.out / "efficiency_sweep.csv")
    seeds = range(experiment.seeds)
    found = curves(
        experiment,
        [dataclasses.replace(c, seed=seed) for seed in seeds for c in configs.values()],
    )
    adamw = {c.config.seed: c for c in found if c.config.optimizer == "adamw"}
    rows = []
    for curve in found:
        target = adamw[curve.config.seed]
        steps, seconds = curve.reached(target.losses[-1])
        rows.append(
            {
                "optimizer": LABELS[curve.config.optimizer],
                "learning rate": curve.config.learning_rate,
                "b2": curve.config.b2,
                "seed": curve.config.seed,
                "final loss": curve.losses[-1],
                "seconds per step": curve.seconds[-1] / curve.steps[-1],
                "steps to AdamW's loss": steps,
                "seconds to AdamW's loss": seconds,
                "fewer steps": 1 - steps / target.steps[-1],
                "less time": 1 - seconds / target.seconds[-1],
            }
        )
    report(rows, experiment.out / "efficiency.csv")
    plot_curves(found, experiment.out / "efficiency.png")


def plot_curves(found: list[Curve], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, field in zip(panels, ("steps", "seconds"), strict=True):
        for curve in found:
            optimizer, is_first = curve.config.optimizer, curve.config.seed == 0
            axis.plot(
                getattr(curve, field),
                curve.losses,
                color=COLORS[optimizer],
                linewidth=1,
                label=LABELS[optimizer] if is_first else None,
            )
        axis.grid(alpha=0.3)
    panels[0].set(xlabel="steps", ylabel="validation loss (nats per byte)")
    panels[1].set(xlabel="seconds of one core, in training steps")
    best = min(curve.losses[-1] for curve in found)
    panels[0].set_ylim(best - 0.05, best + 1.2)
    panels[0].legend()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- frequency -----------------------------------------------------------------------


def frequency(experiment: Experiment) -> None:
    configs, _ = tuned(experiment)
    found = curves(
        experiment,
        [
            dataclasses.replace(configs[optimizer], precondition_frequency=count)
            for optimizer in ("soap", "shampoo")
            for count in FREQUENCIES
        ],
    )
    rows = [
        {
            "optimizer": LABELS[curve.config.optimizer],
            "precondition_frequency": curve.config.precondition_frequency,
            "final loss": curve.losses[-1],
            "seconds per step": curve.seconds[-1] / curve.steps[-1],
        }
        for curve in found
    ]
    report(rows, experiment.out / "frequency.csv")
    [adamw] = curves(experiment, [configs["adamw"]])
    plot_frequency(found, adamw.losses[-1], experiment.out / "frequency.png")


def plot_frequency(found: list[Curve], adamw: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for optimizer in ("shampoo", "soap"):
        mine = [c for c in found if c.config.optimizer == optimizer]
        axis.plot(
            [c.config.precondition_frequency for c in mine],
            [c.losses[-1] for c in mine],
            "o-",
            color=COLORS[optimizer],
            label=LABELS[optimizer],
        )
    axis.axhline(adamw, color=COLORS["adamw"], linestyle=":", label="AdamW")
    axis.set(
        xscale="log",
        xlabel="precondition_frequency (steps)",
        ylabel="final validation loss (nats per byte)",
    )
    axis.set_xticks(FREQUENCIES, FREQUENCIES)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


# --- batch size ----------------------------------------------------------------------


def batch_size(experiment: Experiment) -> None:
    """Counts the steps to a loss for each batch size.

    The learning rate is the tuned one times the root of the ratio of batch sizes. The
    loss is the highest with which any of the runs ends, so that all reach it.
    """
    configs, _ = tuned(experiment)
    base = 32  # The batch of the preset.
    found = curves(
        experiment,
        [
            dataclasses.replace(
                configs[optimizer],
                batch=None if batch == base else batch,
                eval_batches=BASE.eval_batches * base // batch,  # as many sequences
                learning_rate=configs[optimizer].learning_rate * (batch / base) ** 0.5,
            )
            for optimizer in ("adamw", "soap")
            for batch in BATCHES
        ],
    )
    target = max(curve.losses[-1] for curve in found)
    rows = [
        {
            "optimizer": LABELS[curve.config.optimizer],
            "batch": curve.config.batch or base,
            "learning rate": curve.config.learning_rate,
            "final loss": curve.losses[-1],
            "target loss": target,
            "steps to target": curve.reached(target)[0],
        }
        for curve in found
    ]
    report(rows, experiment.out / "batch_size.csv")
    plot_batch_size(rows, target, experiment.out / "batch_size.png")


def plot_batch_size(rows: list[dict[str, Any]], target: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for optimizer in ("adamw", "soap"):
        mine = [row for row in rows if row["optimizer"] == LABELS[optimizer]]
        steps = [row["steps to target"] for row in mine]
        color, label = COLORS[optimizer], LABELS[optimizer]
        axis.plot(BATCHES, steps, "o-", color=color, label=label)
    ideal = [rows[0]["steps to target"] * BATCHES[0] / batch for batch in BATCHES]
    axis.plot(BATCHES, ideal, "k:", linewidth=0.8, label="as many tokens")
    axis.set(
        xscale="log",
        yscale="log",
        xlabel="batch (sequences of 128 bytes)",
        ylabel=f"steps to a validation loss of {target:.3f}",
    )
    axis.set_xticks(BATCHES, BATCHES)
    axis.set_yticks(marks := (25, 50, 100, 200, 400), marks)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


# --- ablations -----------------------------------------------------------------------


def ablations(experiment: Experiment) -> None:
    configs, _ = tuned(experiment)
    variants = {
        label: dataclasses.replace(configs["soap"], **changes)
        for label, changes in VARIANTS.items()
    }
    labels = [*variants, "Shampoo", "AdamW"]
    all_configs = [*variants.values(), configs["shampoo"], configs["adamw"]]
    found = curves(experiment, all_configs)
    rows = [
        {
            "variant": label,
            "final loss": curve.losses[-1],
            "seconds per step": curve.seconds[-1] / curve.steps[-1],
            "state bytes": state_bytes(curve.config),
        }
        for label, curve in zip(labels, found, strict=True)
    ]
    report(rows, experiment.out / "ablations.csv")
    figure, panels = plt.subplots(1, 3, figsize=(11, 4), sharey=True)
    places = range(len(rows), 0, -1)
    for axis, field in zip(panels, list(rows[0])[1:], strict=True):
        values = [row[field] for row in rows]
        axis.plot(values, places, "o", color="C3")
        axis.set(xlabel=field)
        axis.grid(alpha=0.3)
    panels[0].set(yticks=places, yticklabels=labels, xlabel="final loss (nats)")
    save(figure, experiment.out / "ablations.png")


def state_bytes(config: Config) -> int:
    filled = config.filled()
    model = make_model(filled)
    state = jax.eval_shape(lambda: make_state(filled, model))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


# --- recipes -------------------------------------------------------------------------


def recipes(experiment: Experiment) -> None:
    """Takes the best of four learning rates for each optimizer, with more seeds."""
    of_rates = of_each(experiment, RECIPES, "learning_rate", RECIPE_RATES)
    rows = [
        {"optimizer": label, "learning rate": rate, "final loss": curve.losses[-1]}
        for label, found in of_rates.items()
        for rate, curve in zip(RECIPE_RATES, found, strict=True)
    ]
    report(rows, experiment.out / "recipes_sweep.csv")
    best = {
        label: min(found, key=lambda curve: curve.losses[-1]).config.learning_rate
        for label, found in of_rates.items()
    }
    tuned = {
        label: {**changes, "learning_rate": best[label]}
        for label, changes in RECIPES.items()
    }
    of_seeds = of_each(experiment, tuned, "seed", range(experiment.seeds))
    rows = [
        {
            "optimizer": label,
            "learning rate": best[label],
            "seeds": len(found),
            "final loss": np.mean([curve.losses[-1] for curve in found]),
            "spread": np.ptp([curve.losses[-1] for curve in found]),
            "fewer steps than NAdamW": fewer_steps(found, of_seeds["NAdamW"]),
            "fewer steps than Muon": fewer_steps(found, of_seeds["Muon"]),
        }
        for label, found in of_seeds.items()
    ]
    report(rows, experiment.out / "recipes.csv")


def of_each(
    experiment: Experiment,
    recipes: dict[str, dict[str, Any]],
    field: str,
    values: Sequence[Any],
) -> dict[str, list[Curve]]:
    """The curves of each recipe, with each value of a field of the configuration."""
    configs = [
        dataclasses.replace(BASE, **changes, **{field: value})
        for changes in recipes.values()
        for value in values
    ]
    found = iter(curves(experiment, configs))
    return {label: [next(found) for _ in values] for label in recipes}


def fewer_steps(found: list[Curve], others: list[Curve]) -> float:
    """The mean share of steps that are saved until the final losses of others."""
    pairs = zip(found, others, strict=True)
    return 1 - float(
        np.mean([a.reached(b.losses[-1])[0] / b.steps[-1] for a, b in pairs])
    )


PARTS: dict[str, Callable[[Experiment], None]] = {
    "efficiency": efficiency,
    "frequency": frequency,
    "batch_size": batch_size,
    "ablations": ablations,
    "recipes": recipes,
}


def main(experiment: Experiment) -> None:
    require_known("parts", experiment.parts, PARTS)
    for part in experiment.parts:
        print(f"\n{part}")
        PARTS[part](experiment)


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
