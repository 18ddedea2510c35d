"""SOAP in Flax linen, Flax NNX and Equinox, saved and restored by Orbax."""

import equinox as eqx
import equinox.internal as eqxi
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import soap_optax

RNG = np.random.default_rng(0)
INPUTS = jnp.asarray(RNG.normal(size=(64, 6)), jnp.float32)
TARGETS = jnp.tanh(INPUTS @ jnp.asarray(RNG.normal(size=(6, 3)), jnp.float32))


def make_tx():
    return soap_optax.soap(0.02, b1=0.9, precondition_frequency=4)


def squared_error(outputs):
    return jnp.mean((outputs - TARGETS) ** 2)


class Mlp(nn.Module):
    """With metadata boxes around the kernels."""

    boxed: bool = False

    @nn.compact
    def __call__(self, x):
        kernel_init = nn.initializers.lecun_normal()
        if self.boxed:
            kernel_init = nn.with_partitioning(kernel_init, (None, "model"))
        x = nn.tanh(nn.Dense(16, kernel_init=kernel_init)(x))
        return nn.Dense(3, kernel_init=kernel_init)(x)


def linen_state(boxed=False):
    model = Mlp(boxed)
    params = model.init(jax.random.key(0), INPUTS)["params"]
    return TrainState.create(apply_fn=model.apply, params=params, tx=make_tx())


@jax.jit
def linen_step(state):
    def loss_fn(params):
        return squared_error(state.apply_fn({"params": params}, INPUTS))

    loss, grads = jax.value_and_grad(loss_fn)(state.params)
    return state.apply_gradients(grads=grads), loss


@pytest.mark.parametrize("boxed", [False, True])
def test_linen_train_state(boxed):
    state = linen_state(boxed)
    losses = []
    for _ in range(50):
        state, loss = linen_step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_linen_metadata_stays_with_the_moments():
    state = linen_state(boxed=True)
    state, _ = linen_step(state)
    soap = state.opt_state[0]
    assert isinstance(soap.inner_state.mu["Dense_0"]["kernel"], nn.Partitioned)
    specs = nn.get_partition_spec(jax.eval_shape(lambda: state.opt_state))
    assert specs[0].inner_state.nu["Dense_0"]["kernel"] == jax.P(None, "model")
    assert set(jax.tree.leaves(specs[0].factors)) == {jax.P()}


def test_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(6, 16, rngs=rngs)
            self.out = nnx.Linear(16, 3, rngs=rngs)

        def __call__(self, x):
            return self.out(nnx.tanh(self.hidden(x)))

    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, make_tx(), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: squared_error(model(INPUTS))  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(50)]
    assert losses[-1] < 0.2 * losses[0]


def test_equinox():
    model = eqx.nn.MLP(6, 3, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    tx = make_tx()
    opt_state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, opt_state):
        loss_fn = lambda model: squared_error(jax.vmap(model)(INPUTS))  # noqa: E731
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, opt_state = tx.update(grads, opt_state, params)
        return eqx.apply_updates(model, updates), opt_state, loss

    losses = []
    for _ in range(50):
        model, opt_state, loss = step(model, opt_state)
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize(
    "container",
    [
        lambda w, b: (w, b),
        lambda w, b: [w, {"b": b}],
        lambda w, b: {"layer": {0: w, 1: b}},
        lambda w, b: {"w": w, "none": None, "b": b},
        lambda w, b: w,
    ],
)
def test_containers(container):
    params = container(jnp.ones((4, 3)), jnp.ones(3))
    tx = make_tx()
    state = tx.init(params)
    updates, new_state = jax.jit(tx.update)(params, state, params)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    assert jax.tree.structure(new_state) == jax.tree.structure(state)


def run(state, steps):
    for _ in range(steps):
        state, _ = linen_step(state)
    return state


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def saved_part(state):
    return {"step": state.step, "params": state.params, "opt_state": state.opt_state}


@pytest.mark.parametrize("name", ["soap", "shampoo", "in_eigenbasis"])
def test_the_whole_model_as_params(name):
    """Updates have None where the model has functions, numbers and frozen arrays."""
    model = eqx.nn.MLP(6, 3, 16, 1, activation=jnp.tanh, key=jax.random.key(0))
    frozen = lambda model: model.layers[0].bias  # noqa: E731
    is_trained = jax.tree.map(eqx.is_inexact_array, model)
    is_trained = eqx.tree_at(frozen, is_trained, replace=False)
    params = eqx.filter(model, is_trained)
    makes = {
        "soap": lambda: soap_optax.soap(1e-2, weight_decay=0.1),
        "shampoo": lambda: soap_optax.shampoo(1e-2, weight_decay=0.1),
        "in_eigenbasis": lambda: soap_optax.in_eigenbasis(
            optax.add_decayed_weights(0.1), basis="current"
        ),
    }
    tx = makes[name]()
    grads = jax.tree.map(lambda p: jnp.asarray(RNG.normal(size=p.shape)), params)
    state = tx.init(params)
    for _ in range(2):
        updates, new_state = tx.update(grads, state, model)
        expected, state = tx.update(grads, state, params)
        assert_equal(updates, expected)
        assert_equal(new_state, state)
    assert updates.layers[0].bias is None


