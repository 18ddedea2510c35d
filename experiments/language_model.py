"""The paper's comparison of optimizers on a small language model, in fair conditions.

    python experiments/language_model.py --parts efficiency --lengths 300
    python experiments/language_model.py --parts efficiency --optimizers Muon SOAP

The model is the tiny preset of `examples/train_lm.py`, and it is trained on the source
files of Python's standard library. Every optimizer but AdamW, SPlus and published SOAP
has Nesterov's momentum, all but published SOAP leave the embedding and the head to
Adam, and each has its own best settings. Trainings are kept in `--curves` and not
repeated, so that a command that was stopped goes on where it was. Each part prints a
table and writes it, with a plot, to `--out`:

    efficiency  counts the steps of each optimizer to the final losses of others
    schedules   counts the steps of shorter trainings that end at others' final losses
    time        measures whole steps, and counts the time to the final losses of others
    frequency   shows the final loss against the steps between refreshes
    refreshes   shows the final loss against the time of a step for ways to refresh
    batch_size  counts the steps to final losses of others for different sizes of batch
    ablations   shows what each option of SOAP costs and brings
    widths      shows the best learning rate of models of different widths
    precisions  shows what products of lower precision cost, which a CPU emulates
"""

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
import tyro
from results import machine, report, require_known

