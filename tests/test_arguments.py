"""Bad input is refused, naming argument (or parameter), rule and value."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import soap_optax
from soap_optax import DimensionNumbers


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", float("-inf")),
        ("learning_rate", float("nan")),
        ("learning_rate", "fast"),
        ("b1", 1.0),
        ("b1", -0.1),
        ("b1", min),
        ("b2", 1.5),
        ("b2", None),
        ("eps", -1e-8),
        ("eps", float("inf")),
        ("weight_decay", -0.1),
        ("eps_root", -1e-8),
        ("nesterov", 1.5),
        ("factorized", "yes"),
        ("shampoo_beta", 1.0),
        ("shampoo_beta", -1),
        ("precondition_frequency", 0),
        ("precondition_frequency", 2.5),
        ("precondition_frequency", True),
        ("precondition_frequency", "often"),
        ("precondition_frequency", None),
        ("max_precond_dim", -1),
        ("max_precond_dim", 2.5),
        ("merge_dims", "yes"),
        ("precondition_1d", 2),
        ("one_sided", None),
        ("block_size", 1),
        ("block_size", 0),
        ("block_size", 12.5),
        ("basis", "next"),
        ("refresh", "svd"),
        ("initial_basis", None),
        ("mu_dtype", jnp.int32),
        ("mu_dtype", "half precision"),
        ("precond_dtype", jnp.complex64),
        ("rcond", -1.0),
        ("rcond", 2.0),
        ("clip_update_rms", 0.0),
        ("clip_update_rms", -1),
        ("clip_update_rms", float("inf")),
        ("precision", "exact"),
        ("refresh_precision", "exact"),
        ("dimension_numbers", "rows"),
        ("dimension_numbers", 3),
        ("params_sharding", 3),
        ("merge_dims", np.array([True, False])),
        ("precondition_frequency", np.int64(0)),
    ],
)
def test_arguments(argument, value):
    arguments = {"learning_rate": 1e-3, argument: value}
    with pytest.raises(ValueError, match=f"^{argument} must be ") as error:
        soap_optax.soap(**arguments)
    assert repr(value) in str(error.value)


def test_injected_frequency():
    tx = optax.inject_hyperparams(soap_optax.soap)(1e-3, precondition_frequency=0)
    with pytest.raises(ValueError, match="precondition_frequency must be an integer"):
        tx.init(jnp.ones((3, 2)))


def test_inner():
    with pytest.raises(ValueError, match=r"^inner must be an optax"):
        soap_optax.in_eigenbasis(optax.scale_by_adam)


@pytest.mark.parametrize("name", ["first_moments", "coordinatewise", "second_moments"])
@pytest.mark.parametrize("value", ["mu", b"mu", 3, None, (1,)])
def test_words(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a sequence of names"):
        soap_optax.in_eigenbasis(optax.scale_by_adam(), **{name: value})


@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        ("soap", {"learning_rate": 1e-3}, "blok_size"),
        ("soap", {"learning_rate": 1e-3}, "power"),
        ("scale_by_soap", {}, "learning_rate"),
        ("shampoo", {"learning_rate": 1e-3}, "basis"),
        ("scale_by_shampoo", {}, "clip_update_rms"),
        ("in_eigenbasis", {"inner": optax.identity()}, "b1"),
    ],
)
def test_unknown_options(function, arguments, name):
    message = rf"^{function}\(\) got an unexpected keyword argument '{name}'"
    with pytest.raises(TypeError, match=message):
        getattr(soap_optax, function)(**arguments, **{name: 4})


def test_the_order_is_that_of_optax():
    """A call of `optax.adamw` with positional arguments means what it meant there."""

    def positional(function):
        parameters = inspect.signature(function).parameters.values()
        return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]

    for function in (soap_optax.soap, soap_optax.shampoo):
        assert positional(function) == positional(optax.adamw)
    for function in (soap_optax.scale_by_soap, soap_optax.scale_by_shampoo):
        assert positional(function) == positional(optax.scale_by_adam)


def test_a_negative_rate_ascends_as_in_optax():
    params, grads = {"b": jnp.ones(3)}, {"b": jnp.arange(3.0)}
    options = {"b1": 0.9, "b2": 0.99, "weight_decay": 0.0}
    updates = []
    for make in (soap_optax.soap, optax.adamw):
        tx = make(-1e-2, **options)
        state = tx.init(params)
        for _ in range(2):  # The first step of SOAP does not move anything.
            step, state = tx.update(grads, state, params)
        updates.append(step["b"])
    assert np.all(updates[0][1:] > 0) and np.all(updates[1][1:] > 0)


@pytest.mark.parametrize("mask", [None, {"w": True}])
def test_no_decay_and_decay_have_the_same_state(mask):
    params = {"w": jnp.ones((3, 2))}
    states = [
        soap_optax.soap(1e-3, weight_decay=decay, mask=mask).init(params)
        for decay in (0.0, 0.1)
    ]
    assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])


@pytest.mark.parametrize("zero", [0, 0.0, np.float32(0), np.array(0.0)])
def test_no_decay_needs_no_parameters(zero):
    params = {"w": jnp.ones((3, 2))}
    tx = soap_optax.soap(1e-3, weight_decay=zero)
    tx.update(params, tx.init(params))


def test_a_traced_decay_of_zero():
    params = {"w": jnp.ones((3, 2))}

    @jax.jit
    def update(decay):
        tx = soap_optax.soap(1e-3, weight_decay=decay)
        return tx.update(params, tx.init(params), params)[0]["w"]

    np.testing.assert_array_equal(update(0.0), 0)  # in the first step
    np.testing.assert_allclose(update(0.5), -0.5e-3, rtol=1e-6)


@pytest.mark.parametrize(
    "name", ["b1", "eps", "shampoo_beta", "precondition_frequency"]
)
def test_traced_arguments_pass(name):
    @jax.jit
    def update(value):
        tx = soap_optax.scale_by_soap(**{name: value})
        return tx.update(jnp.ones((3, 2)), tx.init(jnp.ones((3, 2))))[0]

    assert np.isfinite(update(3 if name == "precondition_frequency" else 0.5)).all()


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32, jnp.bool_])
def test_parameters_that_are_not_real_floating_point(dtype):
    params = {"layer": {"w": jnp.ones((3, 2), dtype)}}
    message = r"\['layer'\]\['w'\] must be real floating point, got "
    tx = soap_optax.soap(1e-3)
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    state = tx.init({"layer": {"w": jnp.ones((3, 2))}})
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"w": DimensionNumbers((0, 2))}, r"\['w'\]: dimension_numbers must name axes"),
        (
            {"w": DimensionNumbers((0, 0))},
            r"\['w'\]: dimension_numbers must name an axis",
        ),
        (DimensionNumbers((0, 5)), r"\['w'\]: dimension_numbers must name axes"),
        ({"v": None}, "dimension_numbers must be a tree with the structure"),
        ({"w": 3}, "dimension_numbers must be DimensionNumbers, .* got 3"),
        ({"w": (None, None)}, "dimension_numbers must be a tree with the structure"),
        (
            {"w": DimensionNumbers((0.5,))},
            "dimension_numbers must name axes by integers",
        ),
        ({"w": DimensionNumbers(0)}, "dimension_numbers must name axes by integers"),
    ],
)
def test_dimension_numbers(numbers, message):
    tx = soap_optax.soap(1e-3, dimension_numbers=numbers)
    with pytest.raises(ValueError, match=message):
        tx.init({"w": jnp.ones((3, 2))})


@pytest.mark.parametrize(
    ("updates", "name"),
    [
        ({"w": jnp.ones((3, 3)), "b": jnp.ones(2)}, r"\['w'\]"),
        ({"other": jnp.ones((3, 2)), "b": jnp.ones(2)}, r"\['other'\]"),
        ({"w": {"deeper": jnp.ones((3, 2))}, "b": jnp.ones(2)}, r"\['w'\]\['deeper'\]"),
    ],
)
def test_updates_unlike_the_parameters(updates, name):
    tx = soap_optax.scale_by_soap()
    state = tx.init({"w": jnp.ones((3, 2)), "b": jnp.ones(2)})
    with pytest.raises(ValueError, match=f"^{name} must have the shape"):
        tx.update(updates, state)


@pytest.mark.parametrize("jit", [False, True])
def test_updates_with_another_shape_and_no_factor(jit):
    """Where Adam would broadcast, or fail without a name."""
    tx = soap_optax.scale_by_soap()
    state = tx.init({"w": jnp.ones((3, 2)), "b": jnp.ones(1)})
    update = jax.jit(tx.update) if jit else tx.update
    message = (
        r"^\['b'\] must have the shape .* first moment of shape \(2,\), got \(1,\)"
    )
    with pytest.raises(ValueError, match=message):
        update({"w": jnp.ones((3, 2)), "b": jnp.ones(2)}, state)


@pytest.mark.parametrize("missing", ["w", "b"])
def test_updates_without_a_parameter(missing):
    tx = soap_optax.scale_by_soap()
    updates = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = tx.init(updates)
    del updates[missing]
    message = rf"^updates must have every parameter .* got none for \['{missing}'\]"
    with pytest.raises(ValueError, match=message):
        tx.update(updates, state)


def test_params_unlike_the_updates():
    tx = soap_optax.scale_by_soap()
    updates = {"w": jnp.ones((3, 2)), "b": jnp.ones(2)}
    state = tx.init(updates)
    message = r"^\['w'\] must have the shape of its parameter, \(3, 3\), in the updates"
    with pytest.raises(ValueError, match=message):
        tx.update(updates, state, {"w": jnp.ones((3, 3)), "b": jnp.ones(2)})
    message = "^params must have the structure of the updates; .*'b'"
    with pytest.raises(ValueError, match=message):
        tx.update(updates, state, {"w": jnp.ones((3, 2))})


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"block_size": 4}, r"\(2, 2, 4, 4\)"),
        ({"one_sided": True}, "None"),
        ({"max_precond_dim": 4}, "None"),
        ({"dimension_numbers": DimensionNumbers((1,))}, r"\(8, 8, 8\)"),
    ],
)
def test_state_of_another_configuration(options, wanted):
    params = {"w": jnp.ones((8, 8))}
    state = soap_optax.scale_by_soap().init(params)
    with pytest.raises(ValueError, match=rf"^\['w'\] must have .* options .*{wanted}"):
        soap_optax.scale_by_soap(**options).update(params, state)


def test_state_with_another_eigenbasis():
    tx, params = soap_optax.scale_by_soap(), {"w": jnp.ones((8, 8))}
    state = tx.init(params)
    state = state._replace(eigenbases={"w": (jnp.eye(8), jnp.eye(4))})
    with pytest.raises(ValueError, match=r"^\['w'\] must have .* needs eigenbases of"):
        tx.update(params, state)


def test_lists_and_python_numbers_are_parameters():
    tx = soap_optax.soap(0.1, basis="current")
    updates, _ = tx.update([1.0, 2.0], tx.init([3.0, 4.0]), [3.0, 4.0])
    np.testing.assert_allclose(jnp.stack(updates), -0.1, rtol=1e-6)


# --- states of others -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("tx", "other", "message"),
    [
        (
            soap_optax.scale_by_soap(),
            soap_optax.scale_by_soap(factorized=True),
            r"the inner state must have the arrays that init makes .*\.nu",
        ),
        (
            soap_optax.scale_by_soap(factorized=True),
            soap_optax.scale_by_soap(),
            r"the inner state must have the arrays that init makes .*\.nu",
        ),
        (
            soap_optax.in_eigenbasis(optax.scale_by_adam()),
            soap_optax.in_eigenbasis(optax.scale_by_lion()),
            r"the inner state must have the arrays that init makes .*\.nu",
        ),
        (
            soap_optax.scale_by_soap(),
            soap_optax.scale_by_shampoo(),
            "state must be of type EigenbasisState, as init makes it, got",
        ),
        (
            soap_optax.scale_by_shampoo(),
            optax.scale_by_adam(),
            "state must be of type ShampooState, as init makes it, got",
        ),
        (
            soap_optax.hyperball(0.1),
            optax.scale_by_adam(),
            "state must be of type HyperballState, as init makes it, got",
        ),
    ],
)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_the_state_of_another_transformation(tx, other, message, transform):
    params = {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}
    state, update = other.init(params), transform(tx.update)
    with pytest.raises(ValueError, match=message):
        for _ in range(2):  # The first step of the published order is no step of Adam.
            _, state = update(params, state, params)


def test_a_schedule_cannot_stagger():
    with pytest.raises(ValueError, match="must be no schedule if stagger=True"):
        soap_optax.soap(0.1, stagger=True, precondition_frequency=lambda count: 2)
