"""Shampoo's Kronecker factors and their eigenbases: mathematics on one parameter.

For a block G with axes 1..k, unfolded along axis i into the matrix G_(i), with factor
M_i, eigenbasis Q_i and eigenvalue estimates e_i:

    accumulate     M_i <- (1 - w) M_i + w G_(i) G_(i)^T
    project        G' = G x_1 Q_1^T ... x_k Q_k^T       (for a matrix: Q_L^T G Q_R)
    project_back   G = G' x_1 Q_1 ... x_k Q_k           (for a matrix: Q_L G' Q_R^T)
    follow         e_i <- (1 - w) e_i + w diag(G'_(i) G'_(i)^T)
    damp           G' with the numerically null directions of each M_i taken out
    clip_rms       blocks of G' scaled down to a root mean square
    refresh        Q_i <- orthonormal columns nearer to the eigenvectors of M_i
    change_basis   G' x_1 (Q_1^T Q_1^new)^T ...         (into the refreshed eigenbases)

Arrays have the parameter's shape; its `Layout` says which axes form a factor and how
they are cut into blocks. Factors and eigenbases are `[grid…, b, b]`, eigenvalues
`[grid…, b]`, one per axis; None stands for the identity. See "SOAP: Improving and
Stabilizing Shampoo using Adam", https://arxiv.org/abs/2409.11321, Algorithms 3 and 4.
"""

import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax._layout import Layout, explicit_sharding

PerAxis = Sequence[jax.Array | None]


def sharded_like(stored: jax.Array, array: jax.Array, layout: Layout) -> jax.Array:
    """`stored`, `[grid…, …]`, on an explicit mesh sharded like the blocks of `array`.

    So a state has the same sharding before its first step as after it.
    """
    if explicit_sharding(array, range(array.ndim)) is None:
        return stored
    within = [None] * (stored.ndim - len(layout.grid))
    blocks = layout.to_blocks(array)
    sharding = explicit_sharding(blocks, [*layout.grid, *within])
    return jax.sharding.reshard(stored, sharding)


def accumulate(
    factors: PerAxis,
    gradient: jax.Array,
    layout: Layout,
    weight: jax.typing.ArrayLike,
    precision: Any,
) -> list[jax.Array | None]:
    """Moves each factor by `weight` towards the Gram matrix of the gradient.

    A gradient that is not finite, or whose squares are not, leaves its factor alone.
    """

    def one(factor: jax.Array | None, axis: int) -> jax.Array | None:
        if factor is None:
            return None
        blocks = _blocks(gradient, factor, layout)
        gram = _gram(blocks, axis, layout.grid, precision)
        mean = _mean(factor.astype(gram.dtype), gram, weight).astype(factor.dtype)
        # The entries of a semi-definite matrix are bounded by its trace.
        sound = jnp.isfinite(jnp.trace(mean, axis1=-2, axis2=-1))[..., None, None]
        return jnp.where(sound, mean, factor)

    return [one(f, axis) for f, axis in zip(factors, layout.axes, strict=True)]


def bounded(array: jax.Array) -> jax.Array:
    """The array, its finite entries small enough to be squared.

    A mean of squares never comes back from infinity: one overflow would end the
    training of its coordinate. What is not finite stays, for others to see.
    """
    limit = float(jnp.finfo(array.dtype).max) ** 0.5 / 2
    return jnp.where(jnp.isfinite(array), jnp.clip(array, -limit, limit), array)


