"""Nothing poisons the state: round-off, overflow, gradients that are not finite."""

import functools
import itertools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import reference
import reliability
import training

import soap_optax
from soap_optax import _kronecker

SHAPE = reliability.SHAPE
STEPS = 60


def normal(seed, *shape):
    gradient = np.random.default_rng(seed).normal(size=shape or SHAPE)
    return gradient.astype(np.float32)


def with_one(value):
    gradients = [normal(i) for i in range(STEPS)]
    gradients[20] = np.full(SHAPE, value, np.float32)
    return gradients


@functools.cache
def scale_by_soap(**options):
    """Makes the same optimizer each time, so that its step is compiled once."""
    return soap_optax.scale_by_soap(**options)


@functools.cache
def apply_if_finite(tx, limit):
    return optax.apply_if_finite(tx, limit)


def run(tx, gradients):
    state = tx.init(jnp.zeros(gradients[0].shape, jnp.float32))
    update = jax.jit(tx.update)
    updates = []
    for gradient in gradients:
        step, state = update(jnp.asarray(gradient), state)
        updates.append(np.asarray(step))
    return updates, state


OPTIONS = {
    "defaults": {},
    "f=1": {"precondition_frequency": 1},
    "current eigh": {"basis": "current", "refresh": "eigh"},
    "identity": {"initial_basis": "identity", "precondition_frequency": 3},
    "blocks": {"block_size": 4},
    "one-sided": {"one_sided": True},
    "b2=0.999": {"b2": 0.999},
}


IN_EVERY_RUN = {
    ("nan", "defaults"),
    ("1e10 and 1e-10 in turn", "defaults"),
    ("1e6 spikes of rank one", "defaults"),
    ("rank one", "defaults"),
}


@pytest.mark.parametrize(
    ("gradients", "options"),
    cases.some(itertools.product(reliability.BAD_GRADIENTS, OPTIONS), IN_EVERY_RUN),
)
def test_ten_thousand_steps(gradients, options):
    """Factors and eigenbases survive everything, updates are bounded and go on."""
    soap = soap_optax.scale_by_soap(**OPTIONS[options])
    gradient = reliability.BAD_GRADIENTS[gradients]
    sizes, state = reliability.simulation(soap, gradient, 10_000)(0)
    kept = (state.factors, state.eigenbases, state.eigenvalues)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(kept))
    assert reliability.orthonormality(state) <= 3e-5
    assert sizes[np.isfinite(sizes)].max(initial=0) <= 10 * (1 + 1e-4)
    if gradients in ("nan", "inf"):  # updates have shown it from the first one on
        assert np.isfinite(sizes[:50]).all() and not np.isfinite(sizes[50:]).any()
        guarded = optax.apply_if_finite(soap, 10)
        sizes, state = reliability.simulation(guarded, gradient, 10_000)(0)
        assert reliability.orthonormality(state.inner_state) <= 3e-5
        assert state.total_notfinite == 100
    assert np.isfinite(sizes).all() and sizes.max() <= 10 * (1 + 1e-4)
    # A second moment that forgets in 1000 steps hardly moves between the spikes.
    if gradients not in ("zero", "1e-42") and options != "b2=0.999":
        assert sizes[-1] > 1e-3


def test_a_moment_that_turns_is_bounded():
    """In a basis that stays, 1 is Adam's own bound, which a turn may exceed.

    SOAP raises second moments where it does. For other transformations there is
    `clip_update_rms`.
    """
    gradient = reliability.BAD_GRADIENTS["1e6 spikes"]
    adam = optax.scale_by_adam(0.95, 0.95)
    free = soap_optax.in_eigenbasis(adam)
    clipped = soap_optax.in_eigenbasis(adam, clip_update_rms=1.0)
    soap = soap_optax.scale_by_soap(clip_update_rms=None)
    sizes = [
        reliability.simulation(tx, gradient, 10_000)(0)[0].max()
        for tx in (free, clipped, soap)
    ]
    assert sizes[0] > 2
    np.testing.assert_allclose(sizes[1], 1, rtol=1e-4)
    assert sizes[2] < 1.001


