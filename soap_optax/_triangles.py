"""Symmetric matrices in half of their memory, as products and copies can handle them.

A matrix `[..., b, b]` is padded to an even side of 2h and consists of the blocks

    A    B
    B^T  C

The packed array `[..., 2h + 1, h]` has B on top. Below it, the upper triangle of A and
the lower one of C, moved down by a row, fill `[..., h + 1, h]`. This is LAPACK's
rectangular full packed format, up to the order of the parts: see Gustavson et al.,
"Rectangular full packed format for Cholesky's algorithm", arXiv 0901.1696. No entry is
rounded.
"""

import jax
import jax.numpy as jnp


def packed_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what `pack` makes of matrices of a shape `[..., b, b]`."""
    half = (shape[-1] + 1) // 2
    return (*shape[:-2], 2 * half + 1, half)


def pack(matrix: jax.Array) -> jax.Array:
    """Packs symmetric matrices, of which it reads one triangle."""
    half = (matrix.shape[-1] + 1) // 2
    first, last = matrix[..., :half, :half], matrix[..., half:, half:]
    is_odd = matrix.shape[-1] % 2
    upper = jnp.triu(_padded(first, (0, 1), (0, 0)))
    lower = jnp.tril(_padded(last, (1, is_odd), (0, is_odd)), -1)
    beside = _padded(matrix[..., :half, half:], (0, 0), (0, is_odd))
    return jnp.concatenate([beside, upper + lower], axis=-2)


def whole(array: jax.Array, side: int) -> jax.Array:
    """Inverts `pack` for matrices of a side. Whole matrices stay as they are."""
    if array.shape[-2] == array.shape[-1]:
        return array
    half = array.shape[-1]
    beside, triangles = array[..., :half, :], array[..., half:, :]
    first, last = jnp.triu(triangles[..., :-1, :]), jnp.tril(triangles[..., 1:, :])
    first += _transposed(jnp.triu(first, 1))
    last += _transposed(jnp.tril(last, -1))
    upper = jnp.concatenate([first, beside], axis=-1)
    lower = jnp.concatenate([_transposed(beside), last], axis=-1)
    return jnp.concatenate([upper, lower], axis=-2)[..., :side, :side]


def _padded(
    matrix: jax.Array, rows: tuple[int, int], columns: tuple[int, int]
) -> jax.Array:
    """Adds rows and columns of zeros, numbers of which are given before and after."""
    return jnp.pad(matrix, [(0, 0)] * (matrix.ndim - 2) + [rows, columns])


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -2, -1)
