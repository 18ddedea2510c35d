"""Steps under JAX's transformations: ensembles, derivatives and checks for NaN."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding

import soap_optax
from soap_optax import _eigenbasis, _kronecker
from soap_optax.refresh import _members, _stacks


@pytest.fixture(autouse=True)
def slots_of_any_size(monkeypatch):
    monkeypatch.setattr(_stacks, "_SLOT_BYTES", 1)


def soap(learning_rate=0.1, **options):
    options = {"precondition_frequency": 2, "eps_root": 1e-2} | options
    return soap_optax.soap(learning_rate, **options)


def shampoo(learning_rate=0.1, **options):
    options = {"precondition_frequency": 2, "eps_root": 1e-2, "eps": 1e-2} | options
    return soap_optax.shampoo(learning_rate, **options)


def lion(learning_rate=0.1, **options):
    inner = soap_optax.in_eigenbasis(
        optax.scale_by_lion(), precondition_frequency=2, **options
    )
    return optax.chain(inner, optax.scale_by_learning_rate(learning_rate))


MAKERS = {
    "soap": soap,
    # With so large an rcond the derivatives of eigenvalues count.
    "staggered": functools.partial(
        soap, precondition_frequency=3, stagger=True, rcond=0.3
    ),
    "current, kl, cholesky_qr": functools.partial(
        soap, basis="current", factors="kl", refresh="cholesky_qr"
    ),
    "tolerance": functools.partial(soap, refresh_tolerance=0.5),
    "shampoo": shampoo,
    "factorized, blocks": functools.partial(
        soap, factorized=True, block_size=2, clip_update_rms=0.1
    ),
    "eigh": functools.partial(soap, refresh="eigh"),
    "cholesky_qr": functools.partial(
        soap, refresh="cholesky_qr", initial_basis="identity"
    ),
    "staggered, tolerance": functools.partial(
        soap, stagger=True, refresh_tolerance=0.3, precondition_1d=True
    ),
    "nesterov, decay": functools.partial(soap, nesterov=True, weight_decay=0.1),
    "kl": functools.partial(soap, factors="kl"),
    "shampoo, tolerance": functools.partial(
        shampoo, refresh_tolerance=0.3, grafting=None
    ),
    "shampoo, kl": functools.partial(shampoo, factors="kl", power=0.5),
}


def makers(*few):
    """Makes these optimizers in every run, and the others in `make test-slow`."""
    return pytest.mark.parametrize("make", cases.named(MAKERS, *few))


SHAPES = {"v": (4,), "w": (4, 4), "x": (4, 6), "t": (2, 4, 2)}


def normal_tree(*lead, seed=0):
    return {
        name: training.normal(*lead, *shape, seed=seed + i, dtype=np.float64)
        for i, (name, shape) in enumerate(SHAPES.items())
    }


# --- ensembles -----------------------------------------------------------------------

MEMBERS = 3


def member(tree, i):
    return jax.tree.map(lambda x: x[i], tree)


def stacked(trees):
    return jax.tree.map(lambda *arrays: jnp.stack(arrays), *trees)


def assert_same(found, expected):
    assert_close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-10)
    jax.tree.map(assert_close, found, expected)


@functools.cache
def made(make=soap):
    """Makes an optimizer once, so that its step is compiled once."""
    return make()


@functools.cache
def of_members(tx):
    """The step of an ensemble, which is compiled once."""
    return jax.jit(jax.vmap(tx.update))


def advanced(tx, counts):
    """The states of members that have taken so many steps."""
    update, states = jax.jit(tx.update), []
    for i, count in enumerate(counts):
        params = member(normal_tree(MEMBERS), i)
        state = tx.init(params)
        for t in range(count):
            _, state = update(normal_tree(seed=100 * t + i), state, params)
        states.append(state)
    return states


def loop(tx, states, steps):
    """The updates and states of members that take their steps one after another."""
    update, params = jax.jit(tx.update), normal_tree(MEMBERS)
    updates = []
    for t in range(steps):
        grads = normal_tree(MEMBERS, seed=10 * t)
        pairs = [
            update(member(grads, i), state, member(params, i))
            for i, state in enumerate(states)
        ]
        updates.append(stacked([pair[0] for pair in pairs]))
        states = [pair[1] for pair in pairs]
    return updates, stacked(states)


def ensemble(update, state, steps):
    params, updates = normal_tree(MEMBERS), []
    for t in range(steps):
        step, state = update(normal_tree(MEMBERS, seed=10 * t), state, params)
        updates.append(step)
    return updates, state


@pytest.mark.parametrize("counts", [(0, 0, 0), (0, 1, 4)])
@makers("soap", "staggered")
def test_an_ensemble_is_a_loop_over_its_members(make, counts):
    tx = made(make)
    states = advanced(tx, counts)
    found = ensemble(of_members(tx), stacked(states), 5)
    assert_same(found, loop(tx, states, 5))


@pytest.mark.slow
def test_an_ensemble_is_a_loop_without_jit():
    tx = made()
    states = advanced(tx, (0, 1, 4))
    found = ensemble(jax.vmap(tx.update), stacked(states), 5)
    assert_same(found, loop(tx, states, 5))


def test_an_ensemble_of_ensembles_in_a_scan_is_a_loop():
    tx, params = made(), normal_tree(MEMBERS)
    states = advanced(tx, (0, 1, 4))
    outer = stacked([stacked(states), stacked(states[::-1])])
    grads = stacked([normal_tree(MEMBERS, seed=10 * t) for t in range(5)])
    every = jax.tree.map(lambda g: jnp.stack([g, g[:, ::-1]], 1), grads)
    both = stacked([params, jax.tree.map(lambda p: p[::-1], params)])

    def body(state, grads):
        return jax.vmap(jax.vmap(tx.update))(grads, state, both)[::-1]

    state, updates = jax.jit(lambda *a: jax.lax.scan(body, *a))(outer, every)
    steps, expected = loop(tx, states, 5)
    assert_same(member(state, 0), expected)
    assert_same(member(state, 1), jax.tree.map(lambda x: x[::-1], expected))
    assert_same(jax.tree.map(lambda x: x[:, 0], updates), stacked(steps))


@pytest.mark.parametrize("shared", [True, False])
def test_members_with_other_hyperparameters(shared):
    """Learning rates and so on of an ensemble, also where only these differ."""
    tx = optax.inject_hyperparams(soap_optax.soap, static_args=("stagger",))(
        0.1, b2=0.9, rcond=0.0, refresh_tolerance=0.1, precondition_frequency=2
    )
    changes = {
        "learning_rate": [0.1, 0.2, 0.3],
        "b2": [0.9, 0.8, 0.7],
        "rcond": [0.0, 1e-3, 1e-2],
        "refresh_tolerance": [0.0, 0.3, 0.9],
        "precondition_frequency": [1, 2, 3],
    }
    params, states = normal_tree(MEMBERS), []
    if shared:
        params = jax.tree.map(lambda p: jnp.broadcast_to(p[0], p.shape), params)
    for i in range(MEMBERS):
        state = tx.init(member(params, i))
        hyperparams = dict(state.hyperparams)
        for name, values in changes.items():
            like = hyperparams[name]
            hyperparams[name] = jnp.asarray(values[i], like.dtype)
        states.append(state._replace(hyperparams=hyperparams))
    found = ensemble(jax.jit(jax.vmap(tx.update)), stacked(states), 5)
    assert_same(found, loop(tx, states, 5))


class Counted(soap_optax.QR):
    """Householder's method, which reports each matrix that it is given."""

    given = 0

    def refresh(self, factors, eigenbases, wanted, request):
        assert jnp.ndim(request.decompose) == 0

        def report(wanted):
            Counted.given += int(np.sum(wanted))

        jax.debug.callback(report, wanted)
        return super().refresh(factors, eigenbases, wanted, request)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [((0, 0, 0), [21, 0, 21, 0]), ((0, 1, 4), [14, 7, 14, 7])],
)
def test_an_ensemble_refreshes_only_what_is_due(counts, expected):
    """Seven matrices of each member are due in every other step, and no others."""
    tx = soap(refresh=Counted())
    state = stacked(advanced(tx, counts))
    params = normal_tree(MEMBERS)
    update = jax.jit(jax.vmap(tx.update))
    found = []
    for t in range(4):
        jax.effects_barrier()
        Counted.given = 0
        _, state = update(normal_tree(MEMBERS, seed=t), state, params)
        jax.block_until_ready(state)
        jax.effects_barrier()
        found.append(Counted.given)
    assert found == expected


