"""SOAP and AdamW on small images: a convolutional network on handwritten digits.

    python experiments/vision.py --out docs/results  # It takes 12 minutes on one core.

The images are the 1,797 digits of 8 x 8 pixels that come with scikit-learn. Each seed
has its own split into training, validation and test images, its own network and its own
batches. The learning rate of each optimizer is the one of its sweep that has the lowest
validation loss, averaged over the seeds. Finished runs in `<runs>` are not repeated.
The command writes `<out>/vision.csv` and `<out>/vision.png`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import matplotlib
import numpy as np
import optax
import tyro
from results import Row, report, run_all
from sklearn.datasets import load_digits

import soap_optax

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BATCH, HELD_OUT, WEIGHT_DECAY = 64, 300, 1e-2

adamw = functools.partial(optax.adamw, weight_decay=WEIGHT_DECAY)
soap = functools.partial(soap_optax.soap, weight_decay=WEIGHT_DECAY)
# Axes are merged up to 512. Up to 10,000, a kernel would become one axis of 4,608.
merged = functools.partial(soap, merge_dims=True, max_precond_dim=512)
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "AdamW": adamw,
    "NAdamW": functools.partial(adamw, nesterov=True),
    "SOAP, a factor per axis": soap,
    "SOAP, merged axes": merged,
    "SOAP, merged axes, blocks of 96": functools.partial(merged, block_size=96),
    "SOAP, merged axes, recipe": functools.partial(
        merged,
        nesterov=True,
        precondition_frequency=1,
        basis="current",
        factors="kl",
    ),
}
COLORS = ("C7", "C5", "C3", "C0", "C2", "C1")
RATES = {name: (1e-3, 3e-3, 1e-2, 3e-2) for name in OPTIMIZERS}
RATES["AdamW"] = RATES["NAdamW"] = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """SOAP and AdamW on handwritten digits."""

    epochs: int = 20
    seeds: int = 5
    out: Path = Path("runs/vision")
    """The folder of the table and the plot."""
    runs: Path = Path("runs/vision")
    """The folder in which runs are kept."""


@dataclasses.dataclass(frozen=True)
class Job:
    """All seeds of an optimizer and a learning rate, which share a compilation."""

    optimizer: str
    rate: float
    epochs: int
    seeds: int

    @property
    def name(self) -> str:
        words = self.optimizer.replace(",", "").lower().split()
        return f"{'_'.join(words)}_{self.rate:g}_{self.epochs}x{self.seeds}"


class Network(nn.Module):
    """Three convolutions and a dense layer, from `[batch, 8, 8, 1]` to logits."""

    @nn.compact
    def __call__(self, images):
        x = nn.gelu(nn.Conv(16, (3, 3))(images))
        x = nn.gelu(nn.Conv(32, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.gelu(nn.Conv(64, (3, 3))(x))
        return nn.Dense(10)(x.mean((1, 2)))


def digits(seed: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The images and labels of a seed, split into three parts."""
    data = load_digits()
    order = np.random.default_rng(seed).permutation(len(data.target))
    images = (data.images[order, ..., None] / 16).astype(np.float32)
    labels = data.target[order].astype(np.int32)
    cuts = [HELD_OUT, 2 * HELD_OUT]
    parts = zip(np.split(images, cuts), np.split(labels, cuts), strict=True)
    return dict(zip(("validation", "test", "training"), parts, strict=True))


def loss_and_accuracy(params: Any, images: Any, labels: Any) -> tuple[Any, Any]:
    logits = Network().apply(params, images)
    losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels)
    return losses.mean(), (logits.argmax(-1) == labels).mean()


evaluate = jax.jit(loss_and_accuracy)