sys.path.append(str(Path(__file__).parent.parent / "examples"))
from recipes import KL_SOAP
from train_lm import (
    PUBLISHED,
    Corpus,
    jit_step,
    make_model,
    make_state,
    read_tokens,
)
from tuning import (
    Config,
    Curve,
    Seeds,
    base,
    best_settings,
    mean,
    saved,
    with_seeds,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "AdamW": {"optimizer": "adamw", "nesterov": False},
    "NAdamW": {"optimizer": "adamw"},
    "Muon": {"optimizer": "muon"},
    "Shampoo": {"optimizer": "shampoo", "refresh": "eigh"},
    "KL-Shampoo": {"optimizer": "shampoo", "refresh": "eigh", "factors": "kl"},
    "SOAP, published": PUBLISHED,
    "SOAP, f=10": {},
    "SOAP": KL_SOAP,
    "SOAP-Muon": {"optimizer": "soap_muon", **KL_SOAP},
    "SOAP on spheres": {"optimizer": "soap_spheres", **KL_SOAP},
    "SPlus": {
        "optimizer": "splus",
        "nesterov": False,
        "b1": 0.9,
        "b2": 0.999,
        "precondition_frequency": 100,
        "learning_rate": 0.3,
        "adam_learning_rate": 1e-2,
    },
}
_TAB20 = plt.get_cmap("tab20").colors  # They alternate between dark and light.
COLORS = dict(zip(OPTIMIZERS, _TAB20[::2] + _TAB20[1::2], strict=False))
BASELINES = ("AdamW", "NAdamW", "Muon", "Shampoo", "SOAP")
RATES = ("learning_rate", "adam_learning_rate")
ADAM_ALONE, MATRICES_ALONE = ("adam_learning_rate",), ("learning_rate",)
APART = (ADAM_ALONE, MATRICES_ALONE)
"""The settings that are sought only where Adam has matrices of its own."""
SCHEDULE_OPTIMIZERS = ("SOAP", "SOAP-Muon")
SCHEDULE_BASELINES = ("NAdamW", "Muon")
FREQUENCIES = (1, 4, 10, 30, 100)
FREQUENCY_OPTIMIZERS = {
    "SOAP": "SOAP",
    "SOAP, previous basis": "SOAP, f=10",
    "Shampoo": "Shampoo",
    "KL-Shampoo": "KL-Shampoo",
}
"""Names without a frequency, and the labels of the settings that are taken."""
REFRESHES: dict[str, dict[str, Any]] = {
    **{f"f={f}": {"precondition_frequency": f} for f in (1, 2, 4, 10)},
    "f=10, staggered": {"precondition_frequency": 10, "stagger": True},
    "tolerance 0.1": {"refresh_tolerance": 0.1},
}
BATCH_OPTIMIZERS = ("AdamW", "NAdamW", "SOAP")
_ONE_SIDED = {"one_sided": True, "factors": "shampoo"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "SOAP": ("SOAP", {}),
    "without Nesterov": ("SOAP", {"nesterov": False}),
    "embedding and head in eigenbases": ("SOAP", {"adam": ()}),
    "Shampoo's factors": ("SOAP", {"factors": "shampoo"}),
    "previous basis": ("SOAP", {"basis": "previous"}),
    "f=10": ("SOAP", {"precondition_frequency": 10}),
    "f=10, staggered": ("SOAP", {"precondition_frequency": 10, "stagger": True}),
    "identity start": ("SOAP", {"initial_basis": "identity"}),
    "update RMS 0.2": ("SOAP", {"update_rms": 0.2}),
    "eigh": ("SOAP", {"refresh": "eigh"}),
    "blocks of 64": ("SOAP", {"block_size": 64}),
    "one-sided, Shampoo's factor": ("SOAP", _ONE_SIDED),
    "eigenbases in bfloat16": ("SOAP", {"precond_dtype": "bfloat16"}),
    "f=10, eigenbases in bfloat16": (
        "SOAP",
        {"precondition_frequency": 10, "precond_dtype": "bfloat16"},
    ),
    "factorized": ("SOAP", {"factorized": True}),
    "one-sided, Shampoo's factor, factorized": (
        "SOAP",
        {"factorized": True, **_ONE_SIDED},
    ),
    **{
        label if has_nesterov else f"{label}, without Nesterov": (
            label,
            {"nesterov": has_nesterov},
        )
        for label in ("Muon", "Shampoo", "SOAP, f=10")
        for has_nesterov in (True, False)
    },
}
"""The optimizer from whose best settings a variant starts, and its changes."""
PRECISIONS: dict[str, dict[str, Any]] = {
    "float32": {},
    "TF32": {"precision": "TF32_TF32_F32"},
    "three terms of bfloat16": {"precision": "BF16_BF16_F32_X3"},
    "bfloat16": {"precision": "BF16_BF16_F32"},
}
WIDTHS = {64: "width-64", 128: "tiny", 256: "width-256"}
WIDTH_STEPS, WIDTH_ADAM_RATE = 120, 1e-2
WAYS: dict[str, dict[str, Any]] = {
    "NAdamW": {"optimizer": "adamw", "adam_learning_rate": None},
    "SOAP, f=10": {},
    "blocks of 64": {"block_size": 64},
    "update RMS 0.2": {"update_rms": 0.2},
    "on spheres": {"optimizer": "soap_spheres"},
}


@dataclasses.dataclass(frozen=True)
class Experiment:
    """The paper's comparison of optimizers on a small language model."""

    parts: tuple[str, ...] = (
        "efficiency",
        "schedules",
        "time",
        "frequency",
        "refreshes",
        "batch_size",
        "ablations",
        "widths",
    )
    optimizers: tuple[str, ...] = tuple(OPTIMIZERS)
    """Which optimizers are compared in `efficiency` and `time`."""
    lengths: tuple[int, ...] = (300, 1200)
    """How many steps the trainings of `efficiency` and `time` have. Settings are sought
    in the first length, and the learning rates anew in the others."""
    shares: tuple[float, ...] = (0.5, 0.85)
    """Which shares of the last of the lengths the trainings of `schedules` have."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which variants `ablations` has."""
    batches: tuple[int, ...] = (32, 128, 512)
    """How many sequences the batches of `batch_size` have. They train on as many tokens
    as the last of the lengths has in batches of 32."""
    seeds: int = 3
    search_seeds: int = 1
    """Over how many of the seeds the search for settings takes the mean."""
    curves: Path = Path("runs/language_model")
    out: Path = Path("runs/language_model")


