"""A small transformer of Flax Linen is trained in a `TrainState` with the recipe.

Linen's attention has an axis of heads, and `numbers` says so. `make test-clients` runs
this file.
"""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
from common import RECIPE, compare, text
from flax.training.train_state import TrainState
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import soap_optax

STEPS, WIDTH = 100, 64
BATCHES = text(STEPS + 1, rows=16, context=48)


class Transformer(nn.Module):
    """Has one layer."""

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(320, WIDTH, name="embed")  # bytes, and then positions
        x = embed(tokens) + embed(256 + np.arange(48))
        mask, y = nn.make_causal_mask(tokens), nn.LayerNorm()(x)
        x = x + nn.SelfAttention(num_heads=4)(y, mask)
        y = nn.gelu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
        return nn.Dense(256, name="lm_head")(nn.LayerNorm()(x + nn.Dense(WIDTH)(y)))


def numbers(params):
    def of_parameter(path, leaf):
        if leaf.ndim < 2 or path[0].key in ("embed", "lm_head"):
            return None
        axes = ((0, 1), 2) if path[-2].key == "out" else (0, range(1, leaf.ndim))
        return soap_optax.DimensionNumbers(axes)

    return jax.tree.map_with_path(of_parameter, params)


def loss_fn(params, apply, batch):
    return cross_entropy(apply({"params": params}, batch[:, :-1]), batch[:, 1:]).mean()


@jax.jit
def step(state, batch):
    grads = jax.grad(loss_fn)(state.params, state.apply_fn, batch)
    return state.apply_gradients(grads=grads)


def train(tx):
    model, last = Transformer(), BATCHES[0]
    params = model.init(jax.random.key(0), last[:, :-1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for batch in BATCHES[1:]:
        state = step(state, batch)
    return loss_fn(state.params, model.apply, last)


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, dimension_numbers=numbers, **RECIPE)
    nadamw = functools.partial(optax.nadamw, b1=0.95, b2=0.95, weight_decay=0.0)
    optimizers = {"SOAP": (soap, (1e-2, 3e-2, 1e-1))}
    optimizers["NAdamW"] = (nadamw, (3e-3, 1e-2, 3e-2))
    compare("flax", "Linen, text", train, STEPS, **optimizers)
