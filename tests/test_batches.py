"""Many eigenbases: batches of one size, slots, what is copied and what is skipped."""

import functools
import math
import re

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

import soap_optax
from soap_optax._kronecker import BasisChange, Moments
from soap_optax.refresh import METHODS, _stacks
from soap_optax.refresh._clock import Due
from soap_optax.refresh._methods import RefreshRequest


@pytest.fixture(autouse=True)
def slots_of_any_size(monkeypatch):
    monkeypatch.setattr(_stacks, "_SLOT_BYTES", 1)


def layers(count):
    """Parameters of `count` equal layers."""
    layer = {"a": jnp.ones((16, 16)), "b": jnp.ones((16, 24)), "c": jnp.ones(16)}
    return {f"layer_{i}": layer for i in range(count)}


def traced(params, **options):
    """A step whose state may be overwritten, and the bytes of that."""
    tx = soap_optax.soap(1e-3, **options)
    state = jax.eval_shape(tx.init, params)
    step = jax.jit(
        lambda state, grads, params: tx.update(grads, state, params)[::-1],
        donate_argnums=0,
    )
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    return step.trace(state, params, params), size


def program(params, **options):
    step, size = traced(params, **options)
    return step.lower().compile(), size


def decompositions(compiled):
    targets = re.findall(r'custom_call_target="([^"]+)"', compiled.as_text())
    return sorted(t for t in targets if re.search("geqrf|syev|potrf", t.lower()))


@pytest.mark.parametrize("count", [*cases.slow(1), 5])
@pytest.mark.parametrize("stagger", [*cases.slow(False), True])
@pytest.mark.parametrize("refresh", METHODS)
def test_one_decomposition_for_each_size(refresh, stagger, count):
    compiled, _ = program(
        layers(count), refresh=refresh, stagger=stagger, initial_basis="identity"
    )
    kinds = {"qr": ["geqrf"], "eigh": ["syev", "geqrf"]}
    kinds["cholesky_qr"] = ["potrf"]
    found = decompositions(compiled)
    assert len(found) == 2 * len(kinds[refresh])  # sizes 16 and 24
    for kind in kinds[refresh]:
        assert sum(kind in name.lower() for name in found) == 2


@pytest.mark.parametrize("platform", ["tpu", *cases.slow("cuda")])
@pytest.mark.parametrize("refresh", METHODS)
def test_one_decomposition_for_each_size_on_other_platforms(refresh, platform):
    """As far as JAX takes the program there without a device."""
    step, _ = traced(layers(5), refresh=refresh, initial_basis="identity")
    text = step.lower(lowering_platforms=(platform,)).as_text()
    by_cholesky = re.findall(r"stablehlo.cholesky|custom_call @\w*potrf", text)
    assert len(by_cholesky) == 2
    assert not re.search(r"geqrf|@Qr", text)
    others = re.findall(r"custom_call @\w*(?:syev|Eigh)\w*\(", text)
    assert len(others) == (2 if refresh == "eigh" else 0)


@pytest.mark.parametrize(
    ("size", "batch", "platform"),
    [(1024, 8, "tpu"), *cases.slow((128, 24, "cuda"), (4096, 1, "cuda"))],
)
def test_matrices_go_in_batches_of_32_mb(size, batch, platform, monkeypatch):
    """24 factors, of which a chunk of at most 32 MB is decomposed at one time."""
    monkeypatch.setattr(_stacks, "_SLOTS", 1)
    params = [jax.ShapeDtypeStruct((size, size), jnp.float32)] * 12
    step, _ = traced(params, refresh="qr", initial_basis="identity")
    text = step.lower(lowering_platforms=(platform,)).as_text()
    (call,) = re.findall(r".*(?:stablehlo.cholesky|custom_call @\w*potrf).*", text)
    assert f"tensor<{batch}x{size}x{size}xf32>" in call