# --- settings ------------------------------------------------------------------------


@functools.cache
def tuned(
    experiment: Experiment, steps: int
) -> tuple[dict[str, Config], list[tuple[str, Seeds]]]:
    """The best configuration of each optimizer, and all that were tried.

    Both learning rates are sought together, then Adam's alone, then that of matrices
    alone, then b2. In a length that is not the first, the search begins at the best of
    the first, and ends with Adam's rate.
    """
    first = experiment.lengths[0]
    if steps == first:
        best = {
            label: dataclasses.replace(base(steps), **OPTIMIZERS[label])
            for label in experiment.optimizers
        }
        search = [RATES, *APART, ("b2",)]
    else:
        starts, _ = tuned(experiment, first)
        best = {label: at_length(config, steps) for label, config in starts.items()}
        search = [RATES, ADAM_ALONE]
    tried: dict[tuple[str, Config], Seeds] = {}
    for fields in search:
        members = {
            label: config
            for label, config in best.items()
            if has_two_rates(config) or fields not in APART
        }
        found, new = best_settings(
            experiment.curves, members, fields, experiment.search_seeds
        )
        best |= found
        tried |= {(label, of_seeds[0].config): of_seeds for label, of_seeds in new}
    return best, [(label, of_seeds) for (label, _), of_seeds in tried.items()]


def at_length(config: Config, steps: int) -> Config:
    fields = ("steps", "warmup", "eval_every")
    changes = {field: getattr(base(steps), field) for field in fields}
    return dataclasses.replace(config, **changes)


def has_two_rates(config: Config) -> bool:
    """Whether Adam has matrices of its own beside another optimizer."""
    return config.optimizer != "adamw" and bool(config.adam)


def only(experiment: Experiment, *labels: str) -> Experiment:
    """The experiment with the optimizers that a part compares."""
    return dataclasses.replace(experiment, optimizers=tuple(dict.fromkeys(labels)))


def settings(config: Config) -> dict[str, Any]:
    return {
        "learning rate": config.learning_rate,
        "Adam's learning rate": config.adam_peak,
        "b2": config.b2,
    }


def trainings(experiment: Experiment, steps: int) -> dict[str, Seeds]:
    """The curves of all seeds of each optimizer, with its best settings."""
    best, _ = tuned(experiment, steps)
    return of_all_seeds(experiment, best)


def with_best_rates(
    experiment: Experiment, starts: dict[Any, Config]
) -> dict[Any, Seeds]:
    """The same with the best learning rates, sought from these starts."""
    best, _ = best_settings(experiment.curves, starts, RATES, experiment.search_seeds)
    return of_all_seeds(experiment, best)


def of_all_seeds(
    experiment: Experiment, configs: dict[Any, Config]
) -> dict[Any, Seeds]:
    found = with_seeds(experiment.curves, [*configs.values()], experiment.seeds)
    return dict(zip(configs, found, strict=True))


# --- efficiency ----------------------------------------------------------------------


def efficiency(experiment: Experiment) -> None:
    found = {}
    for steps in experiment.lengths:
        _, tried = tuned(experiment, steps)
        rows = [{"optimizer": label, **outcome(of_seeds)} for label, of_seeds in tried]
        report_kept(rows, experiment.out / f"efficiency_{steps}_sweep.csv")
        found[steps] = trainings(experiment, steps)
        rows = [summary(label, found[steps]) for label in found[steps]]
        report_kept(rows, experiment.out / f"efficiency_{steps}.csv")
    plot_efficiency(found, experiment.out / "efficiency.png")


def summary(label: str, found: dict[str, Seeds]) -> dict[str, Any]:
    """The losses of an optimizer, and the steps it saves over others.

    The shares of steps are means of the seeds, and then stand for each seed.
    """
    return {
        "optimizer": label,
        **outcome(found[label]),
        **shares_of_steps(label, found),
    }