MESHES = {
    "automatic": {"kind": AxisType.Auto, "block_size": 2},
    "spread": {"kind": AxisType.Auto},
    "unknown": {"kind": AxisType.Auto, "is_known": False},
}


@pytest.mark.parametrize("kind", ["spread", *cases.slow("automatic", "unknown")])
def test_an_ensemble_on_a_mesh(kind):
    """The members are on all devices, and their parameters are sharded."""
    options = dict(MESHES[kind])
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(options.pop("kind"),) * 2)
    specs = {"v": jax.P(), "w": jax.P("x", "y"), "x": jax.P(None, "x"), "t": jax.P("x")}
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    is_known = options.pop("is_known", True)
    sharded = soap(params_sharding=shardings if is_known else None, **options)
    states = advanced(tx := soap(**options), (0, 1, 4))
    found = ensemble(jax.jit(jax.vmap(sharded.update)), stacked(states), 3)
    assert_same(found, loop(tx, states, 3))


@pytest.mark.slow
def test_an_ensemble_with_one_count_on_an_explicit_mesh():
    """JAX refuses members of different counts there, as it refuses any selection."""
    mesh = jax.make_mesh((2, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)
    specs = {"v": jax.P(), "w": jax.P("x", "y"), "x": jax.P(None, "x"), "t": jax.P("x")}
    specs = {name: NamedSharding(mesh, jax.P(None, *s)) for name, s in specs.items()}
    tx = soap()
    is_count = lambda x: x.ndim == 0 and x.dtype == jnp.int32  # noqa: E731
    axes = jax.tree.map(lambda x: None if is_count(x) else 0, tx.init(normal_tree()))
    update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))
    with jax.set_mesh(mesh):
        params = jax.device_put(normal_tree(MEMBERS), specs)
        state = jax.jit(jax.vmap(tx.init, out_axes=axes))(params)
        for t in range(3):
            grads = jax.device_put(normal_tree(MEMBERS, seed=10 * t), specs)
            updates, state = jax.jit(update)(grads, state, params)
    expected, _ = loop(tx, advanced(tx, (0, 0, 0)), 3)
    assert_same(updates, expected[-1])


