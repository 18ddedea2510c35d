"""An autoencoder of Equinox compresses digits, with the state of SOAP in a PyTree.

The images are those that scikit-learn ships. `make test-clients` runs this file.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
from common import RECIPE, compare, nadam
from sklearn.datasets import load_digits

import soap_optax

STEPS = 200
IMAGES = jnp.asarray(load_digits().data, jnp.float32) / 16


class Autoencoder(eqx.Module):
    """Compresses an image to six numbers."""

    encoder: eqx.nn.MLP
    decoder: eqx.nn.MLP

    def __init__(self, key):
        self.encoder = eqx.nn.MLP(64, 6, 48, 2, jax.nn.gelu, key=key)
        self.decoder = eqx.nn.MLP(6, 64, 48, 2, jax.nn.gelu, key=key)

    def __call__(self, image):
        return self.decoder(self.encoder(image))


def loss_fn(model, images):
    return jnp.mean((jax.vmap(model)(images) - images) ** 2)


def train(tx):
    @eqx.filter_jit
    def step(model, state, images):
        grads = eqx.filter_grad(loss_fn)(model, images)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    model = Autoencoder(jax.random.key(0))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for i in range(STEPS):
        rows = jnp.arange(256 * i, 256 * (i + 1)) % len(IMAGES)
        model, state = step(model, state, IMAGES[rows])
    return loss_fn(model, IMAGES)


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, **RECIPE)
    rates = (1e-2, 3e-2, 1e-1)
    optimizers = {"SOAP": (soap, rates), "NAdam": (nadam, rates)}
    compare("equinox", "autoencoder", train, STEPS, **optimizers)
