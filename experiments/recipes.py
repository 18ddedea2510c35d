"""Optimizers of docs/recipes.md that are made of several transformations, and models.

Whoever imports this module can train with them: their names are in
`train_lm.OPTIMIZERS` and in `train_lm.PRESETS`.
"""

import dataclasses
from typing import Any

import jax
import optax
import train_lm
from jax.sharding import Mesh
from train_lm import Config, make_schedule

import soap_optax

# The options of the recipe for language models, beside Nesterov's momentum.
KL_SOAP: dict[str, Any] = {
    "precondition_frequency": 1,
    "factors": "kl",
    "basis": "current",
}


def make_soap_muon(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    """Divides momentum by the root of its second moment, and orthogonalizes that."""
    momentum = optax.chain(
        optax.trace(config.b1, nesterov=config.nesterov),
        optax.scale_by_rms(config.b2, bias_correction=True),
    )
    orthogonalize = optax.contrib.muon(
        make_schedule(config, config.learning_rate),
        beta=0.0,  # The momentum is that in the eigenbasis.
        nesterov=False,
        weight_decay=config.weight_decay,
        muon_weight_dimension_numbers=train_lm.muon_dimension_numbers(config.adam),
        consistent_rms=0.2,
    )
    return beside_adam(
        config, optax.chain(in_eigenbasis(config, mesh, momentum), orthogonalize)
    )


def make_splus(config: Config, mesh: Mesh | None) -> optax.GradientTransformation:
    """Takes the sign of momentum in the eigenbasis, scaled by the sizes of a matrix."""

    def by_sizes(update, param):
        del param
        return update * (2 / (update.shape[-2] + update.shape[-1]))

    momentum = optax.trace(config.b1, nesterov=config.nesterov)
    sign = optax.chain(momentum, optax.scale_by_sign())
    return beside_adam(
        config,
        optax.chain(
            in_eigenbasis(config, mesh, sign),
            optax.stateless_with_tree_map(by_sizes),
            optax.add_decayed_weights(config.weight_decay),
            optax.scale_by_learning_rate(make_schedule(config, config.learning_rate)),
        ),
    )


def make_soap_spheres(
    config: Config, mesh: Mesh | None
) -> optax.GradientTransformation:
    """SOAP whose matrices keep the norms that they start with."""
    options = train_lm.eigenbasis_options(config, mesh)
    soap = soap_optax.scale_by_soap(
        config.b1,
        config.b2,
        nesterov=config.nesterov,
        basis=config.basis,
        factorized=config.factorized,
        **options,
    )
    spheres = soap_optax.hyperball(
        make_schedule(config, config.learning_rate),
        adam_learning_rate=train_lm.adam_schedule(config),
        adam_weight_decay=config.weight_decay,
        dimension_numbers=options["dimension_numbers"],
    )
    return optax.chain(soap, spheres)


def in_eigenbasis(
    config: Config, mesh: Mesh | None, inner: optax.GradientTransformation
) -> optax.GradientTransformation:
    return soap_optax.in_eigenbasis(
        inner,
        shampoo_beta=config.b2,
        basis=config.basis,
        **train_lm.eigenbasis_options(config, mesh),
    )


def beside_adam(
    config: Config, of_matrices: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Leaves to AdamW what the trainer's patterns leave to it."""
    rest = optax.adamw(train_lm.adam_schedule(config), **train_lm.adamw_options(config))

    def labels(params):
        return jax.tree.map(
            lambda numbers: "adam" if numbers is None else "matrix",
            train_lm.matrices(config.adam)(params),
            is_leaf=train_lm.is_numbers,
        )

    return optax.partition({"matrix": of_matrices, "adam": rest}, labels)


# The tiny preset in other widths.
train_lm.PRESETS |= {
    f"width-{width}": dataclasses.replace(train_lm.PRESETS["tiny"], width=width)
    for width in (64, 256)
}
train_lm.OPTIMIZERS |= {
    "soap_muon": make_soap_muon,
    "splus": make_splus,
    "soap_spheres": make_soap_spheres,
}
