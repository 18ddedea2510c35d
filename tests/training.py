"""Random gradients, and the state of a transformation after some of them."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(*shape, seed=0, dtype=np.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def trained(tx, params, steps=5, dtype=np.float32):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for i in range(steps):
        grads = jax.tree.map(
            lambda p, i=i: normal(*p.shape, seed=i, dtype=dtype), params
        )
        _, state = update(grads, state, params)
    return state
