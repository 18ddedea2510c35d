"""Optimizers of docs/recipes.md that are made of several transformations, and models.

Whoever imports this module can train with them: their names are in
`train_lm.OPTIMIZERS` and in `train_lm.PRESETS`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
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
    scaled = soap_optax.scale_by_soap(
        config.b1,
        config.b2,
        nesterov=config.nesterov,
        basis=config.basis,
        factorized=config.factorized,
        **train_lm.eigenbasis_options(config, mesh),
    )
    schedule = make_schedule(config, config.learning_rate)
    return beside_adam(config, optax.chain(scaled, on_spheres(schedule)))


def on_spheres(learning_rate: optax.ScalarOrSchedule) -> optax.GradientTransformation:
    """Moves matrices W with updates U to R n(W - learning rate R n(U)).

    n divides by the Frobenius norm, and R is the norm of W. Axes before the last two
    count matrices. Source: arXiv 2606.16899.
    """

    def norm(x):
        return jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) + 1e-12

    return optax.chain(
        optax.stateless_with_tree_map(lambda u, p: u * (norm(p) / norm(u))),
        optax.scale_by_learning_rate(learning_rate),
        optax.stateless_with_tree_map(
            lambda u, p: (p + u) * (norm(p) / norm(p + u)) - p
        ),
    )


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
