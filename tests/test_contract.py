"""What optax asks of every optimizer, on matrices and 3-D tensors as well."""

import functools
import itertools
import logging
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import soap_optax
from soap_optax.refresh import _stacks

OPTIMIZERS = {
    "soap": lambda **kw: soap_optax.soap(1e-2, **kw),
    "current": lambda **kw: soap_optax.soap(
        1e-2, basis="current", initial_basis="identity", **kw
    ),
    "blocks": lambda **kw: soap_optax.soap(1e-2, block_size=2, **kw),
    "factorized": lambda **kw: soap_optax.soap(
        1e-2, factorized=True, factors="kl", **kw
    ),
    "shampoo": lambda **kw: soap_optax.shampoo(1e-2, **kw),
    "lion": lambda **kw: optax.chain(
        soap_optax.in_eigenbasis(optax.scale_by_lion(), **kw), optax.scale(-1e-2)
    ),
    "adafactor": lambda **kw: optax.chain(
        soap_optax.in_eigenbasis(optax.scale_by_factored_rms(), **kw),
        optax.scale(-1e-2),
    ),
}
# An optimizer is made once, so that its step is compiled once.
OPTIMIZERS = {name: functools.cache(make) for name, make in OPTIMIZERS.items()}
SHAPES = {"v": (4,), "w": (4, 2), "t": (2, 4, 2), "s": [(), (1, 2)]}


DTYPES = ["bfloat16", *cases.slow("float32", "float16", "float64")]


@pytest.fixture(params=cases.some(OPTIMIZERS, {"soap", "shampoo"}))
def make(request):
    return OPTIMIZERS[request.param]


def normal_tree(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jnp.asarray(rng.normal(size=shape), dtype),
        SHAPES,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def types(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def assert_same_types(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert types(a) == types(b)


def assert_close(a, b, **tolerances):
    jax.tree.map(functools.partial(np.testing.assert_allclose, **tolerances), a, b)


def test_extra_args_and_no_recompilation(make, caplog):
    tx = make()
    params, grads = normal_tree(), normal_tree(seed=1)
    traces = []

    @jax.jit
    def step(params, state, grads):
        traces.append(1)
        updates, state = tx.update(grads, state, params, value=1.0, unexpected=grads)
        return optax.apply_updates(params, updates), state

    params, state = step(params, tx.init(params), grads)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            params, state = step(params, state, grads)
    assert len(traces) == 1
    assert "Compiling" not in caplog.text


def test_eager_steps_compile_nothing_in_the_end(make, caplog):
    """Without jit, neither steps nor refreshes are compiled again and again."""
    assert_compiles_nothing_in_the_end(make(precondition_frequency=2), caplog)


def test_injected_eager_steps_compile_nothing_in_the_end(caplog):
    inject = optax.inject_hyperparams(soap_optax.soap)
    assert_compiles_nothing_in_the_end(inject(1e-2, precondition_frequency=2), caplog)


def assert_compiles_nothing_in_the_end(tx, caplog):
    params, grads = normal_tree(), normal_tree(seed=1)
    state = tx.init(params)
    for _ in range(4):
        _, state = tx.update(grads, state, params)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for _ in range(3):
            _, state = tx.update(grads, state, params)
    compiled = re.findall(r"Compiling (\S+)", caplog.text)
    assert not compiled


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "options", [{}, {"basis": "current"}, {"factors": "kl"}], ids=str
)
def test_strict_promotion_of_dtypes(dtype, options):
    tx = soap_optax.in_eigenbasis(optax.trace(0.9), clip_update_rms=1.0, **options)
    params = optax.tree.cast(normal_tree(), dtype)
    with jax.numpy_dtype_promotion("strict"):
        state = tx.init(params)
        jax.jit(tx.update)(params, state)


@pytest.mark.parametrize(
    "options",
    [{}, *cases.slow({"refresh": "cholesky_qr", "refresh_tolerance": 0.01})],
)
def test_inside_shard_map(monkeypatch, options):
    """Each device has the state of its own rows; slots with factors of other sizes."""
    monkeypatch.setattr(_stacks, "_SLOT_BYTES", 1)
    mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    tx = soap_optax.scale_by_soap(**options)
    shapes = {"rows": (4, 32, 3), "others": (4, 48, 4), "replicated": (4, 4, 3)}
    rng = np.random.default_rng(0)
    grads = {name: rng.normal(size=s).astype("f4") for name, s in shapes.items()}

    def on_device_1(name, grad):
        return grad if name == "replicated" else np.split(grad, 8)[1]

    def specs_of(tree):
        return jax.tree_util.tree_map_with_path(
            lambda path, x: (
                jax.P("x") if x.ndim and "replicated" not in str(path) else jax.P()
            ),
            tree,
        )

    def at(t):
        whole = {name: grad[t] for name, grad in grads.items()}
        return whole, {name: on_device_1(name, grad) for name, grad in whole.items()}

    specs = specs_of(jax.eval_shape(tx.init, at(0)[1]))
    rows = specs_of(at(0)[0])
    init = jax.shard_map(tx.init, mesh=mesh, in_specs=(rows,), out_specs=specs)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=(rows, specs), out_specs=(rows, specs)
    )
    state, alone = jax.jit(init)(at(0)[0]), tx.init(jax.tree.map(jnp.asarray, at(0)[1]))
    for t in range(4):
        whole, mine = at(t)
        updates, state = jax.jit(update)(whole, state)
        expected, alone = jax.jit(tx.update)(mine, alone)
        for name, update_of_all in updates.items():
            here = on_device_1(name, update_of_all)
            np.testing.assert_allclose(here, expected[name], atol=1e-3)


def test_extra_args_reach_the_inner_transformation():
    seen = []

    def update(updates, state, params=None, *, value, **extra_args):
        seen.append(value)
        return updates, state

    inner = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = soap_optax.in_eigenbasis(inner, basis="current")
    tx.update(jnp.ones((2, 2)), tx.init(jnp.ones((2, 2))), value=3.0)
    assert seen == [3.0]


def test_map_params(make):
    tx, params = make(), normal_tree()
    state = tx.init(params)
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert_same_types(same, state)
    specs = jax.tree.map(lambda p: jax.P(*([None] * p.ndim)), params)
    mapped = optax.tree.map_params(
        tx,
        lambda _, spec: spec,
        state,
        specs,
        transform_non_params=lambda _: jax.P(),
        # Shampoo's mean is masked where a parameter has no factor.
        is_leaf=lambda node: isinstance(node, optax.MaskedNode),
    )
    assert optax.tree.get(mapped, "factors") == jax.P()
    moments = {
        name: value
        for name in ("mu", "ema", "v")
        for _, value in optax.tree.get_all_with_path(mapped, name)
        if isinstance(value, dict)
    }
    assert moments and all(specs == moment for moment in moments.values())
    if "v" not in moments:
        mesh = jax.make_mesh((1,), ("x",), devices=jax.devices()[:1])
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            mapped,
            is_leaf=lambda x: isinstance(x, jax.P),
        )
        placed = jax.jit(tx.init, out_shardings=shardings)(params)
        assert_same_types(placed, state)


