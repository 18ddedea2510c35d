"""What several tests share: gradients and states after them, layouts, refreshes."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from soap_optax._options import complete
from soap_optax.parameters._layout import make_layout
from soap_optax.refresh import METHODS, _stacks
from soap_optax.refresh._methods import RefreshRequest

needs_consistent_rms = pytest.mark.skipif(
    "consistent_rms" not in inspect.signature(optax.contrib.muon).parameters,
    reason="optax.contrib.muon without consistent_rms",
)


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


def layout(shape, dimension_numbers=None, **options):
    """The layout of a shape, with defaults for the options that are not given."""
    return make_layout(shape, complete(**options), dimension_numbers)


@functools.partial(jax.jit, static_argnames=("method", "precision"))
def refresh(factor, basis, eigenvalues, method, precision):
    """The eigenbasis and eigenvalues after a refresh, and whether it failed."""
    request = RefreshRequest(precision=precision)
    new = _stacks.refresh_one(factor, basis, METHODS[method], request)
    values = new.eigenvalues.astype(eigenvalues.dtype)
    return (
        new.eigenbases,
        jnp.where(new.is_new[..., None], values, eigenvalues),
        (~new.is_new).astype(jnp.int32)[..., None],
    )