def test_the_published_start_adds_one_for_each_size():
    found = decompositions(program(layers(3))[0])
    assert sum("geqrf" in name for name in found) == 2
    assert sum("syev" in name for name in found) == 2


def test_blocks_of_one_size_are_one_batch():
    params = {"a": jnp.ones((8, 24)), "b": jnp.ones((16, 8)), "c": jnp.ones((3, 8, 8))}
    numbers = {"a": (0, 1), "b": (0, 1), "c": (1, 2)}
    numbers = {k: soap_optax.DimensionNumbers(v) for k, v in numbers.items()}
    options = {"block_size": 8, "dimension_numbers": numbers, "refresh": "qr"}
    compiled, _ = program(params, **options, initial_basis="identity")
    assert len(decompositions(compiled)) == 1


def computations(text):
    """The lines of each computation of a program, by its name."""
    found = {}
    for line in text.splitlines():
        if start := re.match(r"^(ENTRY )?%(\S+) \(", line):
            name = "ENTRY" if start[1] else start[2]
            found[name] = []
        elif line.startswith(" ") and found:
            found[name].append(line)
    return found


def size(shape):
    """The number of entries of an array, from its shape in the text of a program."""
    return math.prod(map(int, re.findall(r"\d+", re.search(r"\[.*?\]", shape)[0])))


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA copies")
@pytest.mark.parametrize("basis", ["previous", *cases.slow("current")])
@pytest.mark.parametrize(
    ("options", "eigenbasis"),
    [({}, "[24,24]"), ({"stagger": True}, "[24,24]"), ({"block_size": 8}, "[2,3,8,8]")],
)
def test_a_step_without_refresh_copies_no_factor_or_basis(basis, options, eigenbasis):
    parts = computations(program(layers(4), basis=basis, **options)[0].as_text())
    assert_copies_nothing_as_large_as(eigenbasis, parts, "ENTRY")


@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="older XLA copies")
@pytest.mark.parametrize("basis", ["previous", "current"])
def test_a_scan_copies_no_factor_or_basis(basis):
    """Nor does a step within it that has no refresh."""
    tx = soap_optax.scale_by_soap(basis=basis)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state, grads):
        def body(state, count):
            scaled = jax.tree.map(lambda g: g * count, grads)
            updates, state = tx.update(scaled, state)
            return state, jax.tree.map(jnp.sum, updates)

        return jax.lax.scan(body, state, jnp.arange(5.0))

    params = layers(4)
    text = run.lower(tx.init(params), params).compile().as_text()
    parts = computations(text)
    (loop,) = (line for line in parts["ENTRY"] if " while(" in line)
    body = re.search(r"body=%([^,]+)", loop)[1]
    assert_copies_nothing_as_large_as("[24,24]", parts, body)


def assert_copies_nothing_as_large_as(eigenbasis, parts, step):
    """Neither around the conditional nor in its branch that keeps the bases.

    Args:
      eigenbasis: the shape of an eigenbasis, as programs print it.
      parts: lines of the computations of a program; see `computations`.
      step: name of the computation that takes a step.
    """
    (refresh,) = (
        line
        for line in parts[step]
        if " conditional(" in line and eigenbasis in line.split(" conditional(")[0]
    )
    keep = re.search(r"branch_computations=\{%([^,]+)", refresh)[1]
    for line in parts[step] + parts[keep]:
        # JAX 0.12 wraps some copies in fusions, which are named after them.
        copied = re.search(
            r"= (\S+) (?:copy(?:-start)?\(|.*calls=%?wrapped_copy)", line
        )
        assert not copied or size(copied[1]) < size(eigenbasis), line


@pytest.mark.parametrize("count", [4, 12])
def test_temporary_memory_is_half_of_the_state_at_most(count):
    params = {f"layer_{i}": jnp.ones((256, 512)) for i in range(count)}
    compiled, state = program(params)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.5 * state


# --- slots ---------------------------------------------------------------------------


