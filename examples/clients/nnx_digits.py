"""A convolutional network of Flax NNX learns digits, by an `nnx.Optimizer` with SOAP.

The images are those that scikit-learn ships. `make test-clients` runs this file.
"""

import functools

import jax.numpy as jnp
import optax
from common import compare, nadam
from flax import nnx
from sklearn.datasets import load_digits

import soap_optax

STEPS = 100
IMAGES, LABELS = load_digits(return_X_y=True)
IMAGES = jnp.asarray(IMAGES, jnp.float32).reshape(-1, 8, 8, 1) / 16


class Network(nnx.Module):
    """Has two convolutions."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.second = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.head = nnx.Linear(512, 10, rngs=rngs)

    def __call__(self, images):
        hidden = nnx.relu(self.second(nnx.relu(self.first(images))))
        return self.head(hidden.reshape(len(images), -1))


def loss_fn(model, images, labels):
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit
def step(model, optimizer, images, labels):
    optimizer.update(model, nnx.grad(loss_fn)(model, images, labels))


def train(tx):
    model = Network(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    for i in range(STEPS):
        rows = jnp.arange(128 * i, 128 * (i + 1)) % len(IMAGES)
        step(model, optimizer, IMAGES[rows], LABELS[rows])
    return loss_fn(model, IMAGES, LABELS)


if __name__ == "__main__":
    options = {"nesterov": True, "merge_dims": True, "max_precond_dim": 512}
    soap = functools.partial(soap_optax.soap, **options)
    rates = (3e-2, 1e-1, 3e-1)
    optimizers = {"SOAP": (soap, rates), "NAdam": (nadam, rates)}
    compare("flax", "NNX, digits", train, STEPS, **optimizers)