def test_inject_hyperparams_is_the_same():
    params = normal_tree()
    injected = optax.inject_hyperparams(soap_optax.soap)(learning_rate=1e-2)
    plain = soap_optax.soap(1e-2)
    state, plain_state = injected.init(params), plain.init(params)
    assert set(state.hyperparams) >= {"learning_rate", "b1", "b2", "eps"}
    assert "precondition_frequency" in state.hyperparams
    for i in range(5):
        grads = normal_tree(seed=i)
        updates, state = jax.jit(injected.update)(grads, state, params)
        expected, plain_state = jax.jit(plain.update)(grads, plain_state, params)
        assert_close(updates, expected, rtol=1e-3, atol=1e-5)


def test_inject_hyperparams_follows_schedules_and_changes():
    params = {"w": jnp.ones((2, 2))}
    tx = optax.inject_hyperparams(soap_optax.soap)(
        learning_rate=optax.linear_schedule(1.0, 0.0, 10), precondition_frequency=3
    )
    state = tx.init(params)
    for i in range(3):
        _, state = jax.jit(tx.update)(
            {"w": normal_tree(seed=i)["w"][:2]}, state, params
        )
    assert np.isclose(state.hyperparams["learning_rate"], 0.8)
    before = state.inner_state[0].eigenbases["w"][0]
    state.hyperparams["precondition_frequency"] = jnp.asarray(2)
    _, state = jax.jit(tx.update)({"w": normal_tree(seed=8)["w"][:2]}, state, params)
    np.testing.assert_array_equal(state.inner_state[0].eigenbases["w"][0], before)
    _, state = jax.jit(tx.update)({"w": normal_tree(seed=9)["w"][:2]}, state, params)
    assert not np.array_equal(state.inner_state[0].eigenbases["w"][0], before)