def make_step(tx: optax.GradientTransformation) -> Callable[..., Any]:
    """Makes a step, which is called in a Python loop.

    In a `jax.lax.scan` convolutions are many times slower on CPU (jax-ml/jax#12868).
    """

    @jax.jit
    def step(params, state, images, labels):
        grads, _ = jax.grad(loss_and_accuracy, has_aux=True)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def train(job: Job) -> list[Row]:
    """Trains with each seed, and gives losses and accuracies after each epoch."""
    per_epoch = len(digits(0)["training"][1]) // BATCH
    steps = job.epochs * per_epoch
    schedule = optax.warmup_cosine_decay_schedule(0.0, job.rate, steps // 10, steps)
    tx = OPTIMIZERS[job.optimizer](schedule)
    step = make_step(tx)
    rows: list[Row] = []
    for seed in range(job.seeds):
        parts, rng, seconds = digits(seed), np.random.default_rng(seed), 0.0
        images, labels = parts["training"]
        params = Network().init(jax.random.key(seed), images[:1])
        carry = params, tx.init(params)
        jax.block_until_ready(
            step(*carry, images[:BATCH], labels[:BATCH])
        )  # It compiles.
        for epoch in range(1, job.epochs + 1):
            since = time.process_time()
            order = rng.permutation(len(labels))[: per_epoch * BATCH]
            for batch in np.split(order, per_epoch):
                carry = step(*carry, images[batch], labels[batch])
            jax.block_until_ready(carry)
            seconds += time.process_time() - since
            row: Row = {"seed": seed, "epoch": epoch, "seconds": seconds}
            for part, data in parts.items():
                loss, accuracy = jax.device_get(evaluate(carry[0], *data))
                row |= {f"{part} loss": loss, f"{part} accuracy": accuracy}
            rows.append(row)
    return rows


# --- table and plot ------------------------------------------------------------------


def curve(rows: list[dict[str, str]], column: str) -> np.ndarray:
    """A column as `[seed, epoch]`."""
    seeds = int(rows[-1]["seed"]) + 1
    return np.array([float(row[column]) for row in rows]).reshape(seeds, -1)


def summary(job: Job, rows: list[dict[str, str]]) -> Row:
    """A row of the table: means over the seeds after the last epoch."""
    last = {column: curve(rows, column)[:, -1] for column in rows[0]}
    return {
        "optimizer": job.optimizer,
        "learning rate": job.rate,
        "epochs": job.epochs,
        "seeds": job.seeds,
        "training loss": last["training loss"].mean(),
        "validation loss": last["validation loss"].mean(),
        "test loss": last["test loss"].mean(),
        "test loss deviation": last["test loss"].std(ddof=1),
        "test accuracy": last["test accuracy"].mean(),
        "seconds": last["seconds"].mean(),
    }


def plot(runs: dict[str, list[dict[str, str]]], path: Path) -> None:
    """Draws means over the seeds against epochs, and fainter lines for each seed."""
    curves = {
        "training loss (nats)": lambda rows: curve(rows, "training loss"),
        "test loss (nats)": lambda rows: curve(rows, "test loss"),
        "test images misread (%)": lambda rows: (
            100 - 100 * curve(rows, "test accuracy")
        ),
    }
    figure, panels = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
    for panel, (title, values_of) in zip(panels, curves.items(), strict=True):
        for (name, rows), color in zip(runs.items(), COLORS, strict=True):
            values = values_of(rows)
            epochs = np.arange(1, values.shape[1] + 1)
            panel.plot(epochs, values.mean(0), color=color, label=name)
            panel.plot(epochs, values.T, color=color, alpha=0.2, linewidth=0.7)
        panel.set(yscale="log", xlabel="epoch", title=title)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(experiment: Experiment) -> None:
    jobs = {}
    for optimizer, rates in RATES.items():
        for rate in rates:
            job = Job(optimizer, rate, experiment.epochs, experiment.seeds)
            jobs[job.name] = job
    runs = run_all(train, jobs, experiment.runs)
    table = [summary(job, runs[name]) for name, job in jobs.items()]
    best = {}
    for name, row in zip(jobs, table, strict=True):
        rivals = [r for r in table if r["optimizer"] == row["optimizer"]]
        least = min(rival["validation loss"] for rival in rivals)
        row["chosen"] = row["validation loss"] == least
        if row["chosen"]:
            best[f"{row['optimizer']} ({row['learning rate']:g})"] = runs[name]
    report(table, experiment.out / "vision.csv")
    plot(best, experiment.out / "vision.png")


if __name__ == "__main__":
    main(tyro.cli(Experiment, description=__doc__))
