"""A network of Haiku learns digits with SOAP, in a loop that `hk.transform` makes pure.

The images are those that scikit-learn ships. `make test-clients` runs this file.
"""

import functools

import haiku as hk
import jax
import jax.numpy as jnp
import optax
from common import compare, nadam
from sklearn.datasets import load_digits

import soap_optax

STEPS = 200
IMAGES, LABELS = map(jnp.asarray, load_digits(return_X_y=True))


@hk.without_apply_rng
@hk.transform
def loss(images, labels):
    logits = hk.nets.MLP([64, 64, 10], activation=jax.nn.tanh)(images / 16)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train(tx):
    @jax.jit
    def step(params, state, images, labels):
        grads = jax.grad(loss.apply)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = loss.init(jax.random.key(0), IMAGES, LABELS)
    state = tx.init(params)
    for i in range(STEPS):
        rows = jnp.arange(128 * i, 128 * (i + 1)) % len(IMAGES)
        params, state = step(params, state, IMAGES[rows], LABELS[rows])
    return loss.apply(params, IMAGES, LABELS)


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, nesterov=True)
    optimizers = {"SOAP": (soap, (3e-2, 1e-1, 3e-1))}
    optimizers["NAdam"] = (nadam, (1e-2, 3e-2, 1e-1))
    compare("dm-haiku", "digits", train, STEPS, **optimizers)
