"""PPO balances a pole of Gymnax with SOAP, in four trainings under one `jax.vmap`.

The trainings differ in their seeds, and the loop is in ppo.py. `make test-clients` runs
this file.
"""

import functools

import gymnax
import jax
import optax
import ppo
from common import compare

import soap_optax

ENV, _ = gymnax.make("CartPole-v1")


def train(tx):
    """Gives how often a pole falls in 1000 steps, in the last sixth of the training."""
    keys = jax.random.split(jax.random.key(0), 4)
    falls = jax.jit(jax.vmap(functools.partial(ppo.train, ENV, tx)))(keys)
    return 1000 * falls[:, -ppo.UPDATES // 6 :].mean()


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, b1=0.9, b2=0.99, nesterov=True)
    nadam = functools.partial(optax.nadam, b1=0.9, b2=0.99)
    optimizers = {"SOAP": (soap, (1e-2, 3e-2, 1e-1))}
    optimizers["NAdam"] = (nadam, (3e-3, 1e-2, 3e-2))
    steps = ppo.UPDATES * ppo.EPOCHS
    compare("gymnax", "PPO, falls", train, steps, limit=2.0, **optimizers)
