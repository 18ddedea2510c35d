"""Trains with SOAP and AdamW on the same data in the same order, from the same model.

    python examples/compare_lm.py            # Both run at their tuned learning rates.
    python examples/compare_lm.py --sweep    # This is how those rates were found.

The command writes metrics (CSV) and a plot (PNG), and says after how many steps and
seconds SOAP reached AdamW's final validation loss.
"""

import csv
import dataclasses
import platform
from pathlib import Path

import jax
import matplotlib
import tyro
from train_lm import Config, Row, train, write_rows

matplotlib.use("Agg")
import matplotlib.pyplot as plt

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


@dataclasses.dataclass(frozen=True)
class Compare:
    """Compares optimizers."""

    config: Config = dataclasses.field(default_factory=Config)
    optimizers: tuple[str, ...] = ("adamw", "soap")
    out: Path = Path("runs/compare")
    sweep: bool = False
    """Sweep the learning rate and then b2 of each optimizer, in place of one run."""


def run(compare: Compare, optimizer: str, name: str, **changes: float) -> list[Row]:
    config = dataclasses.replace(compare.config, optimizer=optimizer, **changes)
    rows = list(train(config))
    write_rows(compare.out / f"{name}.csv", rows)
    return rows


def sweep(compare: Compare) -> None:
    """Sweeps the learning rate at b2 = 0.95, then tries b2 = 0.99 at the best one."""
    table = []
    for optimizer in compare.optimizers:

        def final_loss(learning_rate, b2, optimizer=optimizer):
            name = f"{optimizer}_lr{learning_rate:g}_b2{b2:g}"
            rows = run(compare, optimizer, name, learning_rate=learning_rate, b2=b2)
            loss = rows[-1].validation_loss
            table.append((optimizer, learning_rate, b2, loss))
            print(f"{optimizer} learning rate {learning_rate:g} b2 {b2:g}: {loss:.4f}")
            return loss

        best = min(LEARNING_RATES, key=lambda rate: final_loss(rate, 0.95))
        final_loss(best, 0.99)
    with (compare.out / "sweep.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("optimizer", "learning_rate", "b2", "validation_loss"))
        writer.writerows(table)


def reached(rows: list[Row], loss: float) -> Row | None:
    """The first evaluation at or below a validation loss."""
    return next((row for row in rows if row.validation_loss <= loss), None)


def plot(results: dict[str, list[Row]], path: Path) -> None:
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    target = results["adamw"][-1].validation_loss if "adamw" in results else None
    for axis, field in zip(panels, ("step", "seconds"), strict=True):
        for name, rows in results.items():
            x = [getattr(row, field) for row in rows]
            axis.plot(x, [row.validation_loss for row in rows], label=name)
        if target is not None:
            axis.axhline(target, color="gray", linewidth=0.8, linestyle=":")
        axis.set_xlabel({"step": "steps", "seconds": "seconds of training"}[field])
        axis.grid(alpha=0.3)
    panels[0].set_ylabel("validation loss (nats per token)")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(compare: Compare) -> None:
    print(
        f"{platform.machine()}, {jax.default_backend()}, Python "
        f"{platform.python_version()}, JAX {jax.__version__}"
    )
    compare.out.mkdir(parents=True, exist_ok=True)
    if compare.sweep:
        return sweep(compare)
    results = {name: run(compare, name, name) for name in compare.optimizers}
    plot(results, compare.out / "compare.png")
    for name, rows in results.items():
        last = rows[-1]
        print(
            f"{name}: validation loss {last.validation_loss:.4f} after {last.step} "
            f"steps, {last.seconds:.0f} s"
        )
    if {"adamw", "soap"} <= results.keys():
        target = results["adamw"][-1]
        row = reached(results["soap"], target.validation_loss)
        if row is None:
            print("SOAP did not reach AdamW's final validation loss.")
        else:
            print(
                "SOAP reached AdamW's final validation loss after "
                f"{row.step} steps and {row.seconds:.0f} s; "
                f"AdamW took {target.step} and {target.seconds:.0f} s: "
                f"{1 - row.step / target.step:.0%} fewer steps, "
                f"{1 - row.seconds / target.seconds:.0%} less time."
            )
    print(f"Metrics and plot: {compare.out}")


if __name__ == "__main__":
    main(tyro.cli(Compare, description=__doc__))
