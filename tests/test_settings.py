"""Settings of parameters without factors, sizes of updates, and matrices by name."""

import functools
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import AxisType, NamedSharding
from training import normal

import soap_optax
from soap_optax import DimensionNumbers

PARAMS = {
    "embed": normal(6, 4),
    "layers": {"w": normal(3, 4, 5), "bias": normal(3, 5)},
    "head": normal(4, 6),
}
MATRICES = soap_optax.matrices(exclude=("embed", "head", "bias"))
GRADIENTS = [
    jax.tree.map(lambda x, i=i: normal(*x.shape, seed=i), PARAMS) for i in range(5)
]
MAKERS = {
    "soap": soap_optax.soap,
    "factorized": lambda *a, **k: soap_optax.soap(*a, factorized=True, **k),
    "kl, current": lambda *a, **k: soap_optax.soap(
        *a, factors="kl", basis="current", **k
    ),
    "shampoo": soap_optax.shampoo,
    "shampoo without grafting": lambda *a, **k: soap_optax.shampoo(
        *a, grafting=None, **k
    ),
}
OF_OTHERS = {
    "adam_learning_rate": optax.linear_schedule(0.02, 0.01, 4),
    "adam_b1": 0.8,
    "adam_b2": 0.97,
    "adam_eps": 1e-3,
    "adam_weight_decay": 0.3,
}


def run(tx, params=PARAMS):
    state, update = tx.init(params), jax.jit(tx.update)
    trajectory = []
    for gradient in GRADIENTS:
        updates, state = update(gradient, state, params)
        params = optax.apply_updates(params, updates)
        trajectory.append(updates)
    return trajectory, state


@functools.cache
def run_once(make, *arguments, **options):
    """The trajectory of an optimizer that several tests compare with."""
    return run(make(*arguments, **options))[0]


@functools.cache
def made(make, *arguments, **options):
    """Makes an optimizer once, so that its step is compiled once."""
    return make(*arguments, **options)


def assert_same(actual, expected, rtol=1e-6):
    """Other constants can make another program, which rounds otherwise."""

    def one(a, b):
        np.testing.assert_allclose(a, b, rtol, 1e-8)

    jax.tree.map(one, actual, expected)


def others(tree):
    return {"embed": tree["embed"], "head": tree["head"], "b": tree["layers"]["bias"]}


# --- settings of parameters without factors ------------------------------------------


@pytest.mark.parametrize("make", cases.named(MAKERS, "soap", "shampoo"))
@pytest.mark.parametrize("nesterov", [*cases.slow(False), True])
def test_parameters_without_factors_are_those_of_adamw(make, nesterov):
    """Matrices do not notice."""
    options = {"dimension_numbers": MATRICES, "nesterov": nesterov, "weight_decay": 0.1}
    if make is soap_optax.soap:
        options["basis"] = "current"
    actual, _ = run(make(0.03, **options, **OF_OTHERS))
    if make is soap_optax.shampoo:  # It grafts with the same epsilon.
        options["adam_eps"] = OF_OTHERS["adam_eps"]
    plain, _ = run(make(0.03, **options))
    adamw = optax.adamw(
        OF_OTHERS["adam_learning_rate"],
        0.8,
        0.97,
        1e-3,
        weight_decay=0.3,
        nesterov=nesterov,
    )
    if make is not MAKERS["factorized"]:  # Its published order has no first update.
        expected, _ = run(adamw)
        for ours, theirs in zip(actual, expected, strict=True):
            assert_same(others(ours), others(theirs))
    for ours, theirs in zip(actual, plain, strict=True):
        assert_same(ours["layers"]["w"], theirs["layers"]["w"])
    assert np.abs(actual[-1]["head"] - plain[-1]["head"]).max() > 1e-3


@pytest.mark.parametrize(
    ("make", "name"),
    cases.some(
        [
            (make, name)
            for make in (soap_optax.soap, soap_optax.shampoo)
            for name in OF_OTHERS
            if (make, name) != (soap_optax.shampoo, "adam_eps")  # It also grafts.
        ],
        [(soap_optax.soap, "adam_eps"), (soap_optax.shampoo, "adam_learning_rate")],
    ),
)
def test_each_setting_alone(make, name):
    """A setting that equals that of the matrices changes nothing."""
    values = {"learning_rate": 0.03, "b1": 0.9, "b2": 0.98, "weight_decay": 0.1}
    values["eps"] = 1e-4
    equal = dict(values)
    if make is soap_optax.shampoo:
        equal["adam_eps"] = values["adam_eps"] = 1e-5
    plain = run_once(make, **values, dimension_numbers=MATRICES)
    own = name.removeprefix("adam_")
    equal[name] = values.get(name, values[own])
    same, _ = run(make(**equal, dimension_numbers=MATRICES))
    assert_same(same, plain, rtol=1e-6)
    changed, _ = run(make(**{**equal, name: 0.5}, dimension_numbers=MATRICES))
    assert_same(changed[-1]["layers"]["w"], plain[-1]["layers"]["w"])
    assert np.abs(changed[-1]["head"] - plain[-1]["head"]).max() > 1e-5


