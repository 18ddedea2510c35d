"""A variational autoencoder is fitted by NumPyro's `SVI`, which takes SOAP as it is.

Encoder and decoder are networks of Flax, and the digits are those that scikit-learn
ships. `make test-clients` runs this file.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpyro
from common import compare
from numpyro import distributions as dist
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits

import soap_optax

STEPS, LATENT = 400, 4
IMAGES = jnp.asarray(load_digits().data, jnp.float32) / 16


def network(outputs):
    return nn.Sequential([nn.Dense(64), nn.gelu, nn.Dense(64), nn.gelu, outputs])


def model(images):
    decoder = flax_module("decoder", network(nn.Dense(64)), input_shape=(1, LATENT))
    with numpyro.plate("images", len(images)):
        code = numpyro.sample("code", dist.Normal(jnp.zeros(LATENT), 1).to_event(1))
        shown = dist.Normal(nn.sigmoid(decoder(code)), 0.1).to_event(1)
        numpyro.sample("shown", shown, obs=images)


def guide(images):
    encoder = flax_module("encoder", network(nn.Dense(2 * LATENT)), input_shape=(1, 64))
    mean, log_scale = jnp.split(encoder(images), 2, axis=-1)
    with numpyro.plate("images", len(images)):
        code = dist.Normal(mean, jnp.exp(log_scale)).to_event(1)
        numpyro.sample("code", code)


def train(optimizer):
    svi = numpyro.infer.SVI(model, guide, optimizer, numpyro.infer.Trace_ELBO())
    result = svi.run(jax.random.key(0), STEPS, IMAGES, progress_bar=False)
    return jnp.mean(result.losses[-20:]) / len(IMAGES)


if __name__ == "__main__":
    adam = functools.partial(numpyro.optim.Adam, b1=0.95, b2=0.95)
    rates = (3e-2, 1e-1, 3e-1)
    optimizers = {"SOAP": (soap_optax.soap, rates), "Adam": (adam, rates)}
    compare("numpyro", "SVI of an autoencoder", train, STEPS, **optimizers)
