"""Random gradients, the state of a transformation after some of them, and a refresh."""

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax import _refresh


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


def refresh(factor, basis, eigenvalues, method, precision):
    """The eigenbasis and eigenvalues after a refresh, and whether it failed."""
    new = _refresh.refresh_one(
        factor, basis, _refresh.Method(method, precision=precision)
    )
    values = new.eigenvalues.astype(eigenvalues.dtype)
    return (
        new.eigenbases,
        jnp.where(new.is_new[..., None], values, eigenvalues),
        (~new.is_new).astype(jnp.int32)[..., None],
    )
