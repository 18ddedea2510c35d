"""Parameters on a mesh: shardings of the state, trajectories, collectives, errors."""

import collections
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from flax import nnx
from jax import P
from jax.sharding import AxisType, NamedSharding

import soap_optax
from soap_optax import DimensionNumbers, state_sharding

STACK = DimensionNumbers((-2, -1))  # with batch axes, if any

# Parameters: shape, and sharding on a mesh with the axes d, x, y.
ALIGNED = {
    "matrix": ((16, 32), P("x", "y")),
    "layers": ((3, 16, 16), P(None, "y", "x")),
    "experts": ((8, 8, 4), P(("d", "y"), "x")),
    "partly": ((8, 16), P("x", None)),
    "vector": ((16,), P("y")),
}
UNBLOCKED = {
    "matrix": ((16, 24), P("x", "y")),
    "layers": ((3, 16, 8), P(None, ("x", "y"), None)),
    "experts": ((4, 8, 6), P(("d", "x"), "y")),
    "replicated": ((8, 6), P()),
    "vector": ((16,), P("y")),
}
CUT = {
    "matrix": ((16, 24), P("y", "x")),
    "other": ((24, 16), P(("x", "y"), None)),
    "aligned": ((16, 16), P("x", "y")),
    "replicated": ((16, 8), P()),
    "vector": ((16,), P("y")),
}
MESHES = {"1d": (1, 1, 8), "2d": (1, 2, 4), "3d": (2, 2, 2)}


def make_mesh(sizes, kind=AxisType.Auto):
    return jax.make_mesh(sizes, ("d", "x", "y"), axis_types=(kind,) * 3)


def shardings_of(parameters, mesh):
    return {name: NamedSharding(mesh, spec) for name, (_, spec) in parameters.items()}


def abstract(parameters, dtype=jnp.float32):
    return {
        name: jax.ShapeDtypeStruct(shape, dtype)
        for name, (shape, _) in parameters.items()
    }


def numbers(parameters):
    return {name: STACK if len(s) > 1 else None for name, (s, _) in parameters.items()}


def make_soap(parameters, mesh=None, **options):
    return soap_optax.soap(
        3e-3,
        dimension_numbers=numbers(parameters),
        params_sharding=mesh and shardings_of(parameters, mesh),
        **{"precondition_frequency": 5, **options},
    )


def gradients(parameters, step):
    return {
        name: training.normal(*shape, seed=100 * step + i, dtype=np.float64)
        for i, (name, (shape, _)) in enumerate(parameters.items())
    }


def compiled(tx, parameters, mesh, dtype=jnp.float32):
    """A step ahead of time, whose state may be overwritten."""
    params_sharding = shardings_of(parameters, mesh)
    shapes = abstract(parameters, dtype)
    sharding = state_sharding(tx, shapes, params_sharding)
    state = jax.eval_shape(tx.init, shapes)
    shapes, state = (
        jax.tree.map(lambda x, s: x.update(sharding=s), *pair)
        for pair in ((shapes, params_sharding), (state, sharding))
    )
    explicit = mesh.axis_types[0] == AxisType.Explicit
    out = None if explicit else (params_sharding, sharding)
    step = jax.jit(tx.update, donate_argnums=1, out_shardings=out)
    return step.lower(shapes, state, shapes).compile()


def collectives(text):
    """How many of each kind."""
    kinds = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-\\w+"
    return collections.Counter(re.findall(rf" ({kinds})(?:-start)?\(", text))


def decompositions(text):
    """The shapes of the QR decompositions."""
    return re.findall(r"= \((\S+?)\{[^=]*custom_call_target=\"[^\"]*geqrf", text)


# --- the same steps -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*blocks cut across shards")
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize(
    ("parameters", "options"),
    [
        (ALIGNED, {"block_size": 4}),
        (UNBLOCKED, {}),
        (CUT, {"block_size": 8, "stagger": True}),
    ],
    ids=["aligned", "unblocked", "cut"],
)
def test_the_trajectory_is_that_of_one_device(parameters, options, mesh, kind):
    mesh = make_mesh(MESHES[mesh], kind)
    params_sharding = shardings_of(parameters, mesh)
    alone = make_soap(parameters, weight_decay=0.1, **options)
    tx = make_soap(parameters, mesh, weight_decay=0.1, **options)
    params = gradients(parameters, 1000)
    sharding = state_sharding(tx, params, params_sharding)
    placed = jax.device_put(jax.tree.map(jnp.copy, params), params_sharding)
    state = jax.jit(tx.init, out_shardings=sharding)(placed)
    alone_state = jax.jit(alone.init)(params)

    def train(tx, donated):
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return jax.jit(step, donate_argnums=donated)

    step, alone_step = train(tx, (0, 1)), train(alone, ())
    for i in range(25):
        grads = gradients(parameters, i)
        placed, state = step(placed, state, jax.device_put(grads, params_sharding))
        params, alone_state = alone_step(params, alone_state, grads)
        for name in parameters:
            np.testing.assert_allclose(placed[name], params[name], rtol=0, atol=1e-10)
    jax.tree.map(
        lambda array, sharding: np.testing.assert_equal(
            array.sharding.is_equivalent_to(sharding, array.ndim), True
        ),
        *((placed, state), (params_sharding, sharding)),
    )
    assert int(state[0].refreshes) == (6 if options.get("stagger") else 5)
    assert not any(np.any(n) for n in jax.tree.leaves(state[0].skipped))