def bases_over_time(tx, params, steps):
    """The eigenbases before the first step and after each."""
    state = tx.init(params)
    update = jax.jit(tx.update)
    trace = [state[0].eigenbases]
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: training.normal(*p.shape, seed=i), params)
        _, state = update(grads, state, params)
        trace.append(state[0].eigenbases)
    return trace, state[0]


def changes(trace, name):
    """The steps in which the eigenbases of a parameter changed."""
    arrays = [np.asarray(bases[name][0]) for bases in trace]
    return [i for i in range(len(arrays) - 1) if np.any(arrays[i] != arrays[i + 1])]


def test_slots_are_balanced_and_hold_every_parameter_once():
    sizes = [64, 48, 48, 32, 32, 32, 16, 16, 8, 4]
    factors = [[jnp.zeros((n, n)), None] for n in sizes] + [[None]]
    slots = _stacks.make_slots(factors, 4)
    assert sorted(i for slot in slots for i in slot) == list(range(len(sizes)))
    loads = [sum(sizes[i] ** 3 for i in slot) for slot in slots]
    assert max(loads) == 64**3 and min(loads) > 0.3 * max(loads)
    assert _stacks.make_slots([[None], []], 4) == ()
    assert len(_stacks.make_slots(factors[:2], 4)) == 2


def test_staggered_every_parameter_is_refreshed_every_f_steps():
    params = {name: jnp.ones((6, 5)) for name in "abcdefg"}
    tx = soap_optax.soap(1e-3, precondition_frequency=3, stagger=True)
    trace, state = bases_over_time(tx, params, 13)
    steps = {name: changes(trace, name) for name in params}
    for found in steps.values():
        assert found[0] == 0 and found[1] <= 3
        assert np.all(np.diff(found[1:]) == 3)
    for step in range(1, 13):
        assert 2 <= sum(step in found for found in steps.values()) <= 3
    assert state.refreshes == 5  # at 0, 1, 4, 7, 10
    assert not any(np.any(n) for n in jax.tree.leaves(state.skipped))


@pytest.mark.parametrize("initial_basis", ["eigh", "identity"])
@pytest.mark.parametrize("basis", ["previous", "current"])
def test_staggered_one_matrix_is_refreshed_as_ever(basis, initial_basis):
    params = {"w": jnp.ones((6, 5)), "b": jnp.ones(5)}
    options = {"precondition_frequency": 3, "basis": basis}
    options["initial_basis"] = initial_basis
    plain, staggered = (
        training.trained(
            soap_optax.soap(1e-3, **options, stagger=stagger), params, steps=10
        )
        for stagger in (False, True)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, staggered)


def test_staggered_a_matrix_among_others_is_as_if_refreshed_then():
    """As by a schedule that is due in the steps of its slot."""
    params = {name: jnp.ones((6, 5)) for name in "abc"}
    staggered = soap_optax.scale_by_soap(precondition_frequency=3, stagger=True)
    for slot, name in enumerate("abc"):

        def schedule(count, slot=slot):
            due = (count == 0) | (count % 3 == slot)
            return jnp.where(due, 1, count + 1)

        alone = soap_optax.scale_by_soap(precondition_frequency=schedule)
        one = training.trained(alone, {name: params[name]}, steps=11)
        # The same gradients, for they depend on the shape and the step only.
        every = training.trained(staggered, params, steps=11)
        for field in ("eigenbases", "eigenvalues", "factors"):
            for mine, theirs in zip(
                getattr(every, field)[name], getattr(one, field)[name], strict=True
            ):
                np.testing.assert_allclose(mine, theirs, atol=1e-5)
        np.testing.assert_allclose(
            every.inner_state.mu[name], one.inner_state.mu[name], atol=1e-5
        )