# --- derivatives ---------------------------------------------------------------------

STEPS = 4


def loss(params, t):
    def one(param, curvature):
        return jnp.sum(jnp.cos(param + 0.1 * t) + curvature * jnp.square(param))

    curvatures = normal_tree(seed=7)
    return sum(one(param, curvatures[name]) for name, param in params.items())


def train(make, learning_rate, params):
    """A training, written as a loop: a function of learning rate and parameters."""
    tx = make(learning_rate)
    state = tx.init(params)
    for t in range(STEPS):
        updates, state = tx.update(jax.grad(loss)(params, t), state, params)
        params = optax.apply_updates(params, updates)
    return score(params)


def train_in_scan(make, learning_rate, params):
    tx = make(learning_rate)

    def body(carry, t):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, t), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, _), _ = jax.lax.scan(body, (params, tx.init(params)), jnp.arange(STEPS))
    return score(params)


def score(params):
    weights = normal_tree(seed=20)
    return sum(jnp.sum(param * weights[name]) for name, param in params.items())


def of_full_rank(seed):
    """A tree whose first gradients have parts in all directions.

    Where there is none, damping and the raising of second moments have kinks.
    """
    return {name: normal_tree(seed=seed)[name] for name in ("v", "w", "t")}


def start():
    return jnp.asarray(0.03), of_full_rank(0)


def direction():
    return jnp.asarray(0.7), of_full_rank(30)


