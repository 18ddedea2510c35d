"""Refreshes of difficult factors, by every method, in both precisions, batched."""

import ast
import dataclasses
import functools
from pathlib import Path
from typing import Any

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training

import soap_optax
from soap_optax.refresh import METHODS, _stacks
from soap_optax.refresh._methods import Refreshed, RefreshRequest

SIZE = 12
DTYPES = ["float32", "float64"]


def orthogonal(seed):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(SIZE, SIZE)))[0]


SPECTRA = {
    "spread": np.logspace(0, -3, SIZE),
    "near-degenerate": np.repeat([1, 0.1, 0.01], 4) + 1e-6 * np.arange(SIZE),
    "rank-deficient": np.where(np.arange(SIZE) < 4, np.logspace(0, -2, SIZE), 0),
    "rank one": np.eye(SIZE)[0],
    "ill-conditioned": np.logspace(0, -14, SIZE),
    "identity": np.ones(SIZE),
    "zero": np.zeros(SIZE),
}
SCALES = {
    "float32": {"tiny": 1e-30, "one": 1.0, "huge": 1e36},
    "float64": {"tiny": 1e-290, "one": 1.0, "huge": 1e300},
}


def factors(dtype):
    """Every spectrum at every scale, `[spectra, scales, SIZE, SIZE]`."""
    basis = orthogonal(1)
    matrices = [
        [(basis * (spectrum * scale)) @ basis.T for scale in SCALES[dtype].values()]
        for spectrum in SPECTRA.values()
    ]
    return jnp.asarray(np.array(matrices), dtype)


def refreshed(method, dtype, times=1):
    matrices = factors(dtype)
    bases = jnp.broadcast_to(jnp.asarray(orthogonal(2), dtype), matrices.shape)
    values = jnp.zeros(matrices.shape[:-1], dtype)
    for _ in range(times):
        bases, values, failed = training.refresh(
            matrices, bases, values, method, "highest"
        )
        assert not failed.any()
    return np.asarray(bases), np.asarray(values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [1, 50])
def test_orthonormal(method, dtype, times):
    bases, values = refreshed(method, dtype, times)
    gram = bases.swapaxes(-2, -1) @ bases
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(gram - np.eye(SIZE), 0, atol=tolerance)
    assert np.isfinite(values).all() and np.all(values >= 0)


STARTS = {
    "identity": np.eye(SIZE),
    "turned": orthogonal(2),
    "cycle": np.roll(np.eye(SIZE), 1, axis=0),
}