def test_settings_that_are_injected():
    """Schedules give the values of each step, and the state has them."""
    tx = optax.inject_hyperparams(
        soap_optax.soap, static_args=("dimension_numbers", "precondition_frequency")
    )(0.03, dimension_numbers=MATRICES, **OF_OTHERS)
    plain = soap_optax.soap(0.03, dimension_numbers=MATRICES, **OF_OTHERS)
    actual, state = run(tx)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, 1e-5, 1e-6), actual, run(plain)[0]
    )
    assert state.hyperparams["adam_b1"] == np.float32(0.8)
    assert "adam_learning_rate" in state.hyperparams


def test_the_state_has_the_structure_that_it_has_without_settings():
    """Settings of Adam can change between runs; only rates and decays have a state."""
    plain = soap_optax.soap(0.03).init(PARAMS)
    of_adam = {"adam_b1": 0.8, "adam_b2": 0.97, "adam_eps": 1e-3}
    with_settings = soap_optax.soap(0.03, **of_adam).init(PARAMS)
    assert jax.tree.structure(plain) == jax.tree.structure(with_settings)


@pytest.mark.parametrize("make", [soap_optax.soap, soap_optax.shampoo])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("adam_b1", 1.0),
        ("adam_b2", -0.1),
        ("adam_eps", -1.0),
        ("adam_weight_decay", -1.0),
        ("adam_learning_rate", "fast"),
        ("update_rms", 0.0),
    ],
)
def test_bad_settings(make, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be .*, got {value!r}"):
        make(0.1, **{name: value})


# --- sizes of updates ----------------------------------------------------------------


@pytest.mark.parametrize("make", cases.named(MAKERS, "soap", "shampoo"))
@pytest.mark.parametrize("block_size", [*cases.slow(None), 2])
@pytest.mark.parametrize("scale", [1e-25, *cases.slow(1.0), 1e8])
def test_update_rms(make, block_size, scale):
    """Each block has the size, and the direction that it has without it."""
    params = {"w": jnp.zeros((4, 6)), "v": jnp.zeros(3)}
    grads = [
        {"w": scale * normal(4, 6, seed=i), "v": normal(3, seed=i)} for i in (0, 1)
    ]

    def second(**options):
        tx = made(make, -1.0, block_size=block_size, eps=1e-30, **options)
        state = tx.init(params)
        for gradient in grads:
            updates, state = jax.jit(tx.update)(gradient, state, params)
        return updates

    actual, plain = second(update_rms=0.2), second()
    assert_same(actual["v"], plain["v"])
    size = block_size or 100

    def blocks(array):
        rows, columns = min(size, 4), min(size, 6)
        return np.float64(array).reshape(4 // rows, rows, 6 // columns, columns)

    ours, theirs = blocks(actual["w"]), blocks(plain["w"])
    rms = lambda x: np.sqrt(np.mean(x**2, axis=(1, 3), keepdims=True))  # noqa: E731
    np.testing.assert_allclose(rms(ours), 0.2, rtol=1e-5)
    np.testing.assert_allclose(ours / 0.2, theirs / rms(theirs), rtol=1e-4, atol=1e-5)


def test_update_rms_comes_in_the_place_of_a_bound():
    sizes = {"update_rms": 0.2, "clip_update_rms": 0.01, "basis": "current"}
    tx = soap_optax.scale_by_soap(**sizes)
    w = normal(4, 3)
    updates, _ = jax.jit(tx.update)(w, tx.init(w))
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(updates))), 0.2, rtol=1e-5)


@pytest.mark.parametrize("value", [None, *cases.slow(1e-8)])
def test_the_default_epsilon_of_adam(value):
    given = run_once(soap_optax.shampoo, 0.1, adam_eps=value)
    default = run_once(soap_optax.shampoo, 0.1)
    jax.tree.map(np.testing.assert_array_equal, given, default)


def test_update_rms_of_nothing():
    """Zero updates stay zero, and gradients that are not finite hurt no factor."""
    tx = soap_optax.scale_by_soap(update_rms=0.2)
    w, update = jnp.zeros((4, 3)), jax.jit(tx.update)
    updates, state = update(w, tx.init(w))
    np.testing.assert_array_equal(updates, 0)
    updates, state = update(w, state)
    np.testing.assert_array_equal(updates, 0)
    updates, state = update(w.at[0, 0].set(jnp.nan), state)
    assert all(np.isfinite(f).all() for f in jax.tree.leaves(state.factors))


def test_update_rms_of_aligned_blocks_needs_no_communication():
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    sharding = {"w": NamedSharding(mesh, jax.P("x", "y"))}
    tx = soap_optax.scale_by_soap(
        block_size=4, update_rms=0.2, params_sharding=sharding, initial_basis="identity"
    )
    params = {"w": jax.device_put(normal(8, 16), sharding["w"])}
    placed = soap_optax.state_sharding(tx, params, sharding)
    state = jax.jit(tx.init, out_shardings=placed)(params)
    shardings = {
        "in_shardings": (sharding, placed),
        "out_shardings": (sharding, placed),
    }
    text = jax.jit(tx.update, **shardings).lower(params, state).compile().as_text()
    assert not re.findall(r"all-(?:gather|reduce|to-all)|collective-permute", text)