class Tape:
    """Refreshes in steps without jit: records their results, and plays them later."""

    def __init__(self, monkeypatch):
        self.tape, self.place = [], None
        self.refresh = _eigenbasis._compiled_refresh
        monkeypatch.setattr(_eigenbasis, "_compiled_refresh", self.__call__)

    def rewind(self):
        self.place = iter(self.tape)

    def __call__(self, leaves, refresh, bases, due):
        if self.place is None:
            self.tape.append((bases, self.refresh(leaves, refresh, bases, due)))
            return self.tape[-1][1]
        before, after = next(self.place)

        def turned(i, moments):
            old, new = bases.eigenbases[i], after.eigenbases[i]
            every = jax.tree.map(lambda q: jnp.ones(q.shape[:-2], bool), old)
            layout = leaves[i].layout
            return _kronecker.change_basis(
                moments, old, new, every, layout, refresh.change
            )[0]

        def renewed(before, after, now):
            return jnp.where(before == after, now, after)

        values = jax.tree.map(
            renewed, before.eigenvalues, after.eigenvalues, bases.eigenvalues
        )
        moments = [turned(i, of_leaf) for i, of_leaf in enumerate(bases.moments)]
        return after._replace(eigenvalues=values, moments=moments)


def difference_quotient(make, monkeypatch, step=2e-6):
    """Along `direction`, with the eigenbases and eigenvalues of all refreshes fixed."""
    tape = Tape(monkeypatch)
    train(make, *start())
    ends = []
    for sign in (1, -1):
        tape.rewind()
        moved = jax.tree.map(lambda x, d: x + sign * step * d, start(), direction())  # noqa: B023
        ends.append(train(make, *moved))
    monkeypatch.undo()
    return float(ends[0] - ends[1]) / (2 * step)


@makers("current, kl, cholesky_qr")
def test_derivatives_are_those_of_fixed_eigenbases(make, monkeypatch):
    """With respect to learning rate, parameters and gradients, forward and reverse."""
    expected = difference_quotient(make, monkeypatch)
    in_scan = functools.partial(train_in_scan, make)
    forward = jax.jit(lambda *d: jax.jvp(in_scan, start(), d)[1])(*direction())
    gradient = jax.jit(jax.grad(in_scan, argnums=(0, 1)))(*start())
    products = jax.tree.map(jnp.vdot, gradient, direction())
    np.testing.assert_allclose(forward, expected, rtol=1e-6)
    np.testing.assert_allclose(sum(jax.tree.leaves(products)), forward, rtol=1e-10)


@pytest.mark.slow
def test_derivatives_without_jit_and_of_ensembles():
    def gradient(params):
        return jax.grad(functools.partial(train_in_scan, soap, 0.03))(params)

    params = {"w": normal_tree(MEMBERS)["w"]}
    alone = jax.jit(gradient)
    expected = [alone(member(params, i)) for i in range(MEMBERS)]
    together = jax.jit(jax.vmap(gradient))(params)
    assert_same(together, stacked(expected))
    eager = jax.grad(functools.partial(train, soap, 0.03))(member(params, 0))
    assert_same(eager, expected[0])

    def total(params):
        return jnp.sum(jax.vmap(functools.partial(train_in_scan, soap, 0.03))(params))

    assert_same(jax.jit(jax.grad(total))(params), stacked(expected))


@pytest.mark.parametrize(
    "name",
    [
        "soap",
        "factorized, kl",
        *cases.slow("rcond", "current", "shampoo"),
    ],
)
def test_derivatives_are_finite_where_nothing_is_known(name):
    """Of zero gradients and gradients of rank one, where factors are singular."""
    make = {
        "soap": soap,
        "current": functools.partial(soap, basis="current"),
        "shampoo": shampoo,
        "factorized, kl": functools.partial(soap, factorized=True, factors="kl"),
        "rcond": functools.partial(soap, rcond=1e-12),
    }[name]

    def final(scale, params):
        tx = make()

        def step(carry, t):
            params, state = carry
            rank_one = jnp.outer(params["w"][:, 0], jnp.arange(4.0) + t)
            grads = {"w": rank_one, "x": 0 * params["x"], "v": 0 * params["v"]}
            grads = jax.tree.map(lambda g: scale * g, grads)
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), jnp.arange(4))
        return score(params)

    params = {name: normal_tree()[name] for name in "vwx"}
    slopes = jax.jit(jax.grad(final, argnums=(0, 1)))(jnp.asarray(1.0), params)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))
    assert slopes[0] != 0
    expected = normal_tree(seed=20)
    for name in ("v", "x"):  # They do not move.
        np.testing.assert_allclose(slopes[1][name], expected[name], atol=1e-10)


