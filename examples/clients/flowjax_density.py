"""A normalizing flow of FlowJAX is fitted to data by its `fit_to_data`, with SOAP.

FlowJAX stacks the layers of a flow into arrays `[layers, out, in]`. With
`soap_optax.matrices()` each layer has factors of its own. The data are measurements of
tumours that scikit-learn ships. `make test-clients` runs this file.
"""

import functools

import jax
import jax.numpy as jnp
import optax
from common import compare
from flowjax.distributions import Normal
from flowjax.flows import masked_autoregressive_flow
from flowjax.train import fit_to_data
from sklearn.datasets import load_breast_cancer

import soap_optax

EPOCHS, BATCH = 60, 128
DATA = jnp.asarray(load_breast_cancer().data, jnp.float32)[:, :10]
DATA = (DATA - DATA.mean(0)) / DATA.std(0)
STEPS = EPOCHS * (len(DATA) // BATCH)


def train(tx):
    flow = masked_autoregressive_flow(
        jax.random.key(0), base_dist=Normal(jnp.zeros(10)), flow_layers=4
    )
    _, losses = fit_to_data(
        jax.random.key(1),
        flow,
        DATA,
        optimizer=tx,
        max_epochs=EPOCHS,
        max_patience=EPOCHS,
        batch_size=BATCH,
        val_prop=0.1,
        show_progress=False,
    )
    return min(losses["val"])


if __name__ == "__main__":
    numbers = soap_optax.matrices()
    soap = functools.partial(soap_optax.soap, dimension_numbers=numbers)
    adam = functools.partial(optax.adam, b1=0.95, b2=0.95)
    rates = (1e-2, 3e-2, 1e-1)
    optimizers = {"SOAP": (soap, rates), "Adam": (adam, rates)}
    compare("flowjax", "density of data", train, STEPS, **optimizers)