def project(
    array: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """Coordinates of `array` in the eigenbases, in its shape and dtype."""
    return _multiply(array, eigenbases, layout, precision, back=False)


def project_back(
    array: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """Inverse of `project`."""
    return _multiply(array, eigenbases, layout, precision, back=True)


def change_basis(
    array: jax.Array, old: PerAxis, new: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """Coordinates in the eigenbases `new` of what has coordinates `array` in `old`.

    Along an eigenbasis that stayed they stay, to the bit (at full precision).
    """

    def rotation(q: jax.Array | None, q_new: jax.Array | None) -> jax.Array | None:
        if q is None or q_new is None:
            return None
        q, q_new = (_at_least_float32(x) for x in (q, q_new))
        turn = jnp.einsum("...ki,...kj->...ij", q, q_new, precision=precision)
        stayed = jnp.all(q == q_new, axis=(-2, -1), keepdims=True)
        identity = jnp.broadcast_to(jnp.eye(q.shape[-1], dtype=turn.dtype), turn.shape)
        return jnp.where(stayed, identity, turn)

    rotations = [rotation(*pair) for pair in zip(old, new, strict=True)]
    return project(array, rotations, layout, precision)


def follow(
    eigenvalues: PerAxis,
    projected: jax.Array,
    layout: Layout,
    weight: jax.typing.ArrayLike,
) -> list[jax.Array | None]:
    """Moves the eigenvalue estimates by `weight` towards the gradient's energies.

    While the eigenbases stay, they follow the Rayleigh quotients of the factors so.
    """

    def one(eigenvalue: jax.Array | None, axis: int) -> jax.Array | None:
        if eigenvalue is None:
            return None
        squares = jnp.square(_blocks(projected, eigenvalue, layout))
        kept = sorted((*layout.grid, axis))
        energy = jnp.sum(squares, [d for d in range(squares.ndim) if d not in kept])
        energy = jnp.moveaxis(energy, kept.index(axis), -1)
        sharding = explicit_sharding(squares, [*layout.grid, None])
        if sharding is not None:
            energy = jax.sharding.reshard(energy, sharding)
        mean = _mean(eigenvalue.astype(energy.dtype), energy, weight)
        return jnp.where(jnp.isfinite(mean), mean.astype(eigenvalue.dtype), eigenvalue)

    return [one(e, axis) for e, axis in zip(eigenvalues, layout.axes, strict=True)]


def damp(
    array: jax.Array, eigenvalues: PerAxis, layout: Layout, rcond: float | None
) -> jax.Array:
    """Multiplies each index of an axis by r^2 / (r^2 + rcond^2), r = e / e_max.

    Where the gradient has nothing but the round-off of its projection, an elementwise
    transformation like Adam would scale that to full-size steps. The default `rcond`,
    0.01 of the unit round-off, is in squares: directions with gradients 30 000 times
    (in float32) smaller than the largest.
    """
    if rcond is None:
        rcond = 0.01 * float(jnp.finfo(_at_least_float32(array).dtype).eps)
    if isinstance(rcond, (int, float)) and rcond == 0:
        return array
    for eigenvalue, axis in zip(eigenvalues, layout.axes, strict=True):
        if eigenvalue is not None:
            blocks = layout.to_blocks(array)
            largest = jnp.max(eigenvalue, axis=-1, keepdims=True)
            inverse = jnp.where(eigenvalue > 0, largest / eigenvalue, jnp.inf)
            share = 1 / (1 + (rcond * inverse) ** 2)
            share = jnp.where(largest > 0, share, 1)  # nothing is known
            kept = sorted((*layout.grid, axis))
            share = jnp.moveaxis(share, -1, kept.index(axis)).astype(blocks.dtype)
            others = [d for d in range(blocks.ndim) if d not in kept]
            damped = blocks * jnp.expand_dims(share, others)
            array = layout.from_blocks(damped, array)
    return array


def clip_rms(
    array: jax.Array, layout: Layout, limit: jax.typing.ArrayLike
) -> jax.Array:
    """Scales the blocks whose root mean square exceeds `limit` down to it."""
    blocks = layout.to_blocks(_at_least_float32(array))
    within = [d for d in range(blocks.ndim) if d not in layout.grid]
    largest = jnp.max(jnp.abs(blocks), within, keepdims=True)
    unit = blocks / jnp.where(largest > 0, largest, 1)  # whose squares do not overflow
    rms = largest * jnp.sqrt(jnp.mean(jnp.square(unit), within, keepdims=True))
    limit = jnp.asarray(limit, blocks.dtype)
    clipped = layout.from_blocks(blocks * (limit / jnp.maximum(rms, limit)), array)
    return clipped.astype(array.dtype)


def refresh(
    factor: jax.Array,
    eigenbasis: jax.Array,
    eigenvalues: jax.Array,
    method: Literal["qr", "eigh"],
    precision: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A better eigenbasis of `factor`, its columns in the order of the old one's.

    With P = M Q, the Rayleigh quotients diag(Q^T P) rank the columns. The ranked new
    columns, from one power step (`"qr"`: P = Q R) or from a decomposition (`"eigh"`),
    go back to where the old column of the same rank stood: a coordinate keeps its
    identity, so statistics that are kept per coordinate stay valid. Numerically null
    directions, where new columns would be round-off, keep the old ones. If the
    decomposition fails, all stays as it was.

    Args:
      factor: symmetric positive semi-definite, `[..., b, b]`.
      eigenbasis: orthonormal columns, `[..., b, b]`.
      eigenvalues: their estimates until now, `[..., b]`.
      method: `"qr"` or `"eigh"`.
      precision: of the product M Q.

    Returns:
      The new `eigenbasis` and `eigenvalues`, in the shapes and dtypes of the old, and
      1 if the decomposition failed, else 0, int32 `[..., 1]`.
    """
    run = functools.partial(_refresh, method=method, precision=precision)
    shardings = (
        explicit_sharding(eigenbasis, range(factor.ndim)),
        explicit_sharding(eigenvalues, range(factor.ndim - 1)),
        explicit_sharding(eigenvalues, [*range(factor.ndim - 2), None]),
    )
    if shardings[0] is not None:  # for decompositions JAX has no rules of sharding
        run = jax.sharding.auto_axes(run, out_sharding=shardings)
    return run(factor, eigenbasis, eigenvalues)


def is_orthonormal(matrix: jax.Array) -> jax.Array:
    """Whether the columns of each `[..., b, b]` are, up to round-off, `[...]`.

    Tried on one vector v of random signs: Q^T Q v = v.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], matrix.shape[-1])
    vector = jnp.broadcast_to(jnp.asarray(signs, matrix.dtype), matrix.shape)
    # Sums, because products of matrices may have less precision.
    product = jnp.sum(matrix * vector, axis=-1, keepdims=True)
    residual = jnp.sum(matrix * product, axis=-2) - vector[..., 0, :]
    tolerance = 1e4 * float(jnp.finfo(matrix.dtype).eps)
    return jnp.all(jnp.abs(residual) <= tolerance, axis=-1)


def _refresh(
    factor: jax.Array,
    eigenbasis: jax.Array,
    eigenvalues: jax.Array,
    *,
    method: str,
    precision: Any,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    matrix, basis = _at_least_float32(factor), _at_least_float32(eigenbasis)
    products = jnp.matmul(matrix, basis, precision=precision)
    quotients = jnp.sum(basis * products, axis=-2)
    rank = jnp.argsort(quotients, axis=-1, descending=True)
    if method == "eigh":
        estimates, vectors = (x[..., ::-1] for x in jnp.linalg.eigh(matrix))
        columns = vectors * estimates[..., None, :]
    else:
        estimates = jnp.take_along_axis(quotients, rank, axis=-1)
        columns = _take_columns(products, rank)
    largest = _largest(estimates)
    is_null = estimates <= _null_share(matrix) * largest
    columns = jnp.where(
        is_null[..., None, :],
        _take_columns(basis, rank),
        columns / largest[..., None],
    )
    orthonormal, triangle = jnp.linalg.qr(columns)
    scales = jnp.abs(jnp.diagonal(triangle, axis1=-2, axis2=-1))
    scales = jnp.where(is_null, 0, scales * largest)
    place = jnp.argsort(rank, axis=-1)
    new = _take_columns(orthonormal, place).astype(eigenbasis.dtype)
    scales = jnp.take_along_axis(scales, place, axis=-1).astype(eigenvalues.dtype)
    sound = is_orthonormal(orthonormal)
    return (
        jnp.where(sound[..., None, None], new, eigenbasis),
        jnp.where(sound[..., None], scales, eigenvalues),
        (~sound).astype(jnp.int32)[..., None],
    )


def quality(
    factor: jax.Array, eigenbasis: jax.Array, precision: Any
) -> tuple[jax.Array, jax.Array]:
    """How well conditioned a factor M is, and how well its eigenbasis diagonalizes it.

    Returns:
      Largest over smallest diagonal entry of Q^T M Q, infinite where the smallest is
      round-off, and the norm of its off-diagonal part over that of M, both `[...]`.
    """
    matrix, basis = _at_least_float32(factor), _at_least_float32(eigenbasis)
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    matrix = matrix / _largest(diagonal)[..., None]  # whose squares do not overflow
    rotated = jnp.einsum(
        "...ki,...kl,...lj->...ij", basis, matrix, basis, precision=precision
    )
    quotients = jnp.diagonal(rotated, axis1=-2, axis2=-1)
    low, high = quotients.min(axis=-1), quotients.max(axis=-1)
    is_singular = low <= _null_share(matrix) * high
    condition = jnp.where(is_singular, jnp.inf, high / jnp.where(is_singular, 1, low))
    on_diagonal = jnp.broadcast_to(
        jnp.eye(rotated.shape[-1], dtype=bool), rotated.shape
    )
    norm = _norm(matrix)
    off_diagonal = _norm(jnp.where(on_diagonal, 0, rotated))
    return condition, off_diagonal / jnp.where(norm > 0, norm, 1)


def angles(eigenbasis: jax.Array, other: jax.Array) -> jax.Array:
    """Between the lines along the columns of two eigenbases, radians, `[..., b]`."""
    basis, other = _at_least_float32(eigenbasis), _at_least_float32(other)
    is_opposite = jnp.sum(basis * other, axis=-2, keepdims=True) < 0
    chords = basis - jnp.where(is_opposite, -other, other)
    lengths = jnp.sqrt(jnp.sum(jnp.square(chords), axis=-2))
    return 2 * jnp.arcsin(jnp.minimum(lengths / 2, 1))


def _norm(matrix: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(jnp.square(matrix), axis=(-2, -1)))


def _largest(eigenvalues: jax.Array) -> jax.Array:
    """The largest of each `[..., b]`, or 1 where all are zero, `[..., 1]`."""
    largest = jnp.max(eigenvalues, axis=-1, keepdims=True)
    return jnp.where(largest > 0, largest, 1)


def _null_share(matrix: jax.Array) -> float:
    """The share of the largest eigenvalue under which one is round-off."""
    return 10 * float(jnp.finfo(matrix.dtype).eps)


def _take_columns(matrix: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(matrix, indices[..., None, :], axis=-1)


def _mean(old: jax.Array, new: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    weight = jnp.asarray(weight, new.dtype)
    return (1 - weight) * old + weight * new


def _widest(*dtypes: Any) -> Any:
    return max((jnp.dtype(d) for d in dtypes), key=lambda d: jnp.finfo(d).bits)


def _at_least_float32(array: jax.Array) -> jax.Array:
    return array.astype(_widest(jnp.float32, array.dtype))


def _blocks(array: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """The blocks of `array`, in the dtype of computing with it and `like`."""
    dtype = _widest(jnp.float32, array.dtype, like.dtype)
    return layout.to_blocks(array.astype(dtype))


def _gram(
    blocks: jax.Array, axis: int, grid: Sequence[int], precision: Any
) -> jax.Array:
    """G_(axis) G_(axis)^T for each block, `[grid…, b, b]`."""
    rows = list(range(blocks.ndim))
    columns = [blocks.ndim if d == axis else d for d in rows]
    return jnp.einsum(
        *(blocks, rows, blocks, columns, [*grid, axis, blocks.ndim]),
        precision=precision,
        out_sharding=explicit_sharding(blocks, [*grid, None, None]),
    )


def _multiply(
    array: jax.Array, bases: PerAxis, layout: Layout, precision: Any, *, back: bool
) -> jax.Array:
    """Multiplies each axis of each block by Q^T, or by Q to go `back`."""
    turned = array
    for basis, axis in zip(bases, layout.axes, strict=True):
        if basis is not None:
            blocks = _blocks(turned, basis, layout)
            old = list(range(blocks.ndim))
            new = [blocks.ndim if d == axis else d for d in old]
            entry = [blocks.ndim, axis] if back else [axis, blocks.ndim]
            blocks = jnp.einsum(
                *(blocks, old, basis.astype(blocks.dtype), [*layout.grid, *entry], new),
                precision=precision,
                out_sharding=explicit_sharding(blocks, old),
            )
            turned = layout.from_blocks(blocks, turned)
    return turned.astype(array.dtype)