def test_trees_that_could_be_called():
    """An Equinox module of dimension numbers, or of shardings, is read, not called."""
    model = eqx.nn.Linear(6, 4, key=jax.random.key(0))
    numbers = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        model,
        replace=(soap_optax.DimensionNumbers((1,)), None),
    )
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    shardings = jax.tree.map(lambda _: replicated, eqx.filter(model, eqx.is_array))
    tx = soap_optax.scale_by_soap(dimension_numbers=numbers, params_sharding=shardings)
    params = eqx.filter(model, eqx.is_array)
    factors = tx.init(params).factors
    assert [f.shape for f in factors["weight"]] == [(4, 6, 6)]
    assert factors["bias"] == (None,)
    sharding = soap_optax.state_sharding(tx, params, shardings)
    assert all(s.mesh == mesh for s in jax.tree.leaves(sharding))


@pytest.mark.parametrize("grafting", ["soap", "adam", None])
def test_functions_that_are_trees(grafting):
    """Optimistix makes trees of all closures in an optimizer, which it minimises by."""
    params = {"w": jnp.ones((3, 4, 2)), "b": jnp.ones(3)}
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.NamedSharding(mesh, jax.P())
    numbers = {"w": soap_optax.DimensionNumbers((1, 2)), "b": None}
    options = {
        "dimension_numbers": lambda params: {name: numbers[name] for name in params},
        "params_sharding": lambda params: jax.tree.map(lambda _: replicated, params),
    }
    if grafting == "soap":
        tx = soap_optax.soap(1e-2, **options)
    else:
        tx = soap_optax.shampoo(1e-2, grafting=grafting, **options)
    of_trees = eqxi.closure_to_pytree(tx)
    assert jax.tree.leaves(of_trees) != jax.tree.leaves(tx)
    states = [optimizer.init(params) for optimizer in (tx, of_trees)]
    rng = np.random.default_rng(1)
    for _ in range(3):
        grads = jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape)), params)
        expected, states[0] = tx.update(grads, states[0], params)
        updates, states[1] = of_trees.update(grads, states[1], params)
        assert_equal(updates, expected)
        assert_equal(*states)
    assert np.abs(updates["w"]).max() > 1e-4


def test_an_nnx_parameter_that_is_called_value():
    """The name of a parameter is not that of the box in which NNX keeps it."""

    class Model(nnx.Module):
        def __init__(self):
            self.value = nnx.Param(jnp.asarray(RNG.normal(size=(4, 3))))

    model = Model()
    optimizer = nnx.Optimizer(model, soap_optax.soap(1e-2), wrt=nnx.Param)
    before = np.asarray(model.value[...])
    for _ in range(2):
        grads = nnx.grad(lambda model: jnp.sum(model.value[...] ** 2))(model)
        optimizer.update(model, grads)
    assert np.abs(model.value[...] - before).min() > 1e-4
    assert list(soap_optax.diagnostics(optimizer.opt_state)) == ["value"]


def test_two_parameters_of_one_name():
    with pytest.raises(ValueError, match=r"got \[0\]\['w'\] and \[0\]\.w"):
        soap_optax.soap(1e-3).init([_Both(jnp.ones(3), jnp.ones(2))])


@jax.tree_util.register_pytree_with_keys_class
class _Both:
    """A node whose children have one name, as an attribute and as a key."""

    def __init__(self, key, attribute):
        self.children = (key, attribute)

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.DictKey("w"), jax.tree_util.GetAttrKey("w"))
        return tuple(zip(keys, self.children, strict=True)), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@pytest.mark.parametrize("after", [6, 8])
def test_orbax_resumes_bit_for_bit(tmp_path, after):
    """After 6 steps, between refreshes, and after 8."""
    state = run(linen_state(), after)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", saved_part(state))
    fresh = linen_state()
    with ocp.StandardCheckpointer() as checkpointer:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved_part(fresh))
        restored = fresh.replace(**checkpointer.restore(tmp_path / "state", target))
    assert_equal(restored.opt_state, state.opt_state)
    assert_equal(saved_part(run(restored, 7)), saved_part(run(state, 7)))


def test_flax_serialization_resumes_bit_for_bit():
    state = run(linen_state(), 6)
    data = flax.serialization.to_bytes(saved_part(state))
    fresh = linen_state()
    restored = flax.serialization.from_bytes(saved_part(fresh), data)
    restored = fresh.replace(**restored)
    assert_equal(saved_part(run(restored, 7)), saved_part(run(state, 7)))


def test_donated_buffers():
    tx = make_tx()
    params = {"w": jnp.ones((4, 3))}
    grads = [{"w": jnp.asarray(RNG.normal(size=(4, 3)))} for _ in range(10)]

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def trajectory(step):
        x, state = jax.tree.map(jnp.copy, params), tx.init(params)
        for g in grads:
            x, state = step(x, state, jax.tree.map(jnp.copy, g))
        return x, state

    donating = jax.jit(step, donate_argnums=(0, 1))
    assert_equal(trajectory(donating), trajectory(jax.jit(step)))
