"""Shampoo's Kronecker factors and their eigenbases: mathematics on one parameter.

For a block G with axes 1..k, unfolded along axis i into the matrix G_(i), with factor
M_i, eigenbasis Q_i and eigenvalue estimates e_i:

    accumulate     M_i <- (1 - w) M_i + w G_(i) G_(i)^T
    whiten         G x_j (Q_j E_j^-1/2)^T over all j but i, accumulated by KL-SOAP
    project        G' = G x_1 Q_1^T ... x_k Q_k^T       (for a matrix: Q_L^T G Q_R)
    project_back   G = G' x_1 Q_1 ... x_k Q_k           (for a matrix: Q_L G' Q_R^T)
    follow         e_i <- (1 - w) e_i + w diag(G'_(i) G'_(i)^T)
    damp           G' with the numerically null directions of each M_i taken out
    root           G' x_1 E_1^-p ... x_k E_k^-p          (for Shampoo: L^-p G R^-p)
    rank_one       the second moments of G' from their means along each axis
    clip_rms       blocks of G' scaled down to a root mean square
    graft          blocks of G' scaled to the norms of those of another array
    power_step     M_i Q_i, whose columns are nearly multiples of those of Q_i
    orthonormalize Q_i <- those columns, in the order of their sizes, orthonormal
    change_basis   G' x_1 (Q_1^T Q_1^new)^T ...         (into the refreshed eigenbases)

Arrays have the parameter's shape; its `Layout` says which axes form a factor and how
they are cut into blocks. Factors and eigenbases are `[grid…, b, b]`, eigenvalues
`[grid…, b]`, one per axis; None stands for the identity. See "SOAP: Improving and
Stabilizing Shampoo using Adam", https://arxiv.org/abs/2409.11321, Algorithms 3 and 4.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soap_optax._layout import Layout, explicit_sharding

PerAxis = Sequence[jax.Array | None]

# The share of the mean eigenvalue below which KL-SOAP's inverses take one no smaller.
_KL_FLOOR = 1e-3


def whole(matrix: jax.Array) -> jax.Array:
    """`[grid…, b, b]`, on an explicit mesh gathered if its rows are sharded."""
    sharding = explicit_sharding(matrix, [*range(matrix.ndim - 2), None, None])
    return matrix if sharding is None else jax.sharding.reshard(matrix, sharding)


def accumulate(
    factors: PerAxis,
    gradients: Sequence[jax.Array],
    layout: Layout,
    weight: jax.typing.ArrayLike,
    precision: Any,
) -> list[jax.Array | None]:
    """Moves each factor by `weight` towards the Gram matrix of its gradient.

    A gradient that is not finite, or whose sum of squares is not in the dtype of the
    factor, leaves it alone.
    """

    def one(
        factor: jax.Array | None, gradient: jax.Array, axis: int
    ) -> jax.Array | None:
        if factor is None:
            return None
        blocks = _blocks(gradient, factor, layout)
        gram = _gram(blocks, axis, factor, layout.grid, precision)
        mean = _mean(factor.astype(gram.dtype), gram, weight).astype(factor.dtype)
        # The trace of the Gram matrix, which bounds its entries. False for NaN.
        energy = _energy(blocks, layout)
        sound = energy <= float(jnp.finfo(factor.dtype).max)
        return jnp.where(sound[..., None, None], mean, factor)

    return [
        one(*of_axis) for of_axis in zip(factors, gradients, layout.axes, strict=True)
    ]


def whiten(
    gradient: jax.Array,
    eigenbases: PerAxis,
    eigenvalues: PerAxis,
    layout: Layout,
    precision: Any,
) -> list[jax.Array]:
    """For each axis i the gradient with covariance whitened along all others.

    G x_j (Q_j E_j^-1/2)^T / sqrt(b_j) for all j but i that have a factor. Its Gram
    matrix along axis i is what KL-SOAP accumulates: each factor is weighted by the
    inverses of the others, as in Lin et al., https://arxiv.org/abs/2509.03378.
    """
    scales = _whitening(gradient, eigenvalues, layout)
    whitened = []
    for i in range(len(layout.axes)):
        others = [None if j == i else q for j, q in enumerate(eigenbases)]
        projected = project(gradient, others, layout, precision)
        whitened.append(_scaled_but(i, projected, scales, layout))
    return whitened


def whitened_energies(
    coordinates: jax.Array, eigenvalues: PerAxis, layout: Layout
) -> list[jax.Array | None]:
    """The energies along each eigenvector of what `whiten` gives for its axis."""
    scales = _whitening(coordinates, eigenvalues, layout)
    energies: list[jax.Array | None] = []
    for i, (axis, values) in enumerate(zip(layout.axes, eigenvalues, strict=True)):
        blocks = layout.to_blocks(_scaled_but(i, coordinates, scales, layout))
        energies.append(None if values is None else _energy(blocks, layout, axis))
    return energies


def _scaled_but(
    index: int, array: jax.Array, scales: PerAxis, layout: Layout
) -> jax.Array:
    """The array with each axis but one scaled."""
    others = [None if j == index else s for j, s in enumerate(scales)]
    return _scale(array, others, layout)


def _whitening(
    array: jax.Array, eigenvalues: PerAxis, layout: Layout
) -> list[jax.Array | None]:
    """(b_j e_j)^-1/2 for each axis j with a factor, `[grid…, b]`.

    Eigenvalues below `_KL_FLOOR` of their mean count as that, because a gradient in a
    direction that had none would make the other factors forget all before it. Where
    nothing is known, all are the root mean square of the gradient (for k factors: the
    k-th root of the mean square), with which all factors start alike in size.
    """
    count = sum(values is not None for values in eigenvalues)
    if count < 2:
        return [None] * len(eigenvalues)
    array = at_least_float32(array)
    rows = mean_squares(array, layout)[0]
    start = jnp.mean(rows, axis=-1, keepdims=True) ** (1 / count)

    def one(values: jax.Array | None) -> jax.Array | None:
        if values is None:
            return None
        values = values.astype(array.dtype)
        mean = jnp.mean(values, axis=-1, keepdims=True)
        floored = jnp.where(mean > 0, jnp.maximum(values, _KL_FLOOR * mean), start)
        safe = jnp.where(floored > 0, floored, 1)
        return jnp.where(floored > 0, (safe * values.shape[-1]) ** -0.5, 0)

    return [one(values) for values in eigenvalues]


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


def project_and_measure(
    gradient: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> tuple[jax.Array, list[jax.Array | None]]:
    """The coordinates of a gradient, and the energy along each eigenvector.

    The energy is the sum of squares at an index of an axis, `[grid…, b]`. Turning one
    axis leaves those of the others as they are, so each is that of another array: XLA
    reads each in one pass, where it would make an array of the squares of one.
    """
    energies: list[jax.Array | None] = []
    for i, (axis, basis) in enumerate(zip(layout.axes, eigenbases, strict=True)):
        gradient = project(gradient, _alone(basis, i, layout), layout, precision)
        blocks = layout.to_blocks(gradient)
        energies.append(None if basis is None else _energy(blocks, layout, axis))
    return gradient, energies


def project_back(
    array: jax.Array, eigenbases: PerAxis, layout: Layout, precision: Any
) -> jax.Array:
    """Inverse of `project`."""
    return _multiply(array, eigenbases, layout, precision, back=True)


def change_basis(
    arrays: Sequence[jax.Array],
    old: PerAxis,
    new: PerAxis,
    is_new: PerAxis,
    layout: Layout,
    precision: Any,
) -> tuple[list[jax.Array], list[jax.Array | None]]:
    """Coordinates in the eigenbases `new` of what has coordinates `arrays` in `old`.

    Where the new ones are not `is_new`, `[grid…]`, coordinates stay, to the bit.

    Returns:
      The coordinates, and `is_new` without the blocks that would not stay finite: they
      stay as they are, along all axes.
    """
    turned, is_finite = list(arrays), None
    for i, (q, other, take) in enumerate(zip(old, new, is_new, strict=True)):
        if q is None or other is None or take is None:
            continue
        for k, array in enumerate(turned):
            parameter = project_back(array, _alone(q, i, layout), layout, precision)
            moved = project(parameter, _alone(other, i, layout), layout, precision)
            turned[k] = _where_blocks(take, moved, array, layout)
    for before, after in zip(arrays, turned, strict=True):
        is_fine = _is_finite(after, layout) | ~_is_finite(before, layout)
        is_finite = is_fine if is_finite is None else is_finite & is_fine
    if is_finite is None:
        return turned, list(is_new)
    turned = [
        _where_blocks(is_finite, after, before, layout)
        for before, after in zip(arrays, turned, strict=True)
    ]
    return turned, [None if take is None else take & is_finite for take in is_new]


def follow(
    eigenvalues: PerAxis, energies: PerAxis, weight: jax.typing.ArrayLike
) -> list[jax.Array | None]:
    """Moves the eigenvalue estimates by `weight` towards the gradient's energies.

    While the eigenbases stay, they follow the Rayleigh quotients of the factors so.
    """

    def one(eigenvalue: jax.Array | None, energy: jax.Array | None) -> Any:
        if eigenvalue is None or energy is None:
            return None
        mean = _mean(eigenvalue.astype(energy.dtype), energy, weight)
        return jnp.where(jnp.isfinite(mean), mean.astype(eigenvalue.dtype), eigenvalue)

    return [one(*of_axis) for of_axis in zip(eigenvalues, energies, strict=True)]


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
        rcond = 0.01 * float(jnp.finfo(at_least_float32(array).dtype).eps)
    if isinstance(rcond, (int, float)) and rcond == 0:
        return array
    if all(eigenvalue is None for eigenvalue in eigenvalues):
        return array

    def share(eigenvalue: jax.Array | None) -> jax.Array | None:
        if eigenvalue is None:
            return None
        largest = jnp.max(eigenvalue, axis=-1, keepdims=True)
        inverse = jnp.where(eigenvalue > 0, largest / eigenvalue, jnp.inf)
        share = 1 / (1 + (rcond * inverse) ** 2)
        return jnp.where(largest > 0, share, 1)  # nothing is known

    return _scale(array, list(map(share, eigenvalues)), layout)


def root(
    array: jax.Array,
    eigenvalues: PerAxis,
    layout: Layout,
    power: float,
    eps: float,
) -> jax.Array:
    """Multiplies each index of an axis by (e + eps)^-power, or by 0 if e + eps is."""

    def one(eigenvalue: jax.Array | None) -> jax.Array | None:
        if eigenvalue is None:
            return None
        shifted = eigenvalue + eps
        safe = jnp.where(shifted > 0, shifted, 1)
        return jnp.where(shifted > 0, safe**-power, 0)

    return _scale(array, list(map(one, eigenvalues)), layout)


def mean_squares(array: jax.Array, layout: Layout) -> list[jax.Array]:
    """The mean square of each block at each index of each axis, `[grid…, b]`."""
    blocks = layout.to_blocks(array)
    within = [blocks.shape[axis] for axis in layout.axes]
    return [
        # Before they are summed: a mean of finite squares shall be finite.
        _energy(blocks * (size / math.prod(within)) ** 0.5, layout, axis)
        for axis, size in zip(layout.axes, within, strict=True)
    ]


def rank_one(means: Sequence[jax.Array], like: jax.Array, layout: Layout) -> jax.Array:
    """The square root of the second moments of which these are the `mean_squares`.

    If these have rank one, as Adafactor supposes: the product of the means over all
    axes, over the (k-1)th power of the mean of all.
    """
    roots = []
    for i, mean in enumerate(means):
        total = jnp.mean(mean, axis=-1, keepdims=True)
        ratio = mean if i == 0 else mean / jnp.where(total > 0, total, 1)
        roots.append(jnp.sqrt(ratio))
    return _scale(jnp.ones_like(like), roots, layout)


def _scale(array: jax.Array, scales: PerAxis, layout: Layout) -> jax.Array:
    """Multiplies each index of an axis of each block by an entry of `[grid…, b]`."""
    if all(scale is None for scale in scales):
        return array
    blocks = layout.to_blocks(array)
    for scale, axis in zip(scales, layout.axes, strict=True):
        if scale is not None:
            kept = sorted((*layout.grid, axis))
            scale = jnp.moveaxis(scale, -1, kept.index(axis)).astype(blocks.dtype)
            others = [d for d in range(blocks.ndim) if d not in kept]
            blocks = blocks * jnp.expand_dims(scale, others)
    return layout.from_blocks(blocks, array)


def clip_rms(
    array: jax.Array, layout: Layout, limit: jax.typing.ArrayLike
) -> jax.Array:
    """Scales the blocks whose root mean square exceeds `limit` down to it."""
    blocks = layout.to_blocks(at_least_float32(array))
    within = [d for d in range(blocks.ndim) if d not in layout.grid]
    limit = jnp.asarray(limit, blocks.dtype)
    # Squares of this multiple of the limit are far from underflow, and farther still
    # from overflow.
    unit = 2.0**13 * float(jnp.finfo(blocks.dtype).tiny) ** 0.5
    squares = jnp.square(blocks * (unit / limit))
    excess = jnp.sqrt(jnp.mean(squares, within, keepdims=True)) / unit
    clipped = layout.from_blocks(blocks / jnp.maximum(excess, 1), array)
    return clipped.astype(array.dtype)


def graft(array: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """Scales each block to the norm of that of another array."""
    blocks, others = layout.to_blocks(array), layout.to_blocks(like)
    norm, wanted = (jnp.sqrt(_energy(b, layout)) for b in (blocks, others))
    scale = jnp.where(norm > 0, wanted / jnp.where(norm > 0, norm, 1), 0)
    within = [d for d in range(blocks.ndim) if d not in layout.grid]
    return layout.from_blocks(blocks * jnp.expand_dims(scale, within), array)


class PowerStep(NamedTuple):
    """The power step M Q of a factor M and its eigenbasis Q, and its eigenvalues.

    Attributes:
      rows: M Q, transposed, over the largest Rayleigh quotient, `[..., b, b]`; where a
        quotient is round-off, the column of Q.
      quotients: the Rayleigh quotients of the columns of Q, over the largest, 0 where
        they are round-off, `[..., b]`.
      largest: of the quotients, or 1 where all are zero, `[..., 1]`.
      off_diagonal: norm of the off-diagonal part of Q^T M Q over that of M, `[...]`.
    """

    rows: jax.Array
    quotients: jax.Array
    largest: jax.Array
    off_diagonal: jax.Array


def power_step(
    factor: jax.Array,
    eigenbasis: jax.Array,
    precision: Any,
    is_first: jax.typing.ArrayLike = False,
) -> PowerStep:
    """Takes the power step M Q, whose columns are nearly multiples of those of Q.

    Args:
      factor: symmetric positive semi-definite, `[..., b, b]`.
      eigenbasis: orthonormal columns, `[..., b, b]`.
      precision: of the product M Q.
      is_first: whether Q is the identity, and `rows` shall be M, to be decomposed.
    """
    matrix, basis = at_least_float32(factor), at_least_float32(eigenbasis)
    products = jnp.einsum("...ki,...kl->...il", basis, matrix, precision=precision)
    basis = _transposed(basis)
    quotients = jnp.sum(basis * products, axis=-1)
    largest = _largest(quotients)
    quotients, products = quotients / largest, products / largest[..., None]
    is_null = quotients <= _null_share(matrix)
    quotients = jnp.where(is_null, 0, quotients)
    norm = _norm(products)
    residual = _norm(products - quotients[..., None] * basis)
    return PowerStep(
        rows=jnp.where(is_null[..., None] & ~jnp.asarray(is_first), basis, products),
        quotients=quotients,
        largest=largest,
        off_diagonal=residual / jnp.where(norm > 0, norm, 1),
    )


def orthonormalize(
    rows: jax.Array,
    quotients: jax.Array,
    wanted: jax.Array,
    *,
    by_cholesky: bool,
    decomposed: jax.Array | bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Makes rows `[n, ..., b, b]` orthonormal, in the order of descending quotients.

    They come back where they stood: a coordinate keeps its identity, and statistics
    that are kept per coordinate stay valid.

    Args:
      rows: those of a `PowerStep`.
      quotients: its quotients.
      wanted: which of the matrices are, `[...]`; of the others comes anything.
      by_cholesky: whether by Cholesky's method, in place of Householder's, but for
        those of the `n` of which a matrix fails.
      decomposed: whether the rows are the factor M, and its eigenvectors, in the order
        of their eigenvalues, are wanted.

    Returns:
      The orthonormal rows, the size of the part of each that is orthogonal to those
      before it, `[..., b]`, 0 where that is round-off, and which matrices are
      orthonormal, up to round-off, `[...]`.
    """
    order = jnp.argsort(quotients, axis=-1, descending=True)
    operands = (rows, quotients, order)
    if decomposed is False:
        ordered, is_null = _sorted(*operands)
    elif decomposed is True:
        ordered, is_null = _eigenvectors(*operands)
    else:
        ordered, is_null = jax.lax.cond(decomposed, _eigenvectors, _sorted, *operands)
    if by_cholesky:
        ordered, sizes = _cholesky_or_householder(ordered, wanted)
    else:
        ordered, sizes = _householder(ordered)
    place = jnp.argsort(order, axis=-1)
    sizes = jnp.take_along_axis(jnp.where(is_null, 0, sizes), place, axis=-1)
    return _take_rows(ordered, place), sizes, is_orthonormal(ordered)