@pytest.mark.parametrize(
    "option",
    [
        {"max_precond_dim": 10},
        {"block_size": 2},
        {"mu_dtype": jnp.bfloat16},
        {"precond_dtype": jnp.bfloat16},
    ],
    ids=lambda option: next(iter(option)),
)
def test_inject_hyperparams_of_what_fixes_shapes(option):
    (name,) = option
    params = normal_tree()
    tx = optax.inject_hyperparams(soap_optax.soap)(learning_rate=1e-2, **option)
    with pytest.raises(
        ValueError, match=f"{name} must be static.*static_args=.'{name}'"
    ):
        tx.init(params)
    tx = optax.inject_hyperparams(soap_optax.soap, static_args=(name,))(
        learning_rate=1e-2, **option
    )
    state = tx.init(params)
    jax.jit(tx.update)(normal_tree(seed=1), state, params)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(make, dtype):
    tx, params = make(), normal_tree(dtype)
    state = tx.init(params)
    statistics = jnp.dtype(jnp.promote_types(dtype, jnp.float32))
    for leaf in jax.tree.leaves(state):
        assert leaf.dtype == jnp.int32 or leaf.dtype == statistics
    for i in range(3):
        grads = normal_tree(dtype, seed=i)
        updates, new_state = jax.jit(tx.update)(grads, state, params)
        assert_same_types(updates, params)
        assert_same_types(new_state, state)
        state = new_state
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_gradients_of_another_dtype():
    """Mixed precision: float32 parameters, bfloat16 gradients; the updates follow."""
    tx, params = soap_optax.soap(1e-2), normal_tree()
    state = tx.init(params)
    updates, new_state = tx.update(normal_tree(jnp.bfloat16), state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype("bfloat16")}
    assert_same_types(new_state, state)


# For SOAP, test_other_programs.py has a test without jit in every run.
@pytest.mark.parametrize("compiled", [*cases.slow(False), True])
def test_float64_of_numpy_without_x64(make, compiled):
    """It is float32, as JAX takes it everywhere; here a warning is an error."""
    with jax.enable_x64(False):
        tx, params = make(), normal_tree()
        rng = np.random.default_rng(0)
        wide = jax.tree.map(lambda p: rng.normal(size=p.shape), params)
        assert jax.tree.leaves(wide)[0].dtype == np.float64
        narrow = jax.tree.map(jnp.asarray, wide)
        update = jax.jit(tx.update) if compiled else tx.update
        state = tx.init(wide)
        assert_same_types(state, tx.init(narrow))
        expected, after = update(narrow, state, narrow)
        updates, new_state = update(wide, state, wide)
        assert_same_types(updates, narrow)
        assert_same_types(new_state, after)
        assert_close(updates, expected, rtol=1e-6)


WIDTHS = ["float32", "float64"]
# By default, and in bfloat16 where parameters and gradients differ.
MIXED_IN_EVERY_RUN = {
    (None, "float32", "float64"),
    (None, "float64", "float32"),
    ("bfloat16", "float32", "float64"),
    ("bfloat16", "float64", "float32"),
}


@pytest.mark.parametrize(
    ("precond_dtype", "dtype", "grads_dtype"),
    cases.some(
        itertools.product([None, "bfloat16", "float16", *WIDTHS], WIDTHS, WIDTHS),
        MIXED_IN_EVERY_RUN,
    ),
)
def test_mixed_dtypes(precond_dtype, dtype, grads_dtype):
    tx = soap_optax.scale_by_soap(precond_dtype=precond_dtype, block_size=2)
    params, grads = normal_tree(dtype), normal_tree(grads_dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(grads, state, params)
    assert_same_types(updates, grads)
    assert types(state.factors) == types(tx.init(params).factors)
    assert types(state.eigenvalues) == types(tx.init(params).eigenvalues)


@pytest.mark.parametrize("grafting", ["adam", None])
def test_the_state_of_shampoo_keeps_its_dtypes(grafting):
    tx = soap_optax.scale_by_shampoo(grafting=grafting)
    params, grads = normal_tree("float32"), normal_tree("float64")
    state = tx.init(params)
    _, new_state = jax.jit(tx.update)(grads, state, params)
    assert_same_types(new_state, state)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_dtype_options(dtype):
    tx = soap_optax.scale_by_soap(mu_dtype=dtype, precond_dtype=dtype)
    params = normal_tree()
    state = tx.init(params)
    for i in range(12):
        _, new_state = jax.jit(tx.update)(normal_tree(seed=i), state, params)
        assert_same_types(new_state, state)
        state = new_state
    kept = (state.eigenbases, state.inner_state.mu)
    assert {leaf.dtype for leaf in jax.tree.leaves(kept)} == {jnp.dtype(dtype)}
    squares = (state.factors, state.eigenvalues, state.inner_state.nu)
    assert {leaf.dtype for leaf in jax.tree.leaves(squares)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("dtype", DTYPES)
def test_stability_under_cond(make, dtype):
    tx, params = make(), normal_tree(dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, grads):
        skip = jax.random.bernoulli(jax.random.key(0))
        updates, state = jax.lax.cond(
            skip, lambda: (grads, state), lambda: tx.update(grads, state, params)
        )
        return optax.apply_updates(params, updates), state

    for i in range(2):
        new_params, state = step(params, state, normal_tree(dtype, seed=i))
        assert_same_types(new_params, params)
        params = new_params


def test_scan(make):
    tx, params = make(), normal_tree()

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(params, state, params)  # of |params|^2 / 2
        return (optax.apply_updates(params, updates), state), None

    (trained, _), _ = jax.lax.scan(step, (params, tx.init(params)), length=300)
    assert optax.tree.norm(trained) < 0.5 * optax.tree.norm(params)


def test_constant_schedule_is_a_scalar():
    params = normal_tree()
    constant = optax.constant_schedule
    by_schedule = soap_optax.soap(
        constant(1e-2), weight_decay=0.1, precondition_frequency=lambda count: 3
    )
    by_scalar = soap_optax.soap(1e-2, weight_decay=0.1, precondition_frequency=3)
    s, t = by_schedule.init(params), by_scalar.init(params)
    for i in range(6):
        grads = normal_tree(seed=i)
        updates, s = by_schedule.update(grads, s, params)
        expected, t = by_scalar.update(grads, t, params)
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


def test_multi_steps(make):
    params = normal_tree()
    tx = optax.MultiSteps(make(), every_k_schedule=2)
    state = tx.init(params)
    update, alone_update = jax.jit(tx.update), jax.jit(make().update)
    alone_state = make().init(params)
    for i in range(3):
        a, b = normal_tree(seed=2 * i), normal_tree(seed=2 * i + 1)
        updates, state = update(a, state, params)
        assert not any(np.any(x) for x in jax.tree.leaves(updates))
        updates, state = update(b, state, params)
        mean = jax.tree.map(lambda x, y: x + (y - x) / 2, a, b)
        expected, alone_state = alone_update(mean, alone_state, params)
        assert_close(updates, expected, rtol=1e-3, atol=1e-5)


def test_abstract_init(make):
    tx, params = make(), normal_tree()
    abstract = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), params)
    assert_same_types(tx.init(abstract), tx.init(params))
    assert_same_types(jax.eval_shape(tx.init, params), tx.init(params))