def test_the_default_bound():
    """A small gradient after a large one, in a second moment that forgets at once."""
    gradients = [normal(0), normal(0), np.float32(1e-4) * normal(0)]

    def last(**options):
        tx = soap_optax.scale_by_soap(b1=0.9, b2=0.0, **options)
        return run(tx, gradients)[0][-1]

    free, bounded = last(clip_update_rms=None), last()
    assert np.sqrt(np.mean(free**2)) > 100
    np.testing.assert_allclose(np.sqrt(np.mean(bounded**2)), 10, rtol=1e-4)
    cosine = np.sum(free * bounded) / np.linalg.norm(free) / np.linalg.norm(bounded)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


@pytest.mark.parametrize("shape", [*cases.slow([64, 64]), [32, 48]], ids=str)
@pytest.mark.parametrize("spectrum", [0, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"basis": "current"}, {"block_size": 16}, {"factors": "kl"}],
    ids=str,
)
def test_the_first_updates_where_gradients_are_alike(options, spectrum, shape):
    """The gradient of a full batch is diagonal in the basis that comes from it alone.

    What stands beside the diagonal is round-off, and is not scaled up. So another
    rounding gives the same update. It is the orthogonal factor of the gradient, as Adam
    makes every entry of the diagonal 1, but for directions that float32 does not
    resolve. The second update is like the first one where a schedule starts at 0.
    """
    left, values, right = np.linalg.svd(normal(0, *shape), full_matrices=False)
    if spectrum:
        values = np.logspace(0, -spectrum, min(shape))
    gradient = ((left * values) @ right).astype(np.float32)
    other = np.nextafter(gradient, np.float32(np.inf))
    tx = scale_by_soap(**options)
    skipped = 0 if "basis" in options else 1
    updates = [run(tx, [g] * (skipped + 2))[0][skipped:] for g in (gradient, other)]

    def cosine(a, b):
        return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)

    for update, again in zip(*updates, strict=True):
        assert cosine(update, again) > 0.99
        if "block_size" not in options:
            assert cosine(update, left @ right) > (0.99 if spectrum == 0 else 0.8)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factors": "kl", "precondition_frequency": 3},
        {"b1": 0.9, "b2": 0.999},
        *cases.slow(
            {"precondition_frequency": 1},
            {"max_precond_dim": 8},
            {"basis": "current"},
            {"block_size": 4},
            {"stagger": True},
            {"merge_dims": True, "precondition_1d": True},
        ),
    ],
    ids=str,
)
def test_rows_that_rarely_have_a_gradient(options):
    """No turn of a moment makes an entry of an update large; Adam's are below 1."""
    largest = reliability.rare(scale_by_soap(**options), (120, 8), 100)
    assert largest[4:].max() < 4 and largest[50:].min() > 0.01


def test_rows_that_rarely_have_a_gradient_as_published():
    """Where no second moment is raised, a turn makes entries of updates large."""
    own = soap_optax.in_eigenbasis(optax.scale_by_adam(0.95, 0.95))
    assert reliability.rare(own, (120, 8), 100)[4:].max() > 10


def test_raised_second_moments():
    """What exceeds 1.5 and all ratios of the block comes to the largest of these."""
    before = np.array([[0.4, 0.0, 0.0], [0.3, -0.2, 0.1], [0.0, 0.0, 0.0]])
    square = np.array([[0.64, 0.01, 0.0], [0.04, 0.09, 0.01], [0.01, 0.0, 0.04]])
    layout = training.layout((3, 3))
    old = [None, jnp.eye(3)]
    new = [None, jnp.asarray([[0.6, 0.8, 0.0], [0.8, -0.6, 0.0], [0.0, 0.0, 1.0]])]
    moments = [_kronecker.Moments([jnp.asarray(before)], [jnp.asarray(square)])]
    take = [None, jnp.asarray(True)]

    def change(raises):
        (turned,), _ = _kronecker.change_basis(
            moments, old, new, take, layout, _kronecker.BasisChange(raises, "highest")
        )
        return turned

    expected = before @ np.asarray(new[1])
    np.testing.assert_allclose(change(True).first[0], expected, atol=1e-7)
    np.testing.assert_array_equal(change(False).second[0], square)
    wanted = square.copy()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(np.abs(before) / np.sqrt(square), posinf=0)
    assert abs(ratios.max() - 1.5) < 1e-9
    is_small = np.abs(expected) > 1.5 * np.sqrt(square)
    assert is_small.tolist() == [[False, True, False], [False] * 3, [False] * 3]
    wanted = np.where(is_small, np.square(expected / 1.5), square)
    np.testing.assert_allclose(change(True).second[0], wanted, rtol=1e-5)