def shares_of_steps(label: str, found: dict[str, Seeds]) -> dict[str, Any]:
    row = {}
    for name in (name for name in BASELINES if name in found):
        shares = saved(found[label], found[name])
        row[f"fewer steps than {name}"] = np.mean(shares)
        row[f"than {name}, by seed"] = by_seed(shares)
    return row


def report_kept(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """Reports on trainings, which may be kept ones of another processor than this."""
    about = machine()
    del about["processor"]
    report(rows, path, about)


def by_seed(values: Iterable[float]) -> str:
    return " ".join(f"{value:.3f}" for value in values)


def outcome(of_seeds: Seeds) -> dict[str, Any]:
    """The settings that the seeds share, and their final losses."""
    losses = [curve.final for curve in of_seeds]
    return {
        **settings(of_seeds[0].config),
        "seeds": len(losses),
        "final loss": mean(of_seeds),
        "lowest": min(losses),
        "highest": max(losses),
    }


def above(name: str, of_seeds: Seeds, others: Seeds | None) -> dict[str, Any]:
    """How much higher the final losses are than others' of the same seeds.

    There are no columns where the others were not trained.
    """
    if others is None:
        return {}
    pairs = zip(of_seeds, others, strict=True)
    losses = [one.final - other.final for one, other in pairs]
    return {f"above {name}": np.mean(losses), f"above {name}, by seed": by_seed(losses)}


def plot_efficiency(found: dict[int, dict[str, Seeds]], path: Path) -> None:
    """Draws the mean loss of the seeds of each optimizer, a panel for each length."""
    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 4))
    for axis, (steps, of_optimizers) in zip(
        np.atleast_1d(panels), found.items(), strict=True
    ):
        for label, of_seeds in of_optimizers.items():
            losses = np.mean([curve.losses for curve in of_seeds], axis=0)
            x, color = of_seeds[0].steps, COLORS[label]
            axis.plot(x, losses, color=color, linewidth=1, label=label)
        best = min(curve.final for c in of_optimizers.values() for curve in c)
        axis.set(xlabel=f"steps, of {steps}", ylabel="validation loss (nats per byte)")
        axis.set_ylim(best - 0.05, best + 1)
        axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


# --- schedules -----------------------------------------------------------------------


def schedules(experiment: Experiment) -> None:
    """Trains anew with fewer steps, and compares final losses alone.

    The learning rate of such a training decays earlier. Its other settings are those of
    the whole length. The paper measures its shares of steps in this way.
    """
    experiment = only(experiment, *SCHEDULE_BASELINES, *SCHEDULE_OPTIMIZERS)
    steps = experiment.lengths[-1]
    whole = trainings(experiment, steps)
    lengths = [round(steps * share) for share in experiment.shares]
    shorter = of_all_seeds(
        experiment,
        {
            (label, length): at_length(whole[label][0].config, length)
            for label in SCHEDULE_OPTIMIZERS
            for length in lengths
        },
    )
    rows = []
    for label in SCHEDULE_OPTIMIZERS:
        of_lengths = {length: shorter[label, length] for length in lengths}
        of_lengths[steps] = whole[label]
        found = {**whole, label: by_length(of_lengths)}
        rows += [
            {
                "optimizer": label,
                "steps": length,
                "final loss": mean(of_seeds),
                "by seed": by_seed([curve.final for curve in of_seeds]),
            }
            for length, of_seeds in of_lengths.items()
        ]
        rows[-1] |= shares_of_steps(label, found)
    report_kept(rows, experiment.out / f"schedules_{steps}.csv")


def by_length(of_lengths: dict[int, Seeds]) -> Seeds:
    """The final losses of each seed against the lengths of the trainings, as curves."""
    lengths = np.array([*of_lengths])
    return [
        Curve(of_one[-1].config, lengths, np.array([curve.final for curve in of_one]))
        for of_one in zip(*of_lengths.values(), strict=True)
    ]