@pytest.mark.filterwarnings("ignore:.*blocks cut across shards")
@pytest.mark.parametrize(
    ("options", "shape", "spec"),
    [
        ({"block_size": 2}, (16, 4), ("x", None)),
        ({"block_size": 4}, (8, 64), (None, "x")),
        *cases.slow(
            ({"block_size": 4}, (16, 6), ("x", None)),
            ({"merge_dims": True}, (2, 8, 3), (None, "x", None)),
            (
                {"dimension_numbers": soap_optax.DimensionNumbers((1, 2))},
                (8, 4, 6),
                ("x", None, None),
            ),
        ),
        (
            {"dimension_numbers": soap_optax.DimensionNumbers(((0, 2), 1))},
            (2, 8, 3),
            (None, "x", None),
        ),
    ],
)
def test_explicit_mesh_with_blocks_and_batch_axes(options, shape, spec):
    axis_types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
    tx = soap_optax.scale_by_soap(precondition_frequency=2, **options)
    grads = [np.random.default_rng(i).normal(size=shape).astype("f4") for i in range(4)]
    with jax.set_mesh(mesh):
        place = lambda x: jax.device_put(x, NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
        state = tx.init(place(grads[0]))
        types_before = jax.tree.map(jax.typeof, state)
        for grad in grads:
            updates, state = jax.jit(tx.update)(place(grad), state)
        assert jax.typeof(updates) == jax.typeof(place(grads[0]))
        assert jax.tree.map(jax.typeof, state) == types_before
    alone = tx.init(jnp.asarray(grads[0]))
    for grad in grads:
        expected, alone = jax.jit(tx.update)(jnp.asarray(grad), alone)
    np.testing.assert_allclose(updates, expected, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("soap", "float32"),
        *cases.slow(
            ("lion", "float16"),
            ("soap", "float16"),
            ("current", "float16"),
            ("current", "float32"),
            ("lion", "float32"),
        ),
    ],
)
def test_explicit_mesh_keeps_sharding_types(name, dtype):
    tx = OPTIMIZERS[name]()
    axis_types = (jax.sharding.AxisType.Explicit,)
    mesh = jax.make_mesh((8,), ("x",), axis_types=axis_types)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, jax.P(None, "x"))
        params = {
            "t": jnp.ones((2, 8, 4), dtype, out_sharding=sharding),
            "w": jnp.ones((16, 4), dtype, out_sharding=NamedSharding(mesh, jax.P("x"))),
        }
        state = tx.init(params)
        updates, new_state = tx.update(params, state, params)
        typeof = lambda tree: jax.tree.map(jax.typeof, tree)  # noqa: E731
        assert typeof(state) == typeof(new_state)
        assert typeof(updates) == typeof(params)
        assert typeof(jax.jit(tx.init)(params)) == typeof(state)
        jitted = jax.jit(tx.update)(params, state, params)
        assert typeof(jitted) == typeof((updates, new_state))