def test_what_has_no_factor_is_not_bounded():
    tx = soap_optax.in_eigenbasis(optax.scale(100.0), clip_update_rms=1.0)
    params = {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = jax.jit(tx.update)(params, state)
    np.testing.assert_allclose(updates["w"], 1, rtol=1e-5)
    np.testing.assert_array_equal(updates["b"], 100)


def test_the_first_gradient_is_bad():
    tx = apply_if_finite(scale_by_soap(), 3)
    updates, _ = run(tx, [normal(0) * np.nan, *(normal(i) for i in range(1, 9))])
    assert np.isfinite(updates).all() and np.abs(updates[-1]).max() > 1e-3
    updates, state = run(scale_by_soap(), [normal(0) * np.nan, normal(1)])
    assert all(np.isfinite(f).all() for f in (*state.factors, *state.eigenbases))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_gradients_that_are_not_finite_are_not_hidden(value):
    updates, state = run(scale_by_soap(), with_one(value))
    assert np.isfinite(updates[:20]).all()
    assert not np.isfinite(updates[20]).any()
    assert not np.isfinite(state.inner_state.mu).any()  # as in optax.adam


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("basis", ["previous", "current"])
def test_apply_if_finite_skips_the_step(value, basis):
    """At a step that refreshes; the run goes on as if it had never been."""
    soap = scale_by_soap(precondition_frequency=5, basis=basis)
    gradients = with_one(value)
    updates, state = run(apply_if_finite(soap, 3), gradients)
    del gradients[20]
    expected, expected_state = run(soap, gradients)
    np.testing.assert_array_equal(updates[20], 0)
    np.testing.assert_array_equal(updates[:20] + updates[21:], expected)
    jax.tree.map(np.testing.assert_array_equal, state.inner_state, expected_state)


def test_zero_nans_before():
    tx = optax.chain(optax.zero_nans(), soap_optax.scale_by_soap())
    updates, _ = run(tx, with_one(np.nan))
    assert np.isfinite(updates).all()


@pytest.mark.parametrize("scale", [1, *cases.slow(1e-3), 1e-5])
@pytest.mark.parametrize(("size", "rank"), [(64, 4), *cases.slow((256, 16))])
def test_no_steps_into_the_null_space(size, rank, scale):
    """In float32; without the mend most of the update is there at scale 1."""
    shares = functools.partial(reliability.null_shares, make=scale_by_soap)
    assert np.median(shares(size, rank, scale, None)) <= 0.01
    if scale == 1:
        assert np.median(shares(size, rank, scale, 0)) > 0.8


def test_rows_with_small_gradients_are_not_held_back():
    """In float32, a row with gradients 1000 times smaller trains as in float64."""
    scales = np.logspace(0, -3, 8)[:, None]
    gradients = [normal(i, 8, 8) * scales.astype(np.float32) for i in range(STEPS)]
    expected = sum(reference.run(np.stack(gradients).astype(np.float64)))
    actual = sum(run(scale_by_soap(), gradients)[0])
    error = np.linalg.norm(actual - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert error.max() < 0.1


@pytest.mark.parametrize("rcond", [0.0, 1e-25])
def test_tiny_rcond(rcond):
    gradients = [np.array([[1 + i / 10, 0.3], [0, 1e-12]], "f4") for i in range(8)]
    tx = soap_optax.scale_by_soap(rcond=rcond, precondition_frequency=1)
    assert np.isfinite(run(tx, gradients)[0]).all()


def test_eager_and_jit_agree_on_singular_factors():
    """The first null space keeps its basis, in place of one that round-off chooses."""
    gradients = [normal(i, 12, 3) for i in range(12)]
    tx = scale_by_soap()
    updates, _ = run(tx, gradients)
    state = tx.init(jnp.zeros((12, 3), jnp.float32))
    for gradient, expected in zip(gradients, updates, strict=True):
        step, state = tx.update(jnp.asarray(gradient), state)
        np.testing.assert_allclose(step, expected, atol=1e-3)


@pytest.mark.parametrize("rcond", [0.0, 1e-9])
def test_an_injected_bound_of_round_off(rcond):
    """Also where an eigenvalue is exactly 0."""
    gradient = jnp.diag(jnp.array([1.0, 0.0]))
    tx = optax.inject_hyperparams(soap_optax.soap)(1e-3, rcond=rcond)
    plain = soap_optax.soap(1e-3, rcond=rcond)
    state, plain_state = tx.init(gradient), plain.init(gradient)
    for _ in range(3):
        update, state = jax.jit(tx.update)(gradient, state, gradient)
        expected, plain_state = jax.jit(plain.update)(gradient, plain_state, gradient)
    np.testing.assert_allclose(update, expected, rtol=1e-6)
    assert update[0, 0] != 0 and np.isfinite(update).all()


@pytest.mark.parametrize("options", [{}, {"basis": "current"}, {"factors": "kl"}])
def test_the_last_count_of_int32(options):
    """Counts stay there, and the factors go on; by default also without jit."""
    gradient = normal(0, 4, 3)
    tx = soap_optax.scale_by_soap(precondition_frequency=10**12, **options)
    state, jitted = tx.init(gradient), jax.jit(tx.update)
    for _ in range(2):
        _, state = jitted(gradient, state)
    last = jnp.asarray(jnp.iinfo(jnp.int32).max, jnp.int32)
    state = state._replace(count=last)
    for update in (jitted,) if options else (jitted, tx.update):
        steps, after = update(2 * gradient, state)
        assert np.isfinite(steps).all() and after.count == last
        moved = np.abs(after.factors[0] - state.factors[0]).max()
        assert moved > 0.01 * np.abs(state.factors[0]).max()


@pytest.mark.parametrize("frequency", [2**40, np.int64(2**40)])
def test_a_frequency_that_no_count_reaches(frequency):
    params = {"v": jnp.ones((3, 2)), "w": jnp.ones((4, 3))}
    tx = soap_optax.scale_by_soap(precondition_frequency=frequency, stagger=True)
    state = tx.init(params)
    for _ in range(2):
        _, state = jax.jit(tx.update)(params, state)
    assert state.refreshes == 2  # at the first step, and the second slot after it


def test_an_inner_state_that_starts_with_python_numbers():
    """It has the dtypes of the first update from the start on."""

    def update(updates, state, params=None):
        return updates, {"mean": 0.9 * state["mean"] + 0.37}

    inner = optax.GradientTransformation(lambda params: {"mean": 0}, update)
    tx = soap_optax.in_eigenbasis(inner, basis="current")
    gradient = normal(0, 4, 3)
    state = tx.init(gradient)
    for update_fn in (tx.update, jax.jit(tx.update)):
        _, state = update_fn(gradient, state)
    np.testing.assert_allclose(state.inner_state["mean"], 0.37 * 1.9, rtol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_an_inner_state_that_changes_its_structure(jit):
    def update(updates, state, params=None):
        return updates, {"more": jnp.zeros(())}

    inner = optax.GradientTransformation(lambda params: {}, update)
    tx = soap_optax.in_eigenbasis(inner, basis="current")
    state = tx.init(jnp.ones((4, 3)))
    message = "^inner must be a transformation that keeps the structure"
    with pytest.raises(ValueError, match=message):
        (jax.jit(tx.update) if jit else tx.update)(jnp.ones((4, 3)), state)
