"""Trains with NAdamW, Muon and SOAP on the same data in the same order.

    python examples/compare_lm.py
    python examples/compare_lm.py --optimizers adamw soap --config.steps 200

All optimizers start from the same model and have Nesterov's momentum. Muon and SOAP
leave the embedding and the head to Adam. The settings are those of `TUNED` in
`train_lm.py`. The command writes metrics (CSV) and a plot (PNG), and says after how
many steps and seconds SOAP reached the final validation losses of the others.
"""

import dataclasses
import platform
import sys
from pathlib import Path

import jax
import matplotlib
import tyro
from train_lm import Config, Row, train, write_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# NAdamW is AdamW with Nesterov's momentum, which all optimizers here have.
LABELS = {"adamw": "NAdamW", "muon": "Muon", "soap": "SOAP"}
COLORS = {"adamw": "C7", "muon": "C2", "soap": "C3"}


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compares optimizers."""

    config: Config = dataclasses.field(default_factory=Config)
    optimizers: tuple[str, ...] = ("adamw", "muon", "soap")
    out: Path = Path("runs/compare")


def run(compare: Compare, optimizer: str) -> list[Row]:
    rows = list(train(dataclasses.replace(compare.config, optimizer=optimizer)))
    write_rows(compare.out / f"{optimizer}.csv", rows)
    return rows


def label(optimizer: str) -> str:
    return LABELS.get(optimizer, optimizer)


def reached(rows: list[Row], loss: float) -> Row | None:
    """The first evaluation at or below a validation loss."""
    return next((row for row in rows if row.validation_loss <= loss), None)


def compared(soap: list[Row], other: list[Row], name: str) -> str:
    """Says when SOAP reached the final validation loss of another optimizer."""
    target = other[-1]
    row = reached(soap, target.validation_loss)
    if row is None:
        return f"SOAP did not reach {name}'s final validation loss."
    return (
        f"SOAP reached {name}'s final validation loss after {row.step} steps and "
        f"{row.seconds:.0f} s; {name} took {target.step} and {target.seconds:.0f} s: "
        f"{1 - row.step / target.step:.0%} fewer steps, "
        f"{1 - row.seconds / target.seconds:.0%} less time."
    )


def plot(results: dict[str, list[Row]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, field in zip(panels, ("step", "seconds"), strict=True):
        for name, rows in results.items():
            x = [getattr(row, field) for row in rows]
            losses = [row.validation_loss for row in rows]
            axis.plot(x, losses, color=COLORS.get(name), label=label(name))
        axis.set_xlabel({"step": "steps", "seconds": "seconds of training"}[field])
        axis.grid(alpha=0.3)
    best = min(row.validation_loss for rows in results.values() for row in rows)
    panels[0].set_ylim(best - 0.05, best + 1.5)
    panels[0].set_ylabel("validation loss (nats per byte)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(compare: Compare) -> None:
    print(
        f"{platform.machine()}, {jax.default_backend()}, Python "
        f"{platform.python_version()}, JAX {jax.__version__}"
    )
    for name in compare.optimizers:  # Errors come before the first training.
        dataclasses.replace(compare.config, optimizer=name).filled()
    compare.out.mkdir(parents=True, exist_ok=True)
    results = {name: run(compare, name) for name in compare.optimizers}
    plot(results, compare.out / "compare.png")
    for name, rows in results.items():
        last = rows[-1]
        print(
            f"{label(name)}: validation loss {last.validation_loss:.4f} after "
            f"{last.step} steps, {last.seconds:.0f} s"
        )
    if soap := results.pop("soap", None):
        for name, rows in results.items():
            print(compared(soap, rows, label(name)))
    print(f"Metrics and plot: {compare.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Compare, description=__doc__))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