def gradients_with_multiples():
    """Gradients for which rows of the power step are multiples of one another."""
    rng = np.random.default_rng(3)
    few, many = rng.normal(size=(SIZE, 5)), rng.normal(size=(SIZE, 2 * SIZE))
    few[1::2], many[1::2] = few[::2], many[::2]
    dead = np.where(np.arange(SIZE)[:, None] < SIZE // 2, rng.normal(size=few.shape), 0)
    return [few, many, np.ones((SIZE, 3)), np.eye(SIZE)[:, :1], dead]


@pytest.mark.parametrize("decompose", [None, *cases.slow(True)])
@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_rows_that_are_multiples_of_one_another(method, dtype, start, decompose):
    gradients = gradients_with_multiples()
    matrices = jnp.asarray(np.stack([g @ g.T for g in gradients]), dtype)
    bases = jnp.broadcast_to(jnp.asarray(STARTS[start], dtype), matrices.shape)
    request = RefreshRequest(decompose)
    wanted = jnp.ones(len(matrices), bool)
    new = jax.jit(METHODS[method].refresh)(matrices, bases, wanted, request)
    assert new.is_new.all()
    bases = np.asarray(new.eigenbases)
    tolerance = 20 * float(jnp.finfo(dtype).eps)
    gram = bases.swapaxes(-2, -1) @ bases
    np.testing.assert_allclose(gram - np.eye(SIZE), 0, atol=tolerance)
    ranks = np.array([np.linalg.matrix_rank(g) for g in gradients])
    found = np.sum(np.asarray(new.eigenvalues) > 0, axis=-1)
    assert np.all(found >= ranks) and np.all(found <= ranks + 1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_deterministic_and_as_if_alone(method, dtype):
    bases, values = refreshed(method, dtype)
    again, again_values = refreshed(method, dtype)
    np.testing.assert_array_equal(bases, again)
    np.testing.assert_array_equal(values, again_values)
    matrices, start = factors(dtype), jnp.asarray(orthogonal(2), dtype)
    alone = training.refresh(
        matrices[0, 0], start, jnp.zeros(SIZE, dtype), method, "highest"
    )
    tolerance = 100 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(bases[0, 0], alone[0], atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_subspaces_of_a_decomposition_in_float64(method, dtype, spectrum):
    """Where a gap separates them from the rest, up to round-off over the gap."""
    bases, values = refreshed(method, dtype, times=1 if method == "eigh" else 200)
    row = list(SPECTRA).index(spectrum)
    eps = float(jnp.finfo(dtype).eps)
    for column, scale in enumerate(SCALES[dtype].values()):
        matrix = np.asarray(factors(dtype)[row, column], np.float64) / scale
        exact, vectors = np.linalg.eigh(matrix)
        order = np.argsort(-values[row, column])
        for count in range(1, SIZE):
            low, high = exact[SIZE - count - 1], exact[SIZE - count]
            if high < 100 * eps or low > 0.8 * high:
                continue
            mine = bases[row, column][:, order[:count]].astype(np.float64)
            theirs = vectors[:, SIZE - count :]
            error = np.linalg.norm(mine @ mine.T - theirs @ theirs.T)
            assert error <= 30 * eps * exact[-1] / (high - low), (count, scale)
        cluster = 1.1e-5 if spectrum == "near-degenerate" else 0  # its width
        np.testing.assert_allclose(
            np.sort(values[row, column].astype(np.float64) / scale),
            exact,
            atol=30 * eps * exact[-1] + cluster,
        )


@pytest.mark.parametrize("method", METHODS)
def test_what_fails_stays_in_a_batch(method):
    matrices = factors("float32")
    bad = jnp.full((SIZE, SIZE), jnp.nan, jnp.float32)
    matrices = matrices.at[0, 0].set(bad).at[1, 1].set(jnp.inf)
    start = jnp.broadcast_to(jnp.asarray(orthogonal(2), "float32"), matrices.shape)
    values = jnp.ones(matrices.shape[:-1], jnp.float32)
    bases, after, failed = training.refresh(matrices, start, values, method, "highest")
    expected = np.zeros(matrices.shape[:2], bool)
    expected[0, 0] = expected[1, 1] = True
    np.testing.assert_array_equal(failed[..., 0], expected)
    np.testing.assert_array_equal(bases[expected], start[expected])
    np.testing.assert_array_equal(after[expected], 1)
    assert np.isfinite(bases).all() and np.isfinite(after).all()


@pytest.mark.parametrize("initial", [*cases.slow(False), True])
@pytest.mark.parametrize("tolerance", [None, 1e-3])
@pytest.mark.parametrize("method", METHODS)
def test_chunks_are_as_if_alone(method, tolerance, initial):
    """Among them none, one that fails and one that is diagonal; chunks overlap."""
    scaled = factors("float32")[:, 1]
    matrices = jnp.concatenate([scaled, jnp.diag(jnp.arange(1.0, SIZE + 1))[None]])
    matrices = matrices.at[1].set(jnp.nan).astype(jnp.float32)
    identity = jnp.eye(SIZE, dtype=jnp.float32)
    bases = jnp.broadcast_to(identity, matrices.shape)
    wanted = jnp.ones(len(bases), bool).at[2].set(False)
    if not initial:
        turned = jnp.asarray(orthogonal(2), "float32")
        bases = bases.at[3:-1].set(turned)
    request = RefreshRequest(jnp.asarray(initial), tolerance)
    values = jnp.zeros(bases.shape[:-1], jnp.float32)
    none = jnp.zeros(len(bases), bool)
    start = Refreshed(bases, values, is_new=none, is_kept=none)
    run = functools.partial(_stacks._refresh_chunk, METHODS[method])
    alone, *others = (
        jax.jit(functools.partial(_stacks._in_chunks, run, chunk=chunk))(
            request, matrices, wanted, start
        )
        for chunk in (1, 3, len(matrices))
    )
    assert alone.is_new[3] and not alone.is_new[1:3].any()
    assert bool(alone.is_new[-1]) == (tolerance is None)
    # All columns of the power step of a matrix of rank one are parallel, and of an
    # ill-conditioned one nearly so. But for that of the largest eigenvalue, they become
    # what round-off makes of them.
    names = [*SPECTRA, "diagonal"]
    ill_posed = [names.index("rank one"), names.index("ill-conditioned")]
    well_posed = [i for i in range(len(matrices)) if i not in ill_posed]
    largest = {i: int(jnp.argmax(alone.eigenvalues[i])) for i in ill_posed}
    for chunked in others:
        np.testing.assert_array_equal(chunked.is_new, alone.is_new)
        np.testing.assert_array_equal(chunked.is_kept, alone.is_kept)
        for found, expected in zip(chunked[:2], alone[:2], strict=True):
            for part in (well_posed, *((i, ..., k) for i, k in largest.items())):
                same = np.asarray(found)[part], np.asarray(expected)[part]
                np.testing.assert_allclose(*same, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_asked_may_differ_between_matrices(method):
    """As under `jax.vmap`: each is as if it were asked alone, in chunks that mix."""
    rng = np.random.default_rng(0)
    roots = jnp.asarray(rng.normal(size=(7, SIZE, SIZE)))
    matrices = roots @ jnp.swapaxes(roots, 1, 2)
    bases = jnp.broadcast_to(jnp.asarray(orthogonal(2)), matrices.shape)
    decompose = jnp.arange(7) % 2 == 0
    tolerance = jnp.where(jnp.arange(7) < 3, 0.0, 0.99)
    none = jnp.zeros(7, bool)
    start = Refreshed(bases, jnp.zeros(bases.shape[:-1]), is_new=none, is_kept=none)
    run = functools.partial(_stacks._refresh_chunk, METHODS[method])
    found = jax.jit(functools.partial(_stacks._in_chunks, run, chunk=3))(
        RefreshRequest(decompose, tolerance), matrices, ~none, start
    )
    for i in range(7):
        request = RefreshRequest(decompose[i], tolerance[i])
        one = jax.tree.map(lambda x, i=i: x[i : i + 1], (matrices, ~none, start))
        for x, expected in zip(found, jax.jit(run)(request, *one), strict=True):
            np.testing.assert_allclose(x[i], expected[0], atol=1e-10)
    np.testing.assert_array_equal(found.is_new, tolerance == 0)


def trained_on_text():
    """Factors and eigenbases ten steps after a refresh, of an MLP on source code."""
    text = np.frombuffer(Path(ast.__file__).read_bytes(), np.uint8) % 64
    rng = np.random.default_rng(0)
    params = {
        "embed": rng.normal(size=(64, 16)),
        "hidden": rng.normal(size=(128, 48)) / 128**0.5,
        "out": rng.normal(size=(48, 64)) / 48**0.5,
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)

    def loss(params, windows):
        x = params["embed"][windows[:, :-1]].reshape(len(windows), -1)
        logits = jnp.tanh(x @ params["hidden"]) @ params["out"]
        targets = windows[:, -1]
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    tx = soap_optax.soap(1e-2)

    @jax.jit
    def step(params, state, windows):
        updates, state = tx.update(jax.grad(loss)(params, windows), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(30):
        starts = rng.integers(len(text) - 9, size=64)
        windows = text[starts[:, None] + np.arange(9)].astype(np.int32)
        params, state = step(params, state, windows)
    factors, bases = (
        jax.tree.leaves(tree) for tree in (state[0].factors, state[0].eigenbases)
    )
    return list(zip(factors, bases, strict=True))


def test_cholesky_qr_is_qr_on_the_factors_of_a_training_run():
    """To the round-off of float64, from factors and eigenbases of float32."""
    refresh, conditions = jax.jit(_stacks.refresh_one, static_argnums=2), []
    for factor, basis in trained_on_text():
        wide = factor.astype(jnp.float64), basis.astype(jnp.float64)
        wide = wide[0], jnp.linalg.qr(wide[1])[0]
        qr, by_cholesky = (
            refresh(*wide, METHODS[name], RefreshRequest())
            for name in ("qr", "cholesky_qr")
        )
        assert bool(qr.is_new) and bool(by_cholesky.is_new)
        # Round-off decides about null columns, of words that are not in the text.
        is_known = np.asarray(qr.eigenvalues > 0)
        np.testing.assert_array_equal(by_cholesky.eigenvalues > 0, is_known)
        columns = (m.eigenbases[:, is_known] for m in (by_cholesky, qr))
        np.testing.assert_allclose(*columns, rtol=0, atol=1e-7)
        values = jnp.sort(qr.eigenvalues)
        conditions.append(float(values[-1] / jnp.maximum(values[0], 1e-300)))
    assert len(conditions) == 6 and max(conditions) > 1e4


@pytest.mark.parametrize("name", METHODS)
def test_a_name_is_short_for_a_method(name):
    params = {"w": jnp.ones((4, 3))}
    by_name, by_method = (
        training.trained(soap_optax.scale_by_soap(refresh=refresh), params)
        for refresh in (name, METHODS[name])
    )
    jax.tree.map(np.testing.assert_array_equal, by_name, by_method)


def test_a_method_of_ones_own():
    class Nothing(soap_optax.RefreshMethod):
        def refresh(self, factors, eigenbases, wanted, request):
            values = jnp.zeros(factors.shape[:-1], factors.dtype)
            is_new = jnp.zeros_like(wanted)
            return soap_optax.Refreshed(eigenbases, values, is_new)

    tx = soap_optax.scale_by_soap(refresh=Nothing())
    state = training.trained(tx, {"w": jnp.ones((4, 3))})
    np.testing.assert_array_equal(state.eigenbases["w"][0], jnp.eye(4))
    assert state.skipped["w"][0] == state.refreshes == 1


def test_a_method_with_an_array_is_refused():
    @dataclasses.dataclass(frozen=True)
    class WithArray(soap_optax.QR):
        array: Any

    with pytest.raises(ValueError, match="refresh must be hashable"):
        soap_optax.soap(1e-3, refresh=WithArray(jnp.ones(3)))