# --- checks for NaN ------------------------------------------------------------------


def gradients_of_all_kinds(t):
    """Gradients in which nothing is wrong, though a factor or a moment may be zero."""
    shape, vector = (4, 6), training.normal(6, seed=t)
    normal = training.normal(*shape, seed=t)
    return {
        "alike": training.normal(*shape),
        "empty": jnp.zeros((0, 4, 6)),
        "normal": normal,
        "rank one": jnp.outer(jnp.arange(4.0, dtype=np.float32), vector),
        "small": 1e-20 * normal,
        "subnormal": 1e-38 * normal,
        "vector": vector,
        "zero": jnp.zeros(shape),
        "zero at first": normal * (t > 1),
        "zero at last": normal * (t < 2),
        "zero rows": normal.at[1:].set(0),
    }


def run(update, tx, kinds=None):
    def gradients(t):
        of_all = gradients_of_all_kinds(t)
        return {kind: of_all[kind] for kind in kinds or of_all}

    params = jax.tree.map(jnp.ones_like, gradients(0))
    state = tx.init(params)
    for t in range(4):
        updates, state = update(gradients(t), state, params)
    return updates


CHECKED = {
    "soap": soap_optax.soap,
    "staggered": functools.partial(soap_optax.soap, stagger=True),
    "current, kl, cholesky_qr": functools.partial(
        soap_optax.soap, basis="current", factors="kl", refresh="cholesky_qr"
    ),
    "tolerance, blocks": functools.partial(
        soap_optax.soap, refresh_tolerance=0.3, block_size=2, precondition_1d=True
    ),
    "shampoo": functools.partial(soap_optax.shampoo, eps=0.0),
    "factorized": functools.partial(
        soap_optax.soap, factorized=True, clip_update_rms=1e-3, rcond=1e-30
    ),
    "eigh, kl": functools.partial(soap_optax.soap, refresh="eigh", factors="kl"),
    "shampoo, kl": functools.partial(
        soap_optax.shampoo, grafting=None, factors="kl", refresh_tolerance=0.1
    ),
    "injected": functools.partial(
        optax.inject_hyperparams(soap_optax.soap), rcond=0.0, clip_update_rms=0.1
    ),
}


def checked(*few):
    """Checks these optimizers in every run, and the others in `make test-slow`."""
    return pytest.mark.parametrize("name", cases.some(CHECKED, few))


@pytest.fixture
def debugging():
    with jax.debug_nans(True), jax.debug_infs(True):
        yield


@checked("current, kl, cholesky_qr", "tolerance, blocks")
@pytest.mark.parametrize("jitted", [True, *cases.slow(False)])
def test_nothing_is_reported_where_nothing_is_wrong(name, jitted, debugging):
    tx = CHECKED[name](0.1, precondition_frequency=2)
    updates = run(jax.jit(tx.update) if jitted else tx.update, tx)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


@pytest.mark.parametrize("inside", [True, *cases.slow(False)])
@checked("soap")
def test_checkify_finds_nothing(name, inside, monkeypatch):
    """It does not look into functions with a rule for `jax.vmap`, so one has none."""
    if inside:
        monkeypatch.setattr(_members, "as_one_stack", lambda function: function)
    tx = CHECKED[name](0.1, precondition_frequency=2)
    checks = checkify.float_checks | checkify.div_checks
    checked = jax.jit(checkify.checkify(tx.update, errors=checks))

    def update(*operands):
        error, result = checked(*operands)
        assert error.get() is None
        return result

    # What is outside of such functions hardly depends on the kind of a gradient.
    updates = run(update, tx) if inside else run(update, tx, ("vector", "zero rows"))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(updates))


def test_what_is_wrong_is_reported(debugging):
    tx = soap_optax.scale_by_soap(basis="current")
    with pytest.raises(FloatingPointError, match="nan"):
        jax.jit(tx.update)(jnp.full((4, 6), jnp.nan), tx.init(jnp.ones((4, 6))))
