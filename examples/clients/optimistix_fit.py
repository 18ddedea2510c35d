"""A network is fitted by `optimistix.minimise`, with SOAP in an `OptaxMinimiser`.

The minimiser would stop when the function and the weights change by less than 1e-8.
`make test-clients` runs this file.
"""

import functools

import jax
import jax.numpy as jnp
import optimistix
from common import RECIPE, compare, nadam

import soap_optax

STEPS = 500
X = jnp.linspace(-1.0, 1.0, 128)[:, None]
TARGET = jnp.sin(8 * X) * jnp.exp(-(X**2)) + jnp.sign(X - 0.3)


def first_weights():
    sizes = (1, 32, 32, 1)
    keys = jax.random.split(jax.random.key(0), len(sizes) - 1)
    return [
        {"w": jax.random.normal(key, (m, n)) * (2 / m) ** 0.5, "b": jnp.zeros(n)}
        for key, m, n in zip(keys, sizes, sizes[1:], strict=False)
    ]


def loss(weights, args):
    del args
    x = X
    for layer in weights[:-1]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return jnp.mean((x @ weights[-1]["w"] + weights[-1]["b"] - TARGET) ** 2)


def train(tx):
    solver = optimistix.OptaxMinimiser(tx, rtol=1e-8, atol=1e-8)
    solution = optimistix.minimise(
        loss, solver, first_weights(), max_steps=STEPS + 1, throw=False
    )
    assert solution.stats["num_steps"] > STEPS / 2, "The minimiser stopped too early."
    return loss(solution.value, None)


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, **RECIPE)
    rates = (3e-2, 1e-1, 3e-1)
    optimizers = {"SOAP": (soap, rates), "NAdam": (nadam, rates)}
    compare("optimistix", "fit of a function", train, STEPS, **optimizers)
