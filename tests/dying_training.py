"""A training of which one process kills itself at a moment that can be told exactly.

    python tests/dying_training.py MOMENT STEPS PROCESS --eval-every 1 ...

It is `examples/train_lm.py` with the options that follow, and with hooks that call the
host. All processes run it, because they need one program. When STEPS steps are done,
the process with the number PROCESS sends SIGKILL to itself at the MOMENT:

- `refresh`: a refresh method of this script decomposes as `qr` does, and calls the host
  when a device has new eigenbases. The conditional of the refresh has not ended then,
  so none of them is in the state. This happens on the devices of each process.
- `update`: the optimizer calls the host before it updates. This happens on the first
  device only, so PROCESS must be 0.
- `save`: Orbax writes a checkpoint in the background, to a folder with a temporary
  name.

The host knows how many steps are done, because metrics at each step make it wait.
"""

import dataclasses
import functools
import os
import signal
import sys
import time

import jax
import optax
import train_lm
import tyro

import soap_optax


@dataclasses.dataclass(unsafe_hash=True)
class Death:
    """When a process dies, and which; and how many steps are done so far."""

    moment: str
    steps: int
    process: int
    done: int = dataclasses.field(default=0, compare=False)

    def is_due(self, moment):
        now = moment, self.done, jax.process_index()
        return now == (self.moment, self.steps, self.process)

    def strike(self, moment, *_):
        if self.is_due(moment):
            os.kill(os.getpid(), signal.SIGKILL)

    def train(self, config, train=train_lm.train):
        """Trains, and counts the steps."""
        for row in train(config):
            self.done = row.step
            yield row

    def make_soap(self, config, mesh, make=train_lm.make_soap):
        """Makes the optimizer that may die before an update or in a refresh."""
        tx = make(dataclasses.replace(config, refresh=DyingQR(self)), mesh)

        def update(updates, state, params=None):
            jax.debug.callback(functools.partial(self.strike, "update"))
            return tx.update(updates, state, params)

        return optax.GradientTransformation(tx.init, update)

    def save(self, manager, state, seconds, save=train_lm.save):
        """Saves, and may die as soon as the temporary folder is there."""
        save(manager, state, seconds)
        while self.is_due("save"):
            if list(manager.directory.glob(f"{self.steps}.*tmp*")):
                self.strike("save")
            if (manager.directory / str(self.steps)).exists():
                sys.exit("The checkpoint was whole before its writing was seen.")
            time.sleep(0.001)


class DyingQR(soap_optax.QR):
    """The refresh method `qr`, which may die when it has decomposed."""

    def __init__(self, death):
        self.death = death

    def refresh(self, factors, eigenbases, wanted, request):
        refreshed = super().refresh(factors, eigenbases, wanted, request)
        # One number, because large operands of a callback can block the CPU backend.
        die = functools.partial(self.death.strike, "refresh")
        jax.debug.callback(die, refreshed.eigenbases.ravel()[0])
        return refreshed


if __name__ == "__main__":
    death = Death(sys.argv[1], *map(int, sys.argv[2:4]))
    train_lm.OPTIMIZERS["soap"] = death.make_soap
    train_lm.train, train_lm.save = death.train, death.save
    train_lm.main(tyro.cli(train_lm.Config, args=sys.argv[4:]))