# --- matrices by name ----------------------------------------------------------------

LAST_TWO = DimensionNumbers((-2, -1))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"embed", "layers/w", "layers/bias", "head"}),
        ({"exclude": "bias"}, {"embed", "layers/w", "head"}),
        ({"exclude": ("^embed$", "head")}, {"layers/w", "layers/bias"}),
        ({"include": "layers/"}, {"layers/w", "layers/bias"}),
        ({"include": ["layers"], "exclude": ["bias"]}, {"layers/w"}),
    ],
)
def test_matrices(arguments, expected):
    numbers = soap_optax.matrices(**arguments)(PARAMS)
    flat = {
        "embed": numbers["embed"],
        "head": numbers["head"],
        "layers/w": numbers["layers"]["w"],
        "layers/bias": numbers["layers"]["bias"],
    }
    assert {name for name, n in flat.items() if n == LAST_TWO} == expected
    assert all(n in (LAST_TWO, None) for n in flat.values())


def test_matrices_are_the_last_two_axes():
    tx = soap_optax.scale_by_soap(dimension_numbers=MATRICES)
    shapes = jax.tree.map(jnp.shape, tx.init(PARAMS).factors)
    assert shapes["layers"]["w"] == ((3, 4, 4), (3, 5, 5))
    assert jax.tree.leaves(shapes["head"]) == []


def test_vectors_are_no_matrices():
    assert soap_optax.matrices()({"v": jnp.ones(3), "s": jnp.ones([])}) == {
        "v": None,
        "s": None,
    }


@pytest.mark.parametrize("box", [nn.Partitioned, nn.LogicallyPartitioned])
def test_names_do_not_have_the_value_of_boxes(box):
    params = {"head": box(jnp.ones((4, 3)), (None, None)), "w": jnp.ones((4, 3))}
    numbers = soap_optax.matrices(exclude="^head$")
    tx = soap_optax.scale_by_soap(dimension_numbers=numbers)
    shapes = jax.tree.map(jnp.shape, tx.init(params).factors)
    assert shapes["w"] == ((4, 4), (3, 3)) and jax.tree.leaves(shapes["head"]) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"exclude": "unembed"},
            r"exclude must be patterns that match one of .*"
            r"layers/bias.*, got 'unembed'",
        ),
        ({"include": ("w", "x")}, r"include must be .*embed.*, got 'x'"),
    ],
)
def test_a_pattern_that_matches_nothing(arguments, message):
    tx = soap_optax.soap(0.1, dimension_numbers=soap_optax.matrices(**arguments))
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_matrices_are_no_schedule():
    make = optax.inject_hyperparams(soap_optax.soap)
    tx = make(0.1, dimension_numbers=soap_optax.matrices())
    with pytest.raises(ValueError, match=r"static_args=\('dimension_numbers',\)"):
        tx.init(PARAMS)


@pytest.mark.parametrize("pattern", ["(", 3, ["w", None]])
def test_what_is_no_pattern(pattern):
    with pytest.raises(ValueError, match=r"exclude must be a regular expression"):
        soap_optax.matrices(exclude=pattern)


def test_matrices_for_muon():
    """Muon hides the parameters of its Adam where it asks for the numbers again."""

    def numbers(params):
        return jax.tree.map(
            lambda n: n and optax.contrib.MuonDimensionNumbers(*n.factor_axes),
            MATRICES(params),
            is_leaf=lambda n: n is None or isinstance(n, DimensionNumbers),
        )

    muon = optax.contrib.muon(0.1, muon_weight_dimension_numbers=numbers)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(run(muon)))


def test_matrices_in_a_partition():
    """Patterns may match what another optimizer has, and what is frozen."""
    labels = {"embed": "adam", "layers": {"w": "soap", "bias": "soap"}, "head": "soap"}
    soap = soap_optax.soap(0.1, dimension_numbers=MATRICES)
    tx = optax.partition({"soap": soap, "adam": optax.adam(0.1)}, labels)
    own = run(tx)[0][-1]["layers"]["w"]
    np.testing.assert_allclose(own, run(soap)[0][-1]["layers"]["w"], rtol=1e-5)
    labels = {"embed": "adam", "layers": "adam", "head": "soap"}
    numbers = soap_optax.matrices(exclude="layers/bias")
    soap = soap_optax.soap(0.1, dimension_numbers=numbers)
    _, state = run(optax.partition({"soap": soap, "adam": optax.adam(0.1)}, labels))
    [of_head] = jax.tree.leaves(
        soap_optax.diagnostics(state), is_leaf=lambda node: isinstance(node, tuple)
    )
    assert len(of_head) == 2
    frozen = {**PARAMS, "embed": None}
    assert MATRICES(frozen) == {**MATRICES(PARAMS), "embed": None}