# --- time ----------------------------------------------------------------------------


def measure_time(experiment: Experiment) -> None:
    """Compares the seconds of whole steps, and of trainings to the same losses."""
    experiment = only(experiment, "NAdamW", *experiment.optimizers)
    best, _ = tuned(experiment, experiment.lengths[0])
    median = seconds_per_step(best)
    share = {length: trainings(experiment, length) for length in experiment.lengths}
    rows = [
        {
            "optimizer": label,
            "seconds per step": median[label],
            "to NAdamW's": median[label] / median["NAdamW"],
            **{
                f"less time than {name} in {length} steps": less_time(
                    found[label], found[name], median[label] / median[name]
                )
                for length, found in share.items()
                for name in BASELINES
                if name in found
            },
        }
        for label in best
    ]
    report(rows, experiment.out / "time.csv")


def seconds_per_step(configs: Mapping[str, Config]) -> dict[str, float]:
    """Measures whole steps, of all configurations in turn, in one process.

    The machine must have nothing else to do. A turn has ten steps of each, and the
    seconds of a step are the median of the turns. So refreshes count where one of ten
    steps has them, and do not where they are rarer.
    """
    steps = {label: stepper(config) for label, config in configs.items()}
    seconds: dict[str, list[float]] = {label: [] for label in configs}
    for _ in range(12):
        for label, take in steps.items():
            start = time.perf_counter()
            take(10)
            seconds[label].append((time.perf_counter() - start) / 10)
    return {label: float(np.median(s)) for label, s in seconds.items()}


def less_time(found: Seeds, others: Seeds, ratio: float) -> float:
    return float(np.mean(1 - ratio * (1 - saved(found, others))))


def stepper(config: Config) -> Callable[[int], None]:
    """A function that takes so many steps of a training, and waits for them."""
    config = config.filled()
    model = make_model(config)
    state = make_state(config, model)
    step = jit_step(config, model, state)
    corpus = Corpus(read_tokens(config.data), config)
    batches = map(corpus.micro_batches, itertools.count())

    def take(count: int) -> None:
        nonlocal state
        for batch in itertools.islice(batches, count):
            state, loss = step(state, batch)
        jax.block_until_ready(loss)

    take(11)  # It compiles, and the first step and a first refresh are no usual ones.
    return take


# --- frequency -----------------------------------------------------------------------


def frequency(experiment: Experiment) -> None:
    """Changes the frequency alone, with the best settings of each optimizer."""
    labels = FREQUENCY_OPTIMIZERS.values()
    experiment = only(experiment, "NAdamW", *labels)
    best, _ = tuned(experiment, experiment.lengths[0])
    configs = {
        (name, count): dataclasses.replace(best[label], precondition_frequency=count)
        for name, label in FREQUENCY_OPTIMIZERS.items()
        for count in FREQUENCIES
    }
    found = of_all_seeds(experiment, {"NAdamW": best["NAdamW"], **configs})
    nadamw = mean(found.pop("NAdamW"))
    rows = [
        {"optimizer": name, "precondition_frequency": count, **outcome(of_seeds)}
        for (name, count), of_seeds in found.items()
    ]
    report_kept(rows, experiment.out / "frequency.csv")
    plot_frequency(rows, nadamw, experiment.out / "frequency.png")


