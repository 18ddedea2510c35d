"""A small transformer of Flax Linen is trained in a `TrainState` with the recipe.

Linen's attention has an axis of heads, which `numbers_of_one` merges with its channels.
`make test-clients` runs this file.
"""

import functools

import flax.linen as nn
import jax
from common import RECIPE, compare, nadam, text
from flax.training.train_state import TrainState
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import soap_optax

BATCHES = text(101, rows=16, context=48)


class _Transformer(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(256, 64, name="embed")(tokens)
        mask, y = nn.make_causal_mask(tokens), nn.LayerNorm()(x)
        x = x + nn.SelfAttention(num_heads=4)(y, mask)
        y = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
        return nn.Dense(256, name="lm_head")(nn.LayerNorm()(x + nn.Dense(64)(y)))


def numbers_of_one(path, leaf):
    if leaf.ndim < 2 or path[0].key in ("embed", "lm_head"):
        return None
    axes = ((0, 1), 2) if path[-2].key == "out" else (0, range(1, leaf.ndim))
    return soap_optax.DimensionNumbers(axes)


@jax.jit
def step(state, batch):
    def loss_fn(params):
        logits = state.apply_fn({"params": params}, batch[:, :-1])
        return cross_entropy(logits, batch[:, 1:]).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


def train(tx):
    model = _Transformer()
    params = model.init(jax.random.key(0), BATCHES[0, :, :-1])["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=tx)
    for batch in BATCHES:
        state, loss = step(state, batch)
    return loss


if __name__ == "__main__":
    numbers = functools.partial(jax.tree.map_with_path, numbers_of_one)
    soap = functools.partial(soap_optax.soap, dimension_numbers=numbers, **RECIPE)
    runs = {"SOAP": (soap, (1e-2, 3e-2, 1e-1)), "NAdam": (nadam, (3e-3, 1e-2, 3e-2))}
    compare("flax", "Linen, text", train, len(BATCHES) - 1, **runs)
