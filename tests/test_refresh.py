"""Refreshes of difficult factors, by every method, in both precisions, batched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import training

SIZE = 12
METHODS = ["qr", "cholesky_qr", "eigh"]
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
    refresh = jax.jit(training.refresh, static_argnums=(3, 4))
    for _ in range(times):
        bases, values, failed = refresh(matrices, bases, values, method, "highest")
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