def test_staggering_needs_a_static_frequency():
    for frequency in (lambda count: 3, jnp.asarray(3), 0):
        with pytest.raises(ValueError, match="precondition_frequency must be"):
            soap_optax.soap(1e-3, precondition_frequency=frequency, stagger=True)
    with pytest.raises(ValueError, match="stagger must be True or False, got 'yes'"):
        soap_optax.soap(1e-3, stagger="yes")


# --- what is not needed --------------------------------------------------------------


def test_a_tolerance_skips_what_is_diagonal_enough():
    """Per factor: diagonal gradients leave their eigenbases, others turn them."""
    params = {"diagonal": jnp.ones((5, 5)), "full": jnp.ones((5, 5))}
    tx = soap_optax.scale_by_soap(precondition_frequency=1, refresh_tolerance=0.1)
    state, update = tx.init(params), jax.jit(tx.update)
    for i in range(6):
        grads = {
            "diagonal": jnp.diag(jnp.arange(1.0, 6)),
            "full": training.normal(5, 5, seed=i),
        }
        before = state
        _, state = update(grads, state, params)
    for skipped in state.skipped["diagonal"]:
        assert skipped == 6  # the identity was an eigenbasis from the start
    assert all(skipped == 0 for skipped in state.skipped["full"])
    for basis in state.eigenbases["diagonal"]:
        np.testing.assert_array_equal(basis, jnp.eye(5))
    old, new = (s.eigenbases["full"][0] for s in (before, state))
    assert np.abs(old - new).max() > 1e-3


def test_a_tolerance_of_zero_skips_nothing():
    params = layers(2)
    kwargs = {"precondition_frequency": 2}
    plain, never = (
        training.trained(soap_optax.scale_by_soap(**kwargs, **more), params, steps=7)
        for more in ({}, {"refresh_tolerance": 0.0})
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, never)
    for value in (-0.1, 1.0, jnp.nan, "much"):
        with pytest.raises(ValueError, match="refresh_tolerance must be"):
            soap_optax.soap(1e-3, refresh_tolerance=value)


@pytest.mark.parametrize(
    "slots", [[[1, 2], [0]], *cases.slow([[0, 1, 2]], [[0], [1], [2]])]
)
@pytest.mark.parametrize("name", METHODS)
def test_what_fails_in_a_batch_stays_and_the_others_go_on(name, slots):
    matrices = [jnp.eye(4) + 0.1, jnp.full((4, 4), jnp.nan), jnp.eye(4) + 0.2]
    layout = training.layout((4, 3), max_precond_dim=10)
    bases = _stacks.Bases(
        eigenbases=[[jnp.eye(4), None] for _ in matrices],
        eigenvalues=[[jnp.full(4, 7.0), None] for _ in matrices],
        skipped=[[jnp.zeros(1, jnp.int32), None] for _ in matrices],
        moments=[[Moments([training.normal(4, 3)], [])] for _ in matrices],
    )
    factors = [[matrix, None] for matrix in matrices]
    slots = tuple(map(tuple, slots))
    refresh = _stacks.Refresh(
        (layout,) * 3,
        factors,
        [None] * 3,
        METHODS[name],
        RefreshRequest(),
        BasisChange(True, "highest"),
        slots,
    )
    new = refresh.run(jax.tree.map(lambda x: x, bases), Due.between(0, len(slots)))
    assert [int(of_leaf[0][0]) for of_leaf in new.skipped] == [0, 1, 0]
    np.testing.assert_array_equal(new.eigenbases[1][0], jnp.eye(4))
    np.testing.assert_array_equal(new.eigenvalues[1][0], 7)
    (before,), (after,) = bases.moments[1][0].first, new.moments[1][0].first
    np.testing.assert_array_equal(after, before)
    for i in (0, 2):
        q = np.asarray(new.eigenbases[i][0])
        assert np.abs(q - np.eye(4)).max() > 0.01
        (before,), (after,) = bases.moments[i][0].first, new.moments[i][0].first
        np.testing.assert_allclose(after, q.T @ np.asarray(before), atol=1e-6)
