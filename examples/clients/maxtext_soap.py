"""SOAP for MaxText: a function that takes the place of MaxText's `get_optimizer`.

It reads MaxText's configuration, its dimension numbers of Muon, and its logical axes.
"""

import flax.linen as nn
import jax
import optax
from flax import nnx
from maxtext.optimizers import optimizers
from maxtext.utils import muon_utils, sharding

import soap_optax


def get_optimizer(config, schedule, model, mesh, block_size=None):
    params = nnx.state(model, nnx.Param)
    with nn.logical_axis_rules(config.logical_axis_rules):
        shardings = nnx.as_pure(sharding.nnx_construct_named_sharding(params, mesh))
    tx = soap_optax.soap(
        schedule,
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        eps_root=config.adam_eps_root,
        mu_dtype=config.mu_dtype or None,
        weight_decay=config.adam_weight_decay,
        mask=optimizers.get_adamw_mask(config),
        dimension_numbers=muon_utils.get_muon_weight_dimension_numbers(model, config),
        params_sharding=shardings,
        block_size=block_size,
    )
    of_state = soap_optax.state_sharding(tx, nnx.as_pure(params), shardings)

    def init(params):  # MaxText looks for the sharding in a box around each array.
        box = lambda leaf, found: nnx.Variable(leaf, out_sharding=found)  # noqa: E731
        return jax.tree.map(box, nnx.as_pure(tx.init(params)), of_state)

    return optax.GradientTransformationExtraArgs(init, tx.update)