def plot_frequency(rows: list[dict[str, Any]], nadamw: float, path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for name, label in FREQUENCY_OPTIMIZERS.items():
        losses = [row["final loss"] for row in rows if row["optimizer"] == name]
        axis.plot(FREQUENCIES, losses, "o-", color=COLORS[label], label=name)
    axis.axhline(nadamw, color=COLORS["NAdamW"], linestyle=":", label="NAdamW")
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


# --- refreshes -----------------------------------------------------------------------


def refreshes(experiment: Experiment) -> None:
    """Shows what each way of refreshing costs, and which loss it ends with.

    All else is that of the best settings of SOAP.
    """
    best, _ = tuned(only(experiment, "NAdamW", "SOAP"), experiment.lengths[0])
    configs = {
        label: dataclasses.replace(best["SOAP"], **changes)
        for label, changes in REFRESHES.items()
    }
    found = of_all_seeds(experiment, configs)
    seconds = seconds_per_step({"NAdamW": best["NAdamW"], **configs})
    rows = [
        {
            "refreshes": label,
            **outcome(of_seeds),
            **above("f=1", of_seeds, found["f=1"]),
            "seconds per step": seconds[label],
            "over NAdamW's": seconds[label] - seconds["NAdamW"],
        }
        for label, of_seeds in found.items()
    ]
    report(rows, experiment.out / "refreshes.csv")
    plot_refreshes(rows, experiment.out / "refreshes.png")


def plot_refreshes(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    for row in rows:
        at = (1e3 * row["over NAdamW's"], row["final loss"])
        axis.plot(*at, "o", color=COLORS["SOAP"])
        axis.annotate(row["refreshes"], at, xytext=(5, 5), textcoords="offset points")
    axis.margins(0.2)
    axis.set(
        xlabel="milliseconds of a step over those of NAdamW",
        ylabel="final validation loss (nats per byte)",
    )
    axis.grid(alpha=0.3)
    save(figure, path)


# --- batch size ----------------------------------------------------------------------


def batch_size(experiment: Experiment) -> None:
    """Trains on as many tokens in batches of different sizes.

    Both learning rates are sought anew for each size. Losses of different sizes are on
    different sequences, so that only those of one size are compared.
    """
    experiment = only(experiment, *BATCH_OPTIMIZERS)
    best, _ = tuned(experiment, experiment.lengths[0])
    rows = []
    for batch in experiment.batches:
        starts = {
            label: at_batch(config, experiment.lengths[-1], batch)
            for label, config in best.items()
        }
        found = with_best_rates(experiment, starts)
        rows += [
            {
                "batch": batch,
                "steps": found[label][0].config.steps,
                **summary(label, found),
            }
            for label in found
        ]
    report_kept(rows, experiment.out / "batch_size.csv")
    plot_batch_size(rows, experiment.out / "batch_size.png")


def at_batch(config: Config, steps: int, batch: int) -> Config:
    """Fewer steps of a larger batch, evaluated on as many sequences."""
    usual = base(steps).filled().batch
    shorter = at_length(config, steps * usual // batch)
    if batch == usual:
        return shorter
    count = shorter.eval_batches * usual // min(batch, 128)
    return dataclasses.replace(shorter, batch=batch, eval_batches=count)


def plot_batch_size(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(6, 4))
    batches = list(dict.fromkeys(row["batch"] for row in rows))
    for baseline in ("AdamW", "NAdamW"):
        name = f"fewer steps than {baseline}"
        shares = [row[name] for row in rows if row["optimizer"] == "SOAP"]
        axis.plot(batches, shares, "o-", color=COLORS[baseline], label=name)
    axis.set(xscale="log", xlabel="batch (sequences of 128 bytes)", ylim=(0, 1))
    axis.set_xticks(batches, batches)
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend()
    save(figure, path)


# --- ablations -----------------------------------------------------------------------


def ablations(experiment: Experiment) -> None:
    """Changes one option at a time, with the best rates of each variant."""
    variants = {label: VARIANTS[label] for label in experiment.variants}
    experiment = only(experiment, *(optimizer for optimizer, _ in variants.values()))
    best, _ = tuned(experiment, experiment.lengths[0])
    starts = {
        label: dataclasses.replace(best[optimizer], **changes)
        for label, (optimizer, changes) in variants.items()
    }
    found = with_best_rates(experiment, starts)
    rows = [
        {
            "variant": label,
            **outcome(of_seeds),
            **above("unchanged", of_seeds, found.get(VARIANTS[label][0])),
            "state bytes": state_bytes(of_seeds[0].config),
        }
        for label, of_seeds in found.items()
    ]
    report_kept(rows, experiment.out / "ablations.csv")


def state_bytes(config: Config) -> int:
    filled = config.filled()
    model = make_model(filled)
    state = jax.eval_shape(lambda: make_state(filled, model))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.opt_state))


# --- precisions ----------------------------------------------------------------------


def precisions(experiment: Experiment) -> None:
    """Trains with products of lower precision, with the best settings of float32."""
    best, _ = tuned(only(experiment, "SOAP"), experiment.lengths[0])
    found = of_all_seeds(
        experiment,
        {
            name: dataclasses.replace(best["SOAP"], **changes)
            for name, changes in PRECISIONS.items()
        },
    )
    rows = [
        {
            "products": name,
            **outcome(of_seeds),
            **above("float32", of_seeds, found["float32"]),
        }
        for name, of_seeds in found.items()
    ]
    report_kept(rows, experiment.out / "precision_losses.csv")


# --- widths --------------------------------------------------------------------------


def widths(experiment: Experiment) -> None:
    """Seeks the best learning rate of matrices in each width, in short trainings.

    Adam's rate for the others is the same in all; only NAdamW has one rate.
    """
    starts = {
        (label, width): dataclasses.replace(
            base(WIDTH_STEPS),
            preset=preset,
            **{"adam_learning_rate": WIDTH_ADAM_RATE, **changes},
        )
        for label, changes in WAYS.items()
        for width, preset in WIDTHS.items()
    }
    tried: list[tuple[Any, Seeds]] = []
    for fields in (RATES, MATRICES_ALONE):
        members = {
            key: config
            for key, config in starts.items()
            if has_two_rates(config) == (fields == MATRICES_ALONE)
        }
        tried += best_settings(
            experiment.curves, members, fields, experiment.search_seeds
        )[1]
    rows = [
        {
            "optimizer": label,
            "width": width,
            "learning rate": of_seeds[0].config.learning_rate,
            "final loss": mean(of_seeds),
        }
        for (label, width), of_seeds in tried
    ]
    labels = [*WAYS]
    rows.sort(
        key=lambda row: (
            labels.index(row["optimizer"]),
            row["width"],
            row["learning rate"],
        )
    )
    report_kept(rows, experiment.out / "widths.csv")
    plot_widths(rows, experiment.out / "widths.png")


def plot_widths(rows: list[dict[str, Any]], path: Path) -> None:
    figure, panels = plt.subplots(1, len(WAYS), figsize=(15, 4), sharey=True)
    for axis, label in zip(panels, WAYS, strict=True):
        for width in WIDTHS:
            mine = [r for r in rows if (r["optimizer"], r["width"]) == (label, width)]
            rates = [row["learning rate"] for row in mine]
            losses = [row["final loss"] for row in mine]
            axis.plot(rates, losses, "o-", label=f"width {width}")
        axis.set(xscale="log", xlabel="learning rate", title=label)
        axis.grid(alpha=0.3)
    best = min(row["final loss"] for row in rows)
    panels[0].set_ylim(best - 0.05, best + 1)
    panels[0].set_ylabel("final validation loss (nats per byte)")
    panels[0].legend()
    save(figure, path)


PARTS: dict[str, Callable[[Experiment], None]] = {
    "efficiency": efficiency,
    "schedules": schedules,
    "time": measure_time,
    "frequency": frequency,
    "refreshes": refreshes,
    "batch_size": batch_size,
    "ablations": ablations,
    "widths": widths,
    "precisions": precisions,
}


def main(experiment: Experiment) -> None:
    require_known("parts", experiment.parts, PARTS)
    require_known("optimizers", experiment.optimizers, OPTIMIZERS)
    require_known("variants", experiment.variants, VARIANTS)
    for part in experiment.parts:
        print(f"\n{part}")
        PARTS[part](experiment)


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