def _sorted(
    rows: jax.Array, quotients: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Rows in an order, and whether their quotients are 0."""
    return _take_rows(rows, order), jnp.take_along_axis(quotients, order, axis=-1) <= 0


def _eigenvectors(
    matrix: jax.Array, _: jax.Array, order: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Eigenvectors as rows, times their eigenvalues, in descending order.

    Numerically null ones, which would be chosen by round-off, are left to those of the
    identity that will stand in their place.
    """
    values, vectors = (x[..., ::-1] for x in jnp.linalg.eigh(matrix))
    is_null = values <= _null_share(matrix) * values[..., :1]
    columns = jnp.arange(order.shape[-1], dtype=order.dtype)
    columns = jnp.broadcast_to(columns, matrix.shape)
    identity = (order[..., None] == columns).astype(matrix.dtype)
    rows = _transposed(vectors) * values[..., None]
    return jnp.where(is_null[..., None], identity, rows), is_null


def _householder(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Orthonormalizes rows by a QR decomposition; the signs keep them nearest."""
    columns, triangle = jnp.linalg.qr(_transposed(rows))
    sizes = jnp.diagonal(triangle, axis1=-2, axis2=-1)
    signs = jnp.where(sizes < 0, -1, 1).astype(sizes.dtype)
    return _transposed(columns) * signs[..., None], jnp.abs(sizes)


def _cholesky_or_householder(
    rows: jax.Array, wanted: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`_cholesky` of `[n, ...]` and, for those where it fails, `_householder`."""
    found = _cholesky(rows)
    failed = wanted & ~is_orthonormal(found[0])

    def one(of_matrix: Any) -> tuple[jax.Array, jax.Array]:
        failed, rows, *found = of_matrix
        return jax.lax.cond(jnp.any(failed), _householder, lambda _: tuple(found), rows)

    def fall_back(found: Any) -> Any:
        return jax.lax.map(one, (failed, rows, *found))

    return jax.lax.cond(jnp.any(failed), fall_back, lambda found: found, found)


def _cholesky(rows: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`_householder`, nearly always, from products of matrices: Cholesky-QR, repeated.

    With the factorization X X^T = L L^T the rows of L^-1 X are orthonormal, up to
    round-off times the squared condition number of X. While that is large, a multiple
    of the identity is added to X X^T, so that it has a factorization: each such pass
    divides the condition number by some hundreds. The pass after which X is
    orthonormal up to round-off is the last. Where none is, the result is not
    orthonormal, or not finite. See Fukaya et al., "Shifted Cholesky QR for computing
    the QR factorization of ill-conditioned matrices", arXiv 1809.11085.
    """
    eps = float(jnp.finfo(rows.dtype).eps)
    identity = jnp.broadcast_to(jnp.eye(rows.shape[-1], dtype=rows.dtype), rows.shape)

    def is_far(carry: Any) -> jax.Array:
        _, _, distance, passes = carry
        return (passes < 6) & jnp.any(distance > 0.5)

    def improve(carry: Any) -> Any:
        rows, sizes, _, passes = carry
        gram = jnp.matmul(rows, _transposed(rows), precision="highest")
        distance = _norm(gram - identity)
        shift = jnp.where(distance > 0.5, 4 * eps * _norm(gram), 0)
        triangle = jnp.linalg.cholesky(gram + shift[..., None, None] * identity)
        rows = jax.lax.linalg.triangular_solve(
            triangle, rows, left_side=True, lower=True
        )
        sizes = sizes * jnp.diagonal(triangle, axis1=-2, axis2=-1)
        return rows, sizes, distance, passes + 1

    sizes = jnp.sqrt(jnp.sum(jnp.square(rows), axis=-1))
    rows = rows / jnp.where(sizes > 0, sizes, 1)[..., None]
    start = (rows, sizes, jnp.full_like(sizes[..., 0], jnp.inf), 0)
    rows, sizes, *_ = jax.lax.while_loop(is_far, improve, start)
    return rows, sizes


def is_orthonormal(matrix: jax.Array) -> jax.Array:
    """Whether the columns of each `[..., b, b]` are, up to round-off, `[...]`.

    Tried on one vector v of random signs: Q^T Q v = v.
    """
    signs = np.random.default_rng(0).choice([-1.0, 1.0], matrix.shape[-1])
    vector = jnp.broadcast_to(jnp.asarray(signs, matrix.dtype), matrix.shape[:-1])
    product = jnp.einsum("...ij,...j->...i", matrix, vector, precision="highest")
    again = jnp.einsum("...ij,...i->...j", matrix, product, precision="highest")
    residual = again - vector
    tolerance = 1e4 * float(jnp.finfo(matrix.dtype).eps)
    return jnp.all(jnp.abs(residual) <= tolerance, axis=-1)


def quality(
    factor: jax.Array, eigenbasis: jax.Array, precision: Any
) -> tuple[jax.Array, jax.Array]:
    """How well conditioned a factor M is, and how well its eigenbasis diagonalizes it.

    Returns:
      Largest over smallest diagonal entry of Q^T M Q, infinite where the smallest is
      round-off, and the norm of its off-diagonal part over that of M, both `[...]`.
    """
    step = power_step(factor, eigenbasis, precision)
    low = step.quotients.min(axis=-1)
    condition = jnp.where(low > 0, 1 / jnp.where(low > 0, low, 1), jnp.inf)
    return condition, step.off_diagonal


def angles(eigenbasis: jax.Array, other: jax.Array) -> jax.Array:
    """Between the lines along the columns of two eigenbases, radians, `[..., b]`."""
    basis, other = at_least_float32(eigenbasis), at_least_float32(other)
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


def _take_rows(matrix: jax.Array, indices: jax.Array) -> jax.Array:
    return jnp.take_along_axis(matrix, indices[..., None], axis=-2)


def _transposed(matrix: jax.Array) -> jax.Array:
    return jnp.swapaxes(matrix, -2, -1)


def _is_finite(array: jax.Array, layout: Layout) -> jax.Array:
    """Whether the sum of each block is finite, `[grid…]`."""
    blocks = layout.to_blocks(array)
    within = [d for d in range(blocks.ndim) if d not in layout.grid]
    return jnp.isfinite(jnp.sum(blocks, within))


def _alone(matrix: jax.Array | None, index: int, layout: Layout) -> PerAxis:
    """One axis with a matrix, the others with the identity."""
    return [matrix if i == index else None for i in range(len(layout.axes))]


def _where_blocks(
    mask: jax.Array, array: jax.Array, other: jax.Array, layout: Layout
) -> jax.Array:
    """Blocks of `array` where the mask `[grid…]` is true, else of `other`."""
    blocks = layout.to_blocks(array)
    within = [d for d in range(blocks.ndim) if d not in layout.grid]
    chosen = jnp.where(jnp.expand_dims(mask, within), blocks, layout.to_blocks(other))
    return layout.from_blocks(chosen, array)


def _mean(old: jax.Array, new: jax.Array, weight: jax.typing.ArrayLike) -> jax.Array:
    weight = jnp.asarray(weight, new.dtype)
    return (1 - weight) * old + weight * new


def _widest(*dtypes: Any) -> Any:
    return max((jnp.dtype(d) for d in dtypes), key=lambda d: jnp.finfo(d).bits)


def at_least_float32(array: jax.Array) -> jax.Array:
    return array.astype(_widest(jnp.float32, array.dtype))


def _blocks(array: jax.Array, like: jax.Array, layout: Layout) -> jax.Array:
    """The blocks of `array`, in the dtype of computing with it and `like`."""
    dtype = _widest(jnp.float32, array.dtype, like.dtype)
    return layout.to_blocks(array.astype(dtype))


def _energy(blocks: jax.Array, layout: Layout, axis: int | None = None) -> jax.Array:
    """The sum of the squares of each block, or of each index of an axis of it.

    `[grid…]` or `[grid…, b]`. Written as a product of matrices, which XLA on CPU
    computes in one pass, without an array of squares.
    """
    every = list(range(blocks.ndim))
    kept = [*layout.grid] if axis is None else [*layout.grid, axis]
    return jnp.einsum(
        *(blocks, every, blocks, every, kept),
        precision=jax.lax.Precision.HIGHEST,
        out_sharding=explicit_sharding(
            blocks, [*layout.grid] if axis is None else [*layout.grid, None]
        ),
    )


def _gram(
    blocks: jax.Array, axis: int, like: jax.Array, grid: Sequence[int], precision: Any
) -> jax.Array:
    """G_(axis) G_(axis)^T for each block, `[grid…, b, b]`, sharded like the factor."""
    rows = list(range(blocks.ndim))
    columns = [blocks.ndim if d == axis else d for d in rows]
    return jnp.einsum(
        *(blocks, rows, blocks, columns, [*grid, axis, blocks.ndim]),
        precision=precision,
        out_sharding=explicit_sharding(like, range(like.ndim)),
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
            matrix = whole(basis).astype(blocks.dtype)
            blocks = jnp.einsum(
                *(blocks, old, matrix, [*layout.grid, *entry], new),
                precision=precision,
                out_sharding=explicit_sharding(blocks, old),
            )
            turned = layout.from_blocks(blocks, turned)
    return turned.astype(array.dtype)
