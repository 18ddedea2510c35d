"""Burgers' equation is solved by `jinns.solve`, with the recipe for PINNs.

`make test-clients` runs this file.
"""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import jinns
from common import RECIPE, compare, nadam

import soap_optax

STEPS = 1000


def problem():
    key = jax.random.key(0)
    layers = [(eqx.nn.Linear, 2, 24), (jnp.tanh,)]
    layers += [(eqx.nn.Linear, 24, 24), (jnp.tanh,)] * 2 + [(eqx.nn.Linear, 24, 1)]
    u, weights = jinns.nn.PINN_MLP.create(
        key=key, eqx_list=tuple(layers), eq_type="PDENonStatio"
    )
    nu = jnp.array(0.01 / jnp.pi)
    params = jinns.parameters.Params(nn_params=weights, eq_params={"nu": nu})
    box = {"dim": 1, "min_pts": (-1.0,), "max_pts": (1.0,), "tmin": 0.0, "tmax": 1.0}
    data = jinns.data.CubicMeshPDENonStatio(key=key, n=1000, nb=200, ni=200, **box)
    loss = jinns.loss.LossPDENonStatio(
        u=u,
        dynamic_loss=jinns.loss.BurgersEquation(Tmax=1),
        initial_condition_fun=lambda x: -jnp.sin(jnp.pi * x),
        boundary_condition=jinns.loss.Dirichlet(),
        loss_weights=jinns.loss.LossWeightsPDENonStatio(
            dyn_loss=1.0, initial_condition=10.0, boundary_loss=1.0
        ),
        params=params,
    )
    return {"init_params": params, "data": data, "loss": loss}


def train(tx):
    result = jinns.solve(n_iter=STEPS, optimizer=tx, verbose=False, **problem())
    return result[1][-1]


if __name__ == "__main__":
    soap = functools.partial(soap_optax.soap, **RECIPE)
    optimizers = {"SOAP": (soap, (3e-2, 1e-1, 3e-1))}
    optimizers["NAdam"] = (nadam, (1e-2, 3e-2, 1e-1))
    compare("jinns", "Burgers' equation", train, STEPS, **optimizers)
